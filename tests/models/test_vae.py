"""The VAE against diffusers' class with the same weights, in fp32, and against itself."""

import pytest
import torch

from hunyuan_fast.dispatch import implementations
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae.posterior import DiagonalGaussian
from tests.models.vae_cases import TINY, clip, diffusers_twin, tiny_vae
from tests.models.vae_memory import LiveBytes

SIZES = [(1, 1, 40, 24), (2, 5, 24, 40), (1, 9, 16, 8), (1, 17, 24, 24)]


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"layers_per_block": 2}])
@pytest.mark.parametrize(("batch", "frames", "height", "width"), SIZES)
def test_encode_and_decode_equal_diffusers(
    generator, poison, changes, batch, frames, height, width
):
    vae = tiny_vae(generator, **changes)
    twin = diffusers_twin(vae)
    video = clip(generator, batch, 3, frames, height, width)
    with torch.no_grad():
        posterior, expected = vae.encode(video), twin.encode(video).latent_dist
        close(posterior.mean, expected.mean)
        close(posterior.logvar, expected.logvar)
        shape = (batch, 4, (frames - 1) // 4 + 1, height // 8, width // 8)
        assert posterior.mean.shape == posterior.logvar.shape == shape

        z = torch.randn(shape, generator=generator)
        decoded = vae.decode(z)
        close(decoded, twin.decode(z).sample)
        assert decoded.shape == video.shape


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_add_attention": False},
        {"block_out_channels": (4, 8, 12), "spatial_compression_ratio": 4},
        {"in_channels": 2, "out_channels": 5, "spatial_compression_ratio": 4},
    ],
)
def test_other_architectures_equal_diffusers(generator, changes):
    vae = tiny_vae(generator, **changes)
    twin = diffusers_twin(vae)
    video = clip(generator, 1, vae.config.in_channels, 5, 16, 24)
    with torch.no_grad():
        z = vae.encode(video).mode()
        close(z, twin.encode(video).latent_dist.mode())
        close(vae.decode(z), twin.decode(z).sample)


def test_gradients_equal_diffusers(generator):
    vae = tiny_vae(generator)
    twin = diffusers_twin(vae)
    video = clip(generator, 2, 3, 9, 16, 24)
    weight = torch.randn(video.shape, generator=generator)
    inputs = [video.clone().requires_grad_() for _ in range(2)]
    (vae.decode(vae.encode(inputs[0]).mode()) * weight).sum().backward()
    (twin.decode(twin.encode(inputs[1]).latent_dist.mode()).sample * weight).sum().backward()

    def same(name, actual, expected):
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-4, f"gradient of {name} is off by {error:.1e}"

    same("video", inputs[0].grad, inputs[1].grad)
    expected = dict(twin.named_parameters())
    for name, parameter in vae.named_parameters():
        # a bias of keys shifts all scores of a query alike: its gradient is rounding, nothing else
        if not name.endswith("to_k.bias"):
            same(name, parameter.grad, expected[name].grad)


def test_a_batch_equals_its_clips(generator):
    vae = tiny_vae(generator)
    video = clip(generator, 2, 3, 5, 24, 24)
    with torch.no_grad():
        whole = vae.encode(video).mode()
        close(whole, torch.cat([vae.encode(one).mode() for one in video.split(1)]), 1e-5)
        close(vae.decode(whole), torch.cat([vae.decode(one) for one in whole.split(1)]), 1e-5)


@pytest.mark.skipif(
    "cpu_impl" not in implementations("causal_conv3d"), reason="the native module is not built"
)
def test_no_more_maps_at_a_time_than_a_block_needs(generator):
    """Its input, what is between its convolutions, and its result: neither a normed map nor the
    input of the level that it stands in."""
    vae = tiny_vae(generator, block_out_channels=(8, 16, 16, 16)).requires_grad_(False)
    video, z = clip(generator, 1, 3, 9, 64, 64), torch.randn(1, 4, 3, 8, 8, generator=generator)
    channel = 9 * 64 * 64 * 4
    for call, channels in ((lambda: vae.encode(video), 8 + 8 + 8), (lambda: vae.decode(z), 32)):
        with torch.no_grad(), LiveBytes() as used:
            call()
        assert (channels - 1) * channel < used.peak < (channels + 4) * channel


def test_memory_format_of_the_input_changes_nothing(generator):
    vae = tiny_vae(generator)
    video = clip(generator, 1, 3, 5, 16, 16)
    strided = torch.stack((video, video), dim=-1)[..., 0]
    channels_last = video.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        expected = vae.encode(video).mean
        assert torch.equal(vae.encode(strided).mean, expected)
        assert torch.equal(vae.encode(channels_last).mean, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(generator, dtype, autocast):
    vae = tiny_vae(generator)
    video = clip(generator, 1, 3, 5, 24, 16)
    with torch.no_grad():
        mean = vae.encode(video).mode()
        decoded = vae.decode(mean)
        half = vae if autocast else vae.to(dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            half_mean, half_decoded = half.encode(video).mode(), half.decode(mean)
    assert half_mean.dtype == half_decoded.dtype == dtype
    for actual, expected in ((half_mean, mean), (half_decoded, decoded)):
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < 16 * torch.finfo(dtype).eps


def test_half_precision_trains(generator):
    vae = tiny_vae(generator)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(clip(generator, 1, 3, 5, 16, 16))
        decoded = vae.decode(posterior.sample())
    (decoded.float().square().mean() + 1e-3 * posterior.kl().mean()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


def test_training_reduces_the_error():
    vae = HunyuanVideoVAE(**TINY)
    video = torch.linspace(-1, 1, 16).expand(1, 3, 5, 16, 16)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-4)  # ten times that goes up and down
    losses = []
    for _ in range(30):
        loss = (vae.decode(vae.encode(video).mode()) - video).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_first_frame_does_see_the_clip_through_the_norms(generator):
    """Norms span time, so this VAE is not causal; decoding in pieces cannot be exact."""
    vae = tiny_vae(generator)
    z = torch.randn(1, 4, 3, 2, 2, generator=generator)
    changed = z.clone()
    changed[:, :, 2] += 1
    with torch.no_grad():
        difference = (vae.decode(z) - vae.decode(changed))[:, :, 0].abs().max()
    assert difference > 1e-4


def test_posterior(generator):
    moments = torch.randn(2, 8, 2, 3, 3, generator=generator) * 40
    posterior = DiagonalGaussian.from_moments(moments)
    assert torch.equal(posterior.mode(), moments[:, :4])
    assert torch.equal(posterior.logvar, moments[:, 4:].clamp(-30, 20))

    mean, logvar = torch.randn(2, 3, 4, 1, 2, 2, generator=generator)
    posterior = DiagonalGaussian(mean, logvar)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    divergence = torch.distributions.kl_divergence(normal, standard)
    close(posterior.kl(), divergence.flatten(1).sum(1), 1e-5)


def test_samples_follow_the_posterior_and_the_generator(generator):
    mean, logvar = torch.full((1, 1, 40, 50, 50), 3.0), torch.full((1, 1, 40, 50, 50), -2.0)
    posterior = DiagonalGaussian(mean, logvar)
    state = generator.get_state()
    first = posterior.sample(generator)
    # 100000 draws: a standard error of 0.0012 for the mean and of 0.0008 for the deviation
    assert abs(first.mean() - 3) < 0.006
    assert abs(first.std() - torch.tensor(-1.0).exp()) < 0.004
    assert not torch.equal(first, posterior.sample(generator))
    generator.set_state(state)
    assert torch.equal(first, posterior.sample(generator))
