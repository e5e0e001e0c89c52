"""Integer arithmetic, logic, shifts, bit fields, comparisons and selections."""

from __future__ import annotations

import numpy as np

from ..formats import TYPES, Type
from ..operands import TABLE, compute, elementwise, opcode, reader, writer
from ..parser import Instruction, Pair
from .floating import float_add, float_compare, float_divide, float_minmax, float_multiply, float_sign

U8, U32, S32, U64, S64, B32, B64 = (TYPES[name] for name in "u8 u32 s32 u64 s64 b32 b64".split())
PRED = TYPES["pred"]


def clamp(value: np.ndarray, kind: Type) -> np.ndarray:
    """Saturate a wider integer to the type."""
    info = np.iinfo(kind.dtype)
    return np.clip(value, info.min, info.max).astype(kind.dtype)


def float_or(integer_version):
    """mul, min, ... exist for both: send the float ones to floating.py."""
    floats = {
        "mul": float_multiply,
        "div": float_divide,
        "min": float_minmax,
        "max": float_minmax,
        "abs": float_sign,
        "neg": float_sign,
    }

    def make(i: Instruction):
        return floats[i.parts[0]](i) if i.types[0].floating else integer_version(i)

    return make


# --- arithmetic ------------------------------------------------------------------------------------------------------


@opcode("add", "sub")
def add(i: Instruction):
    if "cc" in i.parts:
        return carry(i)
    target, *sources = i.operands
    function = float_add(i) if i.type.floating else sum_or_difference(i)
    return compute(i, function, target, i.type, sources, [i.type] * 2)


def sum_or_difference(i: Instruction):
    function = np.subtract if i.parts[0] == "sub" else np.add
    if "sat" in i.parts:  # s32 only
        return lambda a, b: clamp(function(a.astype(np.int64), b.astype(np.int64)), S32)
    if i.type.name in ("u16x2", "s16x2"):
        return lambda a, b: pairwise(function, a, b, np.uint16)
    return function


def pairwise(function, a, b, dtype):
    """A function of 16-bit halves, on 32-bit words."""
    a, b = np.broadcast_arrays(np.atleast_1d(a), np.atleast_1d(b))
    a, b = np.ascontiguousarray(a).view(dtype), np.ascontiguousarray(b).view(dtype)
    return function(a, b).view(np.uint32)


def carry(i: Instruction):
    """add.cc, addc, sub.cc, subc, mad.cc, madc: the carry flag is kept per lane in the wave's state."""
    name = i.parts[0]
    takes, sets = name.endswith("c"), "cc" in i.parts
    subtract = name.startswith("sub")
    kind = i.type.unsigned
    target, *sources = i.operands
    write = writer(i, target, kind)
    reads = [reader(i, source, kind) for source in sources]
    product = (multiply_high(i.type) if "hi" in i.parts else multiply_low(i.type)) if name.startswith("mad") else None

    def step(wave, at):
        values = [read(wave, at) for read in reads]
        if product is not None:
            a, b, c = values
            values = [product(a.view(i.type.dtype), b.view(i.type.dtype)).view(kind.dtype), c]
        a, b = (np.broadcast_to(value, at.count) for value in values)
        flag = wave.state.get("carry")
        if flag is None:
            flag = np.zeros(wave.size, bool)
        inward = flag[at.index] if takes else np.zeros(at.count, bool)
        if subtract:
            total = a - b
            result = total - inward
            out = (a < b) | (inward & (total == 0))
        else:
            total = a + b
            result = total + inward
            out = (total < a) | (result < total)
        if sets:
            flag = flag.copy()
            flag[at.index] = out
            wave.state["carry"] = flag
        write(wave, at, result.astype(kind.dtype, copy=False))

    return step


for _name in ("addc", "subc", "madc"):
    opcode(_name)(carry)


def multiply_low(kind: Type):
    return np.multiply


def multiply_wide(kind: Type):
    wide = kind.wide.dtype
    return lambda a, b: np.multiply(a.astype(wide), b.astype(wide))


def multiply_high(kind: Type):
    if kind.bits < 64:
        wide, shift = multiply_wide(kind), kind.wide.dtype(kind.bits)
        return lambda a, b: (wide(a, b) >> shift).astype(kind.dtype)

    def high64(a, b):
        low, s = np.uint64(0xFFFFFFFF), np.uint64(32)
        x, y = a.view(np.uint64), b.view(np.uint64)
        x0, x1, y0, y1 = x & low, x >> s, y & low, y >> s
        middle = x1 * y0 + (x0 * y0 >> s)
        high = x1 * y1 + (middle >> s) + ((x0 * y1 + (middle & low)) >> s)
        if kind.signed:  # undo what reading negative numbers as unsigned added
            zero = np.uint64(0)
            high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
        return high.view(kind.dtype)

    return high64


