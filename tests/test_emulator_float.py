"""Floating-point arithmetic and conversions against exact rationals, rounded by definition."""

import math
from fractions import Fraction

import numpy as np
import pytest
from emulator_harness import (
    FORMATS,
    RNG,
    bf16_bits,
    bf16_values,
    evaluate,
    floats,
    integers,
    rounded,
    same,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities and NaN are what we test

F16, F32, F64, U16, U32, U64 = np.float16, np.float32, np.float64, np.uint16, np.uint32, np.uint64
DTYPE = {"f16": F16, "f32": F32, "f64": F64}


def apply(function, name: str, mode: str, *values: float) -> float:
    """``function`` of exact numbers, rounded once; infinities and NaN as float64 has them."""
    values = [float(v) for v in values]
    if not all(map(math.isfinite, values)):
        return float(function(*map(np.float64, values)))
    exact = function(*map(Fraction, values))
    if exact == 0:  # the sign of zero: as float64, which is exact here
        if function is mul:
            return values[0] * values[1]
        a, b = (
            (values[0] * values[1], values[2])
            if function is fma
            else (values[0], -values[1] if function is sub else values[1])
        )
        negative = [math.copysign(1, term) < 0 for term in (a, b)]
        return -0.0 if (any(negative) if mode == "rm" else all(negative)) else 0.0
    return rounded(exact, name, mode)


def check(ptx: str, name: str, function, mode="rn", count=3, spread=20, post=lambda x: x, sources=None):
    dtype = DTYPE[name]
    sources = sources or [
        floats(dtype, 500, spread) if n == 0 else RNG.permutation(floats(dtype, 500, spread)) for n in range(count)
    ]
    got = evaluate(ptx, sources, dtype)
    want = np.array([post(apply(function, name, mode, *row)) for row in zip(*sources)], F64).astype(dtype)
    same(got, want, *sources)


def add(a, b):
    return a + b


def sub(a, b):
    return a - b


def mul(a, b):
    return a * b


def fma(a, b, c):
    return a * b + c


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["f32", "f64"])
def test_arithmetic_is_correctly_rounded(name, mode):
    check(f"add.{mode}.{name} {{y}}, {{0}}, {{1}};", name, add, mode, 2)
    check(f"sub.{mode}.{name} {{y}}, {{0}}, {{1}};", name, sub, mode, 2)
    check(f"mul.{mode}.{name} {{y}}, {{0}}, {{1}};", name, mul, mode, 2)
    check(f"fma.{mode}.{name} {{y}}, {{0}}, {{1}}, {{2}};", name, fma, mode, 3)
    check(f"fma.{mode}.{name} {{y}}, {{0}}, {{1}}, {{2}};", name, fma, mode, 3, spread=70)


def test_fma_rounds_once():
    # Products with a tie just below them: float64 arithmetic rounded to float32 gets about half of these wrong.
    a = (1 + RNG.integers(1, 2**12, 3000) * 2.0**-12).astype(F32)
    b = (1 + RNG.integers(1, 2**12, 3000) * 2.0**-11).astype(F32)
    c = (RNG.choice([-1, 1], 3000) * 2.0 ** RNG.integers(-80, -30, 3000)).astype(F32)
    check("fma.rn.f32 {y}, {0}, {1}, {2};", "f32", fma, sources=[a, b, c])
    # ... and in the subnormal range
    tiny = (RNG.standard_normal(3000) * 2.0**-75).astype(F32), (RNG.standard_normal(3000) * 2.0**-70).astype(F32)
    check(
        "fma.rn.f32 {y}, {0}, {1}, {2};",
        "f32",
        fma,
        sources=[*tiny, (RNG.standard_normal(3000) * 2.0**-140).astype(F32)],
    )


