"""Mathematical functions of float32 from the arithmetic of a GPU, exact to a few units in the last place.

What _tvm_functions writes out for the CPU is taken from there. log, sin, cos, asin, atan: Cephes. Where float32 would
lose digits (the argument of sin, the exponent of pow) float64 carries them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx import FloatImm, IntImm

from fxopt.backends import _tvm_functions as common
from fxopt.backends._tvm_loops import Expr


def _f(value: float, dtype: str = "float32") -> Expr:
    return FloatImm(dtype, value)


def _i(value: int, dtype: str = "int32") -> Expr:
    return IntImm(dtype, value)


def _let(value: Expr, use: Callable[[Expr], Expr]) -> Expr:
    """*use* of a variable that holds *value*."""
    variable = tirx.Var("t", str(value.ty.dtype))
    return tirx.Let(variable, value, use(variable))


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """In *x*, the highest power first."""
    dtype = str(x.ty.dtype)
    result = _f(coefficients[0], dtype)
    for c in coefficients[1:]:
        result = result * x + _f(c, dtype)
    return result


def _abs(x: Expr) -> Expr:
    return tirx.Max(x, _f(0.0) - x)


def _signed(size: Expr, x: Expr) -> Expr:
    """*size* with the sign of *x*."""
    return tirx.Select(x < _f(0.0), _f(0.0) - size, size)


def _nan_or(x: Expr, value: Expr) -> Expr:
    return tirx.Select(common.is_nan(x), x, value)


def _infinity() -> Expr:
    return tirx.infinity("float32")


def _undefined() -> Expr:
    return tirx.reinterpret("float32", _i(0x7FC00000))


def _bits(x: Expr) -> Expr:
    return tirx.reinterpret("int32", x)


def _fraction(x: Expr, use: Callable[[Expr, Expr], Expr]) -> Expr:
    """*use* of m and e, for x = m·2^e above zero, with m of √½ to √2 and e a whole float."""
    small = x < _f(1.17549435e-38)
    scaled = tirx.Select(small, x * _f(8388608.0), x)

    def split(bits: Expr) -> Expr:
        e = (bits >> _i(23)) - _i(126) - tirx.Select(small, _i(23), _i(0))
        m = tirx.reinterpret("float32", (bits & _i(0x7FFFFF)) | _i(0x3F000000))  # of ½ to 1

        def adjusted(m: Expr) -> Expr:
            low = m < _f(0.70710678)
            exponent = tirx.Cast("float32", e - tirx.Select(low, _i(1), _i(0)))
            return _let(tirx.Select(low, m + m, m), lambda m: _let(exponent, lambda e: use(m, e)))

        return _let(m, adjusted)

    return _let(_bits(scaled), split)


_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip


def _log(x: Expr) -> Expr:
    def above_zero(m: Expr, e: Expr) -> Expr:
        r = m - _f(1.0)
        tail = _polynomial(r, _LOG) * r * r * r + _f(-2.12194440e-4) * e - _f(0.5) * r * r
        return r + tail + _f(0.693359375) * e

    value = tirx.Select(tirx.EQ(x, _infinity()), x, _fraction(x, above_zero))
    value = tirx.Select(tirx.EQ(x, _f(0.0)), _f(0.0) - _infinity(), value)
    return _nan_or(x, tirx.Select(x < _f(0.0), _undefined(), value))


def _log1p(x: Expr) -> Expr:
    def of(u: Expr) -> Expr:
        exact = tirx.Select(tirx.EQ(u, _f(1.0)), x, _let(u, _log) - ((u - _f(1.0)) - x) / u)
        return tirx.Select(tirx.any(tirx.EQ(x, _infinity()), tirx.EQ(u, _f(0.0))), _let(u, _log), exact)

    return _let(x + _f(1.0), of)


def _exp2(x: Expr) -> Expr:
    def scaled(n: Expr) -> Expr:
        power = tirx.reinterpret("float32", (tirx.Cast("int32", n) + _i(127)) << _i(23))
        value = common.exp((x - n) * _f(math.log(2.0))) * power
        value = tirx.Select(x > _f(127.999999), _infinity(), value)
        return _nan_or(x, tirx.Select(x < _f(-126.0), common.exp(x * _f(math.log(2.0))), value))

    return _let(tirx.floor(tirx.Min(tirx.Max(x, _f(-126.0)), _f(127.0)) + _f(0.5)), lambda n: _let(
        tirx.Min(n, _f(127.0)), scaled))  # fmt: skip


def _circular(x: Expr, use: Callable[[Expr, Expr, Expr], Expr]) -> Expr:
    """*use* of sin r, cos r and q, for x = r + q·π/2 with |r| ≤ π/4."""
    wide = tirx.Cast("float64", x)

    def reduced(n: Expr) -> Expr:
        r = (wide - n * _f(1.5707963267341256, "float64")) - n * _f(6.077100506506192e-11, "float64")

        def parts(r: Expr) -> Expr:
            z = r * r
            sine = _polynomial(z, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)) * z * r + r
            cosine = _polynomial(z, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)) * z * z
            quadrant = tirx.Cast("int32", tirx.Cast("int64", n) & _i(3, "int64"))
            return use(sine, cosine - _f(0.5) * z + _f(1.0), quadrant)

        return _let(tirx.Cast("float32", r), parts)

    n = tirx.floor(wide * _f(2.0 / math.pi, "float64") + _f(0.5, "float64"))
    return _let(n, reduced)


def _wave(shift: int) -> Callable[[Expr], Expr]:
    """sin(x + shift·π/2)."""

    def use(sine: Expr, cosine: Expr, quadrant: Expr) -> Expr:
        turned = quadrant + _i(shift)
        value = tirx.Select(tirx.EQ(turned & _i(1), _i(0)), sine, cosine)
        return tirx.Select(tirx.EQ(turned & _i(2), _i(0)), value, _f(0.0) - value)

    return lambda x: _circular(x, use)


def _tan(x: Expr) -> Expr:
    def use(sine: Expr, cosine: Expr, quadrant: Expr) -> Expr:
        even = tirx.EQ(quadrant & _i(1), _i(0))
        return tirx.Select(even, sine / cosine, _f(0.0) - cosine / sine)

    return _circular(x, use)


def _atan(x: Expr) -> Expr:
    def of(size: Expr) -> Expr:
        large, middle = size > _f(2.414213562373095), size > _f(0.4142135623730950)
        start = tirx.Select(large, _f(math.pi / 2), tirx.Select(middle, _f(math.pi / 4), _f(0.0)))
        r = tirx.Select(middle, (size - _f(1.0)) / (size + _f(1.0)), size)
        r = tirx.Select(large, _f(-1.0) / size, r)

        def series(r: Expr) -> Expr:
            z = r * r
            p = _polynomial(z, (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1))
            return _signed(start + (p * z * r + r), x)

        return _let(r, series)

    return _nan_or(x, _let(_abs(x), of))


def _arc_series(r: Expr, z: Expr) -> Expr:
    """asin(r) for z = r² up to ¼."""
    c = (4.2163199048e-2, 2.4181311049e-2, 4.5470025998e-2, 7.4953002686e-2, 1.6666752422e-1)
    return _polynomial(z, c) * z * r + r


def _asin(x: Expr) -> Expr:
    def of(size: Expr) -> Expr:
        half = _f(0.5) * (_f(1.0) - size)
        large = _f(math.pi / 2) - _f(2.0) * _let(half, lambda z: _arc_series(tirx.sqrt(z), z))
        return _signed(tirx.Select(size > _f(0.5), large, _arc_series(size, size * size)), x)

    return _nan_or(x, _let(_abs(x), of))


def _acos(x: Expr) -> Expr:
    def of(size: Expr) -> Expr:
        near = _f(2.0) * _let(_f(0.5) * (_f(1.0) - size), lambda z: _arc_series(tirx.sqrt(z), z))
        far = tirx.Select(x < _f(0.0), _f(math.pi) - near, near)
        return tirx.Select(size > _f(0.5), far, _f(math.pi / 2) - _arc_series(x, x * x))

    return _nan_or(x, _let(_abs(x), of))


def _asinh(x: Expr) -> Expr:
    def of(size: Expr) -> Expr:
        inner = size + size * size / (_f(1.0) + tirx.sqrt(size * size + _f(1.0)))
        far = _let(size, _log) + _f(math.log(2.0))
        return _signed(tirx.Select(size > _f(1e9), far, _let(inner, _log1p)), x)

    return _let(_abs(x), of)


def _acosh(x: Expr) -> Expr:
    def of(t: Expr) -> Expr:
        near = _let(t + tirx.sqrt(t * (t + _f(2.0))), _log1p)
        return tirx.Select(x > _f(1e9), _let(x, _log) + _f(math.log(2.0)), near)

    return _let(x - _f(1.0), of)


def _atanh(x: Expr) -> Expr:
    return _signed(_f(0.5) * _let(_let(_abs(x), lambda s: _f(2.0) * s / (_f(1.0) - s)), _log1p), x)


def _wide_log(x: Expr) -> Expr:
    """Log x of a float32 above zero, in float64: 2·artanh((m − 1)/(m + 1)) + e·log 2."""

    def of(m: Expr, e: Expr) -> Expr:
        wide, one = tirx.Cast("float64", m), _f(1.0, "float64")

        def series(s: Expr) -> Expr:
            p = _let(s * s, lambda z: _polynomial(z, [2 / k for k in range(17, 0, -2)]))
            return p * s + tirx.Cast("float64", e) * _f(math.log(2.0), "float64")

        return _let((wide - one) / (wide + one), series)

    return _fraction(x, of)


def _wide_exp(t: Expr) -> Expr:
    """e^t of a float64 within ±700."""

    def of(n: Expr) -> Expr:
        power = tirx.reinterpret("float64", (tirx.Cast("int64", n) + _i(1023, "int64")) << _i(52, "int64"))
        series = [1 / math.factorial(k) for k in range(11, -1, -1)]
        return _let(t - n * _f(math.log(2.0), "float64"), lambda r: _polynomial(r, series)) * power

    return _let(tirx.floor(t * _f(1 / math.log(2.0), "float64") + _f(0.5, "float64")), of)


def _pow(x: Expr, y: Expr) -> Expr:
    def of(size: Expr) -> Expr:
        limit = _f(1e30, "float64")
        log = tirx.Select(tirx.EQ(size, _infinity()), limit, _wide_log(size))
        log = tirx.Select(tirx.EQ(size, _f(0.0)), _f(0.0, "float64") - limit, log)
        exponent = tirx.Cast("float64", y) * log
        bounded = tirx.Min(tirx.Max(exponent, _f(-700.0, "float64")), _f(700.0, "float64"))
        value = tirx.Cast("float32", _let(bounded, _wide_exp))
        whole, half = tirx.EQ(tirx.floor(y), y), tirx.EQ(tirx.floor(y * _f(0.5)), y * _f(0.5))
        negative = tirx.any(x < _f(0.0), tirx.all(tirx.EQ(x, _f(0.0)), _bits(x) < _i(0)))
        value = tirx.Select(tirx.all(negative, whole, tirx.Not(half)), _f(0.0) - value, value)
        invalid = tirx.all(x < _f(0.0), tirx.Not(whole), size != _infinity())
        value = tirx.Select(invalid, _undefined(), value)
        value = tirx.Select(tirx.all(tirx.EQ(size, _f(1.0)), tirx.EQ(_abs(y), _infinity())), _f(1.0), value)
        value = _nan_or(x, _nan_or(y, value))
        return tirx.Select(tirx.any(tirx.EQ(y, _f(0.0)), tirx.EQ(x, _f(1.0))), _f(1.0), value)

    return _let(_abs(x), of)


def _fmod(x: Expr, y: Expr) -> Expr:
    a, b = tirx.Cast("float64", x), tirx.Cast("float64", y)
    rest = tirx.Cast("float32", a - tirx.trunc(a / b) * b)
    kept = tirx.all(tirx.EQ(_abs(y), _infinity()), _abs(x) < _infinity())
    return tirx.Select(kept, x, rest)


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    **common.WRITTEN,
    "exp2": _exp2,
    "exp10": lambda x: _pow(_f(10.0), x),
    "log": _log,
    "log2": lambda x: _log(x) * _f(1 / math.log(2.0)),
    "log10": lambda x: _log(x) * _f(1 / math.log(10.0)),
    "log1p": _log1p,
    "sin": _wave(0),
    "cos": _wave(1),
    "tan": _tan,
    "asin": _asin,
    "acos": _acos,
    "atan": _atan,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": _atanh,
    "pow": _pow,
    "fmod": _fmod,
    "isnan": common.is_nan,
    "isinf": lambda x: tirx.EQ(_abs(x), _infinity()),
    "isfinite": lambda x: _abs(x) < _infinity(),
}
"""By the names of tirx."""
