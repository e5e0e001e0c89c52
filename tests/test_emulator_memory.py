"""Loads, stores, atomics and copies; what is checked about them; what is counted."""

import ctypes

import numpy as np
import pytest
import torch
from emulator_harness import HEADER, RNG, kernel, launch

from deep_gemm.sm120.emulator import Buffer, Counters, EmulatorError, Module

U32 = np.uint32


# --- loads and stores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["global", "shared", "local", ""])
@pytest.mark.parametrize("bits, count", [(8, 1), (8, 4), (16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 1), (64, 2)])
def test_vectors_through_every_space(space, bits, count):
    """In from global memory, out to ``space``, back, and out again."""
    nbytes = bits // 8 * count
    data = RNG.integers(0, 256, 64 * nbytes).astype(np.uint8)
    out, scratch = np.zeros_like(data), np.zeros_like(data)
    prefix = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits]
    names = [f"{prefix}{20 + n}" for n in range(count)]
    vector = f"{{{', '.join(names)}}}" if count > 1 else names[0]
    suffix = (f".v{count}" if count > 1 else "") + f".b{bits}"
    where = {"global": "%d4", "shared": "%r50", "local": "%r51", "": "%d6"}[space]
    dot = f".{space}" if space else ""
    body = f"""
    mov.u32 %r50, smem; mov.u32 %r52, %tid.x; mad.lo.u32 %r50, %r52, {nbytes}, %r50; mov.u32 %r51, stack;
    mad.lo.u64 %d2, %tid64, {nbytes}, %at0; mad.lo.u64 %d3, %tid64, {nbytes}, %at1;
    mad.lo.u64 %d4, %tid64, {nbytes}, %at2;
    // odd threads go through local, even ones through shared generic addresses
    cvt.u64.u32 %d5, %r50; cvta.shared.u64 %d6, %d5; cvt.u64.u32 %d5, %r51; cvta.local.u64 %d7, %d5;
    and.b32 %r53, %tid, 1; setp.eq.u32 %p1, %r53, 1; selp.b64 %d6, %d7, %d6, %p1;
    ld.global.nc.L1::no_allocate.L2::256B{suffix} {vector}, [%d2];
    st{dot}{suffix} [{where}], {vector};
    {"".join(f"mov.b{max(bits, 16)} {name}, 0;" for name in names)}
    ld{dot}{suffix} {vector}, [{where}];
    st.global.wt{suffix} [%d3], {vector};
    """
    launch(body, [data, out, scratch], 32, 2, extra=".shared .align 16 .b8 smem[1024]; .local .align 16 .b8 stack[16];")
    np.testing.assert_array_equal(out, data)


def test_widest_loads_and_policies():
    data, out = RNG.integers(0, 2**32, (32, 8), U32), np.zeros((32, 8), U32)
    names = ", ".join(f"%r{n}" for n in range(8))
    body = f"""mad.lo.u64 %d1, %tid64, 32, %at0; mad.lo.u64 %d2, %tid64, 32, %at1;
    createpolicy.fractional.L2::evict_last.b64 %d3, 1.0;
    ld.global.nc.L1::evict_last.L2::cache_hint.v8.b32 {{{names}}}, [%d1], %d3; st.global.v8.b32 [%d2], {{{names}}};
    ld.global.v4.b64 {{%d10, %d11, %d12, %d13}}, [%d1];
    st.global.L2::cache_hint.v4.b64 [%d2], {{%d10, %d11, %d12, %d13}}, %d3;"""
    data, out = (aligned(array, 32) for array in (data, out))
    launch(body, [data, out])
    np.testing.assert_array_equal(out, data)


