"""When is a kernel's result right? Three tiers, each judged against what the same precision can do.

Truth is computed in float64 from the inputs as rounded to the kernel's dtype.

A. One rounding at the end (norms, elementwise): :func:`assert_rounded_once`.
B. Rounded inside as well (attention, matrix products, convolutions): :func:`assert_as_good_as`.
C. Quantised codes: :func:`assert_same_codes`.

A fixed tolerance would be too wide for small values, too narrow for large ones, and blind to small
systematic errors; the root-mean-square bounds are what sees those.
"""

import torch
from torch import Tensor


def assert_rounded_once(
    actual: Tensor, exact: Tensor, single: Tensor, *, name: str = "result"
) -> None:
    """Tier A: as if computed in fp32 and rounded once to nearest.

    exact: truth in float64. single: the same formula in plain fp32.
    Every element within half a unit in the last place, plus four times the worst fp32 error; and
    the root mean square of the errors at most 1.01 times that of ``single`` rounded to nearest
    (twice, for fp32 results, where the order of summation shows).
    """
    _check_kind(actual, exact, name)
    _check_non_finite(actual, exact, name)
    error, single_error = _error(actual, exact), _error(single, exact)
    arithmetic = single_error.max() if single_error.numel() else single_error.sum()
    allowed = 0.5 * 1.001 * _ulp(exact, actual.dtype) + 4 * arithmetic
    _check_elements(actual, exact, error, allowed, name, "half an ulp + 4 x the worst fp32 error")

    factor = 1.01 if actual.dtype in (torch.bfloat16, torch.float16) else 2.0
    ideal = _error(single.to(actual.dtype), exact)
    _check_rms(error, ideal, factor, name, "fp32 rounded once to nearest")


def assert_as_good_as(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    emulated: Tensor | None = None,
    *,
    name: str = "result",
    factor: float = 2.0,
    rms_factor: float = 1.15,
) -> None:
    """Tier B: as accurate as plain torch in the same dtype, and as the kernel's rounding allows.

    exact: truth in float64. plain: plain torch computed in the kernel's dtype throughout.
    emulated: the same values and roundings as the kernel makes, in plain torch.
    No element further off than ``factor`` times the worst error of ``plain`` plus twice the cost of
    one addition in this dtype; with ``emulated``, the root mean square of the errors at most
    ``rms_factor`` times that of ``emulated``, and no row worse than three times its worst element.
    """
    _check_kind(actual, exact, name)
    _check_non_finite(actual, exact, name)
    error = _error(actual, exact)
    if not error.numel():
        return
    allowed = allowed_error(exact, plain, actual.dtype, factor=factor)
    _check_elements(
        actual, exact, error, allowed, name, f"{factor} x plain torch's worst error + two additions"
    )
    if emulated is None:
        return
    emulated_error = _error(emulated, exact)
    # One part in 2^24 of the largest value: what any order of summation in fp32 may cost.
    noise = _largest(exact) * 2.0**-24
    _check_rms(error, emulated_error, rms_factor, name, "the emulated kernel", noise)
    _check_elements(
        actual,
        exact,
        error,
        3 * emulated_error.max() + noise,
        name,
        "3 x the emulated kernel's worst error",
    )


def allowed_error(
    exact: Tensor, plain: Tensor, dtype: torch.dtype, *, factor: float = 2.0
) -> Tensor:
    """What :func:`assert_as_good_as` allows an element of a result of this dtype, by itself."""
    rounded = exact.to(dtype)
    two_additions = 2 * _error(rounded + 0.3 - 0.3, rounded.double()).max()
    return factor * _error(plain, exact).max() + two_additions


def assert_same_codes(
    actual: Tensor, values: Tensor, *, name: str = "codes", tie: float = 1e-5
) -> None:
    """Tier C: ``actual`` holds ``values`` (fp32, already scaled) rounded to nearest, bit for bit.

    A code may be the other neighbour only where the value lies within ``tie`` (relative) of the
    midpoint between the two, which one fp32 operation more or less can decide.
    """
    expected = _quantise(values, actual.dtype)
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(values.shape)}")
    got, wanted, truth = actual.double(), expected.double(), values.double()
    different = (got != wanted) & ~(got.isnan() & wanted.isnan())
    distance = (truth - got).abs() - (truth - wanted).abs()
    wrong = different & ~(distance <= 2 * tie * truth.abs())
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} codes differ other than by a tie, the "
            f"first at {where}: {float(got[where])} for {float(truth[where])}, "
            f"expected {float(wanted[where])}"
        )


def assert_equal(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Bit for bit the same values, NaN in the same places."""
    _check_kind(actual, expected, name)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {expected.dtype}")
    if not torch.equal(actual.nan_to_num(), expected.nan_to_num()):
        _check_elements(
            actual, expected, _error(actual, expected.double()), torch.zeros(()), name, "equality"
        )
    _check_non_finite(actual, expected, name)


def _error(actual: Tensor, exact: Tensor) -> Tensor:
    """Absolute error in float64; 0 where both are not finite, which is compared elsewhere."""
    error = (actual.double() - exact.double()).abs()
    return torch.where(exact.isfinite(), error, 0.0)


def _ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` around x."""
    info = torch.finfo(dtype)
    magnitude = x.double().abs().nan_to_num(0.0, 0.0, 0.0).clamp_min(info.smallest_normal)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def _largest(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0).abs().max()


def _check_kind(actual: Tensor, exact: Tensor, name: str) -> None:
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")


def _check_non_finite(actual: Tensor, exact: Tensor, name: str) -> None:
    """NaN and infinities must be in the same places, whichever side has one too many."""
    exact = exact.to(actual.dtype)
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        got, wanted = test(actual), test(exact)
        if not torch.equal(got, wanted):
            where = tuple(int(i) for i in (got != wanted).nonzero()[0])
            raise AssertionError(
                f"{name}: {int(got.sum())} elements are {kind}, {int(wanted.sum())} should be; the "
                f"first difference is at {where}: got {float(actual[where])}, "
                f"expected {float(exact[where])}"
            )


def _check_elements(
    actual: Tensor, exact: Tensor, error: Tensor, allowed: Tensor, name: str, rule: str
) -> None:
    """Every error within what is allowed, else say where it is worst and by how much."""
    allowed = allowed.expand_as(error)
    bad = ~(error <= allowed)
    if not bad.any():
        return
    worst = int((error - allowed).nan_to_num(torch.inf).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {bad.numel()} elements ({bad.double().mean():.2%}) break the "
        f"bound ({rule}). Worst at {where}: got {float(actual[where]):.9g}, "
        f"exact {float(exact[where]):.9g}, error {float(error[where]):.3g}, "
        f"allowed {float(allowed[where]):.3g}, excess {float(error[where] - allowed[where]):.3g}"
    )


def _check_rms(
    error: Tensor,
    ideal: Tensor,
    factor: float,
    name: str,
    rule: str,
    noise: Tensor | float = 0.0,
) -> None:
    if not error.numel():
        return
    got, wanted = (x.square().mean().sqrt() for x in (error, ideal))
    if not got <= factor * wanted + noise:
        raise AssertionError(
            f"{name}: root mean square of the errors is {float(got):.4g}, more than {factor} x "
            f"{float(wanted):.4g}, that of {rule} (ratio {float(got / wanted):.4g})"
        )


def _quantise(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        limit = torch.finfo(dtype).max
        return values.float().clamp(-limit, limit).to(dtype)
    limits = torch.iinfo(dtype)
    return values.float().round().clamp(limits.min, limits.max).to(dtype)
