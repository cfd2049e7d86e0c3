"""What kernels that read by index share: which of them are run, and where each writes.

Such a kernel answers y(o) = sum over taps k of kernel(k) x(o * stride + k - origin) for any part of
the result, with edges repeated. A convolution is one such sum, or some for its first frames; an
upsampling one is one for each output parity.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import product

from torch import Tensor

from hunyuan_fast.kernels.causal_conv3d.phases import Spans, begins_alone, each_tap, phase_spans

Triple = tuple[int, int, int]


class Convolution(ABC):
    """The inputs of one call, as a kernel reads them; taps: of the weight, along each axis."""

    def __init__(
        self, x: Tensor, past: Tensor | None, stride: Triple, taps: tuple[int, ...]
    ) -> None:
        self.x, self.past, self.stride, self.taps = x, past, stride, taps

    @abstractmethod
    def new_map(self, sizes: Iterable[int]) -> Tensor:
        """(B, O, T', H', W') for these T', H', W'."""

    @abstractmethod
    def rows(self, t: Tensor) -> Tensor:
        """t as the kernel reads it."""

    @abstractmethod
    def worth_a_kernel(self, positions: int) -> bool:
        """Whether a kernel of its own pays for itself for one frame of so many positions."""

    @abstractmethod
    def convolve(
        self,
        spans: tuple[Spans, ...],
        origin: tuple[int, ...],
        y: Tensor,
        residual: Tensor | None,
        frames: slice,
    ) -> None:
        """Those frames of y, with the origin of the first of them."""

    def run(
        self, spans: tuple[Spans, ...], origin: Triple, y: Tensor, residual: Tensor | None = None
    ) -> None:
        """y(o) = sum over taps k of kernel(k) x(o * stride + k - origin); y may have any strides.

        spans: the taps of the weight that each tap of the kernel adds up, by axis.

        At the beginning of a clip some taps in time read the same frame, the first. They are added
        up: a third of the multiplications for the first frame, two thirds for the second. Each
        needs a kernel of its own, which pays for itself where frames are large or there are no
        others.
        """
        (lead, *sides), (times, *areas) = origin, spans
        step, begun = self.stride[0], 0
        alone = y.shape[2] * step <= lead
        if not self.has_past and (alone or self.worth_a_kernel(y[0, 0, 0].numel())):
            begun = min(y.shape[2], -(-lead // step))
        for index in range(begun):
            alike = min(lead - index * step + 1, len(times))
            merged = ((times[0][0], times[alike - 1][1]), *times[alike:])
            self.convolve((merged, *areas), (0, *sides), y, residual, slice(index, index + 1))
        self.convolve(spans, (lead - begun * step, *sides), y, residual, slice(begun, None))

    @property
    def has_past(self) -> bool:
        """Whether frames stand before x."""
        return self.past is not None and self.past.shape[2] > 0


def plain(convolution: Convolution, residual: Tensor | None) -> Tensor:
    """The convolution as it is, with residual added."""
    x, past, stride = convolution.x, convolution.past, convolution.stride
    taps, rows, columns = convolution.taps
    lead = taps - 1 if past is None else past.shape[2]
    lengths = (x.shape[2] + lead - taps + 1, *x.shape[3:])
    y = convolution.new_map((n - 1) // step + 1 for n, step in zip(lengths, stride, strict=True))
    spans = tuple(map(each_tap, convolution.taps))
    residual = None if residual is None else convolution.rows(residual)
    convolution.run(spans, (lead, rows // 2, columns // 2), y, residual)
    return y


def upsampled(convolution: Convolution, factor: Triple) -> Tensor:
    """Every output parity is a convolution of x that writes its own places of the result."""
    x, continued, (t, h, w) = convolution.x, convolution.past is not None, factor
    frames, height, width = x.shape[2:]
    if begins_alone(x, convolution.past):  # and has one frame: there is nothing to double in time
        t = 1
    length = frames * t if continued else 1 + (frames - 1) * t
    y = convolution.new_map((length, height * h, width * w))
    phases = phase_spans(convolution.taps, (t, h, w))
    for parity, spans in zip(product(range(t), range(h), range(w)), phases, strict=True):
        # a doubled frame that continues a clip gives the odd output first
        place = (t - 1 - parity[0] if continued else parity[0], *parity[1:])
        places = tuple(slice(p, None, f) for p, f in zip(place, (t, h, w), strict=True))
        lead = len(spans[0]) - 1 - (0 if continued else parity[0])
        convolution.run(spans, (lead, 1 - parity[1], 1 - parity[2]), y[(..., *places)])
    return y