def aligned(array: np.ndarray, align: int) -> np.ndarray:
    room = np.zeros(array.nbytes + align, np.uint8)
    skip = -room.ctypes.data % align
    copy = room[skip : skip + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_sign_and_zero_extension():
    data, out = RNG.integers(0, 256, 32).astype(np.uint8), np.zeros((32, 4), np.int64)
    body = """add.u64 %d1, %tid64, %at0; mad.lo.u64 %d2, %tid64, 32, %at1;
    ld.global.s8 %d3, [%d1]; ld.global.u8 %d4, [%d1]; ld.global.s8 %r1, [%d1]; cvt.u64.u32 %d5, %r1;
    ld.global.b8 %h1, [%d1];
    cvt.u64.u16 %d6, %h1; st.global.v4.u64 [%d2], {%d3, %d4, %d5, %d6};"""
    out = aligned(out, 32)
    launch(body, [data, out])
    signed = data.view(np.int8).astype(np.int64)
    np.testing.assert_array_equal(out, np.stack([signed, data, signed & 0xFFFFFFFF, data], axis=1))


def test_parameters_constants_and_module_variables():
    extra = """
    .const .align 4 .u32 table[4] = {10, 20, 0x30, 40};
    .global .align 4 .f32 half = 0f3F000000;
    .visible .global .align 8 .u64 calls;
    """
    out = np.zeros(32, U32)
    body = """
    and.b32 %r1, %tid, 3; mul.wide.u32 %d1, %r1, 4; mov.u64 %d2, table; add.u64 %d2, %d2, %d1; ld.const.u32 %r2, [%d2];
    ld.const.u32 %r3, [table+8]; add.u32 %r2, %r2, %r3; ld.global.f32 %r4, [half]; add.f32 %r4, %r4, %r4;
    cvt.rzi.u32.f32 %r4, %r4; add.u32 %r2, %r2, %r4; mov.u64 %d3, calls; atom.global.add.u64 %d4, [%d3], 1;
    mov.b64 %d5, p0; cvta.param.u64 %d5, %d5; ld.u64 %d6, [%d5]; mad.lo.u64 %d6, %tid64, 4, %d6;
    st.global.u32 [%d6], %r2;
    """
    counters = launch(body, [out], extra=extra)
    np.testing.assert_array_equal(out, np.array([10, 20, 48, 40] * 8) + 48 + 1)
    assert counters.bytes_read["calls"] == counters.bytes_written["calls"] == 32 * 8


def test_params_as_numbers_and_as_bytes():
    class Block(ctypes.Structure):
        _fields_ = [
            ("out", ctypes.c_void_p),
            ("small", ctypes.c_uint8),
            ("x", ctypes.c_float),
            ("many", ctypes.c_int16 * 6),
        ]

    ptx = f"""{HEADER}
    .visible .entry packed(.param .u64 out, .param .u8 small, .param .f32 x, .param .align 2 .b8 many[12]) {{
    .reg .b16 %h<3>; .reg .b32 %r<9>; .reg .b64 %d<3>;
    ld.param.u64 %d1, [out]; ld.param.u8 %r1, [small]; ld.param.f32 %r2, [x]; ld.param.s16 %r3, [many+10];
    mov.u32 %r4, 0;
    st.global.v4.u32 [%d1], {{%r1, %r2, %r3, %r4}}; ret; }}"""
    module = Module(ptx)
    out = aligned(np.zeros(4, U32), 16)
    many = (ctypes.c_int16 * 6)(1, 2, 3, 4, 5, -6)
    want = [200, np.float32(1.25).view(U32), 0xFFFFFFFA, 0]
    for params in ([out.ctypes.data, 200, 1.25, bytes(many)], bytes(Block(out.ctypes.data, 200, 1.25, many))):
        out[:] = 9
        module.launch("packed", 1, 1, params, [Buffer.of(out, "out")])
        np.testing.assert_array_equal(out, want)
    with pytest.raises(EmulatorError, match="takes 4 values, got 1"):
        module.launch("packed", 1, 1, [1])
    with pytest.raises(EmulatorError, match="takes 28 bytes, got 3"):
        module.launch("packed", 1, 1, b"abc")
    with pytest.raises(EmulatorError, match="'many' has 12 bytes, got 1"):
        module.launch("packed", 1, 1, [1, 2, 3.0, b"x"])


def test_dynamic_shared_memory():
    a, out = RNG.integers(0, 2**32, 64, U32), np.zeros(64, U32)
    body = """mad.lo.u64 %d1, %tid64, 4, %at0; ld.global.u32 %r1, [%d1]; mov.u32 %r2, dyn; mad.lo.u32 %r3, %tid, 4, %r2;
    st.shared.u32 [%r3], %r1; bar.sync 0; xor.b32 %r4, %tid, 63; mad.lo.u32 %r4, %r4, 4, %r2; ld.shared.u32 %r1, [%r4];
    mad.lo.u64 %d1, %tid64, 4, %at1; st.global.u32 [%d1], %r1;"""
    extra = ".shared .align 4 .b8 fixed[100]; .extern .shared .align 16 .b8 dyn[];"
    launch(body, [a, out], 64, extra=extra, shared=256)
    np.testing.assert_array_equal(out, a[::-1])
    with pytest.raises(
        EmulatorError, match=r"thread \(60, 0, 0\): shared write of 4 bytes .* lies outside the 240 bytes"
    ):
        launch(body, [a, out], 64, extra=extra, shared=240)


# --- atomics ---------------------------------------------------------------------------------------------------------

M = 2**32
ATOMICS = {
    "add.u32": lambda old, x: old + x,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x,
    "xor.b32": lambda old, x: old ^ x,
    "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}


@pytest.mark.parametrize("space", ["global", "shared", ""])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name, space):
    """128 threads on 8 cells: any order is right, as long as each thread's result fits into one."""
    values, cells = RNG.integers(0, 50, 128, U32), RNG.integers(0, 50, 8, U32)
    targets = RNG.integers(0, 8, 128, U32)
    final, found = cells.copy(), np.zeros(128, U32)
    atom = f"atom.{space + '.' if space else ''}{name}"
    body = f"""
    mad.lo.u64 %d1, %tid64, 4, %at0; ld.global.u32 %r1, [%d1]; mad.lo.u64 %d1, %tid64, 4, %at1;
    ld.global.u32 %r2, [%d1];
    mul.wide.u32 %d2, %r2, 4; add.u64 %d2, %d2, %at2; setp.ge.u32 %p1, %tid, 8; mov.u32 %r3, cells;
    mad.lo.u32 %r3, %r2, 4, %r3;
    mov.u32 %r4, cells; mad.lo.u32 %r4, %tid, 4, %r4; mad.lo.u64 %d3, %tid64, 4, %at2; @!%p1 ld.global.u32 %r5, [%d3];
    @!%p1 st.shared.u32 [%r4], %r5; bar.sync 0;
    {atom} %r0, [{"%r3" if space == "shared" else "%d2"}], %r1; bar.sync 0;
    {"@!%p1 ld.shared.u32 %r5, [%r4]; @!%p1 st.global.u32 [%d3], %r5;" if space == "shared" else ""}
    mad.lo.u64 %d1, %tid64, 4, %at3; st.global.u32 [%d1], %r0;
    """
    launch(body, [values, targets, final, found], 128, extra=".shared .align 4 .b8 cells[32];")
    want = cells.astype(object)
    for thread in range(128):  # the emulator goes lane by lane
        assert found[thread] == want[targets[thread]]
        want[targets[thread]] = ATOMICS[name](int(want[targets[thread]]), int(values[thread])) % M
    np.testing.assert_array_equal(final, want.astype(U32))


def test_compare_and_swap_and_red_and_floats():
    lock, count = np.zeros(1, U32), np.zeros(1, U32)
    body = """
    AGAIN: atom.global.cas.b32 %r1, [%at0], 0, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra AGAIN;
    ld.volatile.global.u32 %r2, [%at1]; add.u32 %r2, %r2, 1; st.volatile.global.u32 [%at1], %r2;
    membar.gl; atom.global.exch.b32 %r3, [%at0], 0;
    """
    launch(body, [lock, count], 64, 3)
    assert count[0] == 192
    total, wide, largest = np.zeros(1, np.float32), np.zeros(1, np.uint64), np.full(1, -5, np.int32)
    values = RNG.standard_normal(64).astype(np.float32)
    body = """
    mad.lo.u64 %d1, %tid64, 4, %at0; ld.global.f32 %r1, [%d1]; red.global.add.f32 [%at1], %r1;
    red.relaxed.gpu.global.add.u64 [%at2], %tid64;
    cvt.rzi.s32.f32 %r2, %r1; red.global.max.s32 [%at3], %r2;
    """
    launch(body, [values, total, wide, largest], 64)
    want = np.float32(0)
    for value in values:
        want = np.float32(want + value)
    assert total[0] == want and wide[0] == 63 * 32 and largest[0] == max(np.trunc(values))


# --- asynchronous copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, cache", [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
def test_cp_async(size, cache):
    data = aligned(RNG.integers(1, 256, (32, size)).astype(np.uint8), 16)
    taken = RNG.integers(0, size + 1, 32, U32)
    out, zero_filled, ignored = (aligned(np.zeros_like(data), 16) for _ in range(3))
    word = {4: "b32", 8: "b64", 16: "v2.b64"}[size]
    register = {4: "%r9", 8: "%d9", 16: "{%d9, %d10}"}[size]
    body = f"""
    mad.lo.u64 %d1, %tid64, {size}, %at0; mad.lo.u64 %d2, %tid64, 4, %at1; ld.global.u32 %r1, [%d2];
    mov.u32 %r2, smem; mad.lo.u32 %r2, %tid, {size}, %r2;
    cp.async.{cache}.shared.global [%r2], [%d1], {size};
    cp.async.{cache}.shared.global.L2::128B [%r2+512], [%d1], {size}, %r1; cp.async.commit_group; cp.async.wait_group 0;
    setp.eq.u32 %p1, %r1, 1; cp.async.{cache}.shared.global [%r2+1024], [%d1], {size}, %p1; cp.async.wait_all;
    bar.sync 0;
    """
    for n in range(3):
        body += f"ld.shared.{word} {register}, [%r2+{512 * n}]; mad.lo.u64 %d3, %tid64, {size}, %at{n + 2};"
        body += f"st.global.{word} [%d3], {register};"
    launch(body, [data, taken, out, zero_filled, ignored], extra=".shared .align 16 .b8 smem[1536];")
    np.testing.assert_array_equal(out, data)
    np.testing.assert_array_equal(zero_filled, np.where(np.arange(size) < taken[:, None], data, 0))
    np.testing.assert_array_equal(ignored, np.where(taken[:, None] == 1, 0, data))


# --- checks ----------------------------------------------------------------------------------------------------------


def fault(body: str, *arrays, buffers=None, threads=32, blocks=1) -> str:
    """The error of a kernel that must fail."""
    buffers = buffers or [Buffer.of(array, f"array{n}") for n, array in enumerate(arrays)]
    params = [buffer.address for buffer in buffers]
    with pytest.raises(EmulatorError) as caught:
        Module(kernel(body, len(params))).launch("k", blocks, threads, params, buffers)
    return str(caught.value)


def test_out_of_bounds():
    a = np.zeros(40, U32)
    message = fault("mad.lo.u64 %d1, %tid64, 4, %at0;\nld.global.u32 %r1, [%d1];", a, blocks=2)
    line = (
        kernel("mad.lo.u64 %d1, %tid64, 4, %at0;\nld.global.u32 %r1, [%d1];", 1)
        .split("\n")
        .index("ld.global.u32 %r1, [%d1];")
        + 1
    )
    assert f"kernel 'k', PTX line {line}: block (1, 0, 0), thread (8, 0, 0): global read of 4 bytes at" in message
    assert hex(a.ctypes.data + 160) in message and "'array0'" in message and "0 bytes past its end" in message
    assert message.endswith("ld.global.u32 %r1, [%d1];")
    message = fault("sub.u64 %d1, %at0, 8; ld.global.u32 %r1, [%d1];", a)
    assert "8 bytes before its start" in message and "thread (0, 0, 0)" in message
    odd = np.zeros(6, np.uint8)
    odd = aligned(odd, 8)
    assert "starts inside and runs 2 bytes past its end" in fault("ld.global.u64 %d1, [%at0];", odd)
    assert "no buffer was handed in" not in message


def test_nothing_is_written_by_a_store_that_faults():
    a = np.zeros(20, U32)
    assert "thread (20, 0, 0)" in fault("mad.lo.u64 %d1, %tid64, 4, %at0; mov.u32 %r1, 5; st.global.u32 [%d1], %r1;", a)
    assert "thread (20, 0, 0)" in fault("mad.lo.u64 %d1, %tid64, 4, %at0; red.global.add.u32 [%d1], 5;", a)
    assert not a.any()


def test_lanes_that_go_to_several_buffers():
    a, b, out = RNG.integers(0, 99, 16, U32), RNG.integers(0, 99, 16, U32), np.zeros(32, U32)
    body = """setp.lt.u32 %p1, %tid, 16; selp.b64 %d1, %at0, %at1, %p1; and.b32 %r1, %tid, 15; mul.wide.u32 %d2, %r1, 4;
    add.u64 %d1, %d1, %d2; ld.global.u32 %r2, [%d1]; mad.lo.u64 %d3, %tid64, 4, %at2; st.global.u32 [%d3], %r2;
    add.u32 %r2, %r2, 1; st.global.u32 [%d1], %r2;"""
    before = np.concatenate([a, b])
    counters = launch(body, [a, b, out])
    np.testing.assert_array_equal(out, before)
    np.testing.assert_array_equal(np.concatenate([a, b]), before + 1)
    assert counters.bytes_read == {"array0": 64, "array1": 64}


def test_misaligned_and_read_only():
    a = aligned(np.zeros(64, U32), 16)
    message = fault("add.u64 %d1, %at0, 4; ld.global.v2.u32 {%r1, %r2}, [%d1];", a)
    assert "global read of 8 bytes" in message and "is not aligned to 8" in message
    assert "is not aligned to 4" in fault("mov.u32 %r1, 1026; mov.u32 %r2, 0; st.shared.u32 [%r1], %r2;", a)
    message = fault("st.global.u32 [%at0+8], %tid;", buffers=[Buffer.of(a, "weights", writable=False)])
    assert "buffer 'weights'" in message and "is read-only (offset 8)" in message
    a.flags.writeable = False
    assert "read-only" in fault("atom.global.add.u32 %r1, [%at0], 1;", a)


def test_shared_memory_is_bounded():
    assert "shared read of 4 bytes at 0x0 lies outside" in fault(
        "mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];", np.zeros(1)
    )


def test_what_cannot_be_read_or_run():
    for body, message in [
        ("tex.1d.v4.f32.s32 {%r1, %r2, %r3, %r4}, [t, {%r1}];", "PTX line 11: unknown opcode 'tex.1d.v4.f32.s32'"),
        ("add.u32 %r1, %r2, %undeclared;", "unknown special register or undeclared register '%undeclared'"),
        ("add.u32 %r1, %d2, %d3; mov.u64 %r1, %d1;", "register %r1 has 32 bits, .u64 needs 64"),
        ("bra NOWHERE;", "unknown label"),
        ("red.global.add.v2.f32 [%at0], {%r1, %r2};", "vector and 128-bit atomics are not supported"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%at0], [%r1], 16;", "is not supported"),
        ("add.u32 %r1, %r2;", "2 sources expected, found 1"),
        ("@%q add.u32 %r1, %r2, %r3;", "register '%q' is not declared"),
    ]:
        with pytest.raises(EmulatorError, match="(?s)" + message.replace(".", r"\.").replace("[", r"\[")):
            launch(body, [np.zeros(1)])
    with pytest.raises(EmulatorError, match="PTX line 4: .*never closed"):
        Module(HEADER + ".visible .entry k() { ret;")
    module = Module(kernel("", 0))
    assert module.kernels == ["k"] and module.target == "sm_120f"
    with pytest.raises(EmulatorError, match=r"the module has \['k'\], got 'other'"):
        module.launch("other", 1, 1, [])
    with pytest.raises(EmulatorError, match="takes at most 1024 threads, got 2048"):
        module.launch("k", 1, 2048, [])
    with pytest.raises(EmulatorError, match="grid: one to three positive numbers expected"):
        module.launch("k", 0, 32, [])


def test_errors_are_runtime_errors():
    assert issubclass(EmulatorError, RuntimeError)


# --- buffers ---------------------------------------------------------------------------------------------------------


def test_buffer_of():
    a = np.zeros((4, 8), np.float32)
    assert Buffer.of(a, "a").nbytes == 128 and Buffer.of(a, "a").address == a.ctypes.data
    view = a[1:3, 2:5]
    assert Buffer.of(view, "v") == Buffer("v", a.ctypes.data + 40, 32 + 12)
    assert Buffer.of(a[::-1], "r") == Buffer("r", a.ctypes.data, 128)
    t = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert Buffer.of(t[1:, ::2], "t") == Buffer("t", t.data_ptr() + 16, 32 + 14)
    assert Buffer.of(torch.empty(0, 3), "none").nbytes == 0
    with pytest.raises(RuntimeError, match="needs a CPU tensor, got one on meta"):
        Buffer.of(torch.empty(3, device="meta"), "m")


# --- counters --------------------------------------------------------------------------------------------------------


def test_counters():
    a, out = np.zeros(256, U32), np.zeros(256, U32)
    body = """mad.lo.u64 %d1, %tid64, 4, %at0; setp.lt.u32 %p1, %tid, 40; @%p1 ld.global.u32 %r1, [%d1];
    mad.lo.u64 %d2, %tid64, 4, %at1; st.global.u32 [%d2], %r1; bar.sync 0; add.f32 %r1, %r1, %r1;"""
    counters = launch(body, [a, out], 64, 4)
    assert counters.instructions["ld.global.u32"] == 8 and counters.threads["ld.global.u32"] == 40
    assert counters.instructions["bar.sync"] == 8 and counters.threads["bar.sync"] == 256
    assert counters.bytes_read == {"array0": 160} and counters.bytes_written == {"array1": 1024}
    assert counters.classes["load"] == 8 and counters.classes["store"] == 8 and counters.classes["fp32"] == 8
    assert counters.classes["barrier"] == 8 and counters.blocks == 4 and not counters.block_bytes
    twice = counters + counters
    assert isinstance(twice, Counters) and twice.blocks == 8 and twice.instructions["st.global.u32"] == 16
    assert twice.bytes_read["array0"] == 320


def test_diverged_warps_issue_once_for_each_part():
    body = "and.b32 %r1, %tid, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra A; neg.s32 %r1, %r1; A: not.b32 %r1, %r1;"
    counters = launch(body, [np.zeros(1)], 64)
    assert counters.instructions["neg.s32"] == 2 and counters.threads["neg.s32"] == 32
    assert counters.instructions["not.b32"] == 2 and counters.threads["not.b32"] == 64  # together again


def test_trace_counts_sectors_once_a_block_and_once_a_request():
    a, out = aligned(np.zeros(64, U32), 32), np.zeros(64, U32)
    # each block of two warps reads the same 128 bytes three times over: all lanes their word, twice, then one word
    body = """mov.u32 %r1, %laneid; mul.wide.u32 %d1, %r1, 4; add.u64 %d1, %d1, %at0; ld.global.u32 %r2, [%d1];
    ld.global.u32 %r3, [%d1]; ld.global.u32 %r4, [%at0];"""
    counters = launch(body, [a, out], 64, 3, trace=True)
    assert counters.bytes_read["array0"] == 3 * 64 * 12
    assert counters.block_bytes["array0"] == 3 * 128
    assert counters.warp_bytes["array0"] == 3 * 2 * (128 + 128 + 32)
    assert counters.requests["array0"] == 3 * 2 * 3


# --- observers -------------------------------------------------------------------------------------------------------


def test_sanitizer_sees_accesses_and_registers():
    class Watch:
        def __init__(self):
            self.accesses, self.reads, self.writes, self.sources = [], set(), set(), []

        def access(self, wave, access):
            self.accesses.append((access.kind, access.space, access.lanes.count, access.nbytes))

        def register_read(self, wave, instruction, register, lanes):
            self.reads.add(register.name)

        def register_write(self, wave, instruction, register, lanes):
            self.writes.add(register.name)

        def shuffle(self, wave, instruction, lanes, sources):
            self.sources += sources.tolist()

    watch, a = Watch(), np.zeros(32, U32)
    body = """mad.lo.u64 %d1, %tid64, 4, %at0; setp.lt.u32 %p1, %tid, 7; @%p1 ld.global.u32 %r1, [%d1];
    add.u32 %r2, %r1, %r3;
    mov.u32 %r4, 1024; st.shared.u32 [%r4], %r2; atom.global.add.u32 %r5, [%d1], %r2;"""
    launch(body, [a], extra=".shared .align 4 .b8 s[4];", sanitize=watch, shared=4)
    kinds = [access for access in watch.accesses if access[1] != "global" or access[3] == 4]
    assert kinds == [("read", "global", 7, 4), ("write", "shared", 32, 4), ("atomic", "global", 32, 4)]
    shuffle = "setp.lt.u32 %p1, %tid, 30; @%p1 ret; shfl.sync.idx.b32 %r1, %tid, 7, 31, -1;"
    launch(shuffle, [a], sanitize=watch)
    assert watch.sources == [7, 7]  # a lane that has left
    assert {"%r1", "%r3", "%p1"} <= watch.reads and "%r3" not in watch.writes and "%r5" in watch.writes


LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r1];"


