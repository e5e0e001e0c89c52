"""Tensor-core instructions against float64 products; fragments are packed here lane by lane from the ISA's figures."""

import math

import numpy as np
import pytest
from emulator_harness import RNG, launch

from deep_gemm.sm120.emulator import EmulatorError

WARPS = 3


def code_value(code: int, exponent_bits: int, mantissa: int, bias: int, top_is_special: bool) -> float:
    sign = -1 if code >> (exponent_bits + mantissa) & 1 else 1
    exponent, fraction = code >> mantissa & ((1 << exponent_bits) - 1), code & ((1 << mantissa) - 1)
    if top_is_special and exponent == (1 << exponent_bits) - 1:
        return sign * math.inf if fraction == 0 else math.nan
    if exponent == 0:
        return sign * math.ldexp(fraction, 1 - bias - mantissa)
    return sign * math.ldexp(fraction + (1 << mantissa), exponent - bias - mantissa)


E4M3 = np.array([math.nan if c & 127 == 127 else code_value(c, 4, 3, 7, False) for c in range(256)])
E5M2 = np.array([code_value(c, 5, 2, 15, True) for c in range(256)])
E2M1 = np.array([code_value(c, 2, 1, 1, False) for c in range(16)])
E2M3 = np.array([code_value(c, 2, 3, 1, False) for c in range(64)])
E3M2 = np.array([code_value(c, 3, 2, 3, False) for c in range(64)])


def elements(kind: str, shape) -> tuple[np.ndarray, np.ndarray]:
    """Random codes (as they lie in registers) and their values."""
    if kind in ("e4m3", "e5m2"):
        table = E4M3 if kind == "e4m3" else E5M2
        codes = RNG.choice(np.flatnonzero(np.isfinite(table)), shape)
        return codes, table[codes]
    if kind in ("e2m1", "e2m1 packed"):
        codes = RNG.integers(0, 16, shape)
        return codes << 2 if kind == "e2m1" else codes, E2M1[codes]
    if kind in ("e2m3", "e3m2"):
        codes = RNG.integers(0, 64, shape)
        return codes, (E2M3 if kind == "e2m3" else E3M2)[codes]
    if kind in ("s8", "u8"):
        codes = RNG.integers(0, 256, shape)
        return codes, codes.astype(np.uint8).astype(np.int8 if kind == "s8" else np.uint8).astype(float)
    values = RNG.standard_normal(shape).astype(np.float32)
    if kind == "f16":
        half = values.astype(np.float16)
        return half.view(np.uint16).astype(np.int64), half.astype(float)
    drop = 16 if kind == "bf16" else 13
    bits = values.view(np.uint32) >> drop << drop
    return (bits >> 16 if kind == "bf16" else bits).astype(np.int64), bits.view(np.float32).astype(float)


BITS = {"e2m1 packed": 4, "f16": 16, "bf16": 16, "tf32": 32}


