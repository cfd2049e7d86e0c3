"""One model over many processes: who holds what, and how it gets to the others.

Everything stands on ``torch.distributed``: processes are started by ``torchrun``, groups come from
a ``DeviceMesh``, messages go through NCCL between GPUs and gloo between CPUs. A group of ``None``
is a group of one: nothing is sent.
"""
