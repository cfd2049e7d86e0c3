"""The transformer against diffusers' class with the same weights, and by itself."""

import pytest
import torch

from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.dit.checkpoint import rules
from hunyuan_fast.modules.attention import JointAttention
from tests.models.dit_cases import diffusers_twin, run_twin, tiny_inputs, tiny_model, to_native

SIZES = {"video": (3, 4, 6), "image": (1, 6, 4), "one_patch": (1, 2, 2)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("guidance_embed", [True, False], ids=["guidance", "no_guidance"])
def test_equals_diffusers(generator, poison, size, guidance_embed):
    model = tiny_model(generator, guidance_embed=guidance_embed)
    inputs = tiny_inputs(generator, size=size)

    with torch.no_grad():
        velocity, expected = model(**inputs), run_twin(diffusers_twin(model), inputs)

    assert expected.abs().mean() > 0.1, "the test must see a velocity"
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)


def test_other_patch_sizes_and_channels_equal_diffusers(generator):
    changes = {"patch_size": (2, 1, 1), "out_channels": 3, "mlp_width_ratio": 3.0}
    model = tiny_model(generator, **changes)
    inputs = tiny_inputs(generator, size=(4, 3, 5))

    with torch.no_grad():
        velocity, expected = model(**inputs), run_twin(diffusers_twin(model), inputs)

    assert velocity.shape == (2, 3, 4, 3, 5)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)


def test_gradients_equal_diffusers(generator):
    model = tiny_model(generator)
    twin = diffusers_twin(model)
    inputs = tiny_inputs(generator)
    weights = torch.randn(inputs["latents"].shape, generator=generator)
    theirs = {name: value.clone() for name, value in inputs.items()}
    for leaf in ("latents", "pooled_text"):
        inputs[leaf].requires_grad_()
        theirs[leaf].requires_grad_()

    (model(**inputs) * weights).sum().backward()
    (run_twin(twin, theirs) * weights).sum().backward()

    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for rule in rules(model.config):
        ours, reference = gradients[rule.native], to_native(rule, expected)
        # Some gradients are sums that cancel (the refiner's key biases): hence the second term.
        allowed = 1e-4 * reference.abs().max() + 1e-6 * largest
        assert (ours - reference).abs().max() <= allowed, rule.native
    for leaf in ("latents", "pooled_text"):
        torch.testing.assert_close(inputs[leaf].grad, theirs[leaf].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_as_good_as_diffusers(generator, dtype):
    model = tiny_model(generator).to(dtype)
    inputs = {
        name: value.to(dtype).float() if value.is_floating_point() else value
        for name, value in tiny_inputs(generator).items()
    }
    rounded = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }

    with torch.no_grad():
        velocity = model(**rounded)
        baseline = run_twin(diffusers_twin(model), rounded)
        truth = diffusers_twin(model.float())
        expected = run_twin(truth, inputs)

    assert velocity.dtype == dtype
    ours, theirs = velocity.float() - expected, baseline.float() - expected
    assert ours.square().mean() <= 4 * theirs.square().mean()
    assert ours.abs().max() <= 2 * theirs.abs().max()


def test_float64_model_agrees(generator):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator)
    with torch.no_grad():
        velocity, exact = model(**inputs), model.double()(**inputs)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(velocity.double(), exact, rtol=0, atol=1e-5)


def test_timestep_and_guidance_stay_fp32_in_a_bf16_model(generator):
    model = tiny_model(generator).bfloat16()
    inputs = tiny_inputs(generator)
    for name in ("timestep", "guidance"):
        near = [{**inputs, name: torch.full((2,), value)} for value in (997.2, 997.9)]
        assert torch.equal(near[0][name].bfloat16(), near[1][name].bfloat16())
        with torch.no_grad():
            assert not torch.equal(model(**near[0]), model(**near[1]))


def test_vector_is_summed_as_time_plus_pooled_plus_guidance(generator):
    model = tiny_model(generator).bfloat16()
    inputs = tiny_inputs(generator)
    with torch.no_grad():
        pooled = model.vector_in(inputs["pooled_text"].bfloat16())
        expected = (model.time_in(inputs["timestep"]) + pooled) + model.guidance_in(
            inputs["guidance"]
        )
        vec = model._conditioning(inputs["timestep"], inputs["pooled_text"], inputs["guidance"])
    assert torch.equal(vec, expected)


