"""A test of the tests: the real Triton kernels, each with one mistake planted, must be caught.

A mistake is a piece of the kernels' source put in place of another; the piece must be there, so
that no mistake is forgotten when the kernels change.
"""

import importlib
import itertools
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hunyuan_fast.dispatch import implementations
from tests.kit.memory import far_apart
from tests.ops.rope3d_attention_cases import ROOM, Truth, draw_inputs, plain, run

SEEDS = range(2)
RIGHT_SEEDS = range(20)
LENGTHS = [0, 133]
HEAD_DIM = 20  # its scale is no power of two, and its lanes are not all features
SCALE = HEAD_DIM**-0.5
KERNELS = {
    "triton_kernels": ["forward_kernel"],
    "triton_backward": ["query_gradient_kernel", "key_gradient_kernel"],
}


@dataclass(frozen=True)
class Fault:
    """``old`` in the source of a module becomes ``new``; with ``far``, rows are 2^30 apart.

    own: with queries of their own
    """

    old: str
    new: str
    module: str = "triton_kernels"
    far: bool = False
    own: bool = False


def _backward(old: str, new: str, own: bool = False) -> Fault:
    return Fault(old, new, "triton_backward", own=own)


SEEN = "(tl.arange(0, KEYS) < end - start)[None, :], scores"
FAULTS = {
    "a key of padding seen": Fault(SEEN, SEEN.replace("<", "<=")),
    "the last key not seen": Fault(SEEN, SEEN.replace("start)", "start - 1)")),
    "the length of the first sample for all": Fault(
        "tl.load(kv_len_ptr + b)", "tl.load(kv_len_ptr)"
    ),
    "lengths ignored": Fault("if kv_len_ptr is not None:", "if False:"),
    "sums not corrected": Fault("sums * correction[:, None]", "sums"),
    "totals not corrected": Fault("total * correction +", "total +"),
    "scale squared": Fault("score_scale = scale * LOG2_E", "score_scale = scale * scale * LOG2_E"),
    "scale without log2 e": Fault("score_scale = scale * LOG2_E", "score_scale = scale"),
    "log-sum-exp in base 2": Fault("(highest + tl.log2(total)) * LN_2", "highest + tl.log2(total)"),
    "log-sum-exp without the highest": Fault("(highest + tl.log2(total))", "tl.log2(total)"),
    "log-sum-exp of padding zero": Fault('* LN_2, -float("inf")', "* LN_2, 0.0"),
    "outputs not divided": Fault("sums / total[:, None]", "sums"),
    "tail of keys skipped": Fault("tl.range(whole, seen, KEYS", "tl.range(whole, whole, KEYS"),
    "tail loaded past its end": Fault("(rows < end - start)", "(rows < end - start + 1)"),
    "padding not zeroed": Fault("tl.where((rows < end)[:, None], x, 0.0)", "x"),
    "padding not written": Fault("(rows < length)[:, None]", "(rows < end)[:, None]"),
    "features past D written": Fault(
        "inside = (rows < length)[:, None] & (d < D)",
        "inside = (rows < length)[:, None] & (d <= D)",
    ),
    "features past D read": Fault("inside = (d < D)[None, :]", "inside = (d <= D)[None, :]"),
    "sums kept in bf16": Fault(
        "sums * correction[:, None])", "(sums * correction[:, None]).to(v.dtype).to(tl.float32))"
    ),
    "values of the first head": Fault(
        "v_ptr + b * stride_vb + n * stride_vn", "v_ptr + b * stride_vb"
    ),
    "keys of the first sample": Fault("k_ptr + b * stride_kb + n", "k_ptr + n"),
    "32-bit rows": Fault("rows.to(tl.int64)[:, None] * stride", "rows[:, None] * stride", far=True),
    "delta missing in dq": _backward(" - delta[:, None]", ""),
    "delta missing in dk": _backward("-delta[None, :]", "0.0 * delta[None, :]"),
    "delta of the first head": _backward("delta_ptr + row\n", "delta_ptr\n"),
    "dq unscaled": _backward("dq * scale", "dq"),
    "dk unscaled": _backward("dk * scale", "dk"),
    "dv scaled": _backward("head, dv,", "head, dv * scale,"),
    "probabilities not normalised in dq": _backward(" - lse[:, None]", ""),
    "probabilities not normalised in dk": _backward(" - (lse * LOG2_E)[None, :]", ""),
    "log-sum-exp in base 2 in dq": _backward("other=0.0) * LOG2_E", "other=0.0)"),
    "gradients of scores not through the softmax": _backward("ds = p * (", "ds = ("),
    "tail of queries skipped": _backward("tl.range(whole, seeing", "tl.range(whole, whole"),
    "tail of keys skipped in dq": _backward("tl.range(whole, seen,", "tl.range(whole, whole,"),
    "queries of padding counted": _backward(
        "mask=rows < end, other=other", "mask=rows < end + 9, other=other"
    ),
    "dk and dv exchanged": _backward(
        "return tl.dot(ds.to(q.dtype), q, dk), dv", "return dv, tl.dot(ds.to(q.dtype), q, dk)"
    ),
    "q_len ignored": Fault("if q_len_ptr is not None:", "if False:", own=True),
    "queries of the first sample": Fault("tl.load(q_len_ptr + b)", "tl.load(q_len_ptr)", own=True),
    "queries of a sample without keys": Fault(
        "tl.where(keys > 0, queries, 0)", "queries", own=True
    ),
    "keys masked as queries": Fault(
        "_mask(tl.dot(q, tl.trans(k)), start, keys,",
        "_mask(tl.dot(q, tl.trans(k)), start, end,",
        own=True,
    ),
    "as many blocks of keys as of queries": _backward(
        "place(num_heads, key_length, KEYS)", "place(num_heads, length, KEYS)", own=True
    ),
    "dk where as many rows as queries end": _backward(
        "(b * key_length * num_heads + n) * D", "(b * length * num_heads + n) * D", own=True
    ),
    "as many queries as keys in dk": _backward(
        "seeing = tl.where(first < end, queries, 0)", "seeing = tl.where(first < end, end, 0)", True
    ),
}

