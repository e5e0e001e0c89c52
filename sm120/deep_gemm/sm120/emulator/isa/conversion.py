"""cvt, cvta, and the moves."""

from __future__ import annotations

import numpy as np

from ..formats import DECODE, SMALL, TYPES, Type, encode_small, flush, narrow, round_bits
from ..memory import LOCAL_WINDOW, SHARED_WINDOW
from ..operands import compute, elementwise, opcode
from ..parser import Instruction
from .floating import MODES, relu, round_to, saturate, widen

B64, U64, F32 = TYPES["b64"], TYPES["u64"], TYPES["f32"]
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@elementwise("mov")
def mov(i: Instruction):
    return lambda a: a


@opcode("cvta")
def cvta(i: Instruction):
    """To and from generic addresses; global, const and param addresses are generic as they are."""
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(i.one_of("shared", "local", "shared::cta"), 0)
    if "shared::cta" in i.parts:
        window = SHARED_WINDOW
    shift = np.uint64(-window & (2**64 - 1) if "to" in i.parts else window)
    target, source = i.operands
    kind = TYPES["b64"] if i.type.bits == 64 else i.type
    return compute(i, (lambda a: a + shift) if window else (lambda a: a), target, kind, [source], [kind])


@opcode("isspacep")
def isspacep(i: Instruction):
    tag = {"shared": 1, "local": 2, "global": 0}.get(i.parts[1].split("::")[0])
    if tag is None:
        raise i.error(f"isspacep.{i.parts[1]} is not supported")
    target, source = i.operands
    return compute(i, lambda a: a >> np.uint64(56) == tag, target, TYPES["pred"], [source], [U64])


@opcode("cvt")
def cvt(i: Instruction):
    target, *sources = i.operands
    result, source = i.types[0], i.types[-1]
    if "pack" in i.parts:
        return pack(i)
    if source.name.removesuffix("x2") in SMALL:
        return convert_from_pair(i, result, source)
    if result.name.endswith("x2"):
        return convert_pair(i, result, source)
    return compute(i, conversion(i, result, source), target, result, sources, [source])


def conversion(i: Instruction, result: Type, source: Type):
    """The function from one plain type to another."""
    sat = "sat" in i.parts
    if not source.floating and not result.floating:
        if sat:
            return lambda a: clamp_integer(a, result)
        return lambda a: a.astype(result.dtype)
    if not source.floating:
        return from_integer(i, result, source)
    if not result.floating:
        return to_integer(i, result, source)
    return between_floats(i, result, source)


def clamp_integer(a: np.ndarray, result: Type) -> np.ndarray:
    info, have = np.iinfo(result.dtype), np.iinfo(a.dtype)
    low, high = max(info.min, have.min), min(info.max, have.max)
    return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(result.dtype)


def from_integer(i: Instruction, result: Type, source: Type):
    mode = i.one_of(*MODES, default="rn")
    if result.name == "bf16":
        return lambda a: round_to(odd_float64(a), "bf16", mode)
    if mode == "rn":
        return lambda a: a.astype(np.float64).astype(np.float16) if result.name == "f16" else a.astype(result.dtype)
    return lambda a: narrow(a.astype(np.longdouble), result.dtype, mode)


def odd_float64(a: np.ndarray) -> np.ndarray:
    """An integer as float64; 64-bit ones keep a sticky lowest bit for the rounding to come."""
    if a.dtype.itemsize < 8:
        return a.astype(np.float64)
    sticky = np.where((a & a.dtype.type(0x7FF)) != 0, a.dtype.type(0x800), a.dtype.type(0))
    large = np.abs(a.astype(np.float64)) >= 2.0**53
    return np.where(large, (a & ~a.dtype.type(0x7FF)) | sticky, a).astype(np.float64)


def to_integer(i: Instruction, result: Type, source: Type):
    """Round, saturate; NaN becomes 0, or the sign bit alone where 64-bit integers or f64 are involved."""
    how = _TO_INTEGER[i.one_of(*_TO_INTEGER)]
    info = np.iinfo(result.dtype)
    wide_nan = source.bits == 64 or result.bits == 64
    nan = np.array((1 << (result.bits - 1)) if wide_nan else 0, TYPES[f"u{result.bits}"].dtype).view(result.dtype)
    ftz = "ftz" in i.parts

    def convert(a):
        value = widen(flush(a) if ftz else a, source.name) if source.bits < 64 else a
        value = how(value)
        above, below = value >= float(info.max) + (result.bits < 64), value <= float(info.min)
        inside = np.where(above | below | np.isnan(value), 0.0, value).astype(result.dtype)
        inside = np.where(above, result.dtype(info.max), np.where(below, result.dtype(info.min), inside))
        return np.where(np.isnan(value), nan, inside).astype(result.dtype)

    return convert


