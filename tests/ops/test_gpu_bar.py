"""What every kernel for GPUs must hold, beside being right: on small calls of every op.

Memory holds NaN throughout, as in all tests of ops. How exact results are, each op's own tests ask.
"""

import pytest
import torch
from torch import Tensor

from tests.kit import gpu
from tests.kit.inputs import LAYOUTS, with_layout
from tests.kit.memory import Fenced, far_apart
from tests.ops.gpu_cases import BATCH, CASES, LENGTH, OURS, Case, who

pytestmark = pytest.mark.gpu

each_own = who(libraries=False)
each_one = who(libraries=True)


@pytest.fixture
def device() -> torch.Generator:
    """Random numbers of the GPU."""
    return torch.Generator("cuda").manual_seed(7)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """As near as another order of summation keeps them; wrong addresses are far off."""
    for index, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert got.shape == wanted.shape, index
        assert torch.equal(got.isfinite(), wanted.isfinite()), index
        error = (got.double() - wanted.double()).nan_to_num(0, 0, 0).norm()
        assert error <= 2**-6 * (wanted.double().nan_to_num(0, 0, 0).norm() + 1e-6), index


@each_own
def test_the_same_bits_at_every_run(name, case, device):
    tensors, fixed = CASES[case].draw(device), CASES[case].fixed(BATCH, LENGTH)
    gpu.assert_same_bits_at_every_run(lambda: CASES[case].run(name, tensors, fixed))


@each_one
def test_in_a_cuda_graph(name, case, device):
    """Forward and backward, with no word between host and device."""
    tensors, fixed = CASES[case].draw(device), CASES[case].fixed(BATCH, LENGTH)
    gpu.assert_a_graph_replays(lambda: CASES[case].run(name, tensors, fixed), tensors)


@each_one
@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != "expanded"])
def test_layouts_do_not_matter(name, case, layout, device):
    tensors, fixed = CASES[case].draw(device), CASES[case].fixed(BATCH, LENGTH)
    expected = CASES[case].run(name, tensors, fixed)
    laid = [with_layout(t, layout) if t.dim() > 1 else t for t in tensors]
    assert_close(CASES[case].run(name, laid, fixed), expected)


@each_own
def test_no_samples_give_no_results(name, case, device):
    """And gradients of zero of what samples share."""
    tensors, fixed = CASES[case].draw(device, 0), CASES[case].fixed(0, LENGTH)
    for result in CASES[case].run(name, tensors, fixed):
        assert not result.numel() or not result.any()


def samples_of(each: Case, count: int, tensors: list[Tensor], which: slice) -> list[Tensor]:
    """The tensors of some of ``count`` samples."""
    return [t[which] if len(t) == count else t for t in tensors]


@pytest.mark.whole_gpu
@each_own
def test_samples_past_two_to_the_31_apart(name, case, device):
    """Views with enormous strides: small calls that only 64-bit addresses can serve."""
    each = CASES[case]
    tensors, fixed = each.draw(device, 2, LENGTH), each.fixed(2, LENGTH)
    expected = each.run(name, tensors, fixed)
    apart = gpu.size(2**31 + 64, 2**16)
    far = [
        far_apart(t.shape, (apart, *t.stride()[1:]), t.dtype, t.device).copy_(t)
        if len(t) == 2
        else t
        for t in tensors
    ]
    assert_close(each.run(name, far, fixed), expected)


@pytest.mark.whole_gpu
@each_own
def test_tensors_past_two_to_the_31(name, case, device):
    """Of many samples the first and the last are what they are alone, and so are their gradients.

    Gradients of what samples share are sums over all of them, and are not compared.
    """
    each, length = CASES[case], gpu.size(1024, LENGTH)
    if (name, each.op) == ("cuda_impl", "causal_conv3d"):  # whose gradients are the library's
        each = each._replace(trained=False)
    of_samples = max(torch.Size(shape).numel() for shape in each.shapes(1, length)) * each.grows
    count = gpu.rows_past_two_to_the_31(of_samples)
    tensors, fixed = each.draw(device, count, length), each.fixed(count, length)
    whole = each.run(name, tensors, fixed)
    for which in (slice(0, 2), slice(count - 2, count)):
        some = samples_of(each, count, tensors, which)
        alone = each.run(name, some, tuple(samples_of(each, count, list(fixed), which)))
        pairs = [(w[which], a) for w, a in zip(whole, alone, strict=True) if len(w) == count]
        assert pairs
        assert_close(*zip(*pairs, strict=True))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64], ids=str
)
def test_fresh_memory_is_poisoned(dtype):
    """All tests of ops rely on it, and so do graphs: what is allocated in one is filled in it."""
    x = torch.empty(1000, dtype=dtype, device="cuda")
    others = (
        x.new_empty(3, 5),
        torch.empty_like(x),
        torch.empty_strided((2, 3), (5, 1), device="cuda"),
    )
    for fresh in (x, *others):
        poison = torch.nan if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max
        expected = torch.full_like(fresh, poison)
        assert torch.equal(fresh.float(), expected.float()) or fresh.float().isnan().all()


def test_a_fence_shows_what_is_written_beside_an_output():
    fence = Fenced((3, 8), torch.bfloat16, gap=2, device="cuda")
    fence.view.fill_(1)
    fence.check()
    fence.view.as_strided((3, 9), (10, 1)).fill_(1)
    with pytest.raises(AssertionError, match="3 elements outside the output were written"):
        fence.check()


def test_every_op_is_held_to_it():
    from hunyuan_fast import dispatch

    with_kernels = {op for op in dispatch.ops() if dispatch.implementations(op).keys() & set(OURS)}
    assert with_kernels == {each.op for each in CASES.values()}