@elementwise("mul")
@float_or
def mul(i: Instruction):
    if "wide" in i.parts:
        return multiply_wide(i.type), i.type.wide, [i.type] * 2
    return multiply_high(i.type) if "hi" in i.parts else multiply_low(i.type)


@opcode("mad")
def mad(i: Instruction):
    if i.type.floating:
        return TABLE["fma"](i)
    return carry(i) if "cc" in i.parts else multiply_add(i)


def multiply_add(i: Instruction):
    target, *sources = i.operands
    if "wide" in i.parts:
        multiply, wide = multiply_wide(i.type), i.type.wide
        return compute(i, lambda a, b, c: multiply(a, b) + c, target, wide, sources, [i.type, i.type, wide])
    multiply = multiply_high(i.type) if "hi" in i.parts else multiply_low(i.type)
    if "sat" in i.parts:  # mad.hi.sat.s32
        return compute(
            i,
            lambda a, b, c: clamp(multiply(a, b).astype(np.int64) + c, S32),
            target,
            i.type,
            sources,
            [i.type] * 3,
        )
    return compute(i, lambda a, b, c: multiply(a, b) + c, target, i.type, sources, [i.type] * 3)


def _24(i: Instruction):
    def low24(a):
        if i.type.signed:
            return (a.astype(np.int64) << 40) >> 40
        return a.astype(np.uint64) & np.uint64(0xFFFFFF)

    shift = 16 if "hi" in i.parts else 0
    return lambda a, b: ((low24(a) * low24(b)) >> (np.int64 if i.type.signed else np.uint64)(shift)).astype(
        i.type.dtype
    )


@elementwise("mul24")
def mul24(i: Instruction):
    return _24(i)


@elementwise("mad24")
def mad24(i: Instruction):
    multiply = _24(i)
    return lambda a, b, c: multiply(a, b) + c


@elementwise("sad")
def sad(i: Instruction):
    def difference(a, b, c):
        return (np.where(a > b, a - b, b - a) + c).astype(i.type.dtype)

    return difference