def test_saturate_and_flush():
    def flush(x):
        return math.copysign(0.0, x) if 0 < abs(x) < 2.0**-126 else x

    def sat(x):
        return 0.0 if math.isnan(x) or x <= 0 else min(x, 1.0)

    a, b = floats(F32, 500), RNG.permutation(floats(F32, 500))
    fa, fb = (np.array([flush(x) for x in v.tolist()], F32) for v in (a, b))
    same(evaluate("add.sat.f32 {y}, {0}, {1};", [a, b], F32), np.array([sat(x) for x in (a + b).tolist()], F32), a, b)
    want = np.array([flush(x) for x in (fa * fb).tolist()], F32)
    same(evaluate("mul.ftz.f32 {y}, {0}, {1};", [a, b], F32), want, a, b)
    same(
        evaluate("add.ftz.f32 {y}, {0}, {1};", [a, b], F32),
        np.array([flush(x) for x in (fa + fb).tolist()], F32),
        a,
        b,
    )
    same(evaluate("setp.gt.ftz.f32 {y}, {0}, {1};", [a, b], bool), fa > fb, a, b)


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision(name, packed):
    if name == "f16":
        values = [floats(F16, 400, 8), RNG.permutation(floats(F16, 400, 8)), RNG.permutation(floats(F16, 400, 8))]
        bits, reals = [v.view(U16) for v in values], values
    else:
        bits = [bf16_bits(RNG.permutation(floats(F32, 400))) for _ in range(3)]
        reals = [bf16_values(b) for b in bits]
    kind = name + "x2" if packed else name
    sources = [b.view(U32) for b in bits] if packed else bits
    for ptx, function, count in [
        (f"add.rn.{kind} {{y}}, {{0}}, {{1}};", add, 2),
        (f"sub.rn.{kind} {{y}}, {{0}}, {{1}};", sub, 2),
        (f"mul.rn.{kind} {{y}}, {{0}}, {{1}};", mul, 2),
        (f"fma.rn.{kind} {{y}}, {{0}}, {{1}}, {{2}};", fma, 3),
        (f"fma.rn.relu.{kind} {{y}}, {{0}}, {{1}}, {{2}};", fma, 3),
    ]:
        got = evaluate(ptx, sources[:count], U32 if packed else U16).view(U16)
        want = np.array([apply(function, name, "rn", *row) for row in zip(*reals[:count])])
        if "relu" in ptx:
            want = np.where(want < 0, 0.0, want) + 0.0
        if name == "f16":
            same(got.view(F16), want.astype(F16), *reals)
        else:
            same(bf16_values(got), want.astype(F32), *reals)


def test_minimum_and_maximum():
    a, b = floats(F32, 600), RNG.permutation(floats(F32, 600))
    a[::7] = b[::7]

    def order(x, y, largest, nan):
        if math.isnan(x) or math.isnan(y):
            return math.nan if nan or (math.isnan(x) and math.isnan(y)) else y if math.isnan(x) else x
        if x == y:  # -0 < +0
            return (x if math.copysign(1, x) > 0 else y) if largest else (x if math.copysign(1, x) < 0 else y)
        return max(x, y) if largest else min(x, y)

    for largest in (False, True):
        for nan in (False, True):
            ptx = f"{'max' if largest else 'min'}{'.NaN' if nan else ''}.f32 {{y}}, {{0}}, {{1}};"
            want = np.array([order(x, y, largest, nan) for x, y in zip(a.tolist(), b.tolist())], F32)
            got = evaluate(ptx, [a, b], F32)
            same(got, want, a, b)
            assert (got.view(U32)[np.isnan(got)] == 0x7FFFFFFF).all()  # the canonical NaN
    zero = evaluate("max.NaN.f32 {y}, {0}, 0f00000000;", [a], F32)
    same(zero, np.array([order(x, 0.0, True, True) for x in a.tolist()], F32), a)
    c = RNG.permutation(b)
    third = evaluate("max.f32 {y}, {0}, {1}, {2};", [a, b, c], F32)
    same(
        third,
        np.array(
            [order(order(x, y, True, False), z, True, False) for x, y, z in zip(*map(np.ndarray.tolist, (a, b, c)))],
            F32,
        ),
    )
    half = [v.astype(F16) for v in (a, b)]
    got = evaluate("min.NaN.f16 {y}, {0}, {1};", half, F16)
    same(got, np.array([order(x, y, False, True) for x, y in zip(half[0].tolist(), half[1].tolist())], F16), *half)


