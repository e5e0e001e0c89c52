"""Each integer, logic, bit and comparison instruction against its definition in plain Python integers."""

import numpy as np
import pytest
from emulator_harness import RNG, evaluate, floats, integers, launch, same

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S16, S32, S64 = np.int16, np.int32, np.int64
DTYPES = {"u16": U16, "s16": S16, "u32": U32, "s32": S32, "u64": U64, "s64": S64, "b16": U16, "b32": U32, "b64": U64}


def wrap(value: int, dtype) -> int:
    bits = 8 * np.dtype(dtype).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.iinfo(dtype).min < 0 and value >> (bits - 1) else value


def check(ptx: str, result, dtypes, scalar, sources=None):
    """``ptx`` on random operands of ``dtypes`` against ``scalar`` of Python integers."""
    sources = sources or [RNG.permutation(integers(dtype)) if n else integers(dtype) for n, dtype in enumerate(dtypes)]
    got = evaluate(ptx, sources, result)
    want = [scalar(*(one.item() for one in row)) for row in zip(*sources)]
    want = np.array([bool(w) if result is bool else wrap(int(w), result) for w in want], result)
    same(got, want, *sources)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def divide(a, b):
    return -1 if b == 0 else truncated(a, b)


def remainder(a, b):
    return a if b == 0 else a - truncated(a, b) * b


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": divide,
    "rem": remainder,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", BINARY)