def quotient(a, b):
    """Truncating division; by zero all bits are set, as the hardware does."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    result = a // safe
    if a.dtype.kind == "i":
        result = result + ((result < 0) & (result * safe != a)).astype(a.dtype)
        result = np.where(safe == -1, -a, result)
    return np.where(b == 0, ~b.dtype.type(0), result).astype(a.dtype)


@elementwise("div")
@float_or
def div(i: Instruction):
    return quotient


@elementwise("rem")
def rem(i: Instruction):
    return lambda a, b: np.where(b == 0, a, a - quotient(a, b) * b).astype(i.type.dtype)


@elementwise("min", "max")
@float_or
def minmax(i: Instruction):
    function = np.minimum if i.parts[0] == "min" else np.maximum
    if i.type.name in ("u16x2", "s16x2"):
        return lambda a, b: pairwise(function, a, b, np.int16 if i.type.name[0] == "s" else np.uint16)
    if "relu" in i.parts:
        return lambda a, b: np.maximum(function(a, b), a.dtype.type(0))
    return function


@elementwise("abs")
@float_or
def absolute(i: Instruction):
    return np.abs


@elementwise("neg")
@float_or
def negative(i: Instruction):
    return np.negative


# --- logic and shifts ------------------------------------------------------------------------------------------------


for _name, _function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}.items():
    elementwise(_name)(lambda i, function=_function: function)


@elementwise("cnot")
def cnot(i: Instruction):
    return lambda a: (a == 0).astype(i.type.dtype)


# Functions of two bits by their truth table: bit 2b + c is the result for (b, c).
_TWO_BITS = [
    lambda b, c: b & ~b,
    lambda b, c: ~(b | c),
    lambda b, c: ~b & c,
    lambda b, c: ~b,
    lambda b, c: b & ~c,
    lambda b, c: ~c,
    lambda b, c: b ^ c,
    lambda b, c: ~(b & c),
    lambda b, c: b & c,
    lambda b, c: ~(b ^ c),
    lambda b, c: c,
    lambda b, c: ~b | c,
    lambda b, c: b,
    lambda b, c: b | ~c,
    lambda b, c: b | c,
    lambda b, c: b | ~b,
]


@opcode("lop3")
def lop3(i: Instruction):
    """Any function of three bits: bit 4a + 2b + c of the immediate."""
    target, a, b, c, table, *_ = i.operands
    if isinstance(target, Pair) or "BOOL" in i.parts:
        raise i.error("lop3 with a predicate is not supported")
    low, high = table.value & 15, table.value >> 4 & 15
    without, with_ = _TWO_BITS[low], _TWO_BITS[high]
    if low == high:
        function = lambda a, b, c: without(b, c)  # noqa: E731
    elif low == 0:
        function = lambda a, b, c: a & with_(b, c)  # noqa: E731
    elif high == 0:
        function = lambda a, b, c: ~a & without(b, c)  # noqa: E731
    elif high == 15:
        function = lambda a, b, c: a | without(b, c)  # noqa: E731
    elif low == 15:
        function = lambda a, b, c: ~a | with_(b, c)  # noqa: E731
    elif low == 15 - high:
        function = lambda a, b, c: a ^ without(b, c)  # noqa: E731
    else:
        function = lambda a, b, c: (a & with_(b, c)) | (~a & without(b, c))  # noqa: E731
    return compute(i, function, target, i.type, [a, b, c], [i.type] * 3)


def shift_left(a, amount):
    bits = a.dtype.itemsize * 8
    result = a << np.minimum(amount, bits - 1).astype(a.dtype)
    return np.where(amount >= bits, a.dtype.type(0), result)


def shift_right(a, amount):
    """Arithmetic for signed types; an amount beyond the width acts like the width."""
    bits = a.dtype.itemsize * 8
    result = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return result if a.dtype.kind == "i" else np.where(amount >= bits, a.dtype.type(0), result)


@elementwise("shl")
def shl(i: Instruction):
    return shift_left, i.type, [i.type, U32]


@elementwise("shr")
def shr(i: Instruction):
    return shift_right, i.type, [i.type, U32]


@elementwise("shf")
def shf(i: Instruction):
    """Funnel shift of {b, a}: the high word of a left shift, the low word of a right shift."""
    left, wrap = "l" in i.parts, "wrap" in i.parts

    def funnel(a, b, amount):
        n = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return funnel, B32, [B32, B32, U32]


# --- bits and bytes --------------------------------------------------------------------------------------------------

_PRMT_MODES = {  # the four byte selectors that the mode makes of the control's two low bits
    "f4e": lambda s: [s, s + 1, s + 2, s + 3],
    "b4e": lambda s: [s, (s - 1) & 7, (s - 2) & 7, (s - 3) & 7],
    "rc8": lambda s: [s, s, s, s],
    "ecl": lambda s: [np.maximum(s, n) for n in range(4)],
    "ecr": lambda s: [np.minimum(s, n) for n in range(4)],
    "rc16": lambda s: [(s & 1) * 2, (s & 1) * 2 + 1, (s & 1) * 2, (s & 1) * 2 + 1],
}


@elementwise("prmt")
def prmt(i: Instruction):
    """Pick four of the eight bytes of {b, a}; selector bit 3 replicates the byte's sign instead."""
    mode = i.one_of(*_PRMT_MODES)

    def permute(a, b, control):
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        if mode:
            picks = [np.asarray(pick).astype(np.uint64) for pick in _PRMT_MODES[mode](control.astype(np.int64) & 3)]
        else:
            picks = [(control >> np.uint32(4 * n) & np.uint32(15)).astype(np.uint64) for n in range(4)]
        result = np.uint32(0)
        for n, pick in enumerate(picks):
            byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))).astype(np.uint32) & np.uint32(0xFF)
            if not mode and (pick & np.uint64(8)).any():
                sign = (byte >> np.uint32(7)) * np.uint32(0xFF)
                byte = np.where(pick & np.uint64(8) != 0, sign, byte)
            result = result | byte << np.uint32(8 * n)
        return result.astype(np.uint32)

    return permute, B32, [B32] * 3


