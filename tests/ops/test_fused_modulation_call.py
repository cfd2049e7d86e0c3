"""Around the kernels: refusals, registration, compilation, autocast, the short way."""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_fast import ops
from hunyuan_fast.dispatch import explain, implementations, select, use
from hunyuan_fast.kernels.fused_modulation import reference
from tests.kit.numerics import assert_equal
from tests.ops.fused_modulation_cases import (
    BOTH,
    FUNCTIONS,
    GATE,
    NORM,
    ROOM,
    assert_same_bits,
    call_function,
    draw_call,
    each_function,
    each_implementation,
    run,
)

FORWARD = torch.ops.hunyuan_fast.fused_modulation.default
BACKWARD = torch.ops.hunyuan_fast.fused_modulation_bwd.default


def op_arguments(call):
    t = call.tensors
    return (t["x"], t.get("shift"), t.get("scale"), 1e-6, t.get("y"), t.get("gate"), call.index)


@each_function
def test_second_derivative_is_refused(function, generator):
    call = draw_call(function, (1, 2, 8), generator)
    leaves = [t.requires_grad_() for t in call.tensors.values()]
    results = getattr(ops, function)(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results, leaves, [*call.gradients.values()], create_graph=True)
    with pytest.raises(RuntimeError, match=f"^{function} has no second derivative"):
        gradients[-1].sum().backward()


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16], ids=str)
@each_function
def test_autocast_changes_nothing(function, enabled, generator):
    for dtype in (torch.float32, torch.bfloat16):
        call = draw_call(function, (2, 4, 48), generator, dtype, num_vectors=2)
        outside = run("reference", call)
        with torch.autocast("cpu", enabled):
            inside = run("reference", call)
        assert_same_bits(inside, outside)


@pytest.mark.parametrize("num_vectors", [None, 2])
@each_function
@each_implementation
def test_registration(name, function, num_vectors, generator):
    shape = (1, 2, 16)
    call = draw_call(function, shape, generator, torch.bfloat16, num_vectors=num_vectors)
    with use(name, ROOM):
        args = op_arguments(call)
        residual, _, stats = select(ROOM, *args).forward(*args)
        t, d = call.tensors, call.gradients
        saved = (None, None, None)
        if function != GATE:
            saved = (t["x"] if function == NORM else residual, t["scale"], stats)
        gate = (None, None, None) if function == NORM else (d["residual"], t["y"], t["gate"])
        y_dtype = None if function == NORM else torch.bfloat16
        backward = (d.get("modulated"), *saved, *gate, call.index, y_dtype, 1e-6)
        opcheck(BACKWARD, backward)
        for each in t.values():
            each.requires_grad_()
        opcheck(FORWARD, args)


