"""Objectives and optimisers against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_fast.trainer.ema import EMA
from hunyuan_fast.trainer.muon import Muon, orthogonalize
from hunyuan_fast.trainer.objectives import (
    add_noise,
    contrastive_loss,
    flow_matching_loss,
    logit_normal_sigmas,
    next_token_loss,
)
from hunyuan_fast.trainer.optim import OptimConfig, build_optimizers
from hunyuan_fast.trainer.schedule import warmup_cosine


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_training_noise_levels_are_logit_normal_after_the_shift(shift):
    sigmas = logit_normal_sigmas(4096, shift=shift, generator=generator())
    # the shift adds its logarithm to the logit
    logits = torch.logit(sigmas.double()) - math.log(shift)
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1) < 0.02
    assert sigmas.min() > 0 and sigmas.max() < 1


def test_noise_levels_are_stratified_and_shuffled():
    sigmas = logit_normal_sigmas(16, shift=1.0, generator=generator())
    quantiles = torch.special.ndtr(torch.logit(sigmas))
    assert torch.equal((quantiles * 16).floor().sort().values, torch.arange(16.0))
    assert not torch.equal(sigmas, sigmas.sort().values)


def test_the_right_velocity_has_no_loss_and_walks_back_to_the_data():
    data, noise = torch.randn(2, 3, 4, 5, generator=generator()), torch.randn(2, 3, 4, 5)
    sigmas = torch.tensor([0.2, 0.9])
    noisy = add_noise(data, noise, sigmas)
    assert flow_matching_loss(noise - data, data, noise) == 0
    torch.testing.assert_close(noisy - sigmas.view(2, 1, 1, 1) * (noise - data), data)
    assert flow_matching_loss(noise - data + 0.5, data, noise).item() == pytest.approx(0.25)


def test_next_token_loss_reads_one_ahead_and_skips_padding():
    tokens = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    logits = torch.randn(2, 4, 6, generator=generator())
    by_hand = [
        F.cross_entropy(logits[0, 0], torch.tensor(2)),
        F.cross_entropy(logits[0, 1], torch.tensor(3)),
        F.cross_entropy(logits[1, 0], torch.tensor(5)),
    ]
    torch.testing.assert_close(next_token_loss(logits, tokens, mask), sum(by_hand) / 3)


def test_contrastive_loss_is_low_for_matching_rows_only():
    first = torch.randn(8, 32, generator=generator())
    temperature = torch.tensor(0.05)
    matched = contrastive_loss(first, first, temperature)
    shuffled = contrastive_loss(first, first.roll(1, 0), temperature)
    assert matched < 0.01 and shuffled > 5


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonalize_sets_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator())))
    assert values.min() > 0.5 and values.max() < 1.4


def test_muon_takes_kernels_as_matrices_and_refuses_vectors():
    kernel = nn.Parameter(torch.zeros(4, 2, 3, 3, 3))
    optimizer = Muon([kernel], lr=0.1)
    kernel.grad = torch.randn(kernel.shape, generator=generator())
    optimizer.step()
    rms = kernel.detach().square().mean().sqrt().item()
    # an update of AdamW has a root mean square of about 0.2 of its learning rate
    assert 0.5 * 0.02 < rms < 1.4 * 0.02
    with pytest.raises(ValueError, match="two or more dimensions"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_every_parameter_has_exactly_one_optimizer():
    module = nn.ModuleDict(
        {"blocks": nn.Linear(4, 4), "mod": nn.Linear(4, 4), "final_layer": nn.Linear(4, 4)}
    )
    adamw, muon = build_optimizers(module, OptimConfig(lr=1e-3, muon_lr=1e-3))
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(module["blocks"].weight)]
    taken = [id(p) for opt in (adamw, muon) for p in opt.param_groups[0]["params"]]
    assert sorted(taken) == sorted(id(p) for p in module.parameters())
    assert len(build_optimizers(module, OptimConfig(lr=1e-3))) == 1


def test_warmup_then_cosine():
    factors = [warmup_cosine(step, steps=100, warmup=10) for step in range(100)]
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:])[::-1]
    assert max(factors) == pytest.approx(1.0) and 0.02 <= factors[-1] < 0.03


def test_ema_follows_and_gives_the_weights_back():
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema.update()
    # the first factor is (1 + 1) / (10 + 1)
    with ema.applied():
        torch.testing.assert_close(module.weight, torch.full((1, 2), 1 - 2 / 11))
    assert bool((module.weight == 1).all())
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        EMA(module, 1.0)
