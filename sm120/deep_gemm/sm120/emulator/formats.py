"""PTX types as numpy dtypes, and the number formats numpy does not have (bf16, fp8, fp6, fp4, ue8m0, ue4m3).

Registers hold bits: unsigned integers of the register's width, and booleans for predicates.  A type says how an
instruction looks at those bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class Type:
    """One PTX type.  ``kind``: u, s, b (bits), f (numpy has it), n (narrow float, kept as bits), p (predicate)."""

    name: str
    bits: int
    kind: str
    dtype: type

    @property
    def signed(self) -> bool:
        return self.kind == "s"

    @property
    def floating(self) -> bool:
        return self.kind in "fn"

    @property
    def unsigned(self) -> Type:
        return TYPES[f"u{self.bits}"]

    @property
    def wide(self) -> Type:
        """The integer type of twice the width and the same sign."""
        return TYPES[f"{'s' if self.signed else 'u'}{2 * self.bits}"]


_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
TYPES: dict[str, Type] = {"pred": Type("pred", 1, "p", np.bool_)}
for _bits in (8, 16, 32, 64):
    TYPES[f"u{_bits}"] = Type(f"u{_bits}", _bits, "u", UNSIGNED[_bits])
    TYPES[f"b{_bits}"] = Type(f"b{_bits}", _bits, "b", UNSIGNED[_bits])
    TYPES[f"s{_bits}"] = Type(f"s{_bits}", _bits, "s", _SIGNED[_bits])
for _bits in (16, 32, 64):
    TYPES[f"f{_bits}"] = Type(f"f{_bits}", _bits, "f", _FLOAT[_bits])
for _name, _bits in {"bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32, "f32x2": 64, "u16x2": 32, "s16x2": 32}.items():
    TYPES[_name] = Type(_name, _bits, "n", UNSIGNED[_bits])
for _name in ("e4m3x2", "e5m2x2", "ue8m0x2", "e2m1x2", "e2m3x2", "e3m2x2"):
    TYPES[_name] = Type(_name, 8 if _name == "e2m1x2" else 16, "n", UNSIGNED[8 if _name == "e2m1x2" else 16])
TYPES["b128"] = Type("b128", 128, "b", np.void)  # named by ld/st/atom; no register of ours is that wide


# --- small formats: decode tables and a table-driven encoder ---------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A float of at most 8 bits, without infinities unless ``ieee``.  ``nans``: the codes that mean NaN."""

    exponent: int
    mantissa: int
    bias: int
    nans: tuple[int, ...] = ()
    ieee: bool = False
    signed: bool = True

    @property
    def bits(self) -> int:
        return self.signed + self.exponent + self.mantissa

    def value(self, code: int) -> float:
        """The scalar definition."""
        sign = -1.0 if self.signed and code >> (self.exponent + self.mantissa) & 1 else 1.0
        exponent, fraction = code >> self.mantissa & ((1 << self.exponent) - 1), code & ((1 << self.mantissa) - 1)
        if code in self.nans:
            return float("nan")
        if self.ieee and exponent == (1 << self.exponent) - 1:
            return float("nan") if fraction else sign * float("inf")
        if exponent == 0 and self.mantissa:
            return sign * fraction * 2.0 ** (1 - self.bias - self.mantissa)
        return sign * (1 + fraction / (1 << self.mantissa)) * 2.0 ** (exponent - self.bias)

    def table(self) -> np.ndarray:
        """All 256 bytes (bits above the format's are ignored) as float32."""
        return np.array([self.value(code % (1 << self.bits)) for code in range(256)], np.float32)


SMALL = {
    "e4m3": Small(4, 3, 7, nans=(0x7F, 0xFF)),
    "e5m2": Small(5, 2, 15, ieee=True),
    "e3m2": Small(3, 2, 3),
    "e2m3": Small(2, 3, 1),
    "e2m1": Small(2, 1, 1),
    "ue8m0": Small(8, 0, 127, nans=(0xFF,), signed=False),
    "ue4m3": Small(4, 3, 7, nans=(0x7F,), signed=False),
}
DECODE: dict[str, np.ndarray] = {name: small.table() for name, small in SMALL.items()}


def encode_small(name: str, value: np.ndarray) -> np.ndarray:
    """Round float64 to nearest even and saturate to the largest finite value; NaN stays NaN where there is one."""
    small = SMALL[name]
    codes = np.arange(1 << (small.exponent + small.mantissa))
    finite = codes[np.isfinite(DECODE[name][codes])]
    values = DECODE[name][finite].astype(np.float64)
    magnitude = np.abs(value)
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low, high = magnitude - values[above - 1], values[above] - magnitude
    up = (high < low) | ((high == low) & (finite[above] % 2 == 0))
    code = np.where(up, finite[above], finite[above - 1])
    if small.signed:
        code = code | (np.signbit(value).astype(code.dtype) << (small.bits - 1))
    if name in ("e4m3", "e5m2", "ue8m0", "ue4m3"):
        code = np.where(np.isnan(value), 0xFF if name == "ue8m0" else 0x7F, code)
    else:
        code = np.where(np.isnan(value), finite[-1], code)  # formats without NaN: the largest positive value
    return code.astype(np.uint8)


# --- bf16, tf32 ------------------------------------------------------------------------------------------------------


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bits(value: np.ndarray, drop: int, mode: str = "rn") -> np.ndarray:
    """float32 bits of ``value`` (float64 or float32) with the low ``drop`` mantissa bits rounded away, NaN made quiet.

    The step through float32 keeps a sticky bit, so that there is one rounding only.
    """
    value = np.asarray(value, np.float64)
    single = narrow(value, np.float32, "rz")
    bits = single.view(np.uint32) | (single != value) * np.uint32(1)
    one, rest = np.uint32(1), np.uint32((1 << drop) - 1)
    if mode == "rn":
        add = rest >> one
        rounded = bits + add + ((bits >> np.uint32(drop)) & one)
    elif mode == "rna":
        rounded = bits + (one << np.uint32(drop - 1))
    else:
        rounded = bits
    return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), rounded) & ~rest


def f64_to_bf16(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    return (round_bits(value, 16, mode) >> np.uint32(16)).astype(np.uint16)


# --- correct rounding ------------------------------------------------------------------------------------------------


def narrow(value: np.ndarray, dtype: type, mode: str) -> np.ndarray:
    """Round float64 (or longdouble) to ``dtype`` by mode rn, rz, rm or rp."""
    result = np.asarray(value).astype(dtype)
    if mode == "rn":
        return result
    back = result.astype(value.dtype)
    if mode == "rz":
        wrong, toward = np.abs(back) > np.abs(value), dtype(0)
    elif mode == "rm":
        wrong, toward = back > value, dtype(-np.inf)
    else:
        wrong, toward = back < value, dtype(np.inf)
    return np.where(wrong, np.nextafter(result, toward), result)


def add_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd: a later rounding to a narrower format is then the only one."""
    total = a + b
    rest = total - a
    error = (a - (total - rest)) + (b - rest)
    even = total.view(np.uint64) & np.uint64(1) == 0
    inexact = (error != 0) & np.isfinite(error) & np.isfinite(total)
    return np.where(inexact & even, np.nextafter(total, np.copysign(np.inf, error)), total)


def flush(value: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 become zero of their sign."""
    magnitude = np.abs(value)
    small = (magnitude < np.float32(2.0**-126)) & (magnitude > 0)
    return np.where(small, np.copysign(np.float32(0), value), value) if small.any() else value
