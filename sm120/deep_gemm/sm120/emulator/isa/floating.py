"""Floating-point arithmetic, correctly rounded in every mode; .approx instructions as the nearest float32.

float32 sums and products are formed exactly in float64 (or rounded there to odd, which a later rounding cannot
notice) and rounded once.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ..formats import TYPES, Type, add_odd, bf16_to_f32, f64_to_bf16, flush, narrow
from ..operands import compute, elementwise, opcode
from ..parser import Instruction

F32, F64 = TYPES["f32"], TYPES["f64"]
MODES = ("rn", "rz", "rm", "rp")
_MIDWAY, _BELOW_F32 = np.uint64(1 << 28), np.uint64((1 << 29) - 1)
_TINY = np.float32(2.0**-126)


# --- narrow types as float64 and back --------------------------------------------------------------------------------


def widen(bits: np.ndarray, name: str) -> np.ndarray:
    """float64 values of f16, bf16 or f32."""
    if name == "bf16":
        return bf16_to_f32(bits).astype(np.float64)
    return bits.view(TYPES[name].dtype).astype(np.float64)


def round_to(value: np.ndarray, name: str, mode: str = "rn") -> np.ndarray:
    """float64 -> the type's register dtype; NaN becomes the canonical one."""
    if name == "bf16":
        return f64_to_bf16(value, mode)
    result = narrow(value, TYPES[name].dtype, mode)
    if name == "f16":
        return np.where(np.isnan(value), np.uint16(0x7FFF), np.asarray(result).view(np.uint16)).view(np.float16)
    return result


def on_float64(function, i: Instruction, kind: Type):
    """Make a function of float64 arrays one of f16, bf16, f16x2, bf16x2 or f32x2 registers."""
    name = kind.name.removesuffix("x2")
    pair, mode = kind.name.endswith("x2"), i.one_of(*MODES, default="rn")
    half = np.uint32 if name == "f32" else np.uint16

    def run(*sources):
        sources = np.broadcast_arrays(*(np.atleast_1d(source) for source in sources))
        if pair:
            sources = [np.ascontiguousarray(source).view(half) for source in sources]
        value = function(*(widen(source, name) for source in sources))
        if "ftz" in i.parts and name == "f16":
            value = np.where(np.abs(value) < 2.0**-14, np.copysign(0.0, value), value)
        if "sat" in i.parts:
            value = saturate(value)
        if "relu" in i.parts:
            value = relu(value)
        result = round_to(value, name, mode)
        return result.view(kind.dtype) if pair else result

    return run


def saturate(value):
    """[+0, 1]; NaN becomes 0."""
    return np.where(value > 0, np.minimum(value, 1), value.dtype.type(0)).astype(value.dtype)


def relu(value):
    """Negative becomes 0, NaN stays."""
    return np.where(value < 0, value.dtype.type(0), value) + value.dtype.type(0)


def finished(function, i: Instruction):
    """.ftz on sources and result and .sat on the result of a float32 function."""
    ftz, sat = "ftz" in i.parts, "sat" in i.parts
    if not (ftz or sat):
        return function

    def run(*sources):
        result = function(*(flush(source) for source in sources)) if ftz else function(*sources)
        result = flush(result) if ftz else result
        return saturate(result) if sat else result

    return run


# --- add, multiply, fma ----------------------------------------------------------------------------------------------


def float_add(i: Instruction):
    sign = -1 if i.parts[0] == "sub" else 1
    kind, mode = i.type, i.one_of(*MODES, default="rn")
    if kind.kind == "n" or kind.name == "f16":
        return on_float64(lambda a, b: add_odd(a, sign * b), i, kind)
    if mode == "rn":
        return finished(np.subtract if sign < 0 else np.add, i)
    if kind is F64:
        return lambda a, b: exactly(lambda x, y: x + sign * y, mode, a, b, addends=lambda x, y: (x, sign * y))
    return finished(lambda a, b: rounded_sum(a.astype(np.float64), sign * b.astype(np.float64), mode), i)


def float_multiply(i: Instruction):
    kind, mode = i.type, i.one_of(*MODES, default="rn")
    if kind.kind == "n" or kind.name == "f16":
        return on_float64(np.multiply, i, kind)
    if mode == "rn":
        return finished(np.multiply, i)
    if kind is F64:
        return lambda a, b: exactly(lambda x, y: x * y, mode, a, b)
    return finished(lambda a, b: narrow(a.astype(np.float64) * b, np.float32, mode), i)


