"""One registration for every op: an operator of ``torch.library``, and a short way past it.

The operator is what compilers, transforms, modes and profilers see of an op, and need. Its
dispatcher, its autograd and the checks around them take longer than a kernel does on small tensors,
and do nothing for a call that nobody looks at. Such a call goes straight to the kernel, or to an
``autograd.Function`` made of the same kernel and the same gradients.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.library import custom_op
from torch.nn import Parameter

_Function = Callable[..., Any]

# Who may look at a call. The names are private; in a torch without one of them everybody may.
_SIGNS = (
    *((torch._C, "_len_torch_dispatch_stack"), (torch._C, "_is_torch_function_mode_enabled")),
    *((torch._C, "_are_functorch_transforms_active"), (torch._C, "_get_tracing_state")),
    (torch.autograd, "_profiler_enabled"),
)
_dispatch_modes, _function_modes, _transforms, _tracing, _profiled = (
    getattr(module, name, lambda: True) for module, name in _SIGNS
)
# What stands for nothing but itself, besides Tensor and Parameter: no subclass, nothing symbolic.
# A tuple is one of numbers: no schema here has a list of tensors.
_PLAIN = frozenset({type(None), int, float, bool, str, tuple, torch.dtype})


def define(
    schema: str,
    kernel: _Function,
    fake: _Function,
    *,
    save: _Function | None = None,
    gradients: _Function | None = None,
) -> _Function:
    """Register ``hunyuan_fast::<name>``, and return what calls it, with all arguments by position.

    A call has at least one tensor, and all its tensors are on one device.

    schema: ``name(Tensor x, Tensor(a!) out) -> Tensor``; a mark like ``(a!)`` is on what the kernel
        writes into. A tuple may hold results that a call does not have: the kernel and the fake
        return None for them. An operator cannot: to whom it answers, they are empty tensors.
    kernel: takes the arguments, and returns tensors that share no memory with them. What has to
        look at values, checks included, belongs into it: a compiler never gets there.
    fake: the same for tensors without memory: shapes and dtypes of the results.
    save, gradients: ``save(ctx, inputs, output)`` keeps what ``gradients(ctx, *doutputs)`` needs
        for the gradients of all arguments, as ``torch.library.register_autograd`` has it. They must
        bear None and empty tensors alike for results that a call does not have.
    """
    name, signature = schema[: schema.index("(")], schema[schema.index("(") :]
    parameters = signature[1 : signature.rindex(") ->")].split(", ")
    written = {i: words.split()[-1] for i, words in enumerate(parameters) if "!" in words}
    positions = tuple(written)
    qualified = f"hunyuan_fast::{name}"
    names = tuple(written.values())
    definition = custom_op(qualified, _without_none(kernel), mutates_args=names, schema=signature)
    definition.register_fake(_without_none(fake))
    library = getattr(torch.ops.hunyuan_fast, name).default
    differentiable = library  # which refuses the backward of an op without gradients
    if gradients is not None:
        save = save or _keep_nothing
        definition.register_autograd(gradients, setup_context=save)
        differentiable = _differentiable(name, kernel, save, gradients)

    def call(*args: Any) -> Any:
        if _forward_mode_level() >= 0:
            _refuse_tangents(name, args)
        if _watched():
            return library(*args)
        requires_grad = False
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                tensor = arg
                requires_grad = requires_grad or arg.requires_grad
            elif kind not in _PLAIN:
                return library(*args)
        if tensor.is_meta:  # then all are: there is nothing to compute, and the fake answers
            return library(*args)
        if requires_grad and torch.is_grad_enabled():
            return differentiable(*args)
        for position in positions:
            increment_version(args[position])
        return kernel(*args)

    return call


def refuse_second_derivative(function: str) -> Callable[..., NoReturn]:
    """The ``gradients`` of an operator that computes the gradients of ``function``."""

    def gradients(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(
            f"{function} has no second derivative: do not differentiate through its backward "
            "(create_graph=True)"
        )

    return gradients


def _forward_mode_level() -> int:
    """Below zero outside of every block of forward-mode differentiation."""
    return getattr(forward_ad, "_current_level", 0)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raise where a derivative would get lost: kernels know nothing of tangents."""
    tensors = (arg for arg in args if isinstance(arg, Tensor))
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"hunyuan_fast::{name} has no forward-mode derivative (jvp, jacfwd, dual tensors): "
            "use reverse mode"
        )


def _watched() -> bool:
    """Whether somebody compiles, traces, transforms, replaces or times calls of torch."""
    return bool(
        torch.compiler.is_compiling()  # first: a compiler reads no further
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or _tracing()
        or _profiled()
    )


def _differentiable(
    name: str, kernel: _Function, save: _Function, gradients: _Function
) -> _Function:
    """The kernel with its gradients, and without ``torch.library`` in between."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        save(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(name, (torch.autograd.Function,), members)
    return function.apply


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The ``save`` of gradients that need nothing."""


def _without_none(function: _Function) -> _Function:
    """The same function, with empty tensors for results that a call does not have."""

    def crossing(*args: Any) -> Any:
        results = function(*args)
        if not isinstance(results, tuple):
            return results
        first = next(arg for arg in args if isinstance(arg, Tensor))
        return tuple(first.new_empty(0) if result is None else result for result in results)

    return crossing
