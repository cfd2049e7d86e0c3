"""Every op takes two ways, through torch.library and past it: who takes which, to the same end."""

import importlib.util
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hunyuan_fast import ops
from hunyuan_fast.ops import operator
from hunyuan_fast.ops.operator import define
from tests.kit.numerics import assert_equal
from tests.ops.operator_cases import (
    CASES,
    HEADED,
    ROWS,
    assert_same,
    differentiate,
    draw,
    each_case,
    run,
)

# ---- an op whose second result is None: empty to whom torch.library answers


def _probe_kernel(x: Tensor, factor: float, *_: object) -> tuple[Tensor, None]:
    return x * factor, None


def _probe_fake(x: Tensor, *_: object) -> tuple[Tensor, None]:
    return x.new_empty(x.shape), None


SAVED: list[float] = []


def _probe_save(ctx, inputs, output) -> None:
    ctx.factor = inputs[1]
    SAVED.append(ctx.factor)


def _probe_gradients(ctx, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return dy * ctx.factor, *[None] * 5


PROBE = define(
    "operator_probe(Tensor x, float factor, SymInt count, bool flag, ScalarType? dtype, Tensor? t) "
    "-> (Tensor, Tensor)",
    _probe_kernel,
    _probe_fake,
    save=_probe_save,
    gradients=_probe_gradients,
)


def probe(x: Tensor, count: int = 1, t: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return PROBE(x, 3.0, count, True, torch.float32, t)


def takes_the_short_way(x: Tensor, count: int = 1, t: Tensor | None = None) -> bool:
    return probe(x, count, t)[1] is None


class Seen(TorchDispatchMode):
    """A watcher: collects the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


each_way = pytest.mark.parametrize("way", [nullcontext, Seen])


# ---- who watches


def test_nobody_watches_a_plain_call():
    x = torch.randn(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert takes_the_short_way(x)
    with torch.inference_mode():
        assert takes_the_short_way(x)
    assert takes_the_short_way(torch.nn.Parameter(x), t=x.clone().requires_grad_())
    assert takes_the_short_way(x)


WATCHERS = {
    "dispatch mode": Seen,
    "fake tensor mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "function mode": lambda: torch.device("cpu"),
    "profiler": torch.profiler.profile,
    "autograd profiler": torch.autograd.profiler.profile,
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_who_counts_as_watching(watcher, requires_grad):
    x = torch.randn(3, requires_grad=requires_grad)
    with WATCHERS[watcher]():
        assert not takes_the_short_way(x)
    assert takes_the_short_way(x)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "trace": lambda f, x: torch.jit.trace(f, x, check_trace=False),
    "make_fx": lambda f, x: make_fx(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore")
def test_transforms_and_tracers_count_as_watching(transform):
    ways = []

    def look(x: Tensor) -> Tensor:
        with torch.no_grad():
            ways.append(takes_the_short_way(x.detach()))
        return x + 1

    TRANSFORMS[transform](look, torch.randn(2, 3))
    assert ways and not any(ways)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_counts_as_watching(backend):
    compiled = torch.compile(probe, fullgraph=True, backend=backend)
    assert compiled(torch.randn(3))[1] is not None


def test_what_is_not_plain_goes_through_the_library():
    x = torch.randn(3)
    own = x.as_subclass(type("Own", (torch.Tensor,), {}))
    assert not takes_the_short_way(own)
    assert not takes_the_short_way(x, t=own)
    assert not takes_the_short_way(FakeTensorMode().from_tensor(x))
    assert not takes_the_short_way(x, count=type("Count", (int,), {})(2))
    symbolic = []
    traced = make_fx(lambda x: symbolic.append(x.shape[0]) or x + 1, tracing_mode="symbolic")
    traced(torch.randn(3))
    assert isinstance(symbolic[0], torch.SymInt)
    assert not takes_the_short_way(x, count=symbolic[0])


@pytest.mark.parametrize(("module", "name"), operator._SIGNS, ids=lambda part: str(part))
def test_without_a_sign_everybody_watches(module, name, monkeypatch):
    spec = importlib.util.spec_from_file_location("operator_again", operator.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert not again._watched()
    with monkeypatch.context() as patch:
        patch.delattr(module, name)
        spec.loader.exec_module(again)
    assert again._watched()


def test_a_profile_names_the_operators(generator):
    with torch.profiler.profile() as profile:
        for case in CASES:
            run(*draw(case, generator))
    names = {event.name for event in profile.events()}
    for name in ("fused_modulation", "gelu_tanh", "qk_norm_rope", "attention"):
        assert {f"hunyuan_fast::{name}", f"hunyuan_fast::{name}_bwd"} <= names


# ---- both ways end the same


@each_case
def test_both_ways_give_the_same_bits(case, generator):
    function, leaves = draw(case, generator)
    results = function(*leaves)
    name = case.split()[0]
    assert results[-1].grad_fn is None or results[-1].grad_fn.name() == f"{name}Backward"
    short = (*(t.detach() for t in results), *differentiate(results, leaves))
    with Seen() as seen:
        through_library = run(function, leaves)
    shared = {
        "concat_gelu_tanh": "gelu_tanh",
        "upsample_causal_conv3d": "causal_conv3d",
        "group_norm_silu_conv3d": "group_norm_silu",
    }
    operator_of = shared.get(name, name)
    wanted = {f"hunyuan_fast.{name}.default", f"hunyuan_fast.{operator_of}_bwd.default"}
    assert wanted <= seen.names
    assert_same(through_library, short)
    with torch.no_grad():
        assert_same(function(*leaves), short[: len(results)])
        with Seen():
            assert_same(function(*leaves), short[: len(results)])


@each_case
def test_backward_may_take_another_way_than_forward(case, generator):
    function, leaves = draw(case, generator)
    expected = run(function, leaves)
    results = function(*leaves)
    with Seen():
        gradients = differentiate(results, leaves)
    assert_same(gradients, expected[len(results) :])
    with Seen():
        results = function(*leaves)
    assert_same(differentiate(results, leaves), gradients)


def test_what_a_call_does_not_have_is_none_or_empty():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for way in (nullcontext, Seen):
        with way():
            y, nothing = probe(x)
            assert_equal(y.detach(), 3 * x.detach())
            assert_equal(*torch.autograd.grad(y, x, torch.ones_like(x)), torch.full_like(x, 3))
        if nothing is not None:
            assert nothing.shape == (0,) and nothing.dtype == x.dtype
    opcheck(torch.ops.hunyuan_fast.operator_probe.default, (x, 3.0, 1, True, None, x))
    with FakeTensorMode():
        assert probe(torch.empty(3))[1].shape == (0,)


@each_case
def test_compiles_whole_forward_and_backward(case, generator):
    function, leaves = draw(case, generator)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, leaves), run(function, leaves))


@each_case
def test_tensors_without_memory_have_the_shapes_of_real_ones(case, generator):
    function, leaves = draw(case, generator)
    expected = run(function, leaves)
    nowhere = [t.detach().to("meta").requires_grad_() for t in leaves]
    for got, wanted in zip(run(function, nowhere), expected, strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


# ---- who takes part in autograd


@each_way
def test_nothing_is_kept_where_no_gradient_can_be_asked_for(way):
    with way():
        for requires_grad, grad_mode in ((True, True), (True, False), (False, True)):
            SAVED.clear()
            with torch.set_grad_enabled(grad_mode):
                probe(torch.randn(3, requires_grad=requires_grad))
            assert len(SAVED) == (requires_grad and grad_mode)


@each_way
@each_case
def test_second_derivative_is_refused(case, way, generator):
    function, leaves = draw(case, generator)
    with way():
        results = function(*leaves)
        gradients = differentiate(results, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{CASES[case][2]} has no second derivative"):
            sum(t.sum() for t in gradients).backward()


@each_case
def test_saved_tensors_can_be_packed(case, generator):
    function, leaves = draw(case, generator)
    expected = run(function, leaves)
    packed = []
    with saved_tensors_hooks(
        lambda t: packed.append(t.detach().numpy().copy()) or packed[-1], torch.from_numpy
    ):
        results = function(*leaves)
    assert packed
    assert_same(differentiate(results, leaves), expected[len(results) :])


@each_way
@pytest.mark.parametrize("reentrant", [False, True])
@each_case
def test_checkpointing(case, reentrant, way, generator):
    """Forward by either way; what is computed again in backward takes the short one."""
    function, leaves = draw(case, generator)
    expected = run(function, leaves)
    with way():
        results = checkpoint(function, *leaves, use_reentrant=reentrant)
    assert_same(tuple(t.detach() for t in results), expected[: len(results)])
    # not autograd.grad, which reentrant checkpoints refuse
    sum(t.sin().sum() for t in results if t.requires_grad).backward()
    assert_same(tuple(t.grad for t in leaves), expected[len(results) :])


@pytest.mark.parametrize("kept", [False, True])
def test_selective_checkpointing_can_keep_an_op(kept, generator, monkeypatch):
    calls = []
    module = importlib.import_module("hunyuan_fast.ops.rope3d_attention")
    select = module.select
    monkeypatch.setattr(module, "select", lambda *args: calls.append(args) or select(*args))
    function, leaves = draw("attention", generator)
    expected = run(function, leaves)
    assert len(calls) == 2
    policy = [torch.ops.hunyuan_fast.attention.default] if kept else []
    context_fn = partial(create_selective_checkpoint_contexts, policy)
    results = checkpoint(function, *leaves, use_reentrant=False, context_fn=context_fn)
    assert_same(differentiate(results, leaves), expected[1:])
    assert len(calls) == 2 + (2 if kept else 3)


@each_case
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop(case, generator):
    function, (first, *others) = draw(case, generator)
    with torch.no_grad():
        several = torch.stack([first, first.flip(1)])
        in_dims = (0, *[None] * len(others))
        mapped = torch.func.vmap(function, in_dims)(several, *others)
        for i in range(2):
            assert_same(tuple(t[i] for t in mapped), function(several[i], *others))


@each_case
def test_gradients_of_torch_func_are_refused(case, generator):
    function, leaves = draw(case, generator)
    with pytest.raises(RuntimeError, match=r"use an autograd\.Function with functorch"):
        torch.func.grad(lambda *tensors: function(*tensors)[0].sum())(*leaves)


@each_case
def test_derivatives_in_forward_mode_are_refused(case, generator):
    """And not answered by zeros, which is what a kernel that sees no tangent would give."""
    function, leaves = draw(case, generator)
    leaf, *others = (t.detach() for t in leaves)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda t: function(t, *others)[0], (leaf,), (leaf,))
    with forward_ad.dual_level():
        expected = function(leaf, *others)  # nothing to differentiate
        with pytest.raises(RuntimeError, match="use reverse mode"):
            function(forward_ad.make_dual(leaf, leaf), *others)
    assert_same(function(leaf, *others), expected)


# ---- who writes

WRITERS = {
    "gelu_tanh": (ROWS, lambda x, out: ops.gelu_tanh(x, out=out)),
    "attention": (HEADED, lambda x, out: ops.attention(x, x, x, out=out)),
}
each_writer = pytest.mark.parametrize("writer", WRITERS)


@each_way
@each_writer
def test_writing_raises_the_version(writer, way, generator):
    shape, write = WRITERS[writer]
    x, out = torch.randn(shape, generator=generator), torch.zeros(shape)
    expected = write(x, torch.zeros(shape))
    before = out._version
    with way():
        assert write(x, out) is out
    assert out._version > before
    assert_equal(out, expected)


@each_way
@each_writer
def test_writing_into_what_autograd_has_kept_is_noticed(writer, way, generator):
    shape, write = WRITERS[writer]
    leaf = torch.randn(shape, generator=generator, requires_grad=True)
    kept = leaf.sin()
    squared = kept.square()
    with torch.no_grad(), way():
        write(torch.randn(shape, generator=generator), kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@each_way
@each_writer
def test_tensors_of_inference_have_no_version(writer, way, generator):
    shape, write = WRITERS[writer]
    ordinary = torch.randn(shape, generator=generator)
    expected = write(ordinary, torch.zeros(shape))
    with torch.inference_mode(), way():
        assert_equal(write(ordinary.clone(), torch.zeros(shape)), expected)
        into = torch.zeros(0).new_zeros(shape)
        assert into.is_inference()
        assert_equal(write(ordinary, into), expected)