@each_function
def test_compiles_whole_and_once_for_three_lengths(function, generator):
    counter = CompileCounter()
    public = getattr(ops, function)
    compiled = torch.compile(public, fullgraph=True, backend=counter)
    for length in (6, 10, 14):
        call = draw_call(function, (2, length, 24), generator, num_vectors=2)
        for t in (*call.tensors.values(), call.index):
            if t.shape[1] == length:
                torch._dynamo.mark_dynamic(t, 1)
        tensors = call.tensors.values()
        torch.testing.assert_close(
            compiled(*tensors, index=call.index), public(*tensors, index=call.index), rtol=0, atol=0
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("num_vectors", [None, 2])
@each_function
def test_compiled_gradients(function, num_vectors, generator):
    shape = (2, 6, 24)
    call = draw_call(function, shape, generator, torch.bfloat16, num_vectors=num_vectors)
    compiled = torch.compile(call_function_of(call), fullgraph=True, backend="aot_eager")
    leaves = [t.detach().requires_grad_() for t in call.tensors.values()]
    results = compiled(*leaves)
    gradients = torch.autograd.grad(results, leaves, [*call.gradients.values()])
    expected = call_function(call)
    for name, got in zip(call.tensors, gradients, strict=True):
        assert_equal(got, expected[f"d{name}"], name=name)


def call_function_of(call):
    """The call as a function of its tensors that returns a tuple."""

    def public(*tensors):
        results = getattr(ops, call.function)(*tensors, index=call.index)
        return results if isinstance(results, tuple) else (results,)

    return public


class Seen(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@each_function
def test_whoever_watches_sees_the_operators(function, generator):
    call = draw_call(function, (1, 3, 16), generator, torch.bfloat16)
    alone = call_function(call)
    with Seen() as seen:
        watched = call_function(call)
    assert_same_bits(watched, alone)
    assert str(FORWARD) in seen.names and str(BACKWARD) in seen.names


@pytest.mark.parametrize("way", ["short", "library", "compiled"])
def test_gradients_of_the_residual_alone(way, generator):
    """Where nobody uses the modulated half, its vectors have no gradients."""
    call = draw_call(BOTH, (2, 5, 16), generator, torch.bfloat16)
    leaves = [t.requires_grad_() for t in call.tensors.values()]
    function = ops.gate_residual_layer_norm_modulate
    if way == "compiled":
        function = torch.compile(
            lambda *t: ops.gate_residual_layer_norm_modulate(*t)[:1],
            fullgraph=True,
            backend="aot_eager",
        )
    with Seen() if way == "library" else nullcontext():
        residual, *_ = function(*leaves)
        options = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad(residual, leaves, call.gradients["residual"], **options)
    alone = torch.autograd.grad(
        ops.gate_residual(*leaves[:3]), leaves[:3], call.gradients["residual"]
    )
    vectors = call.tensors["shift"], call.tensors["scale"]
    wanted = (*alone, *(torch.zeros_like(t) for t in vectors))
    for name, got, expected in zip(call.tensors, gradients, wanted, strict=True):
        assert_equal(got, expected, name=name)


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode():
        x, y = torch.empty(2, 5, 8), torch.empty(2, 5, 8, dtype=torch.bfloat16)
        vector, index = torch.empty(2, 3, 8), torch.empty(2, 5, dtype=torch.int64)
        results = ops.gate_residual_layer_norm_modulate(x, y, vector, vector, vector, index=index)
    assert [(t.shape, t.dtype) for t in results] == [((2, 5, 8), torch.float32)] * 2


X, VECTOR, SEVERAL = torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.zeros(2, 5, 4)
INDEX = torch.zeros(2, 3, dtype=torch.int64)
SCALE = (X, VECTOR, VECTOR)
REFUSALS = {
    "x_not_a_tensor": (NORM, ([1.0], VECTOR, VECTOR), {}, "x must be a tensor, got list"),
    "x_integer": (NORM, (X.int(), VECTOR, VECTOR), {}, "x must be float32.*got torch.int32"),
    "x_flat": (NORM, (X[0], VECTOR, VECTOR), {}, r"x must be \(B, L, E\).*\(3, 4\)"),
    "x_narrow": (NORM, (X[..., :0], VECTOR[:, :0], VECTOR[:, :0]), {}, "at least 1"),
    "shift_missing": (NORM, (X, None, VECTOR), {}, "shift must be a tensor, got NoneType"),
    "scale_integer": (NORM, (X, VECTOR, VECTOR.long()), {}, "scale must be float32.*int64"),
    "one_vector_for_all": (NORM, (X, VECTOR[0], VECTOR), {}, r"shift must be \(B, E\)"),
    "other_batch": (NORM, (X, VECTOR, VECTOR[:1]), {}, r"scale.*\(2, 4\).*got \(1, 4\)"),
    "mixed_vectors": (NORM, (X, VECTOR, VECTOR.half()), {}, "shift must have the dtype of sc"),
    "double_vector": (NORM, (X, VECTOR.double(), VECTOR), {}, "shift and x must both be flo"),
    "double_x": (NORM, (X.double(), VECTOR, VECTOR), {}, "both be float64 or neither"),
    "other_device": (NORM, (X, VECTOR.to("meta"), VECTOR), {}, "shift must be on the devic"),
    "eps_zero": (NORM, SCALE, {"eps": 0.0}, "eps must be positive.*got 0.0"),
    "eps_nan": (NORM, SCALE, {"eps": float("nan")}, "eps must be positive"),
    "eps_text": (NORM, SCALE, {"eps": "1e-6"}, "eps must be a number, got str"),
    "y_missing": (GATE, (X, None, VECTOR), {}, "y must be a tensor, got NoneType"),
    "y_integer": (GATE, (X, X.int(), VECTOR), {}, "y must be float32.*got torch.int32"),
    "y_short": (GATE, (X, X[:, :2], VECTOR), {}, r"y must have the shape of x, \(2, 3, 4\)"),
    "y_wider": (GATE, (X.half(), X, VECTOR), {}, "y must have the dtype of x, torch.float16"),
    "y_other_half": (GATE, (X.half(), X.bfloat16(), VECTOR), {}, "float32, got torch.bfloat16"),
    "y_double": (GATE, (X, X.double(), VECTOR), {}, "y must have the dtype.*torch.float64"),
    "y_elsewhere": (GATE, (X, X.to("meta"), VECTOR), {}, "y must be on the device of x, cpu"),
    "gate_of_tokens": (GATE, (X, X, X), {}, r"gate must be \(B, E\) = \(2, 4\).*\(2, 3, 4\)"),
    "gate_of_half": (BOTH, (X, X, VECTOR.half(), VECTOR, VECTOR), {}, "gate must have the dtype"),
    "eps_of_both": (BOTH, (X, X, VECTOR, VECTOR, VECTOR), {"eps": -1}, "eps must be positive"),
    "index_list": (GATE, (X, X, SEVERAL), {"index": [0]}, "index must be a tensor, got list"),
    "index_float": (GATE, (X, X, SEVERAL), {"index": INDEX.float()}, "int32 or int64, got.*float"),
    "index_short": (
        GATE,
        (X, X, SEVERAL),
        {"index": INDEX[:1]},
        r"index must be \(B, L\) = \(2, 3",
    ),
    "index_elsewhere": (GATE, (X, X, SEVERAL), {"index": INDEX.to("meta")}, "on the device of x"),
    "index_of_one": (NORM, SCALE, {"index": INDEX}, r"shift must be with an index \(B, M, E\)"),
    "index_unequal": (NORM, (X, SEVERAL[:, :2], SEVERAL), {"index": INDEX}, r"\(2, 5, 4\) for x"),
    "index_of_none": (GATE, (X, X, SEVERAL[:, :0]), {"index": INDEX}, r"gate must be.*\(2, 0, 4"),
    "index_below": (GATE, (X, X, SEVERAL), {"index": INDEX - 1}, r"\[0, 4\], got -1 to -1"),
    "index_above": (NORM, (X, SEVERAL, SEVERAL), {"index": INDEX + 5}, r"\[0, 4\], got 5 to 5"),
}
OF_TYPE = ("not_a_tensor", "integer", "missing", "mixed", "double", "text", "list", "float")
OF_TYPE += ("wider", "other_half", "gate_of_half")


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    function, args, options, words = REFUSALS[case]
    error = TypeError if any(part in case for part in OF_TYPE) else ValueError
    with pytest.raises(error, match=words):
        getattr(ops, function)(*args, **options)


@each_implementation
def test_values_of_an_index_are_refused_by_every_implementation(name):
    with use(name, ROOM), pytest.raises(ValueError, match=r"index must lie in \[0, M - 1\]"):
        ops.gate_residual(X, X, SEVERAL, index=INDEX + 5)


def test_who_answers_on_the_cpu():
    args = reference.example(torch.device("cpu"))
    reasons = explain(ROOM, *args)
    assert reasons["reference"] is None
    assert reasons["cuda_impl"] is not None
    assert reasons["triton_impl"] is not None
    if "cpu_impl" in implementations(ROOM):
        assert select(ROOM, *args) is implementations(ROOM)["cpu_impl"]
        x = args[0]
        assert select(ROOM, x, None, None, 0.0, x, x[:, 0]) is implementations(ROOM)["cpu_impl"]


NATIVE_REFUSALS = {
    "shift does not fit x": {"shift": VECTOR[:, :3]},
    "shift must be float32, got bfloat16": {"shift": VECTOR.bfloat16()},
    "a half of the call is incomplete": {"modulated": None},
    "modulated does not fit x": {"modulated": X[:, :2]},
    "stats must be contiguous": {"stats": torch.zeros(2, 3, 2).mT},
    "shift must be contiguous in its last": {"shift": torch.zeros(4, 2).mT},
    "no kernel takes tensors of torch.complex64": {"x": X.to(torch.complex64)},
    "no kernel takes y of float32 beside x of bfloat16": {
        "x": X.bfloat16(),
        "y": X,
        "gate": VECTOR,
        "residual": X.bfloat16(),
    },
    "vectors must be .B, M, E. with an index": {"index": INDEX},
    r"a tensor of shape \(2, 3, 4\) has no memory": {"x": torch.empty(2, 3, 4, device="meta")},
}


@pytest.mark.parametrize("words", NATIVE_REFUSALS)
def test_the_native_module_writes_nowhere_else(words):
    native = pytest.importorskip("hunyuan_fast._C")
    given = dict.fromkeys(("x", "shift", "scale", "eps", "y", "gate", "index", "residual"))
    given |= {"x": X, "shift": VECTOR, "scale": VECTOR, "eps": 1e-6}
    given |= {"modulated": torch.empty_like(X), "stats": torch.zeros(2, 2, 3)}
    native.fused_modulation_forward_cpu(*given.values(), 1)
    with pytest.raises(ValueError, match=words):
        native.fused_modulation_forward_cpu(*(given | NATIVE_REFUSALS[words]).values(), 1)


def test_every_function_is_public():
    assert set(FUNCTIONS) <= set(ops.__all__)
