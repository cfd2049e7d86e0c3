"""The causal convolution, plain and after upsampling, against the words of their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hunyuan_fast.kernels.causal_conv3d import library_impl as convolution
from hunyuan_fast.modules.causal_conv3d import CausalConv3d
from hunyuan_fast.modules.resample import CausalDownsample, CausalUpsample
from hunyuan_fast.ops import causal_conv3d, upsample_causal_conv3d


def by_definition(x, weight, bias, stride=(1, 1, 1)):
    """Every tap reads the nearest pixel inside the frame, and no frame before the first."""
    size = weight.shape[-1]
    offsets = torch.arange(size)
    side = size // 2
    out = 0
    times, rows, columns = (torch.arange(0, n, s) for n, s in zip(x.shape[2:], stride, strict=True))
    for dt in offsets:
        for dh in offsets:
            for dw in offsets:
                t = (times + dt - size + 1).clamp(min=0)
                h = (rows + dh - side).clamp(0, x.shape[3] - 1)
                w = (columns + dw - side).clamp(0, x.shape[4] - 1)
                seen = x[:, :, t][:, :, :, h][..., w]
                out = out + torch.einsum("oc,bcthw->bothw", weight[:, :, dt, dh, dw], seen)
    return out + bias.view(1, -1, 1, 1, 1)


def repeat_pixels(x, factor):
    """Every frame but the first `t` times, every pixel `h` times down and `w` times across."""
    t, h, w = factor
    x = x.repeat_interleave(h, 3).repeat_interleave(w, 4)
    return torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(t, 2)], 2)


def inputs(generator, *, batch=2, frames=4, kernel=3, dtype=torch.float64):
    x = torch.randn(batch, 3, frames, 5, 6, generator=generator, dtype=dtype)
    weight = torch.randn(4, 3, kernel, kernel, kernel, generator=generator, dtype=dtype)
    return x, weight, torch.randn(4, generator=generator, dtype=dtype)


@pytest.fixture(params=["library", "frames"])
def form(request, monkeypatch):
    """Both forms of a 3D convolution: torch's, and one 2D convolution for each frame."""
    limit = 0 if request.param == "library" else 10**9
    monkeypatch.setattr(convolution, "_SLOW_CONV3D_LIMIT", limit)
    return request.param


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 2), (2, 5)])
def test_causal_conv3d(generator, poison, form, kernel, stride, batch, frames):
    x, weight, bias = inputs(generator, batch=batch, frames=frames, kernel=kernel)
    actual = causal_conv3d(x, weight, bias, stride=stride)
    torch.testing.assert_close(actual, by_definition(x, weight, bias, stride))


def test_the_future_has_no_influence(generator):
    x, weight, bias = inputs(generator, frames=6)
    changed = x.clone()
    changed[:, :, 4:] = torch.nan
    expected = causal_conv3d(x, weight, bias)[:, :, :4]
    assert torch.equal(causal_conv3d(changed, weight, bias)[:, :, :4], expected)


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 2), (2, 5)])
def test_upsampling_equals_repeating_and_convolving(generator, poison, form, factor, batch, frames):
    x, weight, bias = inputs(generator, batch=batch, frames=frames)
    actual = upsample_causal_conv3d(x, weight, bias, factor=factor)
    expected = by_definition(repeat_pixels(x, factor), weight, bias)
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_upsampling_is_as_good_as_the_plain_one(generator, dtype):
    exact = inputs(generator, frames=5)
    half = [x.to(dtype) for x in exact]
    rounded = [x.double() for x in half]
    truth = by_definition(repeat_pixels(rounded[0], (2, 2, 2)), *rounded[1:])
    plain = causal_conv3d(repeat_pixels(half[0], (2, 2, 2)), *half[1:])
    actual = upsample_causal_conv3d(*half, factor=(2, 2, 2))

    def error(y):
        return (y.double() - truth).square().mean().sqrt()

    # the summed taps cost one rounding more
    assert error(actual) < 2 * error(plain)


@pytest.mark.parametrize(("factor", "share"), [((2, 2, 2), 8 / 27), ((1, 2, 2), 4 / 9)])
def test_upsampling_saves_multiplications(generator, factor, share):
    x, weight, bias = inputs(generator, frames=1001)

    def multiplications(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    repeated, ones = repeat_pixels(x, factor), (1, 1, 1)
    full = multiplications(lambda: convolution.forward(repeated, weight, bias, ones, None, None))
    saved = multiplications(lambda: convolution.forward(x, weight, bias, ones, None, factor))
    assert saved / full == pytest.approx(share, rel=2e-3)


@pytest.mark.parametrize("frames", [1, 3])
def test_gradients(generator, form, frames):
    x, weight, bias = (v.requires_grad_() for v in inputs(generator, batch=1, frames=frames))
    x = x[..., :3, :2].detach().requires_grad_()
    strided = lambda *v: causal_conv3d(*v, stride=(2, 2, 2))  # noqa: E731
    upsampled = lambda *v: upsample_causal_conv3d(*v, factor=(2, 2, 2))  # noqa: E731
    for run in (causal_conv3d, strided, upsampled):
        assert torch.autograd.gradcheck(run, (x, weight, bias), fast_mode=True)


def test_modules_hold_the_parameters(generator):
    x = torch.randn(1, 4, 3, 6, 4, generator=generator)
    conv = CausalConv3d(4, 6, stride=(1, 2, 2))
    expected = by_definition(x, conv.conv.weight, conv.conv.bias, (1, 2, 2))
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)
    assert CausalDownsample(4, (2, 2, 2))(x).shape == (1, 4, 2, 3, 2)
    assert CausalUpsample(4, (2, 2, 2))(x).shape == (1, 4, 5, 12, 8)
    assert sorted(CausalUpsample(4, (2, 2, 2)).state_dict()) == [
        "conv.conv.bias",
        "conv.conv.weight",
    ]


def test_small_and_large_maps_agree(generator):
    """torch changes its kernel at a size of its own; what it computes must not change."""
    x = torch.randn(1, 16, 12, 40, 6, generator=generator)
    weight, bias = torch.randn(8, 16, 3, 3, 3, generator=generator), torch.zeros(8)
    few = causal_conv3d(x[:, :, :, :30], weight, bias)[:, :, :, :29]
    many = causal_conv3d(x, weight, bias)[:, :, :, :29]
    torch.testing.assert_close(few, many, atol=2e-4, rtol=1e-5)
    assert F.cosine_similarity(few.flatten(), many.flatten(), dim=0) > 0.999999