def test_sign_bits():
    for dtype, name in [(F32, "f32"), (F64, "f64"), (F16, "f16")]:
        a = floats(dtype)
        same(evaluate(f"abs.{name} {{y}}, {{0}};", [a], dtype), np.abs(a))
        same(evaluate(f"neg.{name} {{y}}, {{0}};", [a], dtype), -a)
    a = RNG.integers(0, 2**32, 100, U32)
    same(evaluate("neg.bf16x2 {y}, {0};", [a], U32), a ^ U32(0x80008000))
    same(evaluate("abs.f16x2 {y}, {0};", [a], U32), a & U32(0x7FFF7FFF))
    x, y = floats(F32), RNG.permutation(floats(F32))
    same(evaluate("copysign.f32 {y}, {0}, {1};", [x, y], F32), np.copysign(y, x))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_division_and_roots(mode):
    a, b = floats(F32, 600), RNG.permutation(floats(F32, 600))

    def quotient(x, y):
        if not (math.isfinite(x) and math.isfinite(y)) or x == 0 or y == 0:
            return float(np.float32(x) / np.float32(y))
        return rounded(Fraction(x) / Fraction(y), "f32", mode)

    def root(x):
        if x <= 0 or not math.isfinite(x):
            return float(np.sqrt(np.float32(x)))
        # 60 more bits than float32 has, and a sticky one
        scaled = math.isqrt(int(Fraction(x) * 2**400))
        exact = scaled * scaled == int(Fraction(x) * 2**400)
        return rounded(Fraction(2 * scaled + (not exact), 2) / 2**200, "f32", mode)

    same(
        evaluate(f"div.{mode}.f32 {{y}}, {{0}}, {{1}};", [a, b], F32),
        np.array([quotient(x, y) for x, y in zip(a.tolist(), b.tolist())], F32),
        a,
        b,
    )
    same(
        evaluate(f"rcp.{mode}.f32 {{y}}, {{0}};", [a], F32),
        np.array([quotient(1.0, x) for x in a.tolist()], F32),
        a,
    )
    same(evaluate(f"sqrt.{mode}.f32 {{y}}, {{0}};", [a], F32), np.array([root(x) for x in a.tolist()], F32), a)


@pytest.mark.parametrize(
    "name, function",
    [("ex2", np.exp2), ("lg2", np.log2), ("sin", np.sin), ("cos", np.cos), ("tanh", np.tanh), ("rcp", lambda x: 1 / x),
     ("sqrt", np.sqrt), ("rsqrt", lambda x: 1 / np.sqrt(x))],
)  # fmt: skip
def test_approximations(name, function):
    a = floats(F32, 400, 6)
    want = function(a.astype(F64)).astype(F32)
    got = evaluate(f"{name}.approx.f32 {{y}}, {{0}};", [a], F32)
    np.testing.assert_allclose(got, want, rtol=2e-7)
    assert evaluate(f"{name}.approx.ftz.f32 {{y}}, {{0}};", [np.array([2.0**-140], F32)], F32)[0] == function(F32(0.0))


COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b and a == a and b == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("name", ["f32", "f64", "f16"])
def test_comparisons(name):
    a, b = floats(DTYPE[name]), RNG.permutation(floats(DTYPE[name]))
    a[::5] = b[::5]
    for compare, scalar in COMPARE.items():
        got = evaluate(f"setp.{compare}.{name} {{y}}, {{0}}, {{1}};", [a, b], bool)
        same(got, np.array([scalar(x, y) for x, y in zip(a.tolist(), b.tolist())]), a, b)
        if len(compare) == 2:  # the unordered twin: true for NaN
            got = evaluate(f"setp.{compare}u.{name} {{y}}, {{0}}, {{1}};", [a, b], bool)
            want = [scalar(x, y) or x != x or y != y for x, y in zip(a.tolist(), b.tolist())]
            same(got, np.array(want), a, b)


def test_testp():
    a = floats(F32)
    tests = {"finite": np.isfinite(a), "infinite": np.isinf(a), "notanumber": np.isnan(a), "number": ~np.isnan(a)}
    tests["subnormal"] = (a != 0) & (np.abs(a) < 2.0**-126)
    tests["normal"] = np.isfinite(a) & (np.abs(a) >= 2.0**-126)
    for name, want in tests.items():
        same(evaluate(f"testp.{name}.f32 {{y}}, {{0}};", [a], bool), want, a)


# --- conversions -----------------------------------------------------------------------------------------------------


NARROWING = [("f64", "f32", mode) for mode in ("rn", "rz", "rm", "rp")]
NARROWING += [
    (source, target, mode) for source in ("f32", "f64") for target in ("f16", "bf16") for mode in ("rn", "rz")
]


@pytest.mark.parametrize("source, target, mode", NARROWING)
def test_narrowing(source, target, mode):
    a = floats(DTYPE[source], 800, 30)
    got = evaluate(f"cvt.{mode}.{target}.{source} {{y}}, {{0}};", [a], {"f16": F16, "bf16": U16, "f32": F32}[target])
    want = np.array([rounded(Fraction(x), target, mode) if math.isfinite(x) else x for x in a.tolist()])
    if target == "bf16":
        same(bf16_values(got), np.where(want == 0, np.copysign(0, a), want).astype(F32), a)
    else:
        same(got, np.where(want == 0, np.copysign(0, a), want).astype(DTYPE[target]), a)


