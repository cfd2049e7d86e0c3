"""A CUDA device in name only, so that code which needs one runs, slowly, where there is none.

Tensors "on the device" are tensors of the CPU whose storage bears a mark (``device``, ``tensors``);
``torch.cuda`` is stood in for (``runtime``), Triton's kernels are interpreted, Hopper's run on the
emulated machine, and torch's own libraries are stand-ins (``kernels``). It shows mistakes of tests
and benchmarks: a missing import, a wrong argument, a tensor or a generator on the wrong device, a
wait for the device where there must be none. It verifies no kernel. The way in is ``pytest
--rehearse-gpu``, and for benchmarks ``python -m tests.kit.rehearsal``.
"""

from tests.kit.rehearsal.plugin import Plugin, begin

__all__ = ["Plugin", "begin"]