@elementwise("bfe")
def bfe(i: Instruction):
    """Bits [pos, pos + len), extended by the sign bit (the last one in range) for signed types."""
    kind, bits = i.type, i.type.bits

    def extract(a, pos, length):
        pos, length = (np.atleast_1d(n) & np.uint32(255) for n in (pos, length))
        field = shift_right(a.view(kind.unsigned.dtype), pos)
        mask = ~shift_left(np.full(1, ~kind.unsigned.dtype(0)), length)
        field = field & mask
        if kind.signed:
            last = np.minimum(pos + length - (length > 0), bits - 1).astype(np.uint32)
            sign = (a.view(kind.unsigned.dtype) >> last.astype(kind.unsigned.dtype)) & kind.unsigned.dtype(1)
            field = np.where((sign != 0) & (length > 0), field | ~mask, field)
            # a field that reaches beyond the top is filled with the sign
            top = np.maximum(bits - pos.astype(np.int64), 0).astype(np.uint32)
            above = ~shift_left(np.full(1, ~kind.unsigned.dtype(0)), np.minimum(length, top))
            field = np.where((sign != 0) & (length > 0), field | ~above, field)
        return field.astype(kind.unsigned.dtype).view(kind.dtype)

    return extract, kind, [kind, U32, U32]


@elementwise("bfi")
def bfi(i: Instruction):
    """b with the low ``len`` bits of a at ``pos``."""

    def insert(a, b, pos, length):
        pos, length = (np.atleast_1d(n) & np.uint32(255) for n in (pos, length))
        mask = shift_left(~shift_left(np.full(1, ~b.dtype.type(0)), length), pos)
        return (b & ~mask) | (shift_left(np.atleast_1d(a), pos) & mask)

    return insert, i.type, [i.type, i.type, U32, U32]


def leading_zeros(a: np.ndarray) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    a, count = a.copy(), np.zeros(a.shape, np.uint32)
    step = bits // 2
    zero = a == 0
    while step:
        high = a >> a.dtype.type(bits - step) == 0
        count = count + high * np.uint32(step)
        a = np.where(high, a << a.dtype.type(step), a)
        step //= 2
    return np.where(zero, np.uint32(bits), count)


@elementwise("bfind")
def bfind(i: Instruction):
    """Position of the highest bit that is not the sign; 0xFFFFFFFF for none."""
    kind = i.type

    def find(a):
        magnitude = np.where(a < 0, ~a, a).view(kind.unsigned.dtype) if kind.signed else a
        zeros = leading_zeros(magnitude)
        found = zeros if "shiftamt" in i.parts else np.uint32(kind.bits - 1) - zeros
        return np.where(magnitude == 0, np.uint32(0xFFFFFFFF), found)

    return find, U32, [kind]


def reverse_bits(a: np.ndarray) -> np.ndarray:
    swapped = np.atleast_1d(a)
    for step, mask in ((1, 0x55), (2, 0x33), (4, 0x0F)):
        every = np.array(int.from_bytes(bytes([mask]) * a.dtype.itemsize, "little"), a.dtype)
        n = a.dtype.type(step)
        swapped = ((swapped >> n) & every) | ((swapped & every) << n)
    return swapped.byteswap()


@elementwise("brev")
def brev(i: Instruction):
    return reverse_bits


@elementwise("clz")
def clz(i: Instruction):
    return leading_zeros, U32, [i.type]


@elementwise("popc")
def popc(i: Instruction):
    return lambda a: np.bitwise_count(a).astype(np.uint32), U32, [i.type]


@elementwise("fns")
def fns(i: Instruction):
    """The position of the n-th set bit from ``base`` on, upwards for n > 0, downwards for n < 0."""

    def one(mask: int, base: int, offset: int) -> int:
        if offset == 0:
            return base if mask >> base & 1 else 0xFFFFFFFF
        walk = range(base, 32) if offset > 0 else range(base, -1, -1)
        found = [position for position in walk if mask >> position & 1]
        return found[abs(offset) - 1] if len(found) >= abs(offset) else 0xFFFFFFFF

    search = np.vectorize(one, otypes=[np.uint32])
    return lambda a, b, c: search(a, b, c), B32, [B32, B32, S32]


@elementwise("szext")
def szext(i: Instruction):
    """Sign- or zero-extend from ``n`` bits."""

    def extend(a, n):
        n = n if "clamp" in i.parts else n & np.uint32(31)
        unused = np.where(n >= 32, 0, 32 - n.astype(np.int64)).astype(np.uint32)
        shifted = shift_left(np.atleast_1d(a).view(np.uint32), unused).view(i.type.dtype)
        return shift_right(shifted, unused)

    return extend, i.type, [i.type, U32]


@elementwise("bmsk")
def bmsk(i: Instruction):
    """``b`` ones from bit ``a`` on."""

    def mask(a, b):
        a, b = np.atleast_1d(a), np.atleast_1d(b)
        if "wrap" in i.parts:
            a, b = a & np.uint32(31), b & np.uint32(31)
        return shift_left(~shift_left(np.full(1, 0xFFFFFFFF, np.uint32), b), a)

    return mask, B32, [B32, B32]


