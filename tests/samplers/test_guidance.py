"""Embedded and classifier-free guidance."""

import pytest
import torch

from hunyuan_fast.samplers import classifier_free, embedded_guidance


@pytest.mark.parametrize(
    ("scale", "bfloat16"),
    [(1, 1000), (2, 2000), (3, 3008), (4, 4000), (5, 4992), (6, 6016), (7, 7008), (8, 8000)],
)
def test_embedded_guidance_is_rounded_as_in_the_reference(scale: float, bfloat16: int) -> None:
    in_bfloat16 = embedded_guidance(scale, 2, dtype=torch.bfloat16)
    assert in_bfloat16.tolist() == [bfloat16] * 2
    assert embedded_guidance(scale, 1, dtype=torch.float32).tolist() == [1000 * scale]


def test_classifier_free_is_the_formula(generator: torch.Generator) -> None:
    negative, positive = torch.randn(2, 3, 5, generator=generator).double().unbind(0)
    for scale in (1.0, 1.5, 6.0):
        expected = negative + scale * (positive - negative)
        got = classifier_free(negative.float(), positive.float(), scale)
        assert (got - expected).abs().max() <= 2e-6
    assert torch.equal(classifier_free(negative.float(), positive.float(), 1.0), positive.float())


def test_classifier_free_computes_in_float32(generator: torch.Generator) -> None:
    negative, positive = torch.randn(2, 100, generator=generator).bfloat16().unbind(0)
    got = classifier_free(negative, positive, 6.0)
    exact = negative.double() + 6 * (positive.double() - negative.double())
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= 1e-5
