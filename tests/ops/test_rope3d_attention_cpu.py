"""The C++ attention: instruction sets, ends of tiles, threads, and the memory it leaves alone."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kit import resident
from hunyuan_fast.dispatch import explain, implementations, use
from hunyuan_fast.ops import attention
from tests.kit.emulation import FlashAttention, plain_attention
from tests.kit.memory import Fenced, poisoned_memory
from tests.kit.numerics import assert_as_good_as, assert_equal

ROOM = "rope3d_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
needs_resident = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of resident memory"
)


@pytest.fixture
def cpu_impl():
    if "cpu_impl" not in implementations(ROOM):
        pytest.skip("the native module is not built")
    return implementations(ROOM)["cpu_impl"]


@pytest.fixture
def native(cpu_impl):
    return cpu_impl._C


def draw(shape, generator, dtype=torch.float32) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def run(module, inputs, lengths=None, scale=0.2) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = inputs
    kv_len = None if lengths is None else torch.tensor(lengths)
    out, lse = module.forward(q, k, v, kv_len, scale)
    return [out, lse, *module.backward(dout, out, lse, q, k, v, kv_len, scale)]


def truth(inputs, lengths, scale, dtype=torch.float64) -> list[Tensor]:
    q, k, v, dout = (x.to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = plain_attention(*leaves, lengths, scale)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(results, inputs, lengths, scale, names=("out", "lse", "dq", "dk", "dv")) -> None:
    """As the tests of the room judge: against plain torch and an emulated flash kernel."""
    q, k, v, dout = inputs
    kernel = FlashAttention()
    out, lse = kernel.forward(q, k, v, lengths, scale)
    golden = [out, lse, *kernel.backward(dout, out, lse, q, k, v, lengths, scale)]
    single = q.dtype == torch.float32
    judge = partial(
        assert_as_good_as, factor=3.0 if single else 2.0, rms_factor=2.0 if single else 1.15
    )
    exact, plain = truth(inputs, lengths, scale), truth(inputs, lengths, scale, q.dtype)
    for i, name in enumerate(names):
        if name != "lse":
            judge(results[i], exact[i], plain[i], golden[i], name=name)
    torch.testing.assert_close(results[1].double(), exact[1], rtol=1e-6, atol=2**-12)


@each_dtype
@pytest.mark.parametrize("head_dim", [1, 3, 17, 31, 33, 50, 66, 100, 129, 192, 257])
def test_ends_of_heads(cpu_impl, head_dim, dtype, generator):
    """Features past the last vector, and odd ones, which share a word with nothing."""
    lengths = [35, 18]
    inputs = draw((2, 37, 2, head_dim), generator, dtype)
    check(run(cpu_impl, inputs, lengths), inputs, lengths, 0.2)


@each_dtype
@pytest.mark.parametrize("length", [2, 15, 16, 17, 31, 33, 95, 97, 193, 389, 777])
def test_ends_of_sequences(cpu_impl, length, dtype, generator):
    """Queries and keys past the last group of rows, vector, tile and chunk."""
    inputs = draw((1, length, 6, 8), generator, dtype)
    check(run(cpu_impl, inputs, [length], 0.3), inputs, [length], 0.3)


@each_dtype
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(cpu_impl, scale, dtype, generator):
    inputs = draw((1, 45, 2, 24), generator, dtype)
    check(run(cpu_impl, inputs, [45], scale), inputs, [45], scale)


@each_dtype
def test_the_highest_score_may_come_last(cpu_impl, dtype, generator):
    """Each tile of keys raises the maximum, so that all earlier results are scaled down."""
    inputs = draw((1, 800, 1, 16), generator, dtype)
    inputs[1] *= torch.linspace(0.1, 4.0, 800)[:, None, None].to(dtype)
    inputs[0][...] = inputs[0].abs() + 0.5
    inputs[1][...] = inputs[1].abs()
    # Forward only: the gradients of the few keys that count share their few rounding errors.
    check(run(cpu_impl, inputs, [800], 0.25), inputs, [800], 0.25, names=("out", "lse"))


def test_scores_of_minus_infinity_weigh_nothing(cpu_impl, generator):
    """Also where a whole tile of keys has no other."""
    q, k, v, _ = draw((1, 600, 1, 4), generator)
    q, k = q.abs(), k.abs()
    k[:, :400] = -torch.inf
    out, lse = cpu_impl.forward(q, k, v, None, 0.5)
    wanted, wanted_lse = cpu_impl.forward(
        q[:, 400:].contiguous(), k[:, 400:].contiguous(), v[:, 400:].contiguous(), None, 0.5
    )
    torch.testing.assert_close(out[:, 400:], wanted)
    torch.testing.assert_close(lse[..., 400:], wanted_lse)


@each_dtype
def test_a_single_key_has_no_gradient_but_that_of_its_value(cpu_impl, dtype, generator):
    inputs = draw((1, 1, 3, 300), generator, dtype)
    out, _, dq, dk, dv = run(cpu_impl, inputs)
    assert_equal(out, inputs[2])
    assert not dq.any()
    assert not dk.any()
    torch.testing.assert_close(dv, inputs[3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [((1, 212, 3, 64), None), ((3, 900, 2, 40), [900, 13, 411]), ((2, 50, 1, 16), [0, 50])],
)
def test_any_number_of_threads_gives_the_same_bits(cpu_impl, shape, lengths, dtype, generator):
    """Blocks of queries depend on it, and the order in which chunks add to dq would."""
    inputs = draw(shape, generator, dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(run(cpu_impl, inputs, lengths))
    finally:
        torch.set_num_threads(before)
    for results in found[1:]:
        for result, expected in zip(results, found[0], strict=True):
            assert_equal(result, expected)


@each_dtype
@pytest.mark.parametrize("lengths", [None, [30, 0], [7, 30]], ids=str)
def test_nothing_else_is_written(cpu_impl, native, lengths, dtype, generator):
    """All outputs between canaries, rows and ends alike, and every element of them written."""
    shape = (2, 30, 2, 21)
    q, k, v, dout = draw(shape, generator, dtype)
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    out, dq, dk, dv = (Fenced(shape, dtype, gap=5) for _ in range(4))
    lse = Fenced((2, 2, 30), torch.float32)
    with poisoned_memory():
        native.rope3d_attention_forward_cpu(q, k, v, kv_len, None, 0.2, out.view, lse.view, 2)
        native.rope3d_attention_backward_cpu(
            *(dout, out.view, lse.view, q, k, v, kv_len, None, 0.2, dq.view, dk.view, dv.view, 2)
        )
    found = (out, lse, dq, dk, dv)
    for fenced, expected in zip(found, run(cpu_impl, (q, k, v, dout), lengths), strict=True):
        fenced.check()
        assert_equal(fenced.view, expected)


@each_dtype
def test_nothing_else_is_read(cpu_impl, dtype, generator):
    """Between the rows of q, k, v, out and dout lies NaN."""
    shape = (1, 29, 2, 13)
    inputs = draw(shape, generator, dtype)
    fenced = []
    for x in inputs:
        room = torch.full((1, 31, 4, 40), torch.nan, dtype=dtype)
        view = room[:, 1:30, 1:3, 9:22]
        view.copy_(x)
        fenced.append(view)
    for result, expected in zip(run(cpu_impl, fenced), run(cpu_impl, inputs), strict=True):
        assert_equal(result, expected)


def test_subnormal_neighbours_survive_flushing(cpu_impl, generator):
    """A word of two bfloat16 is a subnormal float where its upper half is zero."""
    inputs = draw((1, 20, 1, 8), generator, torch.bfloat16)
    for x in inputs:
        x[..., 1::2] = 0
    expected = run(cpu_impl, inputs)
    if not torch.set_flush_denormal(True):
        pytest.skip("the processor does not flush subnormal numbers")
    try:
        for result, wanted in zip(run(cpu_impl, inputs), expected, strict=True):
            assert_equal(result, wanted)
    finally:
        torch.set_flush_denormal(False)


def test_who_answers(cpu_impl, native):
    q = torch.zeros(1, 4, 1, 8)

    def reasons(x):
        return explain(ROOM, x, x, x, None, 1.0)

    assert "float64" in reasons(q.double())["cpu_impl"]
    assert "it is on meta" in cpu_impl.supports(*[q.to("meta")] * 3, None, 1.0)
    assert reasons(q.bfloat16())["cpu_impl"] is None
    expected = "library_impl is faster" if native.cpu_isa() == "plain" else None
    assert (reasons(q)["cpu_impl"] is None) == (expected is None)


def test_the_launchers_refuse_what_does_not_fit(native):
    x, lse = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 3)
    lengths = torch.tensor([3, 1])

    def call(**changed):
        given = {"q": x, "k": x, "v": x, "kv_len": lengths, "q_len": None, "scale": 1.0}
        given |= {"out": x.clone(), "lse": lse} | changed
        native.rope3d_attention_forward_cpu(*given.values(), 1)

    call()
    for words, changed in {
        "q must be float32": {"q": x.double()},
        "not empty": {"q": x[:0]},
        "k does not fit": {"k": x[:, :2]},
        "v must be float32, got bfloat16": {"v": x.bfloat16()},
        "out must be contiguous in its last": {"out": torch.zeros(2, 3, 5, 4).mT},
        "lse does not fit": {"lse": lse[:1]},
        "lse must be contiguous": {"lse": torch.zeros(2, 4, 6)[..., ::2][..., :3]},
        r"kv_len must be \(B,\)": {"kv_len": lengths[:1]},
        "kv_len must be int32": {"kv_len": lengths.float()},
        r"\[0, 3\], got 4": {"kv_len": lengths + 1},
    }.items():
        with pytest.raises(ValueError, match=words):
            call(**changed)


@needs_resident
def test_scores_are_never_stored(cpu_impl, generator):
    """A call takes, beyond its results, less than half of what a head's scores would in bf16."""
    q, k, v, dout = draw((2, 4608, 2, 64), generator, torch.bfloat16)
    kv_len = torch.tensor([4392, 4608])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with use("cpu_impl", ROOM):
        grown = resident.growth(lambda: attention(*leaves, kv_len=kv_len).backward(dout))
    assert grown - 4 * q.nbytes < 4608 * 4608


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_lower_instruction_sets(isa):
    files = [__file__, str(Path(__file__).with_name("test_rope3d_attention.py"))]
    wanted = "ends_of or any_scale or last or nothing_else or single_key or as_accurate"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        + ["-k", f"({wanted}) and not library and not reference and not triton and not cuda"],
        env={**os.environ, "HUNYUAN_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