_names = count()


@pytest.fixture
def triton_impl(tmp_path, monkeypatch) -> ModuleType:
    if "triton_impl" not in implementations(ROOM) or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.syspath_prepend(tmp_path)
    return implementations(ROOM)["triton_impl"]


def planted(fault: Fault, folder: Path, impl: ModuleType) -> dict[str, object]:
    """The kernels by name, made anew from sources with the mistake in one of them."""
    room = Path(impl.__file__).parent
    names = {module: f"planted_{next(_names)}_{module}" for module in KERNELS}
    kernels = {}
    for module, name in names.items():
        source = (room / f"{module}.py").read_text()
        if module == fault.module:
            assert fault.old in source or not fault.old, (
                "the kernels have changed: plant this mistake anew"
            )
            source = source.replace(fault.old, fault.new)
        source = source.replace(f"{impl.__package__}.triton_kernels", names["triton_kernels"])
        (folder / f"{name}.py").write_text(source)
        loaded = importlib.import_module(name)
        kernels |= {kernel: getattr(loaded, kernel) for kernel in KERNELS[module]}
    return kernels


@cache
def drawn(seed: int) -> tuple[Truth, list[Tensor]]:
    """Two samples whose padding is NaN, and what a right kernel of these roundings returns."""
    generator = torch.Generator().manual_seed(seed)
    inputs = draw_inputs((2, 140, 2, HEAD_DIM), generator, torch.bfloat16)
    for x, item in itertools.product(inputs, range(2)):
        x[item, LENGTHS[item] :] = torch.nan
    truth = Truth.of(inputs, LENGTHS, SCALE)
    return truth, truth.emulated("triton_impl")


@cache
def drawn_own(seed: int) -> tuple[Truth, list[Tensor]]:
    """Three samples with queries of their own: one without keys, one with few queries."""
    generator = torch.Generator().manual_seed(seed)
    queries, lengths = [40, 40, 7], [0, 70, 66]
    q, _, _, dout = draw_inputs((3, 40, 1, HEAD_DIM), generator, torch.bfloat16)
    k, v, *_ = draw_inputs((3, 70, 1, HEAD_DIM), generator, torch.bfloat16)
    for x, numbers in ((q, queries), (dout, queries), (k, lengths), (v, lengths)):
        for item in range(3):
            x[item, numbers[item] :] = torch.nan
    truth = Truth.of([q, k, v, dout], lengths, SCALE, queries)
    return truth, truth.emulated("triton_impl")


def inspect(seed: int, own: bool = False) -> None:
    """Forward first, so that a mistake there costs no backward."""
    impl = implementations(ROOM)["triton_impl"]
    truth, golden = drawn_own(seed) if own else drawn(seed)
    *tensors, dout = truth.inputs
    arguments = *tensors, torch.tensor(truth.lengths), SCALE
    q_len = None if truth.queries is None else torch.tensor(truth.queries)
    out, lse = impl.forward(*arguments, None, q_len)
    truth.judge_out("triton_impl", out, golden)
    truth.judge_lse(lse)
    gradients = impl.backward(dout, out, lse, *arguments, q_len)
    truth.judge_gradients("triton_impl", list(gradients), golden)


def inspect_far(seed: int) -> None:
    near = draw_inputs((1, 3, 1, 16), torch.Generator().manual_seed(seed), torch.bfloat16)
    far = [far_apart(x.shape, (16, 2**30 + 8, 16, 1)).copy_(x) for x in near]
    results = run("triton_impl", far, [3], SCALE)
    for result, expected in zip(results, plain(near, [3], SCALE, torch.bfloat16), strict=True):
        torch.testing.assert_close(result, expected.to(result.dtype), rtol=2**-5, atol=2**-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, triton_impl, tmp_path, monkeypatch):
    for name, kernel in planted(FAULTS[fault], tmp_path, triton_impl).items():
        monkeypatch.setattr(triton_impl, name, kernel)
    for seed in SEEDS:
        with pytest.raises(AssertionError):
            if FAULTS[fault].far:
                inspect_far(seed)
            else:
                inspect(seed, FAULTS[fault].own)
            pytest.fail(f"nothing noticed: {fault}", pytrace=False)


def test_right_kernels_raise_no_alarm(triton_impl, tmp_path, monkeypatch):
    """Loaded as those with mistakes are."""
    for name, kernel in planted(Fault("", ""), tmp_path, triton_impl).items():
        monkeypatch.setattr(triton_impl, name, kernel)
    for seed in RIGHT_SEEDS:
        inspect(seed)
    for seed in RIGHT_SEEDS[:5]:
        inspect(seed, own=True)
    inspect_far(0)