@elementwise("fma")
def float_fma(i: Instruction):
    kind, mode = i.type, i.one_of(*MODES, default="rn")
    if kind.kind == "n" or kind.name == "f16":
        return on_float64(lambda a, b, c: add_odd(a * b, c), i, kind)
    if kind is F64:
        terms = lambda x, y, z: (x * y, z)  # noqa: E731
        return lambda a, b, c: exactly(lambda x, y, z: x * y + z, mode, a, b, c, addends=terms)
    if mode == "rn":
        return finished(fma32, i)
    return finished(lambda a, b, c: rounded_sum(a.astype(np.float64) * b, c.astype(np.float64), mode), i)


def rounded_sum(a, b, mode: str):
    """a + b of float64 as float32; downwards, x - x is -0."""
    total = add_odd(a, b)
    if mode == "rm":
        total = np.where((total == 0) & (np.signbit(a) | np.signbit(b)), -0.0, total)
    return narrow(total, np.float32, mode)


def fma32(a, b, c):
    """round(a * b + c) in float32.

    The product is exact in float64 and the sum is rounded there first, which matters only if it lands midway between
    two float32 (or below their normal range): those lanes are done again with care.
    """
    product = np.atleast_1d(a.astype(np.float64) * b)
    total = product + c
    result = total.astype(np.float32)
    risky = (total.view(np.uint64) & _BELOW_F32) == _MIDWAY
    risky |= (np.abs(result) <= _TINY) & (total != 0)
    if risky.any():
        product, c = np.broadcast_arrays(product, c)
        result[risky] = add_odd(product[risky], c[risky].astype(np.float64)).astype(np.float32)
    return result


def exactly(function, mode: str, *sources, addends=None):
    """A float64 result rounded once from the exact rational one; scalar by scalar, for what is rare.

    ``addends`` gives the two terms of a sum, for the sign of zero.
    """

    def one(*values: float) -> float:
        plain = function(*values)
        if not np.isfinite(plain) and not all(map(np.isfinite, values)):
            return plain
        exact = function(*map(Fraction, values))
        if exact == 0:  # its sign: as the plain operation has it, but downwards x - x is -0
            return -0.0 if mode == "rm" and addends and any(map(np.signbit, addends(*values))) else plain
        try:
            nearest = float(exact)
        except OverflowError:
            nearest = float("inf") if exact > 0 else float("-inf")
        if mode == "rn":
            return nearest
        over = np.isinf(nearest) or Fraction(nearest) != exact
        above = nearest > 0 if np.isinf(nearest) else Fraction(nearest) > exact
        down = mode == "rm" or (mode == "rz" and exact > 0)
        if over and above == down:
            return float(np.nextafter(nearest, -np.inf if down else np.inf))
        return nearest

    return np.vectorize(one, otypes=[np.float64])(*sources)


# --- division, roots, transcendental functions -----------------------------------------------------------------------


def float_divide(i: Instruction):
    mode = i.one_of(*MODES, default="rn")
    if mode == "rn" or i.type is F64:
        return finished(np.divide, i)
    return finished(lambda a, b: directed(np.divide(a, b), mode, lambda q: exact_sign(q, b, a)), i)


def exact_sign(factor, other, target):
    """The sign of factor * other - target (float32), in units of the quotient: + means that ``factor`` is too large."""
    error = factor.astype(np.float64) * other - target
    return np.sign(error) * np.sign(other)


def directed(nearest, mode: str, sign_of_error):
    """Correct a result rounded to nearest for another mode, given the sign of its error."""
    sign = sign_of_error(nearest)
    high = (sign > 0) & ((mode == "rm") | ((mode == "rz") & (nearest > 0)))
    low = (sign < 0) & ((mode == "rp") | ((mode == "rz") & (nearest < 0)))
    inf = np.float32(np.inf)
    result = np.where(high, np.nextafter(nearest, -inf), nearest)
    return np.where(low, np.nextafter(nearest, inf), result)


def via_float64(function):
    return lambda a: function(a.astype(np.float64)).astype(np.float32)