def test_batch_equals_single_samples(generator):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator, text_lengths=(7, 3, 1))
    with torch.no_grad():
        together = model(**inputs)
        alone = [model(**{n: x[i : i + 1] for n, x in inputs.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-6)


def test_the_released_model_has_its_size():
    with torch.device("meta"):
        distilled = HunyuanVideoTransformer()
        base = HunyuanVideoTransformer(guidance_embed=False)
    counts = [
        (len(m.state_dict()), sum(p.numel() for p in m.parameters())) for m in (distilled, base)
    ]
    assert counts == [(856, 12_821_012_544), (852, 12_810_782_784)]
    assert not list(distilled.buffers()), "a buffer would stay on the meta device when weights load"


def test_runs_on_the_meta_device(generator):
    with torch.device("meta"):
        model = HunyuanVideoTransformer(mm_double_blocks_depth=1, mm_single_blocks_depth=1)
        velocity = model(
            torch.empty(1, 16, 33, 90, 160),
            torch.empty(1),
            torch.empty(1, 256, 4096),
            torch.empty(1, 256, dtype=torch.bool),
            torch.empty(1, 768),
            torch.empty(1),
        )
    assert velocity.shape == (1, 16, 33, 90, 160)


def test_initial_weights(generator):
    model = tiny_model(generator)  # every parameter random
    model.init_weights()

    parameters = dict(model.named_parameters())
    zeros = {name for name, parameter in parameters.items() if not parameter.any()}
    expected = {"img_in.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias"}
    expected |= {n for n in parameters if "_mod." in n or "modulation." in n}
    expected |= {n for n in parameters if n.endswith(("norm1.bias", "norm2.bias"))}
    assert zeros == expected

    bound = (6 / (48 + 16)) ** 0.5
    patch = model.img_in.proj.weight
    assert 0.9 * bound < patch.abs().max() <= bound
    for embedder in (model.time_in, model.guidance_in, model.txt_in.t_embedder):
        assert 0.015 < embedder.mlp[2].weight.std() < 0.025
    assert torch.equal(model.single_blocks[0].q_norm.weight, torch.ones(24))
    with torch.no_grad():
        assert not model(**tiny_inputs(generator)).any(), "training starts from a velocity of zero"


def test_gradient_checkpointing_changes_no_gradient(generator):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator)

    gradients = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        model.zero_grad()
        model(**inputs).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointed_blocks_run_twice(generator):
    model = tiny_model(generator)
    model.enable_gradient_checkpointing()
    calls = []
    for block in (*model.double_blocks, *model.single_blocks):
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    model(**tiny_inputs(generator)).sum().backward()
    assert len(calls) == 2 * 5


def test_compiles_in_one_graph(generator):
    model = tiny_model(generator)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = tiny_inputs(generator)

    expected = model(**inputs)
    velocity = compiled(**inputs)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)

    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    velocity.sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_other_resolutions_need_no_other_graph(generator):
    model = tiny_model(generator, mm_double_blocks_depth=1, mm_single_blocks_depth=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        compiled(**tiny_inputs(generator, size=(5, 14, 22)))
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in ((7, 10, 34), (9, 26, 6)):
                inputs = tiny_inputs(generator, size=size)
                torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=0, atol=1e-6)


def test_autocast_matches_full_precision_coarsely(generator):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator)
    with torch.no_grad():
        expected = model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(**inputs)
    error = (velocity.float() - expected).square().mean().sqrt()
    assert error < 0.05 * expected.square().mean().sqrt()


def test_all_blocks_attend_as_the_model_was_told(generator):
    model = tiny_model(generator)
    joint = [module for module in model.modules() if isinstance(module, JointAttention)]
    assert len(joint) == len(model.double_blocks) + len(model.single_blocks)
    with pytest.raises(ValueError, match="attention precision"):
        model.set_attention(precision="int3")
    model.set_attention(precision="fp8")
    model.set_attention()
    assert {module.precision for module in joint} == {"fp8"}
    model.set_attention(precision="same")
    assert {module.precision for module in joint} == {"same"}


def test_fp8_attention_is_close_and_not_for_training(generator):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator)
    with torch.no_grad():
        exact = model(**inputs)
        model.set_attention(precision="fp8")
        velocity = model(**inputs)
    error = (velocity - exact).norm() / exact.norm()
    assert 0 < error < 0.05
    with pytest.raises(ValueError, match="fp8 attention is for inference"):
        model(**inputs)


@pytest.mark.gpu
def test_on_a_gpu_the_host_never_waits(generator):
    model = tiny_model(generator)
    inputs = tiny_inputs(generator)
    with torch.no_grad():
        expected = model(**inputs)
        model, inputs = model.cuda(), {name: value.cuda() for name, value in inputs.items()}
        model(**inputs)  # kernels load, tables are made
        torch.cuda.set_sync_debug_mode("error")
        try:
            velocity = model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(velocity.cpu(), expected, rtol=0, atol=1e-4)
