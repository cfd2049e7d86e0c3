"""The released architecture against diffusers' class, whole clips, equal random weights, in fp32.

``python -m tests.models.vae_exactness`` prints the table of docs/vae.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_fast.models import HunyuanVideoVAE
from tests.models.vae_cases import clip, diffusers_twin, released_vae

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """What goes in: clips of so many frames, and the size of their latents."""

    frames: int
    height: int
    width: int
    batch: int = 1


@dataclass(frozen=True)
class Exactness:
    """Largest differences of a pass.

    apart: between diffusers and us, in fp32; ours, theirs: from diffusers in float64, where asked
    for; scale: the smallest standard deviation of what a pass returns.
    """

    apart: float
    scale: float
    ours: float | None = None
    theirs: float | None = None


class Pair:
    """Our class and that of diffusers, which share the memory of their weights."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.vae = released_vae(generator)
        self.twin = diffusers_twin(self.vae).requires_grad_(False)

    def encode(self, size: Size, *, wide: bool = False) -> Exactness:
        """Mean and logarithm of the variance of a clip of noise; with `wide` in float64 too."""
        shape = size.batch, 3, size.frames, 8 * size.height, 8 * size.width
        return self._compare("encode", clip(self.generator, *shape), wide)

    def decode(self, size: Size, *, wide: bool = False) -> Exactness:
        """The pixels of normal latents; with `wide` in float64 too."""
        shape = size.batch, 16, (size.frames - 1) // 4 + 1, size.height, size.width
        return self._compare("decode", torch.randn(shape, generator=self.generator), wide)

    @torch.no_grad()
    def _compare(self, function: str, x: Tensor, wide: bool) -> Exactness:
        actual, expected = self.run(self.vae, function, x), self.run(self.twin, function, x)
        apart, scale = _largest(actual, expected), min(float(t.std()) for t in expected)
        if not wide:
            return Exactness(apart, scale)
        with in_float64(self.twin):
            exact = self.run(self.twin, function, x.double())
        assert all(t.dtype == torch.float64 for t in exact)
        return Exactness(apart, scale, _largest(actual, exact), _largest(expected, exact))

    @staticmethod
    def run(model: Any, function: str, x: Tensor) -> Results:
        """The tensors that encoding or decoding gives, of either class."""
        if function == "encode":
            found = model.encode(x)
            posterior = found if isinstance(model, HunyuanVideoVAE) else found.latent_dist
            return posterior.mean, posterior.logvar
        found = model.decode(x)
        return (found if isinstance(found, Tensor) else found.sample,)


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Let every layer compute in float64, with weights that are wide only while it does."""

    def widen(layer: nn.Module, _: Any) -> None:
        narrow = {name: p.data for name, p in layer.named_parameters(recurse=False)}
        kept[layer] = narrow
        layer.double()

    def narrow(layer: nn.Module, *_: Any) -> None:
        for name, data in kept.pop(layer).items():
            layer.get_parameter(name).data = data

    kept: dict[nn.Module, dict[str, Tensor]] = {}
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_pre_hook(widen) for layer in layers]
    handles += [layer.register_forward_hook(narrow) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _largest(actual: Results, expected: Results) -> float:
    """The largest difference, NaN if there is one."""
    pairs = zip(actual, expected, strict=True)
    return max((float((a - e).abs().max()) for a, e in pairs), key=lambda d: (d != d, d))


SIZES = (
    *(Size(1, 5, 3, 2), Size(5, 3, 7, 2), Size(9, 5, 3, 2), Size(17, 3, 7, 2), Size(29, 5, 3, 2)),
    *(Size(5, 13, 11), Size(17, 7, 9)),
)


def main() -> None:
    """Print a row for each size and pass. Float64 takes most of the time, and up to 6 GiB."""
    pair = Pair(torch.Generator().manual_seed(0))
    print("| frames | latents | batch | pass | apart | ours to float64 | diffusers to float64 |")
    for size in SIZES:
        for name, measure in (("encode", pair.encode), ("decode", pair.decode)):
            found = measure(size, wide=True)
            place = f"{size.frames} | {size.height} x {size.width} | {size.batch} | {name}"
            figures = f"{found.apart:.1e} | {found.ours:.1e} | {found.theirs:.1e}"
            print(f"| {place} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
