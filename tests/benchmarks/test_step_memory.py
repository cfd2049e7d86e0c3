"""Memory of a step at 118,800 video tokens: what is alive, as if on a GPU, and who asks for values.

On the meta device reading a value is an error, so these runs also show that nobody waits for one.
"""

from importlib import import_module

import pytest
import torch

from benchmarks import shapes, step_memory
from benchmarks.bench_transformer import FEW_BLOCKS, REAL
from benchmarks.step_memory import META, OURS, THEIRS, Ledger, need
from benchmarks.transformer_twins import Source, Twins
from hunyuan_fast.planning.layouts import Layout
from hunyuan_fast.planning.memory import memory
from hunyuan_fast.planning.work import released
from hunyuan_fast.samplers import integrate, shifted_sigmas

CLIP = shapes.CLIP_720P_129
# (B, L, E) of the longest clip in bf16
VECTOR = CLIP.joint * 3072 * 2
HALF = torch.bfloat16


def test_a_ledger_counts_what_is_alive():
    given = torch.empty(8, device=META)
    with Ledger([given]) as ledger:
        x = torch.empty(1000, device=META)
        y = x + 1
        del x
        view = y[:500]
        z = torch.empty(700, device=META)
        del y
        given.add_(1)
    assert len(view) + len(z) == 1200
    assert ledger.peak == 2000 * 4 and ledger.now == 1700 * 4
    del view, z
    assert ledger.now == 0 and ledger.largest == {torch.float32: 1000}


def test_a_step_of_the_real_model_makes_neither_scores_nor_wide_copies_and_reads_no_value():
    few = Source(FEW_BLOCKS, HALF, META)
    model, (latents, *rest) = Twins(few).empty(), step_memory._inputs(CLIP, FEW_BLOCKS)
    latents = latents.float()
    with Ledger([*model.parameters(), latents]) as ledger, torch.no_grad():

        def velocity(x, timestep):
            return model(x.to(HALF), timestep, *rest[1:])

        assert integrate(velocity, latents, shifted_sigmas(2)).shape == latents.shape
    widest = 3 * 3072 + 12288  # the first layer of a single block
    assert ledger.largest.pop(HALF) == CLIP.joint * widest > 2**31
    # of other dtypes nothing is larger than the rotary tables, which may have been made before
    assert max(ledger.largest.values()) <= CLIP.video * 128
    # the input of a single block, its first layer, that of its last one, and q, k, v
    assert ledger.peak == pytest.approx((1 + 7 + 5 + 3) * VECTOR, rel=0.02)


def test_plans_count_what_a_step_takes():
    job = released(720, 1280, 129)
    found = need(OURS, CLIP, FEW_BLOCKS)
    assert found.peak == pytest.approx(memory(Layout(), job).busy, rel=0.02)
    assert found.total == found.weights + found.peak
    with torch.device("meta"):
        weights = sum(
            p.numel() * p.itemsize for p in Twins(Source(REAL, HALF, META)).empty().parameters()
        )
    assert weights == 2 * 12_821_012_544


def test_training_keeps_what_blocks_keep_and_checkpointing_their_inputs():
    whole, again = (
        need(OURS, CLIP, FEW_BLOCKS, training=True, checkpointing=on) for on in (False, True)
    )
    assert 118 * VECTOR < whole.peak < 132 * VECTOR  # 2 x 21 + 4 x 19 are kept
    assert again.peak < 0.3 * whole.peak


@pytest.mark.parametrize("training", [False, True])
def test_diffusers_takes_more_and_makes_no_scores(training):
    pytest.importorskip("diffusers")
    real = torch.nn.functional.scaled_dot_product_attention
    ours, theirs = (
        need(who, CLIP, FEW_BLOCKS, training=training, checkpointing=True) for who in (OURS, THEIRS)
    )
    assert ours.weights == theirs.weights
    assert ours.peak < theirs.peak < 2 * ours.peak
    assert torch.nn.functional.scaled_dot_product_attention is real


def test_heads_within_an_op_are_counted():
    qkv, text = (torch.empty(1, n, 96, device=META, dtype=HALF) for n in (10, 4))
    arguments = (qkv, None, None, None, None, 2, text)
    assert step_memory._heads_within("hunyuan_fast.norm_rope_attention.default", arguments) == 2688
    assert step_memory._heads_within("hunyuan_fast.norm_rope_attention_out.default", arguments)
    assert step_memory._heads_within("aten.add.Tensor", arguments) == 0


# torch can run these on the meta device.
@pytest.mark.parametrize("name", ["reference", "libraries.flash", "libraries.efficient"])
@pytest.mark.parametrize("lengths", [True, False])
def test_attention_in_torch_reads_no_length(name, lengths):
    impl = import_module(f"hunyuan_fast.kernels.rope3d_attention.{name}")
    q, k, v, out = (torch.empty(2, 600, 2, 64, dtype=HALF, device=META) for _ in range(4))
    kv_len = torch.empty(2, dtype=torch.int32, device=META) if lengths else None
    found, sums = impl.forward(q, k, v, kv_len, 0.125, out)
    assert found is out and sums.shape == (2, 2, 600)
    if name == "libraries.efficient":  # whose backward torch calls wrongly there
        return
    gradients = impl.backward(out, out, sums, q, k, v, kv_len, 0.125)
    assert [x.shape for x in gradients] == [q.shape] * 3


def test_attention_in_eight_bits_in_torch_reads_no_length():
    impl = import_module("hunyuan_fast.kernels.fp8_attention.reference")
    q, k, v, out = (torch.empty(1, 600, 2, 64, dtype=HALF, device=META) for _ in range(4))
    kv_len = torch.empty(1, dtype=torch.int32, device=META)
    assert impl.forward(q, k, v, kv_len, 0.125, out).shape == q.shape


def test_the_table_tells_every_step_of_both(monkeypatch, capsys):
    asked = []

    def counted(who, clip, *more, **how):
        asked.append((who, clip.name))
        return step_memory.Need(10**9, 81 * 10**9)

    monkeypatch.setattr(step_memory, "need", counted)
    monkeypatch.setenv("COLUMNS", "160")
    step_memory.main()
    said = capsys.readouterr().out
    assert len(asked) == 18 and {who for who, _ in asked} == {OURS, THEIRS}
    assert "82.0" in said and "yes" in said
