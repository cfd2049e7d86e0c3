"""Plans are pure functions of shapes: what they promise, how they read, when they refuse."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hunyuan_fast import dispatch
from hunyuan_fast.kernels.causal_conv3d import library_impl
from hunyuan_fast.models import HunyuanVideoVAE
from hunyuan_fast.models.vae import planner
from hunyuan_fast.models.vae.budget import read_bytes, show_bytes
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.vae.cost import SLACK, Ledger
from hunyuan_fast.models.vae.layers import Layer, layers_of, sizes_of
from hunyuan_fast.models.vae.planner import least_budget, plan_decode, plan_encode
from hunyuan_fast.models.vae.workspace import Call, answering, workspace
from tests.models.vae_cases import TINY, tiny_vae

REAL = VAEConfig()
FRAMES_720P = (1, 16, 33, 90, 160)
GIB = 1 << 30


@pytest.mark.parametrize("changes", [{}, TINY, {"mid_block_add_attention": False}])
def test_layers_name_every_parameter_once(changes):
    with torch.device("meta"):
        vae = HunyuanVideoVAE(**changes)
    for half, other in (("encode", ("decoder", "post_")), ("decode", ("encoder", "quant_"))):
        named = set()
        for layer in layers_of(vae.config, half):
            for name in (layer.conv, layer.norm, layer.shortcut):
                if name is not None:
                    module = vae.get_submodule(name)
                    parameters = {id(p) for p in module.parameters()}
                    if not (layer.attends and name == layer.norm):
                        assert not parameters & named
                    named |= parameters
            module = vae.get_submodule(layer.conv)
            if isinstance(module, nn.Conv3d):
                assert (module.in_channels, module.out_channels) == (layer.inputs, layer.outputs)
                assert module.kernel_size[0] == layer.kernel
        mine = {id(p) for n, p in vae.named_parameters() if not n.startswith(other)}
        assert named == mine


def test_sizes_are_those_of_the_maps():
    sizes = sizes_of(layers_of(REAL, "decode"), (33, 90, 160))
    assert sizes[0] == (33, 90, 160) and sizes[-1] == (129, 720, 1280)
    assert (33, 180, 320) in sizes and (65, 360, 640) in sizes
    assert sizes_of(layers_of(REAL, "encode"), (129, 720, 1280))[-1] == (33, 90, 160)


def by_the_library(x, weight, bias, *, stride=(1, 1, 1), factor=None, **fused):
    return library_impl.forward(x, weight, bias, stride, None, factor, **fused)


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_arithmetic_is_what_torch_counts(generator, half, monkeypatch):
    vae = tiny_vae(generator, mid_block_add_attention=False).requires_grad_(False)
    # more frames than the weights fold for, and large enough for 3D convolutions
    x = torch.zeros(1, 3, 9, 16, 16) if half == "encode" else torch.zeros(1, 4, 3, 2, 2)
    # torch counts its own operators, and sees ours as one
    for place in ("modules.causal_conv3d", "modules.resample", "models.vae.model"):
        for name in ("causal_conv3d", "upsample_causal_conv3d"):
            path = f"hunyuan_fast.{place}.{name}"
            monkeypatch.setattr(path, by_the_library, raising=False)
    counter = FlopCounterMode(display=False)
    with dispatch.use("library_impl", "causal_conv3d"), torch.no_grad(), counter:
        getattr(vae, half)(x)
    ledger = Ledger(vae.config, half, tuple(x.shape[2:]), torch.float32, "cpu_impl")
    # kernel-1 convolutions run as matrix products, which the counter sees as well
    assert sum(ledger.flops) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("planned", [plan_decode, plan_encode])
def test_more_memory_never_means_more_arithmetic(planned):
    half = planned.__name__.removeprefix("plan_")
    shape = FRAMES_720P if half == "decode" else (1, 3, 129, 720, 1280)
    least = least_budget(half, REAL, shape, torch.bfloat16)
    plans = [planned(REAL, shape, torch.bfloat16, int(least * 1.2**n)) for n in range(28)]
    extras = [plan.extra for plan in plans]
    assert extras == sorted(extras, reverse=True)
    assert extras[-1] == pytest.approx(1)
    assert all(plan.peak <= plan.budget for plan in plans)
    assert plans[0].peak >= 0.9 * least
    assert plans[-1].together == 1 and not plans[0].together
    for plan in plans:
        if plan.together:
            assert not plan.segments and plan.extra == 1
            continue
        ends = [segment.stop for segment in plan.segments]
        starts = [segment.start for segment in plan.segments]
        assert starts == [0, *ends[:-1]] and ends[-1] == len(layers_of(REAL, half))


def test_the_least_budget_is_named_and_works():
    least = least_budget("decode", REAL, FRAMES_720P, torch.float32)
    with pytest.raises(ValueError, match=r"memory_budget must be at least [0-9.]+GiB") as caught:
        plan_decode(REAL, FRAMES_720P, torch.float32, least - 1)
    words = str(caught.value)
    assert "to decode 1 x 16 x 33 x 90 x 160 in float32" in words
    said = words.split("at least ")[1].split()[0]
    assert plan_decode(REAL, FRAMES_720P, torch.float32, read_bytes(said)).peak <= read_bytes(said)
    assert plan_decode(REAL, FRAMES_720P, torch.float32, least).peak <= least
    with pytest.raises(TypeError, match="budget must be a number of bytes, got str"):
        plan_decode(REAL, FRAMES_720P, torch.float32, "6GiB")


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_strips_work_in_less_memory(half, monkeypatch):
    shape = FRAMES_720P if half == "decode" else (1, 3, 129, 720, 1280)
    with_strips = least_budget(half, REAL, shape, torch.float32)
    planner._cached_planner.cache_clear()
    monkeypatch.setattr(planner, "_STRIPS", (1,))
    without = least_budget(half, REAL, shape, torch.float32)
    planner._cached_planner.cache_clear()
    assert with_strips < without / 2


def test_plans_depend_on_who_answers():
    shape = 1, 16, 5, 32, 32
    found = {}
    for name in ("cpu_impl", "library_impl", "reference"):
        if name in dispatch.implementations("causal_conv3d"):
            with dispatch.use(name, "causal_conv3d"):
                assert answering(torch.float32, torch.device("cpu")) == name
                found[name] = least_budget("decode", REAL, shape, torch.float32)
    assert list(found.values()) == sorted(found.values())
    if "cpu_impl" in found:
        assert least_budget("decode", REAL, shape, torch.float32) == found["cpu_impl"]
    # the kernels of a GPU read by index too
    call = Call(Layer("", 64, 64), 2, 4, 2, 90, 160, 4 * 64 * 90 * 160 * 2)
    assert workspace(call, "triton_impl") < call.result < workspace(call, "library_impl")


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_planning_is_fast(half):
    shape = FRAMES_720P if half == "decode" else (1, 3, 129, 720, 1280)
    planned = plan_decode if half == "decode" else plan_encode
    planner._cached_planner.cache_clear()
    begin = time.process_time()
    least = least_budget(half, REAL, shape, torch.bfloat16)
    plan = planned(REAL, shape, torch.bfloat16, least)
    # it takes a tenth of that
    assert time.process_time() - begin < 3
    assert max(step.strips for segment in plan.segments for step in segment.passes) > 1


def test_half_precision_and_offload_need_less():
    full = least_budget("decode", REAL, FRAMES_720P, torch.float32) - SLACK
    half = least_budget("decode", REAL, FRAMES_720P, torch.bfloat16) - SLACK
    # in 16 bits the library answers, which copies edges around its maps
    assert full / 2 < half < 0.65 * full
    kept = plan_decode(REAL, FRAMES_720P, torch.bfloat16, 40 * GIB)
    parked = plan_decode(REAL, FRAMES_720P, torch.bfloat16, 40 * GIB, offload=True)
    assert parked.extra < kept.extra and parked.parked > 40 * GIB
    assert kept.parked == 0


def test_a_batch_is_planned_as_its_clips_and_one_result():
    one = plan_decode(REAL, (1, 16, 5, 32, 32), torch.float32, 2 * GIB)
    two = plan_decode(REAL, (2, 16, 5, 32, 32), torch.float32, 2 * GIB)
    assert two.flops == pytest.approx(2 * one.flops * two.extra / one.extra)
    assert two.result_shape == (2, 3, 17, 256, 256)
    assert two.peak <= 2 * GIB


@pytest.mark.parametrize("planned", [plan_decode, plan_encode])
def test_the_plain_pass_is_taken_where_it_fits(planned):
    shape = (3, 16, 5, 32, 32) if planned is plan_decode else (3, 3, 17, 256, 256)
    at_once = planned(REAL, shape, torch.float32, 1 << 50)
    assert at_once.together == 3 and at_once.extra == 1
    assert str(at_once).endswith(" of 1048576.00GiB, whole maps, as without a budget")
    assert planned(REAL, shape, torch.float32, at_once.peak).together == 3
    in_turn = planned(REAL, shape, torch.float32, at_once.peak - 1)
    assert in_turn.together == 1 and at_once.peak / 3 < in_turn.peak < at_once.peak / 2.5
    assert str(in_turn).endswith(", whole maps, as without a budget, one clip after the other")
    assert planned(REAL, shape, torch.float32, in_turn.peak).together == 1
    in_chunks = planned(REAL, shape, torch.float32, in_turn.peak - 1)
    assert not in_chunks.together and in_chunks.segments


def test_a_plan_reads_as_a_table():
    plan = plan_decode(REAL, (1, 16, 9, 32, 32), torch.float32, 3 * GIB)
    head, columns, *rows = str(plan).splitlines()
    assert head.startswith("decode 1 x 16 x 9 x 32 x 32 in float32: peak ")
    assert "of 3.00GiB" in head and "times the arithmetic" in head
    assert columns.split() == [
        *("stored", "map", "made", "by", "passes", "strips"),
        *("frames", "stored", "peak", "TFLOP"),
    ]
    assert len(rows) == len(plan.segments)
    assert rows[0].startswith("decoder.conv_in ") and rows[-1].startswith("decoder.conv_out ")
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (7, 7),
        ("7", 7),
        ("7B", 7),
        ("6GiB", 6 * GIB),
        ("1.5 gib", 3 * GIB // 2),
        ("500MB", 500_000_000),
        (" 2KiB ", 2048),
        ("1TB", 10**12),
        ("0.5TiB", GIB * 512),
    ],
)
def test_amounts(text, count):
    assert read_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "6 G", "-1GiB", "6,5GiB", "1e9", "6GiB!", "nanGiB"])
def test_amounts_that_are_none(text):
    with pytest.raises(ValueError, match="memory_budget must be a number and a unit"):
        read_bytes(text)


def test_other_wrong_amounts():
    for wrong in (0, "0GiB", "0.1B", -5):
        with pytest.raises(ValueError, match="--memory-budget must be positive, got"):
            read_bytes(wrong, "--memory-budget")
    for wrong in (1.5, True, None, [1]):
        with pytest.raises(TypeError, match="memory_budget must be a number of bytes or a text"):
            read_bytes(wrong)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1, "1B"), (2048, "2KiB"), (3 << 20, "3MiB"), (3 * GIB // 2, "1.50GiB"), (7 * GIB, "7.00GiB")],
)
def test_amounts_shown(count, shown):
    assert show_bytes(count) == shown
    assert read_bytes(show_bytes(count, up=True)) >= count
    assert read_bytes(show_bytes(count + 1, up=True)) >= count + 1