@opcode("dp4a", "dp2a")
def dot(i: Instruction):
    """c + the dot product of bytes (dp2a: of 16-bit halves of a with two bytes of b), modulo 2^32."""
    kinds = i.types
    target, *sources = i.operands
    result = S32 if any(kind.signed for kind in kinds) else U32

    def words(value, kind: Type, bits: int):
        small = TYPES[f"{'s' if kind.signed else 'u'}{bits}"].dtype
        flat = np.ascontiguousarray(np.atleast_1d(value)).view(small)
        return flat.reshape(-1, 32 // bits).astype(np.int64)

    def product(a, b, c):
        if i.parts[0] == "dp4a":
            total = (words(a, kinds[0], 8) * words(b, kinds[1], 8)).sum(axis=1)
        else:
            half = words(b, kinds[1], 8)[:, 2:] if "hi" in i.parts else words(b, kinds[1], 8)[:, :2]
            total = (words(a, kinds[0], 16) * half).sum(axis=1)
        return (total + c.astype(np.int64)).astype(np.uint64).astype(np.uint32).view(result.dtype)

    return compute(i, product, target, result, sources, [B32, B32, result])


# --- comparing and choosing ------------------------------------------------------------------------------------------

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(i: Instruction, kind: Type):
    return float_compare(i, kind) if kind.floating else _COMPARE[i.parts[1]]


@opcode("setp")
def setp(i: Instruction):
    """p|q = compare(a, b) {and, or, xor} c; q gets the comparison's opposite."""
    target, a, b, *third = i.operands
    first, second = target if isinstance(target, Pair) else (target, None)
    kind = i.type
    if kind.name in ("f16x2", "bf16x2"):
        return setp_pair(i, first, second, a, b, third)
    compare = comparison(i, kind)
    write, write_not = writer(i, first, PRED), writer(i, second, PRED)
    read_a, read_b = reader(i, a, kind), reader(i, b, kind)
    join = _JOIN[i.parts[2]] if third else None
    read_c = reader(i, third[0], PRED) if third else None
    if second is None and join is None:
        return lambda wave, at: write(wave, at, compare(read_a(wave, at), read_b(wave, at)))

    def step(wave, at):
        yes = compare(read_a(wave, at), read_b(wave, at))
        no = ~yes
        if join is not None:
            c = read_c(wave, at)
            yes, no = join(yes, c), join(no, c)
        write(wave, at, yes)
        write_not(wave, at, no)

    return step


def setp_pair(i: Instruction, first, second, a, b, third):
    """setp on packed halves: p for the low one, q for the high one."""
    compare = comparison(i, TYPES[i.type.name[:-2]])
    writes = writer(i, first, PRED), writer(i, second, PRED)
    reads = reader(i, a, i.type), reader(i, b, i.type)
    join = _JOIN[i.parts[2]] if third else None
    read_c = reader(i, third[0], PRED) if third else None
    dtype = TYPES[i.type.name[:-2]].dtype

    def step(wave, at):
        x, y = (read(wave, at) for read in reads)
        for n, write in enumerate(writes):
            half = [(value >> np.uint32(16 * n)).astype(np.uint16).view(dtype) for value in (x, y)]
            yes = compare(*half)
            write(wave, at, yes if join is None else join(yes, read_c(wave, at)))

    return step


@opcode("set")
def set_(i: Instruction):
    """Like setp, into a register: all ones or 1.0 for true."""
    target, a, b, *third = i.operands
    result, kind = i.types
    compare = comparison(i, kind)
    join = _JOIN[i.parts[2]] if third else None

    def function(x, y, *c):
        yes = compare(x, y)
        yes = join(yes, *c) if join else yes
        if result.kind == "f":
            return np.asarray(yes).astype(result.dtype)
        one = np.uint16(0x3F80) if result.name == "bf16" else ~result.dtype(0)
        return np.where(yes, one, result.dtype(0))

    return compute(i, function, target, result, [a, b, *third], [kind, kind] + [PRED] * len(third))


@elementwise("selp")
def selp(i: Instruction):
    kind = i.type.unsigned if i.type.kind != "p" else i.type
    return lambda a, b, p: np.where(p, a, b), kind, [kind, kind, PRED]


@elementwise("slct")
def slct(i: Instruction):
    """a where c >= 0 (-0.0 and so on; NaN chooses b), else b."""
    kind, by = i.types
    kind = kind.unsigned
    return lambda a, b, c: np.where(c >= 0, a, b), kind, [kind, kind, by]