@pytest.mark.parametrize(
    "offset, access, wavefronts",
    [
        ("shl.b32 %r2, %r9, 2;", "ld.shared.u32 %r3, [%r1];", 1),
        ("mov.u32 %r2, 64;", "ld.shared.u32 %r3, [%r1];", 1),  # one word for all
        ("shl.b32 %r2, %r9, 3;", "ld.shared.u32 %r3, [%r1];", 2),
        ("shl.b32 %r2, %r9, 7;", "ld.shared.u32 %r3, [%r1];", 32),
        ("shl.b32 %r2, %r9, 1;", "ld.shared.u16 %h3, [%r1];", 1),
        ("shl.b32 %r2, %r9, 3;", "ld.shared.v2.u32 {%r3, %r4}, [%r1];", 2),
        ("shl.b32 %r2, %r9, 4;", "ld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%r1];", 4),
        ("shl.b32 %r2, %r9, 4;", LDMATRIX, 4),  # rows side by side
        ("shl.b32 %r2, %r9, 7;", LDMATRIX, 32),  # rows 128 bytes apart: 8 rows on the same four banks
        ("shl.b32 %r2, %r9, 7; and.b32 %r3, %r9, 7; shl.b32 %r3, %r3, 4; xor.b32 %r2, %r2, %r3;", LDMATRIX, 4),
    ],
)
def test_wavefronts_of_shared_memory(offset: str, access: str, wavefronts: int) -> None:
    body = f"""mov.u32 %r1, tile; mov.u32 %r9, %laneid; {offset} add.u32 %r1, %r1, %r2; {access}"""
    tile = ".shared .align 128 .b8 tile[4096];"
    for warps in (1, 3):
        counters = launch(body, [np.zeros(1)], 32 * warps, extra=tile, trace=True)
        assert counters.wavefronts == {"read": wavefronts * warps}
    assert not launch(body, [np.zeros(1)], extra=tile).wavefronts