def test_binary(name, kind):
    dtype = DTYPES[kind]
    check(f"{name}.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype, dtype], BINARY[name])


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_multiply_high_and_mad(kind):
    dtype = DTYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize
    check(f"mul.hi.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype] * 2, lambda a, b: a * b >> bits)
    check(f"mad.lo.{kind} {{y}}, {{0}}, {{1}}, {{2}};", dtype, [dtype] * 3, lambda a, b, c: a * b + c)
    check(f"mad.hi.{kind} {{y}}, {{0}}, {{1}}, {{2}};", dtype, [dtype] * 3, lambda a, b, c: (a * b >> bits) + c)
    check(f"sad.{kind} {{y}}, {{0}}, {{1}}, {{2}};", dtype, [dtype] * 3, lambda a, b, c: abs(a - b) + c)


@pytest.mark.parametrize("kind, wide", [("u16", U32), ("s16", S32), ("u32", U64), ("s32", S64)])
def test_wide(kind, wide):
    dtype = DTYPES[kind]
    check(f"mul.wide.{kind} {{y}}, {{0}}, {{1}};", wide, [dtype] * 2, lambda a, b: a * b)
    check(f"mad.wide.{kind} {{y}}, {{0}}, {{1}}, {{2}};", wide, [dtype, dtype, wide], lambda a, b, c: a * b + c)


def test_saturating():
    def clamp(v):
        return max(-(2**31), min(2**31 - 1, v))

    check("add.sat.s32 {y}, {0}, {1};", S32, [S32] * 2, lambda a, b: clamp(a + b))
    check("sub.sat.s32 {y}, {0}, {1};", S32, [S32] * 2, lambda a, b: clamp(a - b))
    check("mad.hi.sat.s32 {y}, {0}, {1}, {2};", S32, [S32] * 3, lambda a, b, c: clamp((a * b >> 32) + c))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_mul24(kind):
    def low(a):
        a &= 0xFFFFFF
        return a - (1 << 24) if kind == "s32" and a >> 23 else a

    dtype = DTYPES[kind]
    check(f"mul24.lo.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype] * 2, lambda a, b: low(a) * low(b))
    check(f"mul24.hi.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype] * 2, lambda a, b: low(a) * low(b) >> 16)
    check(f"mad24.lo.{kind} {{y}}, {{0}}, {{1}}, {{2}};", dtype, [dtype] * 3, lambda a, b, c: low(a) * low(b) + c)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_abs_neg(kind):
    check(f"abs.{kind} {{y}}, {{0}};", DTYPES[kind], [DTYPES[kind]], abs)
    check(f"neg.{kind} {{y}}, {{0}};", DTYPES[kind], [DTYPES[kind]], lambda a: -a)


def test_carry_chains():
    a, b, c = (integers(U64), RNG.permutation(integers(U64)), integers(U64))
    split = "mov.b64 {{%r10, %r11}}, {0}; mov.b64 {{%r12, %r13}}, {1}; "
    join = " mov.b64 {y}, {{%r14, %r15}};"
    for ptx, want in [
        ("add.cc.u32 %r14, %r10, %r12; addc.u32 %r15, %r11, %r13;", lambda a, b, c: a + b),
        ("sub.cc.u32 %r14, %r10, %r12; subc.u32 %r15, %r11, %r13;", lambda a, b, c: a - b),
        # 64-bit a * low(b) + c in 32-bit pieces
        (
            "mov.b64 {{%r16, %r17}}, {2}; mad.lo.cc.u32 %r14, %r10, %r12, %r16; madc.hi.u32 %r15, %r10, %r12, %r17;"
            "mad.lo.u32 %r15, %r11, %r12, %r15;",
            lambda a, b, c: a * (b & 0xFFFFFFFF) + c,
        ),
    ]:
        check(split + ptx + join, U64, None, want, [a, b, c])
    carry = "add.cc.u32 %r10, {0}, {1}; addc.cc.u32 %r11, {2}, {0}; addc.u32 {y}, 0, 0;"
    check(carry, U32, [U32] * 3, lambda a, b, c: (a + c + (a + b >> 32)) >> 32)
    borrow = "sub.cc.u32 %r10, {0}, {1}; subc.cc.u32 %r11, {2}, {0}; subc.u32 {y}, 0, 0;"
    check(borrow, U32, [U32] * 3, lambda a, b, c: -1 if c - a - (a < b) < 0 else 0)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind):
    dtype = DTYPES[kind]
    check(f"and.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype] * 2, lambda a, b: a & b)
    check(f"or.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype] * 2, lambda a, b: a | b)
    check(f"xor.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype] * 2, lambda a, b: a ^ b)
    check(f"not.{kind} {{y}}, {{0}};", dtype, [dtype], lambda a: ~a)
    check(f"cnot.{kind} {{y}}, {{0}};", dtype, [dtype], lambda a: a == 0)


def test_logic_of_predicates():
    p, q = RNG.integers(0, 2, (2, 64)).astype(bool)
    same(evaluate("and.pred {y}, {0}, {1};", [p, q], bool), p & q)
    same(evaluate("or.pred {y}, {0}, !{1};", [p, q], bool), p | ~q)
    same(evaluate("xor.pred {y}, {0}, {1};", [p, q], bool), p ^ q)
    same(evaluate("not.pred {y}, {0};", [p, q], bool), ~p)
    same(evaluate("mov.pred {y}, {0};", [p, q], bool), p)
    same(evaluate("@{0} mov.u32 %r1, 7; @!{0} mov.u32 %r1, 9; mov.u32 {y}, %r1;", [p], U32), np.where(p, 7, 9))


@pytest.mark.parametrize("table", range(256))
def test_lop3(table):
    def scalar(a, b, c):
        out = 0
        for n in range(8):
            if table >> n & 1:
                out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        return out

    sources = [RNG.integers(0, 2**32, 64, U32) for _ in range(3)]
    check(f"lop3.b32 {{y}}, {{0}}, {{1}}, {{2}}, {table:#x};", U32, None, scalar, sources)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u32", "s16", "s32", "s64"])
def test_shifts(kind):
    dtype = DTYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize
    if kind[0] == "b":
        check(f"shl.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype, U32], lambda a, n: a << min(n, 64))
        check(f"shl.{kind} {{y}}, {{0}}, {bits};", dtype, [dtype], lambda a: 0)
        check(f"shl.{kind} {{y}}, {{0}}, 3;", dtype, [dtype], lambda a: a << 3)
    check(f"shr.{kind} {{y}}, {{0}}, {{1}};", dtype, [dtype, U32], lambda a, n: a >> min(n, 64))
    check(f"shr.{kind} {{y}}, {{0}}, 5;", dtype, [dtype], lambda a: a >> 5)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel(mode):
    def amount(n):
        return n & 31 if mode == "wrap" else min(n, 32)

    check(
        f"shf.l.{mode}.b32 {{y}}, {{0}}, {{1}}, {{2}};",
        U32,
        [U32] * 3,
        lambda a, b, n: (b << 32 | a) << amount(n) >> 32,
    )
    check(f"shf.r.{mode}.b32 {{y}}, {{0}}, {{1}}, {{2}};", U32, [U32] * 3, lambda a, b, n: (b << 32 | a) >> amount(n))


def byte_picker(mode):
    def scalar(a, b, control):
        octets = [(b << 32 | a) >> 8 * n & 255 for n in range(8)]
        s = control & 3
        if mode == "":
            out = []
            for n in range(4):
                nibble = control >> 4 * n & 15
                byte = octets[nibble & 7]
                out.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        else:
            pick = {
                "f4e": [s, s + 1, s + 2, s + 3],
                "b4e": [s, (s + 7) % 8, (s + 6) % 8, (s + 5) % 8],
                "rc8": [s] * 4,
                "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]][s],
                "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]][s],
                "rc16": [[0, 1, 0, 1], [2, 3, 2, 3]][s & 1],
            }[mode]
            out = [octets[n] for n in pick]
        return sum(byte << 8 * n for n, byte in enumerate(out))

    return scalar


@pytest.mark.parametrize("mode", ["", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_prmt(mode):
    dot = f".{mode}" if mode else ""
    check(f"prmt.b32{dot} {{y}}, {{0}}, {{1}}, {{2}};", U32, [U32] * 3, byte_picker(mode))


def test_prmt_with_fixed_selectors():
    pick = byte_picker("")
    for selector in map(int, RNG.integers(0, 2**16, 8)):
        check(
            f"prmt.b32 {{y}}, {{0}}, {{1}}, {selector};",
            U32,
            [U32] * 2,
            lambda a, b, s=selector: pick(a, b, s),
        )


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfe(kind):
    dtype = DTYPES[kind]
    msb = 8 * np.dtype(dtype).itemsize - 1

    def scalar(a, pos, length):  # the ISA's own pseudocode
        pos, length = pos & 255, length & 255
        bits = a & ((1 << (msb + 1)) - 1)
        sign = 0 if kind[0] == "u" or length == 0 else bits >> min(pos + length - 1, msb) & 1
        return sum((bits >> (pos + n) & 1 if n < length and pos + n <= msb else sign) << n for n in range(msb + 1))

    positions = RNG.integers(0, 80, 400, U32)
    lengths = RNG.integers(0, 80, 400, U32)
    check(f"bfe.{kind} {{y}}, {{0}}, {{1}}, {{2}};", dtype, None, scalar, [integers(dtype), positions, lengths])
    check(f"bfe.{kind} {{y}}, {{0}}, 7, 9;", dtype, [dtype], lambda a: scalar(a, 7, 9))


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bfi(kind):
    dtype = DTYPES[kind]
    msb = 8 * np.dtype(dtype).itemsize - 1

    def scalar(a, b, pos, length):
        for n in range(length):
            if pos + n <= msb:
                b = b & ~(1 << (pos + n)) | (a >> n & 1) << (pos + n)
        return b

    sources = [integers(dtype), integers(dtype), RNG.integers(0, 80, 400, U32), RNG.integers(0, 80, 400, U32)]
    check(f"bfi.{kind} {{y}}, {{0}}, {{1}}, {{2}}, {{3}};", dtype, None, scalar, sources)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfind(kind):
    dtype = DTYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize

    def scalar(a):
        return ((~a if a < 0 else a).bit_length() or 0) - 1

    def shift(a):
        found = scalar(a)
        return -1 if found < 0 else bits - 1 - found

    check(f"bfind.{kind} {{y}}, {{0}};", U32, [dtype], scalar)
    check(f"bfind.shiftamt.{kind} {{y}}, {{0}};", U32, [dtype], shift)


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_counting_and_reversing(kind):
    dtype = DTYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize
    check(f"popc.{kind} {{y}}, {{0}};", U32, [dtype], lambda a: bin(a).count("1"))
    check(f"clz.{kind} {{y}}, {{0}};", U32, [dtype], lambda a: bits - a.bit_length())
    check(f"brev.{kind} {{y}}, {{0}};", dtype, [dtype], lambda a: int(f"{a:0{bits}b}"[::-1], 2))


def test_fns():
    def scalar(mask, base, n):
        if n == 0:
            return base if mask >> base & 1 else -1
        positions = [p for p in (range(base, 32) if n > 0 else range(base, -1, -1)) if mask >> p & 1]
        return positions[abs(n) - 1] if len(positions) >= abs(n) else -1

    sources = [RNG.integers(0, 2**32, 300, U32), RNG.integers(0, 32, 300, U32), RNG.integers(-9, 10, 300).astype(S32)]
    check("fns.b32 {y}, {0}, {1}, {2};", U32, None, scalar, sources)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_szext_bmsk(mode):
    def width(n):
        return n & 31 if mode == "wrap" else min(n, 32)

    def unsigned(a, n):
        return a & ((1 << width(n)) - 1)

    def signed(a, n):
        low = unsigned(a, n)
        return low - (1 << width(n)) if width(n) and low >> (width(n) - 1) else low

    amounts = RNG.integers(0, 70, 400, U32)
    check(f"szext.{mode}.u32 {{y}}, {{0}}, {{1}};", U32, None, unsigned, [integers(U32), amounts])
    check(f"szext.{mode}.s32 {{y}}, {{0}}, {{1}};", S32, None, signed, [integers(S32), amounts])
    starts = RNG.integers(0, 70, 400, U32)
    check(
        f"bmsk.{mode}.b32 {{y}}, {{0}}, {{1}};",
        U32,
        None,
        lambda a, b: ((1 << width(b)) - 1) << width(a),
        [starts, amounts],
    )


def test_dot_products():
    def parts(word, bits, signed):
        fields = [word >> n & ((1 << bits) - 1) for n in range(0, 32, bits)]
        return [f - (1 << bits) if signed and f >> (bits - 1) else f for f in fields]

    for a_kind in ("u32", "s32"):
        for b_kind in ("u32", "s32"):
            kinds = f"{a_kind}.{b_kind}"
            signed = a_kind == "s32", b_kind == "s32"

            def dp4a(a, b, c, signed=signed):
                return c + sum(x * y for x, y in zip(parts(a, 8, signed[0]), parts(b, 8, signed[1])))

            def dp2a(a, b, c, signed=signed, first=0):
                return c + sum(x * y for x, y in zip(parts(a, 16, signed[0]), parts(b, 8, signed[1])[first:]))

            check(f"dp4a.{kinds} {{y}}, {{0}}, {{1}}, {{2}};", U32, [U32] * 3, dp4a)
            check(f"dp2a.lo.{kinds} {{y}}, {{0}}, {{1}}, {{2}};", U32, [U32] * 3, dp2a)
            check(
                f"dp2a.hi.{kinds} {{y}}, {{0}}, {{1}}, {{2}};",
                U32,
                [U32] * 3,
                lambda a, b, c, f=dp2a: f(a, b, c, first=2),
            )


def test_packed_halves():
    def halves(function, signed):
        def scalar(a, b):
            out = 0
            for n in (0, 16):
                x, y = ((v >> n & 0xFFFF) - (0x10000 if signed and v >> n & 0x8000 else 0) for v in (a, b))
                out |= (function(x, y) & 0xFFFF) << n
            return out

        return scalar

    check("add.u16x2 {y}, {0}, {1};", U32, [U32] * 2, halves(lambda x, y: x + y, False))
    check("min.s16x2 {y}, {0}, {1};", U32, [U32] * 2, halves(min, True))
    check("max.u16x2 {y}, {0}, {1};", U32, [U32] * 2, halves(max, False))


COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_setp(kind):
    dtype = DTYPES[kind]
    a, b = integers(dtype), RNG.permutation(integers(dtype))
    b[::5] = a[::5]
    for name, scalar in COMPARE.items():
        check(f"setp.{name}.{kind} {{y}}, {{0}}, {{1}};", bool, None, scalar, [a, b])
    if kind == "u32":
        for name, plain in UNSIGNED_NAMES.items():
            check(f"setp.{name}.u32 {{y}}, {{0}}, {{1}};", bool, None, COMPARE[plain], [a, b])


@pytest.mark.parametrize("join", ["and", "or", "xor"])
def test_setp_with_two_predicates(join):
    def both(x, y):
        return {"and": x and y, "or": x or y, "xor": x != y}[join]

    a, b, c = integers(S32), RNG.permutation(integers(S32)), RNG.integers(0, 2, 400).astype(bool)
    ptx = f"setp.lt.{join}.s32 %p7|%p8, {{0}}, {{1}}, {{2}}; mov.pred {{y}}, "
    check(ptx + "%p7;", bool, None, lambda a, b, c: both(a < b, c), [a, b, c])
    check(ptx + "%p8;", bool, None, lambda a, b, c: both(a >= b, c), [a, b, c])
    negated = f"setp.lt.{join}.s32 {{y}}, {{0}}, {{1}}, !{{2}};"
    check(negated, bool, None, lambda a, b, c: both(a < b, not c), [a, b, c])


def test_set_selp_slct():
    check("set.gt.u32.s32 {y}, {0}, {1};", U32, [S32] * 2, lambda a, b: -1 if a > b else 0)
    got = evaluate("set.le.f32.s32 {y}, {0}, {1};", [np.arange(9, dtype=S32), np.full(9, 4, S32)], np.float32)
    same(got, (np.arange(9) <= 4).astype(np.float32))
    p = RNG.integers(0, 2, 400).astype(bool)
    for dtype, kind in [(U16, "b16"), (S32, "s32"), (U64, "u64")]:
        check(
            f"selp.{kind} {{y}}, {{0}}, {{1}}, {{2}};",
            dtype,
            None,
            lambda a, b, p: a if p else b,
            [integers(dtype), integers(dtype)[::-1], p],
        )
    check("slct.u32.s32 {y}, {0}, {1}, {2};", U32, [U32, U32, S32], lambda a, b, c: a if c >= 0 else b)


def test_slct_by_float():
    a, b, by = integers(U32), RNG.permutation(integers(U32)), floats(np.float32)
    got = evaluate("slct.b32.f32 {y}, {0}, {1}, {2};", [a, b, by], U32)
    same(got, np.array([x if c >= 0 else y for x, y, c in zip(a, b, by)], U32))


@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("target", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_cvt(source, target):
    small = {"u8": (0, 255), "s8": (-128, 127)}
    info = np.iinfo(DTYPES[target]) if target in DTYPES else None
    low, high = small.get(target) or (info.min, info.max)
    held = DTYPES.get(target, U32)

    def clamp(a):
        return max(low, min(high, a))

    def cut(a):
        bits = int(target[1:])
        a &= (1 << bits) - 1
        return a - (1 << bits) if target[0] == "s" and a >> (bits - 1) else a

    check(f"cvt.{target}.{source} {{y}}, {{0}};", held, [DTYPES[source]], cut)
    check(f"cvt.sat.{target}.{source} {{y}}, {{0}};", held, [DTYPES[source]], clamp)


def test_mov_packs_and_unpacks():
    a, b = RNG.integers(0, 2**32, (2, 100), U32)
    wide = a.astype(U64) | b.astype(U64) << U64(32)
    same(evaluate("mov.b64 {y}, {{{0}, {1}}};", [a, b], U64), wide)
    same(evaluate("mov.b64 {{_, {y}}}, {0};", [wide], U32), b)
    same(evaluate("mov.b32 {{%h20, %h21}}, {0}; mov.b32 {y}, {{%h21, %h20}};", [a], U32), a >> U32(16) | a << U32(16))
    same(evaluate("mov.b64 {{%h20, %h21, %h22, %h23}}, {0}; mov.u16 {y}, %h22;", [wide], U16), b.astype(U16))


def test_cvt_pack():
    def scalar(a, b, c):
        def clamp(v):
            return max(-128, min(127, v)) & 255

        return clamp(a) << 8 | clamp(b) | c << 16

    check("cvt.pack.sat.s8.s32.b32 {y}, {0}, {1}, {2};", U32, [S32, S32, U32], scalar)


def test_special_registers():
    names = "%tid.x %tid.y %tid.z %ntid.x %ntid.y %ctaid.x %ctaid.y %nctaid.x %nctaid.y".split()
    names += ["%laneid", "%warpid", "%lanemask_lt"]
    body = "mov.u32 %r0, %tid.z; mov.u32 %r1, %ntid.y; mov.u32 %r2, %tid.y; mad.lo.u32 %r0, %r0, %r1, %r2; "
    body += "mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.u32 %r0, %r0, %r1, %r2; "
    body += "mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %ctaid.x; mad.lo.u32 %r3, %r3, %r4, %r5; "
    body += "mad.lo.u32 %r0, %r3, 24, %r0; mul.lo.u32 %r0, %r0, 64; cvt.u64.u32 %d1, %r0; add.u64 %d1, %d1, %at0;"
    for n, name in enumerate(names):
        body += f"mov.u32 %r6, {name}; st.global.u32 [%d1+{4 * n}], %r6;"
    out = np.zeros((6 * 24, 16), np.uint32)  # 3 x 2 blocks of 4 x 3 x 2 threads
    launch(body, [out], threads=(4, 3, 2), blocks=(3, 2))
    for row, got in enumerate(out):
        block, thread = divmod(row, 24)
        x, y, z = thread % 4, thread // 4 % 3, thread // 12
        want = [x, y, z, 4, 3, block % 3, block // 3, 3, 2, thread % 32, thread // 32, (1 << thread % 32) - 1]
        assert list(got[: len(want)]) == want
