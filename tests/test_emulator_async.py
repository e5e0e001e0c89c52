"""Barriers with transaction counts, and bulk copies, by definition."""

import numpy as np
import pytest
from emulator_harness import HEADER, REGISTERS, kernel
from emulator_harness import launch as launch_body

from deep_gemm.sm120.emulator import Buffer, EmulatorError, Module, TensorMap

RNG = np.random.default_rng()
TILE = ".shared .align 1024 .b8 tile[16384]; .shared .align 8 .b8 bar[16];"


def copy_box(tensor: TensorMap, data: np.ndarray, start: tuple[int, ...], form="") -> np.ndarray:
    """One box by TMA, then shared memory as it lies: [bytes]."""
    nbytes = int(np.prod(tensor.box)) * tensor.element_bytes
    out = np.zeros(nbytes // 4, np.uint32)
    coordinates = ", ".join(map(str, start))
    opcode = f"cp.async.bulk.tensor.{len(start)}d.shared::cta.global{form}.mbarrier::complete_tx::bytes"
    text = f"""{HEADER}{TILE}
.visible .entry k(.param .u64 p0, .param .align 64 .b8 map[128])
{{ {REGISTERS}
    mov.u32 %tid, %tid.x; ld.param.u64 %at0, [p0]; mov.u64 %d1, map; cvta.param.u64 %d1, %d1;
    mov.u32 %r1, bar; mov.u32 %r2, tile; setp.eq.u32 %p1, %tid, 0; @!%p1 bra WAIT;
    mbarrier.init.shared::cta.b64 [%r1], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {nbytes};
    {opcode} [%r2], [%d1, {{{coordinates}}}], [%r1];
WAIT: bar.sync 0;
AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra AGAIN;
LOOP: shl.b32 %r3, %tid, 2; setp.ge.u32 %p3, %r3, {nbytes}; @%p3 ret;
    add.u32 %r4, %r2, %r3; ld.shared.u32 %r5, [%r4]; cvt.u64.u32 %d2, %r3; add.u64 %d2, %d2, %at0;
    st.global.u32 [%d2], %r5; add.u32 %tid, %tid, 64; bra LOOP;
}}"""
    buffers = [Buffer.of(out, "out"), Buffer.of(data, "data", writable=False)]
    params = [out.ctypes.data, bytes(128)]
    counters = Module(text).launch("k", 1, 64, params, buffers, tensor_maps={64: tensor})
    assert counters.instructions[opcode] == 1
    return out.view(np.uint8)


def box_by_definition(data: np.ndarray, start: tuple[int, ...], box: tuple[int, ...], swizzle: int) -> np.ndarray:
    """Element by element; start and box innermost first."""
    elements = np.zeros(box[::-1], data.dtype)
    for index in np.ndindex(elements.shape):
        place = [first + i for first, i in zip(start[::-1], index)]
        if all(0 <= p < extent for p, extent in zip(place, data.shape)):
            elements[index] = data[tuple(place)]
    straight = elements.reshape(-1).view(np.uint8)
    lying = np.zeros_like(straight)
    for offset in range(0, len(straight), 16):
        unit = offset // 16
        bits = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
        to = unit ^ (unit >> 3 & ((1 << bits) - 1))
        lying[16 * to : 16 * to + 16] = straight[offset : offset + 16]
    return lying


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_boxes(dtype, swizzle: int) -> None:
    size = np.dtype(dtype).itemsize
    inner = (swizzle or 64) // size
    box = (inner, int(RNG.integers(1, 40)))
    data = RNG.integers(0, 255, (50, inner * size * 2), np.uint8).view(dtype)
    tensor = TensorMap(data.ctypes.data, size, data.shape[::-1], data.strides[::-1], box, swizzle)
    for start in [(0, 0), (inner, 30), (3, 49), (-5, -7), (2 * inner - 1, 10), (0, 60), (-inner, 0)]:
        assert (copy_box(tensor, data, start) == box_by_definition(data, start, box, swizzle)).all(), start


def test_three_dimensions_with_a_stride() -> None:
    data = RNG.integers(0, 255, (6, 5, 48), np.uint8)
    view = data[:, :, :32]
    tensor = TensorMap(view.ctypes.data, 1, view.shape[::-1], view.strides[::-1], (32, 4, 2), 32)
    for start in [(0, 0, 0), (0, 2, 5), (0, -1, 3)]:
        assert (copy_box(tensor, data, start) == box_by_definition(view, start, (32, 4, 2), 32)).all()


def test_the_cluster_form() -> None:
    data = RNG.integers(0, 255, (8, 64), np.uint8)
    tensor = TensorMap(data.ctypes.data, 1, (64, 8), (1, 64), (64, 8))
    assert (copy_box(tensor, data, (0, 0), ".tile") == data.reshape(-1)).all()


def test_only_the_inside_of_a_box_must_exist() -> None:
    data = RNG.integers(0, 255, (4, 64), np.uint8)
    tensor = TensorMap(data.ctypes.data, 1, (64, 5), (1, 64), (64, 8))  # claims a row more
    with pytest.raises(EmulatorError, match=r"thread \(0, 0, 0\): global read .* lies in no buffer"):
        copy_box(tensor, data, (0, 0))


def test_bytes_are_counted() -> None:
    data = np.zeros((10, 64), np.uint8)
    tensor = TensorMap(data.ctypes.data, 1, (64, 10), (1, 64), (64, 8))
    out = np.zeros(1, np.uint32)
    text = f"""{HEADER}{TILE}
.visible .entry k(.param .align 64 .b8 map[128])
{{ {REGISTERS} mov.u64 %d1, map; mov.u32 %r1, bar; mov.u32 %r2, tile; mbarrier.init.shared.b64 [%r1], 1;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%d1, {{0, 6}}], [%r1];
ret; }}"""
    buffers = [Buffer.of(data, "data"), Buffer.of(out, "out")]
    counters = Module(text).launch("k", 3, 1, [bytes(128)], buffers, tensor_maps={0: tensor}, trace=True)
    assert counters.bytes_read == {"data": 3 * 4 * 64}
    assert counters.block_bytes["data"] == 3 * (4 * 64 + (32 if data.ctypes.data % 32 else 0))


def test_a_plain_bulk_copy() -> None:
    data, out = RNG.integers(0, 2**32, 64, np.uint32), np.zeros(64, np.uint32)
    launch_body(
        """mov.u32 %r1, bar; mov.u32 %r2, tile; setp.ne.u32 %p1, %tid, 0; @%p1 bra WAIT;
        mbarrier.init.shared.b64 [%r1], 1; mbarrier.arrive.expect_tx.shared.b64 %d1, [%r1], 256;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%at0], 256, [%r1];
        WAIT: bar.sync 0; mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 trap;
        shl.b32 %r3, %tid, 2; add.u32 %r2, %r2, %r3; ld.shared.u32 %r4, [%r2];
        cvt.u64.u32 %d2, %r3; add.u64 %d2, %d2, %at1; st.global.u32 [%d2], %r4;""",
        [data, out],
        threads=64,
        extra=TILE,
    )
    assert (out == data).all()


# --- mbarrier --------------------------------------------------------------------------------------------------------


def run(body: str, threads=64, blocks=1) -> np.ndarray:
    """%r1 is the address of a barrier; the result is what each thread leaves in %r9."""
    out = np.zeros(threads * blocks, np.uint32)
    end = "mad.lo.u64 %d60, %tid64, 4, %at0; st.global.u32 [%d60], %r9;"
    launch_body(f"mov.u32 %r1, bar; mov.u32 %r9, 0; {body}\n{end}", [out], threads, blocks, TILE)
    return out


INIT = "mov.u32 %r5, %tid.x; setp.eq.u32 %p1, %r5, 0; @%p1 mbarrier.init.shared.b64 [%r1], {0}; bar.sync 0;"


def test_a_phase_takes_its_arrivals() -> None:
    """The first warp waits for what 32 lanes of the second bring; both blocks for themselves."""
    body = (
        INIT.format(32)
        + """
        setp.lt.u32 %p2, %r5, 32; @%p2 bra WAIT;
        mov.u32 %r6, word; st.shared.u32 [%r6], 77; mbarrier.arrive.shared.b64 %d1, [%r1]; bra DONE;
        WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra WAIT;
        mov.u32 %r6, word; ld.shared.u32 %r9, [%r6]; DONE:"""
    )
    out = run(".shared .b32 word;" + body, blocks=3).reshape(3, 2, 32)
    assert (out[:, 0] == 77).all() and (out[:, 1] == 0).all()


def test_parities_take_turns() -> None:
    """A ring of one stage: the second warp counts to 10, the first adds up what it sees, one turn each."""
    body = """.shared .b32 word; .shared .align 8 .b64 free;
        mov.u32 %r5, %tid.x; mov.u32 %r2, free; mov.u32 %r6, word; setp.ne.u32 %p1, %r5, 0; @%p1 bra GO;
        mbarrier.init.shared.b64 [%r1], 32; mbarrier.init.shared.b64 [%r2], 32;
        GO: bar.sync 0; mov.u32 %r7, 0; mov.u32 %r8, 0; setp.ge.u32 %p2, %r5, 32; @%p2 bra PRODUCER;
        CONSUMER: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], %r8; @!%p3 bra CONSUMER;
        ld.shared.u32 %r4, [%r6]; add.u32 %r9, %r9, %r4; mbarrier.arrive.shared.b64 %d1, [%r2];
        xor.b32 %r8, %r8, 1; add.u32 %r7, %r7, 1; setp.lt.u32 %p4, %r7, 10; @%p4 bra CONSUMER; bra DONE;
        PRODUCER: xor.b32 %r10, %r8, 1;
        POLL: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], %r10; @!%p3 bra POLL;
        add.u32 %r7, %r7, 1; st.shared.u32 [%r6], %r7; mbarrier.arrive.shared.b64 _, [%r1];
        xor.b32 %r8, %r8, 1; setp.lt.u32 %p4, %r7, 10; @%p4 bra PRODUCER; DONE:"""
    assert (run(body)[:32] == 55).all()


def test_a_phase_waits_for_its_bytes() -> None:
    body = (
        INIT.format(1)
        + """@!%p1 bra DONE;
        mbarrier.arrive.expect_tx.shared.b64 %d1, [%r1], 48; mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 0;
        @%p2 or.b32 %r9, %r9, 1; mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [%r1], 32;
        mbarrier.test_wait.shared.b64 %p2, [%r1], %d1; @%p2 or.b32 %r9, %r9, 2;
        mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [%r1], 16;
        mbarrier.test_wait.shared.b64 %p2, [%r1], %d1; @%p2 or.b32 %r9, %r9, 4;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 1; @%p2 or.b32 %r9, %r9, 8;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 0; @%p2 or.b32 %r9, %r9, 16; DONE:"""
    )
    assert run(body)[0] == 4 + 16


def test_bytes_may_come_before_they_are_expected() -> None:
    body = (
        INIT.format(1)
        + """@!%p1 bra DONE; mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [%r1], 32;
        mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 32; mbarrier.arrive.shared.b64 _, [%r1];
        mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 0; selp.u32 %r9, 1, 0, %p2; DONE:"""
    )
    assert run(body)[0] == 1


def test_dropped_arrivals_are_missed_no_more() -> None:
    body = (
        INIT.format(3)
        + """@!%p1 bra DONE; mbarrier.arrive_drop.shared.b64 %d1, [%r1];
        mbarrier.arrive.shared.b64 %d1, [%r1], 2; mbarrier.arrive.shared.b64 %d1, [%r1], 2;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 1; selp.u32 %r9, 1, 0, %p2; DONE:"""
    )
    assert run(body)[0] == 1


def test_a_generic_address() -> None:
    body = """cvt.u64.u32 %d3, %r1; cvta.shared.u64 %d3, %d3; mov.u32 %r5, %tid.x; setp.eq.u32 %p1, %r5, 0;
        @%p1 mbarrier.init.b64 [%d3], 64; bar.sync 0; mbarrier.arrive.b64 %d1, [%d3];
        WAIT: mbarrier.try_wait.b64 %p2, [%d3], %d1; @!%p2 bra WAIT; mov.u32 %r9, 5;"""
    assert (run(body) == 5).all()


@pytest.mark.parametrize(
    "body, message",
    [
        ("mbarrier.arrive.shared.b64 _, [%r1];", "no mbarrier was initialised at shared address 0x400"),
        ("mbarrier.init.shared.b64 [%r1], 0;", "an mbarrier takes at least one arrival, got 0"),
        ("add.u32 %r1, %r1, 4; mbarrier.init.shared.b64 [%r1], 1;", "is not aligned to 8"),
        ("add.u32 %r1, %r1, 65536; mbarrier.init.shared.b64 [%r1], 1;", "lies outside"),
        (INIT.format(1) + "mbarrier.arrive.shared.b64 _, [%r1];", "more than the 1 arrivals of a phase"),
        (
            INIT.format(99) + "mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;",
            "deadlock: a phase is never over; waiting are 64 threads at PTX line",
        ),
        (INIT.format(1) + "@%p1 mbarrier.inval.shared.b64 [%r1]; mbarrier.arrive.shared.b64 _, [%r1];", "no mbarrier"),
        ("mbarrier.pending_count.b64 %r2, %d1;", "'mbarrier.pending_count.b64' is not supported"),
        (
            "cp.async.bulk.tensor.1d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r1], [%d1, {0}], [%r1];",
            "is not supported",
        ),
        (
            "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%at0, {0, 0}], [%r1];",
            "the tensor map at .* was not handed in",
        ),
        (
            "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%at0], 24, [%r1];",
            "not multiples of 16",
        ),
    ],
)
def test_refused(body: str, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run(body)


def test_waiting_counts_once() -> None:
    """However often the machine looks again."""
    out = np.zeros(64, np.uint32)
    body = (
        "mov.u32 %r1, bar;"
        + INIT.format(64)
        + """mbarrier.arrive.shared.b64 _, [%r1];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra WAIT;"""
    )
    counters = Module(kernel(body, 1, TILE)).launch("k", 1, 64, [out.ctypes.data], [Buffer.of(out, "out")])
    assert counters.instructions["mbarrier.try_wait.parity.shared.b64"] == 2