def pack_a(codes: np.ndarray, bits: int) -> np.ndarray:
    """[warps, 16, k] -> [warps, 32 lanes, registers]: rows g and g + 8, then the same for the upper half of k."""
    warps, _, k = codes.shape
    per = 32 // bits
    registers = np.zeros((warps, 32, 16 * k * bits // 1024), np.uint64)
    for row in range(16):
        for column in range(k):
            lane = (row % 8) * 4 + column % (4 * per) // per
            register = column // (4 * per) * 2 + (row >= 8)
            registers[:, lane, register] |= codes[:, row, column].astype(np.uint64) << np.uint64(column % per * bits)
    return registers.astype(np.uint32)


def pack_b(codes: np.ndarray, bits: int) -> np.ndarray:
    """[warps, k, 8] -> [warps, 32 lanes, registers]"""
    warps, k, _ = codes.shape
    per = 32 // bits
    registers = np.zeros((warps, 32, 8 * k * bits // 1024), np.uint64)
    for row in range(k):
        for column in range(8):
            lane = column * 4 + row % (4 * per) // per
            registers[:, lane, row // (4 * per)] |= codes[:, row, column].astype(np.uint64) << np.uint64(
                row % per * bits
            )
    return registers.astype(np.uint32)


def pack_d(matrix: np.ndarray) -> np.ndarray:
    """[warps, 16, 8] -> [warps, 32 lanes, 4]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)"""
    out = np.zeros((len(matrix), 32, 4), matrix.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for n in range(4):
            out[:, lane, n] = matrix[:, g + 8 * (n // 2), 2 * t + n % 2]
    return out


def run(opcode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, scales="", sa=None, sb=None, body_of_d=4, **options):
    """Registers [warps, 32, n] in and d's registers out."""
    registers = {"a": a, "b": b, "c": c}
    arrays = [np.zeros((len(a), 32, body_of_d), np.uint32)]
    body, lists, free = "", {}, 20
    if sa is not None:
        registers |= {"sa": sa[..., None], "sb": sb[..., None]}
    for number, (name, value) in enumerate(registers.items()):
        value = np.ascontiguousarray(value).view(np.uint32)
        arrays.append(value)
        count = value.shape[-1]
        lists[name] = [f"%r{free + n}" for n in range(count)]
        free += count
        body += f"mad.lo.u64 %d1, %tid64, {4 * count}, %at{number + 1};"
        body += "".join(f"ld.global.u32 {register}, [%d1+{4 * n}];" for n, register in enumerate(lists[name]))
    d = [f"%r{n}" for n in range(body_of_d)]
    vectors = ", ".join("{" + ", ".join(registers) + "}" for registers in (d, lists["a"], lists["b"], lists["c"]))
    tail = "" if sa is None else ", " + scales.format(sa=lists["sa"][0], sb=lists["sb"][0])
    body += f"{opcode} {vectors}{tail};"
    body += f"mad.lo.u64 %d1, %tid64, {4 * body_of_d}, %at0;"
    body += "".join(f"st.global.u32 [%d1+{4 * n}], {register};" for n, register in enumerate(d))
    launch(body, arrays, threads=32 * len(a), **options)
    return arrays[0]


def assert_close(got: np.ndarray, want: np.ndarray, magnitude: np.ndarray, epsilon=64 * 2**-24) -> None:
    """Error relative to the sum of the terms' magnitudes, which is what rounding is relative to: half a unit in the
    last place for each of up to 64 sums in float32."""
    error = np.abs(got.astype(float) - pack_d(want)) / pack_d(magnitude)
    assert error.max() < epsilon, (
        f"largest error {error.max():.3g} at (warp, lane, register) {np.argwhere(error == error.max())[0]}"
    )


PLAIN = [
    ("m16n8k32.row.col.f32.e4m3.e4m3.f32", "e4m3", "e4m3", 32),
    ("m16n8k32.row.col.f32.e5m2.e5m2.f32", "e5m2", "e5m2", 32),
    ("m16n8k32.row.col.f32.e4m3.e5m2.f32", "e4m3", "e5m2", 32),
    ("m16n8k16.row.col.f32.e4m3.e4m3.f32", "e4m3", "e4m3", 16),
    ("kind::f8f6f4.m16n8k32.row.col.f32.e4m3.e4m3.f32", "e4m3", "e4m3", 32),
    ("kind::f8f6f4.m16n8k32.row.col.f32.e2m1.e4m3.f32", "e2m1", "e4m3", 32),
    ("kind::f8f6f4.m16n8k32.row.col.f32.e2m3.e3m2.f32", "e2m3", "e3m2", 32),
    ("m16n8k16.row.col.f32.f16.f16.f32", "f16", "f16", 16),
    ("m16n8k8.row.col.f32.f16.f16.f32", "f16", "f16", 8),
    ("m16n8k16.row.col.f32.bf16.bf16.f32", "bf16", "bf16", 16),
    ("m16n8k8.row.col.f32.tf32.tf32.f32", "tf32", "tf32", 8),
    ("m16n8k4.row.col.f32.tf32.tf32.f32", "tf32", "tf32", 4),
]


@pytest.mark.parametrize("shape, a_kind, b_kind, k", PLAIN)
def test_plain(shape, a_kind, b_kind, k):
    a_codes, a = elements(a_kind, (WARPS, 16, k))
    b_codes, b = elements(b_kind, (WARPS, k, 8))
    c = RNG.standard_normal((WARPS, 16, 8)).astype(np.float32)
    got = run(
        f"mma.sync.aligned.{shape}",
        pack_a(a_codes, BITS.get(a_kind, 8)),
        pack_b(b_codes, BITS.get(b_kind, 8)),
        pack_d(c),
    )
    assert_close(got.view(np.float32), a @ b + c, np.abs(a) @ np.abs(b) + np.abs(c))


def test_integers_and_half_accumulators():
    a_codes, a = elements("s8", (WARPS, 16, 32))
    b_codes, b = elements("u8", (WARPS, 32, 8))
    c = RNG.choice([-(2**31), 2**31 - 1, 0, 12345], (WARPS, 16, 8)).astype(np.int32)
    got = run("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32", pack_a(a_codes, 8), pack_b(b_codes, 8), pack_d(c))
    want = (a @ b).astype(np.int64) + c
    np.testing.assert_array_equal(got, pack_d(want).astype(np.uint64).astype(np.uint32))
    opcode = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.u8.s32"
    got = run(opcode, pack_a(a_codes, 8), pack_b(b_codes, 8), pack_d(c))
    np.testing.assert_array_equal(got.view(np.int32), pack_d(np.clip(want, -(2**31), 2**31 - 1)))

    a_codes, a = elements("f16", (WARPS, 16, 16))
    b_codes, b = elements("f16", (WARPS, 16, 8))
    c = RNG.standard_normal((WARPS, 16, 8)).astype(np.float16)
    got = run(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
        pack_a(a_codes, 16),
        pack_b(b_codes, 16),
        pack_d(c).view(np.uint32),
        body_of_d=2,
    )
    want = pack_d(a @ b + c)
    np.testing.assert_allclose(got.view(np.float16).astype(float), want, atol=np.abs(want).max() * 2.0**-11)


def test_special_values_spread_like_in_a_sum():
    a_codes, a = elements("e4m3", (1, 16, 32))
    b_codes, b = elements("e4m3", (1, 32, 8))
    a_codes[0, 3, 7], a[0, 3, 7] = 0x7F, math.nan
    got = run(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
        pack_a(a_codes, 8),
        pack_b(b_codes, 8),
        np.zeros((1, 32, 4), np.float32),
    )
    np.testing.assert_array_equal(np.isnan(got.view(np.float32)), np.isnan(pack_d(a @ b)))


SCALED = [
    ("mxf8f6f4", "1X", "m16n8k32", "e4m3", "e4m3", "ue8m0"),
    ("mxf8f6f4", "1X", "m16n8k32", "e5m2", "e4m3", "ue8m0"),
    ("mxf8f6f4", "1X", "m16n8k32", "e4m3", "e2m1", "ue8m0"),
    ("mxf4", "2X", "m16n8k64", "e2m1", "e2m1", "ue8m0"),
    ("mxf4nvf4", "2X", "m16n8k64", "e2m1", "e2m1", "ue8m0"),
    ("mxf4nvf4", "4X", "m16n8k64", "e2m1", "e2m1", "ue8m0"),
    ("mxf4nvf4", "4X", "m16n8k64", "e2m1", "e2m1", "ue4m3"),
]


@pytest.mark.parametrize("kind, scale_vec, shape, a_kind, b_kind, scale_type", SCALED)
def test_block_scaled(kind, scale_vec, shape, a_kind, b_kind, scale_type):
    blocks, k = int(scale_vec[0]), int(shape[6:])
    packed = " packed" if kind.startswith("mxf4") else ""
    a_codes, a = elements(a_kind + packed, (WARPS, 16, k))
    b_codes, b = elements(b_kind + packed, (WARPS, k, 8))
    c = RNG.standard_normal((WARPS, 16, 8)).astype(np.float32)
    bits = BITS.get(a_kind + packed, 8)
    opcode = f"mma.sync.aligned.kind::{kind}.block_scale.scale_vec::{scale_vec}.{shape}.row.col"
    opcode += f".f32.{a_kind}.{b_kind}.f32.{scale_type}"
    bytes_of = {1: range(4), 2: (0, 2), 4: (0,)}[blocks]
    for byte_a, thread_a, byte_b, thread_b in [
        (RNG.choice(bytes_of), thread, RNG.choice(bytes_of), RNG.integers(4)) for thread in (0, 1, 0, 1)
    ]:
        low, high = (110, 140) if scale_type == "ue8m0" else (0x20, 0x60)
        scale_a, scale_b = RNG.integers(low, high, (2, WARPS, 32, 4)).astype(np.uint8)  # bytes of each lane's register
        value = (lambda s: 2.0 ** (s.astype(float) - 127)) if scale_type == "ue8m0" else (lambda s: E4M3[s])
        # row g: lane 4g + 2 thread_a, row g + 8: the lane after it; column g: lane 4g + thread_b
        factors_a = np.zeros((WARPS, 16, k))
        factors_b = np.zeros((WARPS, k, 8))
        for block in range(blocks):
            ks = slice(block * k // blocks, (block + 1) * k // blocks)
            for g in range(8):
                lane = 4 * g + 2 * thread_a
                factors_a[:, g, ks] = value(scale_a[:, lane, byte_a + block])[:, None]
                factors_a[:, g + 8, ks] = value(scale_a[:, lane + 1, byte_a + block])[:, None]
                factors_b[:, ks, g] = value(scale_b[:, 4 * g + thread_b, byte_b + block])[:, None]
        got = run(
            opcode,
            pack_a(a_codes, bits),
            pack_b(b_codes, bits),
            pack_d(c),
            f"{{{{{{sa}}}}}}, {{{{{byte_a}, {thread_a}}}}}, {{{{{{sb}}}}}}, {{{{{byte_b}, {thread_b}}}}}",
            scale_a.view(np.uint32)[..., 0],
            scale_b.view(np.uint32)[..., 0],
        )
        x, y = a * factors_a, b * factors_b
        assert_close(got.view(np.float32), x @ y + c, np.abs(x) @ np.abs(y) + np.abs(c))


def test_scales_of_one_equal_the_plain_product():
    a_codes, _ = elements("e4m3", (WARPS, 16, 32))
    b_codes, _ = elements("e4m3", (WARPS, 32, 8))
    c = RNG.standard_normal((WARPS, 16, 8)).astype(np.float32)
    fragments = pack_a(a_codes, 8), pack_b(b_codes, 8), pack_d(c)
    plain = run("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", *fragments)
    ones = np.full((WARPS, 32), 0x7F7F7F7F, np.uint32)
    scaled = run(
        "mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32.e4m3.e4m3.f32.ue8m0",
        *fragments,
        "{{{sa}}}, {{0, 0}}, {{{sb}}}, {{0, 0}}",
        ones,
        ones,
    )
    np.testing.assert_array_equal(plain, scaled)


def test_fragments_are_read_anew_when_a_register_changes():
    """A loop that adds to one byte of a each turn: what is remembered must not outlive the register."""
    out = np.zeros((32, 4), np.float32)
    one, step = 0x38, 0x08  # 1.0; the next power of two
    body = f"""
    mov.u32 %r1, {one * 0x01010101}; mov.u32 %r2, {one * 0x01010101}; mov.u32 %r9, 0;
    mov.f32 %r4, 0f00000000; mov.f32 %r5, %r4; mov.f32 %r6, %r4; mov.f32 %r7, %r4;
    TURN:
    mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32
        {{%r4, %r5, %r6, %r7}}, {{%r1, %r1, %r1, %r1}}, {{%r2, %r2}}, {{%r4, %r5, %r6, %r7}};
    add.u32 %r1, %r1, {step * 0x01010101}; add.u32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 3; @%p1 bra TURN;
    mad.lo.u64 %d1, %tid64, 16, %at0; st.global.v4.f32 [%d1], {{%r4, %r5, %r6, %r7}};
    """
    launch(body, [out])
    assert (out == 32 * (1 + 2 + 4)).all()


def test_partial_fronts():
    """Warps that run an mma apart from each other, and one warp that never does."""
    a_codes, a = elements("e4m3", (4, 16, 32))
    b_codes, b = elements("e4m3", (4, 32, 8))
    arrays = [np.zeros((4, 32, 4), np.float32), pack_a(a_codes, 8), pack_b(b_codes, 8)]
    mma = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
    mma += " {%r4, %r5, %r6, %r7}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r4, %r5, %r6, %r7};"
    body = f"""
    mad.lo.u64 %d1, %tid64, 16, %at1; ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d1];
    mad.lo.u64 %d1, %tid64, 8, %at2; ld.global.v2.u32 {{%r14, %r15}}, [%d1];
    mov.f32 %r4, 0f00000000; mov.f32 %r5, %r4; mov.f32 %r6, %r4; mov.f32 %r7, %r4;
    shr.u32 %r20, %tid, 5; setp.eq.u32 %p1, %r20, 1; @%p1 bra DONE; setp.eq.u32 %p2, %r20, 2; @%p2 bra TWICE;
    {mma} bra DONE;
    TWICE: {mma} {mma}
    DONE: mad.lo.u64 %d1, %tid64, 16, %at0; st.global.v4.f32 [%d1], {{%r4, %r5, %r6, %r7}};
    """
    launch(body, arrays, threads=128)
    times = np.array([1, 0, 2, 1])[:, None, None]
    np.testing.assert_allclose(arrays[0], times * pack_d(a @ b), rtol=1e-5, atol=1e-5 * np.abs(a @ b).max())


def test_mma_needs_the_whole_warp():
    fragments = np.zeros((1, 32, 4), np.uint32), np.zeros((1, 32, 2), np.uint32), np.zeros((1, 32, 4), np.float32)
    opcode = "setp.eq.u32 %p1, %tid, 5; @%p1 ret; mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
    with pytest.raises(EmulatorError, match=r"PTX line \d+: .*thread \(0, 0, 0\).*needs all 32 lanes.*0xffffffdf"):
        run(opcode, *fragments)
    with pytest.raises(EmulatorError, match="do(es)? not fill 8 x 32"):
        run("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", fragments[0], fragments[0], fragments[2])
    with pytest.raises(EmulatorError, match="only dense m16n8kK"):
        run("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", *fragments)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_stmatrix(count, trans):
    tiles = RNG.integers(0, 2**16, (count, 8, 8)).astype(np.uint16)
    out = np.zeros((32, count), np.uint32)
    back = np.zeros_like(tiles)
    names = ", ".join(f"%r{n}" for n in range(count))
    body = f"""
    cvta.to.shared.u64 %d1, %at3;
    mov.u32 %r60, smem; mad.lo.u32 %r61, %tid, 16, %r60; setp.ge.u32 %p1, %tid, {8 * count};
    mad.lo.u64 %d2, %tid64, 16, %at0;
    @%p1 bra LOADED; ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d2];
    st.shared.v4.u32 [%r61], {{%r10, %r11, %r12, %r13}};
    LOADED: bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r61];
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r61+1024], {{{names}}};
    mad.lo.u64 %d3, %tid64, {4 * count}, %at1;
    {"".join(f"st.global.u32 [%d3+{4 * n}], %r{n};" for n in range(count))}
    bar.sync 0;
    @%p1 bra STORED; ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r61+1024];
    mad.lo.u64 %d2, %tid64, 16, %at2; st.global.v4.u32 [%d2], {{%r10, %r11, %r12, %r13}};
    STORED:
    """
    launch(body, [tiles, out, back, np.zeros(1, np.uint64)], extra=".shared .align 16 .b8 smem[2048];")
    for lane in range(32):
        for n in range(count):
            tile = tiles[n].T if trans else tiles[n]
            low, high = (int(tile[lane // 4, 2 * (lane % 4) + e]) for e in range(2))
            assert out[lane, n] == low | high << 16
    np.testing.assert_array_equal(back, tiles)


def test_movmatrix():
    tile = RNG.integers(0, 2**16, (8, 8)).astype(np.uint16)
    out = np.zeros_like(tile)
    body = """mad.lo.u64 %d1, %tid64, 4, %at0; ld.global.u32 %r1, [%d1];
    movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; mad.lo.u64 %d1, %tid64, 4, %at1; st.global.u32 [%d1], %r2;"""
    launch(body, [tile, out])
    np.testing.assert_array_equal(out, tile.T)
