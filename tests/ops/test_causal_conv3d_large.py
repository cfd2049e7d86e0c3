"""Large maps, the size of a mistake of cuDNN's and beyond 2^31 values, at some of their places.

A second map in fp32 would not fit beside them. The places are drawn, the ends of the map are among
them, and each is summed up on its own, in float64, from the values that it is made of.
"""

from dataclasses import dataclass
from math import prod

import pytest
import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations, use
from hunyuan_fast.ops import causal_conv3d, upsample_causal_conv3d
from tests.kit import gpu
from tests.ops.causal_conv3d_cases import ON_CPU, ONES, ROOM, Triple

# Wrong values are as large as right ones, which spread by about one. How exact they are, other
# tests ask; here a sum of taps may have been rounded, and the result.
TOLERANCE = {"rtol": 2**-6, "atol": 0.04}
PLACES = 512


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution: (T, H, W) of its map, and what it makes of it."""

    size: Triple
    channels: int
    out_channels: int
    kernel: Triple = (3, 3, 3)
    stride: Triple = ONES
    factor: Triple = ONES

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        options = {"generator": generator, "device": generator.device, "dtype": dtype}
        x = torch.empty(
            (1, self.channels, *self.size),
            device=generator.device,
            dtype=dtype,
            memory_format=torch.channels_last_3d,
        )
        for frame in x.unbind(2):  # the random numbers of a whole map would not fit beside it
            frame.copy_(torch.randn(frame.shape, **options))
        weight = torch.randn(self.out_channels, self.channels, *self.kernel, **options)
        weight *= prod(weight.shape[1:]) ** -0.5
        return x, weight, torch.randn(self.out_channels, **options)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.factor == ONES:
            return causal_conv3d(x, weight, bias, stride=self.stride)
        return upsample_causal_conv3d(x, weight, bias, factor=self.factor)

    def at(self, places: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What the result holds at places (N, 3), by its definition: (N, O) in float64."""
        indices = []
        grown = [1 + (self.size[0] - 1) * self.factor[0]]
        grown += [n * f for n, f in zip(self.size[1:], self.factor[1:], strict=True)]
        for axis, (taps, step, factor) in enumerate(
            zip(self.kernel, self.stride, self.factor, strict=True)
        ):
            before = taps - 1 if axis == 0 else taps // 2
            seen = places[:, axis, None] * step + torch.arange(taps, device=x.device) - before
            seen = seen.clamp(0, grown[axis] - 1)
            # the first frame stands once, every other one as often as the factor says
            indices.append((seen + (factor - 1 if axis == 0 else 0)) // factor)
        t, h, w = indices
        field = x[0].movedim(0, -1)[t[:, :, None, None], h[:, None, :, None], w[:, None, None, :]]
        sums = torch.einsum("nijkc,ocijk->no", field.double(), weight.double())
        return sums + bias.double()


def draw_places(y: Tensor, generator: torch.Generator) -> Tensor:
    """Places (N, 3) of y: its corners, and anywhere."""
    ends = torch.tensor([n - 1 for n in y.shape[2:]])
    corners = torch.tensor([[i >> axis & 1 for axis in range(3)] for i in range(8)]) * ends
    drawn = [torch.randint(n, (PLACES,), generator=generator) for n in y.shape[2:]]
    return torch.cat((corners, torch.stack(drawn, 1))).to(y.device)


def assert_right_at_places(name: str, layer: Layer, device: str, dtype: torch.dtype) -> None:
    x, weight, bias = layer.draw(torch.Generator(device).manual_seed(0), dtype)
    with use(name, ROOM), torch.no_grad():
        y = layer.apply(x, weight, bias)
    places = draw_places(y, torch.Generator().manual_seed(0))
    t, h, w = places.unbind(1)
    got = y[0].movedim(0, -1)[t, h, w].double()
    torch.testing.assert_close(got, layer.at(places, x, weight, bias), **TOLERANCE)


SMALL = {
    "plain": Layer(size=(3, 4, 5), channels=5, out_channels=3),
    "in space": Layer(size=(2, 4, 5), channels=3, out_channels=4, kernel=(1, 3, 3)),
    "down": Layer(size=(5, 4, 7), channels=3, out_channels=4, stride=(2, 2, 2)),
    "up": Layer(size=(3, 3, 2), channels=3, out_channels=4, factor=(2, 2, 2)),
    "up in space": Layer(size=(3, 3, 2), channels=3, out_channels=4, factor=(1, 2, 2)),
    "pointwise": Layer(size=(2, 3, 4), channels=6, out_channels=4, kernel=ONES),
}
# As the decoder and the encoder meet them at 129 frames of 720 x 1280, whole.
LARGE = {
    "reported": Layer(size=(124, 1280, 720), channels=16, out_channels=16, kernel=(1, 3, 3)),
    "reported, causal": Layer(size=(124, 1280, 720), channels=16, out_channels=16),
    "finest level": Layer(size=(129, 720, 1280), channels=128, out_channels=128),
    "up": Layer(size=(65, 360, 640), channels=256, out_channels=256, factor=(2, 2, 2)),
    "up in space": Layer(size=(33, 360, 640), channels=512, out_channels=512, factor=(1, 2, 2)),
    "down in space": Layer(size=(129, 720, 1280), channels=128, out_channels=128, stride=(1, 2, 2)),
    "down": Layer(size=(129, 360, 640), channels=256, out_channels=256, stride=(2, 2, 2)),
    "shortcut": Layer(size=(97, 720, 1280), channels=256, out_channels=128, kernel=ONES),
}


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("name", ON_CPU)
def test_places_of_small_maps(name, case):
    assert_right_at_places(name, SMALL[case], "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.whole_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("name", ["library_impl", "triton_impl"])
def test_places_of_large_maps(name, case, dtype):
    torch.cuda.empty_cache()  # what tests before this one have left is free
    layer = LARGE[case] if not gpu.rehearsed else SMALL["plain"]
    if name not in implementations(ROOM):
        pytest.skip(f"{name} cannot be loaded")
    if dtype == torch.float16 and case not in ("reported", "finest level"):
        pytest.skip("one way through the kernels per size of a value is enough")
    free, _ = torch.cuda.mem_get_info()
    # in and out, and for the library's kernels a padded copy, with what cuDNN may want
    maps = 2 * prod(layer.size) * layer.channels * (2 if name == "library_impl" else 1)
    result = 2 * prod(layer.size) * prod(layer.factor) * layer.out_channels
    if maps + result > 0.9 * free:
        pytest.skip(f"needs {(maps + result) / 0.9 / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    assert_right_at_places(name, layer, "cuda", dtype)
