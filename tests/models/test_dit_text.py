"""Text masks of any pattern: only the tokens they keep have influence, wherever they stand."""

import pytest
import torch

from hunyuan_fast.models.dit.inputs import pack_text
from tests.models.dit_cases import tiny_inputs, tiny_model


@pytest.mark.parametrize("garbage", [1e4, float("inf"), float("nan")])
def test_padded_text_has_no_influence(generator, poison, garbage):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator)
    spoilt = inputs["text_states"].masked_fill(~inputs["text_mask"][..., None], garbage)
    with torch.no_grad():
        assert torch.equal(model(**inputs), model(**{**inputs, "text_states": spoilt}))


def test_nan_in_padded_text_leaves_gradients_alone(generator):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator)
    gradients = []
    for garbage in (0.0, torch.nan):
        states = inputs["text_states"].masked_fill(~inputs["text_mask"][..., None], garbage)
        states.requires_grad_()
        model.zero_grad()
        model(**{**inputs, "text_states": states}).square().mean().backward()
        gradients.append([states.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gradients[0][0][0].any()
    assert not gradients[0][0][~inputs["text_mask"]].any()


def test_trimming_padded_text_changes_nothing(generator):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator, text_lengths=(3,))
    trimmed = {name: inputs[name][:, :3] for name in ("text_states", "text_mask")}
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs), model(**{**inputs, **trimmed}), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("places", [(4, 5, 6), (0, 3, 6), (1, 2, 4)], ids=str)
def test_valid_tokens_may_stand_anywhere(generator, places):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator, text_lengths=(3,))
    scattered = torch.full_like(inputs["text_states"], torch.nan)
    scattered[:, places] = inputs["text_states"][:, :3]
    mask = torch.zeros_like(inputs["text_mask"])
    mask[:, places] = True
    with torch.no_grad():
        velocity = model(**{**inputs, "text_states": scattered, "text_mask": mask})
        assert torch.equal(velocity, model(**inputs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_mask_dtypes(generator, dtype):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator)
    with torch.no_grad():
        velocity = model(**{**inputs, "text_mask": inputs["text_mask"].to(dtype)})
        assert torch.equal(velocity, model(**inputs))


def test_no_valid_token_at_all(generator, poison):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator, text_lengths=(0, 4))
    inputs["text_states"][0] = torch.nan
    velocity = model(**inputs)
    velocity.sum().backward()

    assert velocity.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    shorter = {name: inputs[name][:1, :1] for name in ("text_states", "text_mask")}
    with torch.no_grad():
        alone = model(**{**{name: x[:1] for name, x in inputs.items()}, **shorter})
    torch.testing.assert_close(velocity[:1], alone, rtol=0, atol=2e-6)


def test_pack_text_keeps_order(generator):
    states = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]])
    packed, length = pack_text(states, mask)
    assert packed[..., 0].tolist() == [[1, 3, 4, 0, 0], [5, 6, 0, 0, 0]]
    assert length.tolist() == [3, 2]