@elementwise("rcp")
def rcp(i: Instruction):
    mode = i.one_of(*MODES, default="rn")
    if i.type is F64 or mode == "rn":
        return finished(lambda a: a.dtype.type(1) / a, i)
    one = np.float32(1)
    return finished(lambda a: directed(one / a, mode, lambda q: exact_sign(q, a, one)), i)


@elementwise("sqrt")
def sqrt(i: Instruction):
    mode = i.one_of(*MODES, default="rn")
    if i.type is F64 or mode == "rn":
        return finished(np.sqrt, i)
    return finished(
        lambda a: directed(np.sqrt(a), mode, lambda r: np.sign(r.astype(np.float64) ** 2 - a.astype(np.float64))), i
    )


def transcendental(name: str, function):
    @elementwise(name)
    def make(i: Instruction):
        if i.type.kind == "n" or i.type.name == "f16":
            return on_float64(function, i, i.type)
        return function if i.type is F64 else finished(via_float64(function), i)


transcendental("ex2", np.exp2)
transcendental("lg2", np.log2)
transcendental("sin", np.sin)
transcendental("cos", np.cos)
transcendental("tanh", np.tanh)
transcendental("rsqrt", lambda a: 1 / np.sqrt(a))


# --- minimum, maximum, sign ------------------------------------------------------------------------------------------


def minimum(nan: bool, largest: bool):
    """min or max: the other operand if one is NaN, unless ``nan``; -0 lies below +0."""
    pick = {(False, False): np.fmin, (False, True): np.fmax, (True, False): np.minimum, (True, True): np.maximum}
    function = pick[nan, largest]

    def run(a, b):
        result = function(a, b)
        zeros = (result == 0) & (a == b)
        if zeros.any():
            chosen = np.signbit(a) & np.signbit(b) if largest else np.signbit(a) | np.signbit(b)
            result = np.where(zeros, np.where(chosen, -result.dtype.type(0), result.dtype.type(0)), result)
        return result

    return run


def float_minmax(i: Instruction):
    function = minimum("NaN" in i.parts, i.parts[0] == "max")
    if "abs" in i.parts:  # .xorsign.abs
        signless = function

        def function(a, b):
            return np.copysign(signless(np.abs(a), np.abs(b)), np.where(np.signbit(a) ^ np.signbit(b), -1.0, 1.0))

    kind = i.type
    if kind.kind == "n" or kind.name == "f16":
        return on_float64(function, i, kind)
    canonical = kind.dtype(np.nan) if kind is F64 else np.uint32(0x7FFFFFFF).view(np.float32)

    def run(*sources):
        result = function(*sources[:2])
        for source in sources[2:]:  # three-operand min and max
            result = function(result, source)
        return np.where(np.isnan(result), canonical, result).astype(kind.dtype)

    if len(i.operands) == 4:
        return finished(run, i), kind, [kind] * 3
    return finished(run, i)


def float_sign(i: Instruction):
    """abs and neg work on the sign bit, whatever the value."""
    kind = i.type
    bits = kind.bits
    each = 32 if kind.name == "f32x2" else 16 if kind.name.endswith("x2") else bits
    mask = sum(1 << (each * (n + 1) - 1) for n in range(bits // each))
    sign = np.array(mask, kind.unsigned.dtype)[()]
    raw = (lambda a: a & ~sign) if i.parts[0] == "abs" else (lambda a: a ^ sign)
    unsigned = kind.unsigned.dtype
    return (
        finished(lambda a: raw(a.view(unsigned)).view(kind.dtype), i)
        if kind is F32
        else (raw, kind.unsigned, [kind.unsigned])
    )


@elementwise("copysign")
def copysign(i: Instruction):
    return lambda a, b: np.copysign(b, a)


@opcode("testp")
def testp(i: Instruction):
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
        "subnormal": lambda a: (np.abs(a) < np.finfo(a.dtype).tiny) & (a != 0),
    }[i.parts[1]]
    target, source = i.operands
    return compute(i, test, target, TYPES["pred"], [source], [i.type])


# --- comparing -------------------------------------------------------------------------------------------------------

_ORDERED = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNORDERED = {
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def float_compare(i: Instruction, kind: Type):
    compare = {**_ORDERED, **_UNORDERED}[i.parts[1]]
    if kind.name == "bf16":
        return lambda a, b: compare(bf16_to_f32(a), bf16_to_f32(b))
    return (lambda a, b: compare(flush(a), flush(b))) if "ftz" in i.parts else compare