def between_floats(i: Instruction, result: Type, source: Type):
    to_whole = _TO_INTEGER.get(i.one_of(*_TO_INTEGER))
    mode = i.one_of(*MODES, default="rn")
    ftz, sat, is_relu = "ftz" in i.parts, "sat" in i.parts, "relu" in i.parts

    def convert(a):
        if ftz and source is F32:
            a = flush(a)
        value = a if source.bits == 64 else widen(a, source.name)
        if to_whole is not None:
            value = to_whole(value)
        if sat:
            value = saturate(value)
        if is_relu:
            value = relu(value)
        if result.name == "tf32":
            return round_bits(value, 13, "rna" if "rna" in i.parts else mode)
        out = value if result.bits == 64 else round_to(value, result.name, mode)
        return flush(out) if ftz and result is F32 else out

    return convert


# --- packed conversions ----------------------------------------------------------------------------------------------


def convert_pair(i: Instruction, result: Type, source: Type):
    """d = {a, b}: a in the upper half.  f32, f32 -> f16x2, bf16x2 and the small formats; f16x2, bf16x2 -> small."""
    target, *sources = i.operands
    name, mode = result.name.removesuffix("x2"), i.one_of(*MODES, default="rn")
    width = result.bits // 2
    if name == "f32":
        raise i.error(f"cvt to .{result.name} is not supported")
    half = source.name.removesuffix("x2")

    def encode(value):
        if "relu" in i.parts:
            value = relu(value)
        if name in SMALL:
            if name == "ue8m0":
                return encode_ue8m0(value, mode).astype(np.uint32)
            return encode_small(name, value).astype(np.uint32)
        if "satfinite" in i.parts:
            largest = 65504.0 if name == "f16" else 3.3895313892515355e38
            value = np.where(np.isnan(value), value, np.clip(value, -largest, largest))
        return np.asarray(round_to(value, name, mode)).view(np.uint16).astype(np.uint32)

    def merge(high, low):
        return (encode(high) << np.uint32(width) | encode(low)).astype(result.dtype)

    if source.name.endswith("x2"):  # one register that holds both

        def split(a):
            high, low = ((a >> np.uint32(n)).astype(np.uint16) for n in (16, 0))
            return merge(widen(high, half), widen(low, half))

        return compute(i, split, target, result, sources, [source])
    return compute(
        i, lambda a, b: merge(a.astype(np.float64), b.astype(np.float64)), target, result, sources, [F32] * 2
    )


def encode_ue8m0(value: np.ndarray, mode: str) -> np.ndarray:
    """The exponent of |value|, rounded up (rp) or down (rz) to a power of two."""
    fraction, exponent = np.frexp(np.abs(value))
    power = np.where((fraction == 0.5) | (mode == "rz"), exponent - 1, exponent)
    power = np.where(value == 0, -127, power)
    power = np.where(np.isinf(value), 127, power)
    return np.where(np.isnan(value), 255, np.clip(power, -127, 127) + 127).astype(np.uint8)


def convert_from_pair(i: Instruction, result: Type, source: Type):
    """f16x2 or bf16x2 from two small floats in one register."""
    target, a = i.operands
    name, width = source.name.removesuffix("x2"), source.bits // 2
    if name not in SMALL or not result.name.endswith("x2"):
        raise i.error(f"cvt from .{source.name} to .{result.name} is not supported")
    half = result.name.removesuffix("x2")
    mask = np.uint32((1 << width) - 1)

    def expand(bits):
        def one(code):
            value = DECODE[name][code & mask].astype(np.float64)
            value = relu(value) if "relu" in i.parts else value
            return np.asarray(round_to(value, half)).view(np.uint16).astype(np.uint32)

        bits = bits.astype(np.uint32)
        return one(bits >> np.uint32(width)) << np.uint32(16) | one(bits)

    return compute(i, expand, target, result, [a], [source])


def pack(i: Instruction):
    """cvt.pack.sat.{s16,u16,s8,u8,...}.s32{.b32} d, a, b{, c}: two saturated integers (c's bits shift up)."""
    result, source = i.types[0], i.types[1]
    target, *sources = i.operands
    bits = np.uint32(result.bits)
    mask = np.uint32((1 << result.bits) - 1)

    def merge(a, b, *c):
        high, low = (clamp_integer(value, result).astype(np.int64).astype(np.uint32) & mask for value in (a, b))
        both = high << bits | low
        return both | c[0] << (bits * np.uint32(2)) if c else both

    b32 = TYPES["b32"]
    return compute(i, merge, target, b32, sources, [source] * 2 + [b32] * (len(sources) - 2))
