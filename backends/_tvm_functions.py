"""Functions as polynomials: LLVM has no vector code for exp, tanh and erf, and would call the C library for each lane.

Exact to a few units in the last place of float32. exp: Cephes' expf. erf: the rational function of Eigen's and XLA's
``erf``. tanh and sigmoid: from exp. All of them, and the extremes, keep NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx import FloatImm, IntImm

from fxopt.backends._tvm_loops import Expr


def _f(value: float) -> Expr:
    return FloatImm("float32", value)


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Polynomial in *x*, the highest power first."""
    result = _f(coefficients[0])
    for c in coefficients[1:]:
        result = tirx.Add(tirx.Mul(result, x), _f(c))
    return result


def _clamp(x: Expr, low: float, high: float) -> Expr:
    return tirx.Min(tirx.Max(x, _f(low)), _f(high))


def extreme(kind: type[tirx.Max] | type[tirx.Min], a: Expr, b: Expr) -> Expr:
    """``kind(a, b)``, which is NaN where *a* or *b* is; TVM's own is *b* where the two cannot be compared."""
    dtype = str(a.ty.dtype)
    if dtype not in BITS:
        return kind(a, b)
    if isinstance(a, FloatImm) or isinstance(b, FloatImm):
        return kind(b, a) if isinstance(b, FloatImm) else kind(a, b)
    name = "llvm.maximum" if kind is tirx.Max else "llvm.minimum"
    return tirx.call_llvm_pure_intrin(dtype, name, a, b)


BITS = {
    "float16": ("int16", 0x7FFF, 0x7C00),
    "float32": ("int32", 0x7FFFFFFF, 0x7F800000),
    "float64": ("int64", (1 << 63) - 1, 0x7FF << 52),
}
"""Integers of the same size, their bits without the sign, and those of infinity; above them are NaNs."""


def is_nan(x: Expr) -> Expr:
    """By the bits: TVM simplifies x ≠ x to false."""
    kind, but_sign, infinite = BITS[str(x.ty.dtype)]
    bits = tirx.BitwiseAnd(tirx.reinterpret(kind, x), IntImm(kind, but_sign))
    return tirx.GT(bits, IntImm(kind, infinite))


def exp(x: Expr) -> Expr:
    """e^x: x = n·ln 2 + r, |r| ≤ ln 2 / 2, a polynomial for e^r, and n added to the exponent bits."""
    inside = _clamp(x, -87.33654, 88.72283)
    n = tirx.floor(tirx.Add(tirx.Mul(inside, _f(1.44269504088896341)), _f(0.5)))
    n = tirx.Min(n, _f(127.0))
    r = tirx.Sub(tirx.Sub(inside, tirx.Mul(n, _f(0.693359375))), tirx.Mul(n, _f(-2.12194440e-4)))
    p = _horner(r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5))
    p = tirx.Add(tirx.Add(tirx.Mul(tirx.Mul(p, r), r), r), _f(1.0))
    bits = tirx.LShift(tirx.Add(tirx.Cast("int32", n), IntImm("int32", 127)), IntImm("int32", 23))
    value = tirx.Mul(p, tirx.reinterpret("float32", bits))
    value = tirx.Select(tirx.GT(x, _f(88.72283)), tirx.infinity("float32"), value)
    value = tirx.Select(tirx.LT(x, _f(-87.33654)), _f(0.0), value)
    return tirx.Select(is_nan(x), x, value)


def _tanh(x: Expr) -> Expr:
    """Odd polynomial for small |x|, else ±(1 − 2/(e^2|x| + 1))."""
    size = tirx.Max(x, tirx.Sub(_f(0.0), x))
    e = exp(tirx.Mul(tirx.Min(size, _f(10.0)), _f(2.0)))
    large = tirx.Sub(_f(1.0), tirx.Div(_f(2.0), tirx.Add(e, _f(1.0))))
    squared = tirx.Mul(x, x)
    odd = _horner(
        squared, (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    )
    small = tirx.Add(tirx.Mul(tirx.Mul(odd, squared), x), x)
    value = tirx.Select(tirx.LT(x, _f(0.0)), tirx.Sub(_f(0.0), large), large)
    value = tirx.Select(tirx.LT(size, _f(0.625)), small, value)
    return tirx.Select(is_nan(x), x, value)


def _sinh(x: Expr) -> Expr:
    """(e^x − e^−x)/2; its series where the two cancel."""
    squared = tirx.Mul(x, x)
    series = _horner(squared, (2.7557319e-6, 1.9841270e-4, 8.3333333e-3, 0.16666667, 1.0))
    large = tirx.Mul(_f(0.5), tirx.Sub(exp(x), exp(tirx.Sub(_f(0.0), x))))
    return tirx.Select(tirx.LT(squared, _f(1.0)), tirx.Mul(x, series), large)


def _sigmoid(x: Expr) -> Expr:
    return tirx.Div(_f(1.0), tirx.Add(_f(1.0), exp(tirx.Sub(_f(0.0), x))))


def _erf(x: Expr) -> Expr:
    inside = _clamp(x, -4.0, 4.0)
    squared = tirx.Mul(inside, inside)
    above = _horner(
        squared,
        (
            -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
            -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
        ),
    )  # fmt: skip
    below = _horner(
        squared,
        (
            -1.45660718464996e-05,
            -2.13374055278905e-04,
            -1.68282697438203e-03,
            -7.37332916720468e-03,
            -1.42647390514189e-02,
        ),
    )
    return tirx.Select(is_nan(x), x, tirx.Div(tirx.Mul(inside, above), below))


WRITTEN: dict[str, Callable[..., Expr]] = {
    "exp": exp,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "erf": _erf,
    "sinh": _sinh,
    "cosh": lambda x: tirx.Mul(_f(0.5), tirx.Add(exp(x), exp(tirx.Sub(_f(0.0), x)))),
    "rsqrt": lambda x: tirx.Div(_f(1.0), tirx.sqrt(x)),
}