def test_widening_and_relu():
    half = floats(F16)
    same(evaluate("cvt.f32.f16 {y}, {0};", [half], F32), half.astype(F32))
    bits = bf16_bits(floats(F32))
    same(evaluate("cvt.f32.bf16 {y}, {0};", [bits], F32), bf16_values(bits))
    single = floats(F32)
    same(evaluate("cvt.f64.f32 {y}, {0};", [single], F64), single.astype(F64))
    for name, code in (
        ("f16x2", lambda x: rounded(Fraction(x), "f16")),
        ("bf16x2", lambda x: rounded(Fraction(x), "bf16")),
    ):
        a, b = RNG.standard_normal((2, 200)).astype(F32)
        for relu in ("", ".relu"):
            got = evaluate(f"cvt.rn{relu}.{name}.f32 {{y}}, {{0}}, {{1}};", [a, b], U32)
            upper, lower = (got >> U32(16)).astype(U16), got.astype(U16)
            for part, source in ((upper, a), (lower, b)):
                want = np.array([code(float(x)) for x in (np.maximum(source, 0) if relu else source)])
                same(
                    part.view(F16) if name == "f16x2" else bf16_values(part),
                    want.astype(F16 if name == "f16x2" else F32),
                )


def test_tf32():
    a = RNG.standard_normal(300).astype(F32)
    got = evaluate("cvt.rna.tf32.f32 {y}, {0};", [a], U32)
    assert (got & U32(0x1FFF) == 0).all()
    bits = a.view(U32).astype(np.int64)
    same(got, ((bits + 0x1000) & ~0x1FFF).astype(U32), a)


ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("mode", ROUND)
@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
@pytest.mark.parametrize("target", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_float_to_integer(source, target, mode):
    bits = int(target[1:])
    low, high = (0, 2**bits - 1) if target[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    a = floats(DTYPE[source], 500, 14 if source == "f16" else 66)

    def scalar(x):
        if math.isnan(x):
            return 1 << (bits - 1) if bits == 64 or source == "f64" else 0
        if math.isinf(x):
            return high if x > 0 else low
        return max(low, min(high, ROUND[mode](x)))

    held = {8: U32, 16: U16, 32: U32, 64: U64}[bits]
    got = evaluate(f"cvt.{mode}.{target}.{source} {{y}}, {{0}};", [a], held)
    mask = 2 ** (8 * np.dtype(held).itemsize) - 1
    want = []
    for x in a.tolist():
        value = scalar(x)
        if target == "s8" and value > high:
            value -= 1 << bits
        want.append(value & mask)
    same(got, np.array(want, held), a)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", ["u32", "s32", "u64", "s64"])
def test_integer_to_float(source, mode):
    dtype = {"u32": U32, "s32": np.int32, "u64": U64, "s64": np.int64}[source]
    a = integers(dtype, 600)
    for target in ("f32", "f64"):
        got = evaluate(f"cvt.{mode}.{target}.{source} {{y}}, {{0}};", [a], DTYPE[target])
        same(got, np.array([rounded(Fraction(int(x)), target, mode) for x in a], DTYPE[target]), a)
    if mode == "rn":
        got = evaluate(f"cvt.rn.bf16.{source} {{y}}, {{0}};", [a], U16)
        same(bf16_values(got), np.array([rounded(Fraction(int(x)), "bf16") for x in a], F32), a)


def test_round_to_whole_float():
    a = floats(F32, 500, 26)
    for mode, function in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        same(evaluate(f"cvt.{mode}.f32.f32 {{y}}, {{0}};", [a], F32), function(a), a)


# --- eight bits and less ---------------------------------------------------------------------------------------------

# name: exponent bits, mantissa bits, bias, largest finite value, has NaN
SMALL = {
    "e4m3": (4, 3, 7, 448.0, True),
    "e5m2": (5, 2, 15, 57344.0, True),
    "e2m1": (2, 1, 1, 6.0, False),
    "e2m3": (2, 3, 1, 7.5, False),
    "e3m2": (3, 2, 3, 28.0, False),
}


def small_value(code: int, name: str) -> float:
    exponent_bits, mantissa, bias, largest, has_nan = SMALL[name]
    sign = -1.0 if code >> (exponent_bits + mantissa) & 1 else 1.0
    exponent, fraction = code >> mantissa & ((1 << exponent_bits) - 1), code & ((1 << mantissa) - 1)
    value = (
        math.ldexp(fraction, 1 - bias - mantissa)
        if exponent == 0
        else math.ldexp(fraction + (1 << mantissa), exponent - bias - mantissa)
    )
    if has_nan and value > largest:
        return sign * math.inf if name == "e5m2" and fraction == 0 else math.nan
    return sign * value


@pytest.mark.parametrize("name", SMALL)
def test_small_floats_to_f16(name):
    width = 4 if name == "e2m1" else 8
    codes = np.arange(1 << (2 * width), dtype=np.uint32).astype(U16)
    ptx = f"cvt.rn.f16x2.{name}x2 {{y}}, {{0}};"
    if name == "e2m1":
        ptx = ".reg .b8 %byte; cvt.u8.u16 %byte, {0}; cvt.rn.f16x2.e2m1x2 {y}, %byte;"
    got = evaluate(ptx, [codes], U32).view(F16).reshape(-1, 2)
    bits = 1 + SMALL[name][0] + SMALL[name][1]
    low = np.array([small_value((int(c) & ((1 << width) - 1)) % (1 << bits), name) for c in codes], F16)
    high = np.array([small_value((int(c) >> width) % (1 << bits), name) for c in codes], F16)
    same(got[:, 0].copy(), low, codes)
    same(got[:, 1].copy(), high, codes)


@pytest.mark.parametrize("name", SMALL)
def test_f32_to_small_floats(name):
    exponent_bits, mantissa, _, largest, has_nan = SMALL[name]
    positive = [(small_value(c, name), c) for c in range(1 << (exponent_bits + mantissa))]
    positive = [(v, c) for v, c in positive if math.isfinite(v)]
    sign_bit = 1 << (exponent_bits + mantissa)

    def encode(x):
        if math.isnan(x):
            return 0x7F if has_nan else positive[-1][1]
        magnitude = min(abs(x), largest)
        best = min(positive, key=lambda vc: (abs(vc[0] - magnitude), vc[1] % 2))
        return best[1] | (sign_bit if math.copysign(1, x) < 0 else 0)

    ties = np.array([(a[0] + b[0]) / 2 for a, b in zip(positive, positive[1:])], F32)
    a = np.concatenate([floats(F32, 300, 8), ties, -ties, (RNG.standard_normal(500) * largest / 3).astype(F32)])
    b = RNG.permutation(a)
    width = 4 if name == "e2m1" else 8
    ptx = f"cvt.rn.satfinite.{name}x2.f32 {{y}}, {{0}}, {{1}};"
    if name == "e2m1":
        ptx = ".reg .b8 %byte; cvt.rn.satfinite.e2m1x2.f32 %byte, {0}, {1}; cvt.u16.u8 {y}, %byte;"
    got = evaluate(ptx, [a, b], U16)
    same(got, np.array([encode(x) << width | encode(y) for x, y in zip(a.tolist(), b.tolist())], U16), a, b)
    if name in ("e4m3", "e5m2"):
        pair = a.astype(F16)[:400].view(U32)
        values = a.astype(F16)[:400].astype(F64).reshape(-1, 2).tolist()
        got = evaluate(f"cvt.rn.satfinite.{name}x2.f16x2 {{y}}, {{0}};", [pair], U16)
        same(got, np.array([encode(y) << 8 | encode(x) for x, y in values], U16))


@pytest.mark.parametrize("mode", ["rz", "rp"])
def test_ue8m0(mode):
    def encode(x):
        if math.isnan(x):
            return 255
        if math.isinf(x):
            return 254
        x = Fraction(abs(x))
        exponent = -127
        while exponent < 127 and (Fraction(2) ** (exponent + 1) <= x if mode == "rz" else Fraction(2) ** exponent < x):
            exponent += 1
        return exponent + 127

    a, b = floats(F32, 200, 100), RNG.permutation(floats(F32, 200, 100))
    got = evaluate(f"cvt.{mode}.satfinite.ue8m0x2.f32 {{y}}, {{0}}, {{1}};", [a, b], U16)
    same(got, np.array([encode(x) << 8 | encode(y) for x, y in zip(a.tolist(), b.tolist())], U16), a, b)
    codes = np.arange(65536, dtype=np.uint32).astype(U16)
    got = bf16_values(evaluate("cvt.rn.bf16x2.ue8m0x2 {y}, {0};", [codes], U32).view(U16)).reshape(-1, 2)
    want = np.array([math.nan if c == 255 else math.ldexp(1, c - 127) for c in range(256)], F32)
    same(got[:, 0].copy(), want[codes & 255], codes)
    same(got[:, 1].copy(), want[codes >> 8], codes)


def test_formats_of_the_reference():
    # The definition that everything above leans on, against numpy where numpy has the format.
    a = floats(F64, 500, 30)
    a = a[np.isfinite(a)]
    for name in ("f16", "f32"):
        same(
            np.array([rounded(Fraction(x), name) for x in a.tolist()], DTYPE[name]) + DTYPE[name](0),
            a.astype(DTYPE[name]) + DTYPE[name](0),
            a,
        )
    assert set(FORMATS) == {"f16", "bf16", "f32", "f64"}
