"""Whether tensors share memory, which an op that writes into one while it reads another asks."""

from torch import Tensor

Axes = list[tuple[int, int]]


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether no byte belongs to both, as far as that can be seen at a glance.

    Views of one buffer may lie between each other, as columns of its rows do: then some period,
    a stride of one of them, separates them. Of odder patterns, and of those alone, it is said that
    they meet when they may not.
    """
    if not a.numel() or not b.numel():
        return True
    distance = b.data_ptr() - a.data_ptr()
    first, second = _axes(a), _axes(b)
    if distance >= _extent(first, a) or -distance >= _extent(second, b):
        return True
    return any(
        _separates(step, distance, (first, a), (second, b))
        for step in {step for _, step in first + second if step}
    )


def check_apart(out: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError, with the names of both, where out may share memory with one of others."""
    written = out.untyped_storage()
    first = written.data_ptr()
    stop = first + written.nbytes()
    for name, x in others.items():
        if x is None:
            continue
        read = x.untyped_storage()
        start = read.data_ptr()
        if start >= stop or start + read.nbytes() <= first:
            continue  # as nearly always, and soon known
        if not apart(out, x):
            raise ValueError(
                f"out must share no memory with {name}, got views that overlap: addresses "
                f"{out.data_ptr():#x} and {x.data_ptr():#x}, shapes {tuple(out.shape)} and "
                f"{tuple(x.shape)}, strides {out.stride()} and {x.stride()}"
            )


def _axes(x: Tensor) -> Axes:
    """Steps along every axis, and how many bytes each is."""
    item = x.element_size()
    pairs = zip(x.shape, x.stride(), strict=True)
    return [(size - 1, step * item) for size, step in pairs if size > 1]


def _extent(axes: Axes, x: Tensor) -> int:
    """Bytes from the first to the last one, both included."""
    return x.element_size() + sum(count * step for count, step in axes)


def _separates(
    period: int, distance: int, first: tuple[Axes, Tensor], second: tuple[Axes, Tensor]
) -> bool:
    """Whether both repeat with the period, and take different parts of it."""
    widths = [
        _extent([(count, step) for count, step in axes if step % period], x)
        for axes, x in (first, second)
    ]
    return widths[0] <= distance % period <= period - widths[1]
