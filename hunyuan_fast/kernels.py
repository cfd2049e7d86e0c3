"""The door to the kernel rooms: ``hunyuan_fast.kernels.<op>``.

A checkout keeps the rooms at the top level (``kernels/<op>/``), a wheel carries them inside the
package (``hunyuan_fast/kernels/<op>/``); this is their one name in both. The folder has no
``__init__.py``: as a package of its own it would shadow the ``kernels`` distribution of PyPI.
"""

from pathlib import Path

_installed = Path(__file__).with_suffix("")
_checkout = Path(__file__).parents[1] / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _checkout)]
