"""The merge of partial attentions: every implementation against the truth and an oracle."""

import os

import pytest
import torch
from torch import Tensor

from hunyuan_fast.dispatch import explain, implementations, select, use
from hunyuan_fast.kernels.ring_attention import config, reference
from hunyuan_fast.ops import attention, merge_attention, ring_attention
from tests.kit import gpu
from tests.kit.aot import Specialisation, compile_ahead
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.numerics import assert_as_good_as, assert_equal

ROOM = "ring_attention"
MODULE = f"hunyuan_fast.kernels.{ROOM}.triton_impl"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOT_ON_CPU = set() if INTERPRETED else {"triton_impl"}
ON_CPU = tuple(name for name in implementations(ROOM) if name not in NOT_ON_CPU)
FAST = tuple(name for name in ON_CPU if name != "reference")
NAMES = ("out", "lse", "dout", "dlse", "dpart", "dpart_lse")

each_implementation = pytest.mark.parametrize("name", ON_CPU)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def inputs(
    shape: tuple[int, int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    wide: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """out, lse, part, part_lse; some rows have seen nothing in one part, or in both, and hold NaN.

    Log-sum-exps lie so that either part may count for next to nothing.
    """
    batch, length, num_heads, _ = shape
    out, part = (torch.randn(shape, generator=generator).to(wide) for _ in range(2))
    kind = torch.randint(0, 8, (batch, num_heads, length), generator=generator)
    lses = []
    for x, unseen in ((out, (0, 1)), (part, (1, 2))):
        lse = 20 * torch.randn((batch, num_heads, length), generator=generator).to(wide)
        nothing = (kind == unseen[0]) | (kind == unseen[1])
        x.masked_fill_(nothing.transpose(1, 2)[..., None], torch.nan)
        lses.append(lse.masked_fill(nothing, -torch.inf))
    return out, lses[0], part.to(dtype), lses[1]


def gradients(args: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of out and lse; none of lse where it is -inf, and of out where nothing was seen."""
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in args[:2])
    return dout, dlse


def run(
    name: str, args: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None
) -> dict[str, Tensor]:
    """out, lse and the gradients, through the public function."""
    leaves = [x.detach().requires_grad_() for x in args]
    with use(name, ROOM):
        out, lse = merge_attention(*leaves)
        wanted = (out, lse) if dlse is not None else (out,)
        given = (dout, dlse) if dlse is not None else (dout,)
        found = torch.autograd.grad(wanted, leaves, given)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *found), strict=True))


def oracle(
    args: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None, compute: torch.dtype
) -> dict[str, Tensor]:
    """The same by softmax over the two log-sum-exps, and autograd, in another dtype."""
    seen = [x.isfinite() for x in (args[1], args[3])]
    rows = [x.transpose(1, 2)[..., None] for x in seen]
    leaves = [x.detach().to(compute, copy=True).requires_grad_() for x in args]
    out, lse, part, part_lse = leaves
    # rows that have seen nothing are taken out before anything is computed of them
    lses = torch.stack((lse.masked_fill(~seen[0], -1e30), part_lse.masked_fill(~seen[1], -1e30)))
    shares = (lses - lses.amax(0).detach()).exp()
    shares = shares / shares.sum(0)
    first, second = shares.transpose(2, 3)[..., None]
    merged = first * out.masked_fill(~rows[0], 0) * rows[0]
    merged = merged + second * part.masked_fill(~rows[1], 0) * rows[1]
    merged_lse = lses.logsumexp(0)
    known = seen[0] | seen[1]
    total = (merged * dout.to(compute)).sum()
    if dlse is not None:
        total = total + merged_lse.masked_fill(~known, 0).mul(dlse.to(compute)).sum()
    found = torch.autograd.grad(total, leaves)
    unseen = merged_lse.detach().masked_fill(~known, -torch.inf)
    return dict(zip(NAMES, (merged.detach(), unseen, *found), strict=True))


def assert_right(
    actual: dict[str, Tensor], args: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None
) -> None:
    """Tier B, against the oracle in float64 and in the dtype of the accumulator."""
    exact, plain = (oracle(args, dout, dlse, dtype) for dtype in (torch.float64, args[0].dtype))
    for name, x in actual.items():
        truth = exact[name]
        finite = torch.where(truth.isfinite(), truth, 0.0)
        error = torch.where(truth.isfinite(), plain[name].to(x.dtype) - truth, 0.0).abs()
        # of a few numbers the errors are luck: one more unit in the last place of the largest
        worst = error.amax() + 2.0**-23 * finite.abs().amax()
        assert_as_good_as(x, truth, finite + worst, name=name)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 7), (1, 33, 2, 128), (2, 4, 1, 67)])
@each_implementation
def test_against_the_truth(name, shape, dtype, generator):
    args = inputs(shape, generator, dtype)
    dout, dlse = gradients(args, generator)
    assert_right(run(name, args, dout, dlse), args, dout, dlse)
    assert_right(run(name, args, dout, None), args, dout, None)


def test_reference_in_float64(generator):
    args = inputs((2, 9, 3, 5), generator, torch.float64, torch.float64)
    dout, dlse = gradients(args, generator)
    wanted = oracle(args, dout, dlse, torch.float64)
    for name, x in run("reference", args, dout, dlse).items():
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, wanted[name], rtol=1e-12, atol=1e-12)


def test_reference_gradients_by_finite_differences(generator):
    out, lse, part, part_lse = inputs((1, 3, 2, 4), generator, torch.float64, torch.float64)
    args = [x.nan_to_num(neginf=0.0).requires_grad_() for x in (out, lse / 20, part, part_lse / 20)]
    with use("reference", ROOM):
        assert torch.autograd.gradcheck(merge_attention, args)


@pytest.mark.parametrize("scale", [1.0, 50.0])
@each_implementation
def test_parts_of_the_keys_make_the_whole(name, scale, generator):
    """Three parts, one of them without keys for one sample, merged in place."""
    q, k, v = (torch.randn(2, 9, 3, 16, generator=generator) for _ in range(3))
    q = scale * q
    wanted, wanted_lse = attention(q, k, v, return_lse=True)
    out, lse = torch.full(q.shape, torch.nan), torch.full((2, 3, 9), -torch.inf)
    with use(name, ROOM):
        for rows in (slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 9)):
            part, part_lse = plain_part(q, k[:, rows], v[:, rows])
            assert merge_attention(out, lse, part, part_lse, in_place=True)[0] is out
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=1e-5)


def plain_part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
@each_implementation
def test_layouts_do_not_matter(name, layout, generator):
    args = inputs((2, 5, 3, 40), generator, torch.bfloat16)
    dout, dlse = gradients(args, generator)
    wanted = run(name, args, dout, dlse)
    awkward = tuple(with_layout(x, layout) for x in args)
    for key, x in run(name, awkward, with_layout(dout, layout), with_layout(dlse, layout)).items():
        assert_equal(x, wanted[key], name=key)
    out, lse = (with_layout(x, layout) for x in args[:2])
    with use(name, ROOM):
        merge_attention(out, lse, *awkward[2:], in_place=True)
    assert_equal(out, wanted["out"])
    assert_equal(lse, wanted["lse"])


@each_implementation
def test_last_dimension_may_be_strided(name, generator):
    args = inputs((2, 5, 3, 4), generator)
    dout, dlse = gradients(args, generator)
    strided = tuple(x.mT.contiguous().mT for x in args)
    wanted = run(name, args, dout, dlse)
    for key, x in run(name, strided, dout.mT.contiguous().mT, dlse).items():
        assert_equal(x, wanted[key], name=key)
    with use(name, ROOM):
        merge_attention(*strided, in_place=True)
    assert_equal(strided[0], wanted["out"])
    assert_equal(strided[1], wanted["lse"])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4)], ids=str)
@each_implementation
def test_no_rows(name, shape, generator):
    args = inputs(shape, generator)
    results = run(name, args, *gradients(args, generator))
    assert results["out"].shape == results["dpart"].shape == shape
    with use(name, ROOM):
        assert merge_attention(*args, in_place=True)[0] is args[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_implementation
def test_a_bad_element_stays_alone(name, bad, generator):
    args = [x.nan_to_num(neginf=1.0) for x in inputs((1, 4, 2, 20), generator)]
    clean = run(name, tuple(args), *gradients(tuple(args), torch.Generator().manual_seed(0)))
    args[2][0, 1, 1, 3] = bad
    args[1][0, 1, 1] = args[3][0, 1, 1] = 0.0  # both halves count there
    spoiled = run(name, tuple(args), *gradients(tuple(args), torch.Generator().manual_seed(0)))
    difference = spoiled["out"] != clean["out"]
    difference[0, 1, 1] = False
    assert not difference.any()
    assert not spoiled["out"][0, 1, 1, 3].isfinite()


def test_cpu_kernels_do_not_depend_on_the_number_of_threads(generator):
    pytest.importorskip("hunyuan_fast._C")
    args = inputs((2, 300, 3, 128), generator, torch.bfloat16)
    dout, dlse = gradients(args, generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu_impl", args, dout, dlse))
    finally:
        torch.set_num_threads(before)
    for key, x in results[0].items():
        assert_equal(results[1][key], x, name=key)


def test_refusals(generator):
    out, lse, part, part_lse = inputs((2, 3, 2, 4), generator)
    for args, error, words in (
        ((out[0], lse, part, part_lse), ValueError, r"out must be \(B, L, N, D\)"),
        ((out.half(), lse, part, part_lse), TypeError, "out must be float32 or float64"),
        ((out, lse.double(), part, part_lse), TypeError, "lse must have the dtype of out"),
        ((out, lse, part.long(), part_lse), TypeError, "part must hold floating-point"),
        ((out, lse, part[:, 1:], part_lse), ValueError, r"part must have the shape \(2, 3, 2, 4\)"),
        ((out, lse, part, part_lse.mT), ValueError, r"part_lse must have the shape \(2, 2, 3\)"),
        ((out, lse, part.to("meta"), part_lse), ValueError, "part must be on cpu like out"),
    ):
        with pytest.raises(error, match=words):
            merge_attention(*args)
    with pytest.raises(ValueError, match="in_place is for inference"):
        merge_attention(out, lse, part.requires_grad_(), part_lse, in_place=True)


def test_second_derivative_is_refused(generator):
    args = [x.requires_grad_() for x in inputs((1, 2, 2, 4), generator)]
    (grad,) = torch.autograd.grad(merge_attention(*args)[0].sum(), args[2], create_graph=True)
    with pytest.raises(RuntimeError, match="merge_attention has no second derivative"):
        grad.sum().backward()


def test_a_ring_of_one_is_attention(generator):
    q, k, v = (torch.randn(2, 6, 3, 8, generator=generator) for _ in range(3))
    kv_len = torch.tensor([4, 6])
    for given in (kv_len, kv_len[None]):
        found = ring_attention(q, k, v, kv_len=given, group=None, return_lse=True)
        wanted = attention(q, k, v, kv_len=kv_len, return_lse=True)
        for x, y in zip(found, wanted, strict=True):
            assert_equal(x, y)


def triton_impl():
    pytest.importorskip("triton")
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(str(explain(ROOM, torch.zeros(1))["triton_impl"]))
    return implementations(ROOM)["triton_impl"]


def test_refusals_of_implementations(monkeypatch, generator):
    args = inputs((1, 2, 2, 4), generator, torch.float64, torch.float64)
    assert select(ROOM, *args) is reference
    if "cpu_impl" in implementations(ROOM):
        impl = implementations(ROOM)["cpu_impl"]
        assert "out must be float32" in impl.supports(*args)
        assert "part must be float32" in impl.supports(args[0].float(), None, args[2], None)
        assert "out must be on the CPU" in impl.supports(args[0].to("meta"), *args[1:])
        wide = inputs((1, 2, 2, 4), generator)
        assert select(ROOM, *wide) is impl
    impl = triton_impl()
    assert "out must be float32" in impl.supports(*args)
    assert "part must be float32" in impl.supports(args[0].float(), None, args[2], None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "out must be on a CUDA device" in impl.supports(*args)


def test_the_native_functions_check_what_they_get(generator):
    native = pytest.importorskip("hunyuan_fast._C")
    out, lse, part, part_lse = inputs((2, 3, 2, 4), generator)
    for args, words in (
        ((out.double(), lse, part, part_lse, out, lse, 1), "out must be float32, got float64"),
        ((out, lse, part.long(), part_lse, out, lse, 1), "part must be float32, float16 or bf"),
        ((out, lse, part[:, :2], part_lse, out, lse, 1), "part must have the shape of out"),
        ((out, lse.mT, part, part_lse, out, lse, 1), r"lse must be \(B, N, L\)"),
        ((out, lse, part.mT.contiguous().mT, part_lse, out, lse, 1), "part must be contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            native.ring_attention_merge_cpu(*args)


def test_blocks_are_full():
    for dim in (1, 16, 17, 64, 100, 128, 256, 4096):
        block = config.merge_block(dim)
        assert block.width >= dim and block.width & (block.width - 1) == 0
        assert block.rows * block.width >= 2048


def specialisations() -> list[Specialisation]:
    """What the launchers ask for at the model's head size, on three GPUs."""
    cases = []
    strides = ("b", "l", "n")
    for arch in (80, 90, 100):
        for dtype in ("*bf16", "*fp32"):
            block = config.merge_block(128)
            sizes = {"BLOCK_L": block.rows, "BLOCK_D": block.width}
            common = {"module": MODULE, "arch": arch, "num_warps": block.num_warps}
            numbers = {"length": "i32", "num_heads": "i32", "dim": "i32"}
            pointers = {"out_ptr": "*fp32", "lse_ptr": "*fp32", "part_ptr": dtype}
            pointers |= {"part_lse_ptr": "*fp32"}
            forward = pointers | {"new_out_ptr": "*fp32", "new_lse_ptr": "*fp32"} | numbers
            forward |= {f"stride_{x}{s}": "i32" for x in "opr" for s in strides}
            backward = {"dout_ptr": "*fp32", "dlse_ptr": "*fp32"} | pointers | numbers
            backward |= {f"{x}_ptr": "*fp32" for x in ("dfirst", "dfirst_lse", "dpart_lse")}
            backward |= {"dpart_ptr": dtype}
            backward |= {f"stride_{x}{s}": "i32" for x in "gop" for s in strides}
            unaligned = ("length", "num_heads")
            for kernel, signature, more in (
                ("_forward_kernel", forward, {}),
                ("_backward_kernel", backward, {"HAS_DLSE": False}),
            ):
                cases.append(
                    Specialisation(
                        kernel=kernel,
                        signature=signature,
                        constants=sizes | more,
                        unaligned=unaligned,
                        **common,
                    )
                )
    return cases


def test_triton_kernels_compiled_ahead_are_lean():
    pytest.importorskip("triton")
    for report in compile_ahead(specialisations()):
        # what leaves 5 blocks of 128 threads on a multiprocessor
        report.assert_lean(max_registers=96, min_access_bits=32)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(
    "shape",
    gpu.size([(1, 1, 1, 64), (2, 77, 3, 128), (1, 777, 24, 128)], [(1, 1, 1, 64), (2, 7, 3, 128)]),
    ids=str,
)
def test_on_a_gpu(shape, dtype, generator):
    args = inputs(shape, generator, dtype)
    dout, dlse = gradients(args, generator)
    actual = run("triton_impl", tuple(x.cuda() for x in args), dout.cuda(), dlse.cuda())
    assert_right({name: x.cpu() for name, x in actual.items()}, args, dout, dlse)
