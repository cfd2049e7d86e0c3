"""How much memory a call takes: the bytes of live tensors, and of what is kept for backward.

``python -m tests.models.vae_memory`` prints the tables of docs/vae.md on training.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.posterior import DiagonalGaussian

# Batch, frames, height and width of the clips of the tables.
CLIP = (1, 17, 256, 256)
REST = "rest"
_PART = re.compile(r"\w+\.(?:(mid_block|(?:up|down)_blocks\.\d+)|conv_)")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made in the block: `now`, and at most at a time `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given or key in self._alive:
                continue
            self._alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def kept_bytes(model: nn.Module, run: Callable[[], object]) -> Counter[str]:
    """Bytes that a call keeps for backward beyond the parameters, by the part that keeps them.

    Parts are the levels and the middle of both halves. What is kept between two parts, as the input
    of a checkpointed block is, counts for the one that follows; what several keep, for the first.
    Works on tensors without memory.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, Tensor] = {}
    kept: Counter[str] = Counter()
    inside = [""]

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = t  # so that no address is used twice
            kept[inside[-1]] += storage.nbytes()
        return t

    def enter(part: str) -> None:
        kept[part] += kept.pop("", 0)
        inside.append(part)

    handles = []
    for name, module in model.named_modules():
        part = _PART.match(name)
        if part:
            label = part[1] or REST
            handles.append(module.register_forward_pre_hook(lambda *_, label=label: enter(label)))
            handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    with saved_tensors_hooks(pack, lambda t: t):
        result = run()
    enter(REST)
    for handle in handles:
        handle.remove()
    del result
    return kept


def meta_clip(vae: HunyuanVideoVAE, half: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What a half takes for a clip of the tables, without memory."""
    config, (batch, frames, *area) = vae.config, CLIP
    if half == "encode":
        return torch.empty((batch, config.in_channels, frames, *area), dtype=dtype, device="meta")
    ratio = config.spatial_compression_ratio
    length = (frames - 1) // config.temporal_compression_ratio + 1
    size = batch, config.latent_channels, length, *(n // ratio for n in area)
    return torch.empty(size, dtype=dtype, device="meta")


def call(model: Any, half: str, x: Tensor) -> Tensor:
    """The pixels, or the mean of the latents, of our class or of diffusers'."""
    found = getattr(model, half)(x)
    if half == "decode":
        return found if isinstance(found, Tensor) else found.sample
    mean: Tensor = (found if isinstance(found, DiagonalGaussian) else found.latent_dist).mean
    return mean


def peak_of_training(model: Any, half: str, x: Tensor) -> int:
    """The most bytes alive at a time in forward and backward, gradients of parameters included."""
    model.zero_grad()
    gc.collect()
    with LiveBytes() as live:
        call(model, half, x).sum().backward()
    model.zero_grad()
    return live.peak


def main() -> None:
    """Print what the released architecture needs per pixel in bf16, and what diffusers needs."""
    from tests.models.vae_cases import diffusers_twin

    with torch.device("meta"):
        vae = HunyuanVideoVAE().bfloat16()
    twin, pixels = diffusers_twin(vae), prod(CLIP)
    for half in ("decode", "encode"):
        x = meta_clip(vae, half)
        for name, model in (("ours", vae), ("diffusers", twin)):
            for checkpointing in (False, True):
                if name == "ours":
                    vae.enable_gradient_checkpointing(checkpointing)
                elif checkpointing:
                    twin.enable_gradient_checkpointing()
                else:
                    twin.disable_gradient_checkpointing()
                kept = kept_bytes(model, lambda model=model, half=half, x=x: call(model, half, x))
                print(
                    f"{half} {name}, checkpointing {checkpointing}: "
                    f"kept {kept.total() / pixels:.0f}, "
                    f"peak {peak_of_training(model, half, x) / pixels:.0f}"
                )
                for part, size in sorted(kept.items()):
                    print(f"    {part}: {size / pixels:.1f}")


if __name__ == "__main__":
    main()
