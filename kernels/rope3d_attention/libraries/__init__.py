"""Attention by libraries, a module each, behind the contract of the room.

Each has the four names of an implementation and is asked for as ``library_impl.<module>``. One that
``VERIFIED_ON`` does not name an architecture in answers there only when a ranking says so, or by
name. ``torch.nn.attention.varlen`` has no module: behind it stands the kernel of ``flash``.
"""
