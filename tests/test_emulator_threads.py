"""Divergence, barriers, shuffles, votes: what threads do together."""

import numpy as np
import pytest
from emulator_harness import RNG, launch

from deep_gemm.sm120.emulator import EmulatorError

U32 = np.uint32
STORE = "mad.lo.u64 %d1, %tid64, 4, %at0; st.global.u32 [%d1], %r0;"
LOAD = "mad.lo.u64 %d1, %tid64, 4, %at1; ld.global.u32 %r1, [%d1];"


def results(body: str, *arrays, threads=32, blocks=1, **options) -> np.ndarray:
    """What ``body`` leaves in %r0 of each thread; %r1 is the thread's element of the first array."""
    out = np.zeros(threads * blocks, U32)
    launch((LOAD if arrays else "") + body + STORE, [out, *arrays], threads, blocks, **options)
    return out


# --- control flow ----------------------------------------------------------------------------------------------------


def test_if_else_and_early_exit():
    a = RNG.integers(0, 100, 96, U32)
    body = """
    mov.u32 %r0, 0; setp.gt.u32 %p1, %r1, 90; @%p1 ret;
    setp.lt.u32 %p1, %r1, 50; @%p1 bra SMALL;
    mul.lo.u32 %r0, %r1, 3; bra.uni END;
    SMALL: add.u32 %r0, %r1, 1000;
    END: add.u32 %r0, %r0, 1;
    """
    want = np.where(a > 90, 0, np.where(a < 50, a + 1000, a * 3) + 1)
    np.testing.assert_array_equal(results(body, a, threads=48, blocks=2), want)


def test_loops_of_different_length_nested():
    a = RNG.integers(0, 20, 128, U32)
    body = """
    mov.u32 %r0, 0; mov.u32 %r2, 0;
    OUTER: setp.ge.u32 %p1, %r2, %r1; @%p1 bra OUT;
    mov.u32 %r3, 0;
    INNER: setp.ge.u32 %p2, %r3, %r2; @%p2 bra IN;
    add.u32 %r0, %r0, %r3; add.u32 %r3, %r3, 1; bra INNER;
    IN: add.u32 %r2, %r2, 1; bra OUTER;
    OUT:
    """
    want = [sum(j for i in range(n) for j in range(i)) for n in a.tolist()]
    np.testing.assert_array_equal(results(body, a, threads=64, blocks=2), want)


def test_scopes_hide_labels_and_registers():
    body = """
    mov.u32 %r0, 1;
    { .reg .b32 %r0; .reg .pred p; setp.eq.u32 p, %tid, 3; mov.u32 %r0, 50; @p bra L; mov.u32 %r2, %r0; bra M;
    L: mov.u32 %r2, 7; M: }
    { .reg .pred p; setp.eq.u32 p, %tid, 4; @p bra L; add.u32 %r2, %r2, 1; L: }
    add.u32 %r0, %r0, %r2;
    """
    want = [1 + (7 if t == 3 else 50) + (t != 4) for t in range(32)]
    np.testing.assert_array_equal(results(body), want)


def test_waves_agree_with_each_other():
    """More blocks than one wave holds, and blocks of an odd size."""
    got = results("mov.u32 %r2, %ctaid.x; mad.lo.u32 %r0, %r2, 1000, %tid;", threads=33, blocks=500)
    np.testing.assert_array_equal(got, np.arange(500 * 33) // 33 * 1000 + np.arange(500 * 33))


def test_a_spinning_warp_lets_the_others_go_on():
    """Warp 0 waits in a loop for a flag in shared memory that warp 1 sets further down."""
    body = """
    mov.u32 %r9, flag; setp.ne.u32 %p1, %tid, 0; @%p1 bra READY; st.shared.u32 [%r9], 0; READY: bar.sync 0;
    setp.ge.u32 %p1, %tid, 32; @%p1 bra SETTER;
    SPIN: ld.volatile.shared.u32 %r0, [%r9]; setp.eq.u32 %p2, %r0, 0; @%p2 bra SPIN;
    bra END;
    SETTER: mov.u32 %r0, 5; st.volatile.shared.u32 [%r9], %r0;
    END:
    """
    np.testing.assert_array_equal(results(body, threads=64, extra=".shared .align 4 .b8 flag[4];"), 5)
    sleepy = body.replace("@%p2 bra SPIN", "nanosleep.u32 20; @%p2 bra SPIN")
    np.testing.assert_array_equal(results(sleepy, threads=64, extra=".shared .align 4 .b8 flag[4];"), 5)


# --- barriers --------------------------------------------------------------------------------------------------------


def test_barriers_order_shared_memory():
    a = RNG.integers(0, 2**32, 256, U32)
    body = """
    mov.u32 %r9, smem; mov.u32 %r8, %tid.x; mad.lo.u32 %r7, %r8, 4, %r9; xor.b32 %r6, %r8, 127;
    mad.lo.u32 %r6, %r6, 4, %r9;
    setp.lt.u32 %p1, %r8, 50; @%p1 bra LATE; st.shared.u32 [%r7], %r1; bar.sync 0; bra READ;
    LATE: mul.lo.u32 %r2, %r1, 1; st.shared.u32 [%r7], %r2; barrier.sync 0;
    READ: ld.shared.u32 %r0, [%r6];
    """
    got = results(body, a, threads=128, blocks=2, extra=".shared .align 4 .b8 smem[512];")
    np.testing.assert_array_equal(got, a.reshape(2, 128)[:, ::-1].reshape(-1))


def test_named_barriers_and_arrive():
    """Warp 0 produces and does not wait; warp 1 waits for it at barrier 3; warp 2 does neither."""
    body = """
    mov.u32 %r9, cell; mov.u32 %r0, 0; shr.u32 %r8, %tid, 5; setp.eq.u32 %p1, %r8, 1; @%p1 bra CONSUME;
    setp.eq.u32 %p1, %r8, 2; @%p1 bra END;
    st.shared.u32 [%r9], 77; mov.u32 %r5, 3; bar.arrive %r5, 64; bra END;
    CONSUME: bar.sync 3, 64; ld.shared.u32 %r0, [%r9];
    END:
    """
    got = results(body, threads=96, extra=".shared .align 4 .b8 cell[4];")
    np.testing.assert_array_equal(got, np.repeat([0, 77, 0], 32))


@pytest.mark.parametrize("count", [1, 5])
def test_barrier_in_a_loop_with_exited_threads(count):
    body = f"""
    mov.u32 %r0, 0; setp.lt.u32 %p1, %tid, {count}; @%p1 ret; mov.u32 %r2, 0;
    TURN: bar.sync 0; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 4; @%p1 bra TURN; mov.u32 %r0, %r2;
    """
    np.testing.assert_array_equal(results(body, threads=64), np.where(np.arange(64) < count, 0, 4))


def test_barrier_reductions():
    a = RNG.integers(0, 3, 192, U32)
    a[:64] = 1
    for name, function in [("and", np.all), ("or", np.any)]:
        body = f"setp.eq.u32 %p1, %r1, 1; barrier.cta.red.{name}.pred %p2, 0, %p1; selp.u32 %r0, 1, 0, %p2;"
        want = np.repeat([function(block == 1) for block in a.reshape(3, 64)], 64)
        np.testing.assert_array_equal(results(body, a, threads=64, blocks=3), want)
    body = "setp.eq.u32 %p1, %r1, 1; bar.red.popc.u32 %r0, 0, !%p1;"
    want = np.repeat([(block != 1).sum() for block in a.reshape(3, 64)], 64)
    np.testing.assert_array_equal(results(body, a, threads=64, blocks=3), want)


def test_barrier_that_cannot_be_passed():
    with pytest.raises(
        EmulatorError, match=r"kernel 'k', PTX line \d+: block \(1, 0, 0\), thread \(0, 0, 0\): deadlock.*64 thr"
    ):
        results(
            "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 1; @%p1 bar.sync 1, 96; mov.u32 %r0, 1;", threads=64, blocks=3
        )
    with pytest.raises(EmulatorError, match="deadlock.*32 threads at PTX line"):
        results("setp.lt.u32 %p1, %tid, 32; @%p1 bra A; bar.sync 2; bra B; A: bar.sync 3; B:", threads=64)
    with pytest.raises(EmulatorError, match="numbered 0 to 15, got 16"):
        results("bar.sync 16;")
    with pytest.raises(EmulatorError, match="multiple of 32, got 33"):
        results("bar.sync 1, 33;")


# --- warps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    a = RNG.integers(0, 2**32, 64, U32)
    by, clamp = RNG.integers(0, 33, 64, U32), RNG.choice([0x1F, 0, 0x181F, 0x1C03, 0x0F07, 0x1800], 64).astype(U32)

    def source(lane, b, c):  # the ISA's pseudocode
        b, segment, limit = b & 31, c >> 8 & 31, c & 31
        most, least = (lane & segment) | (limit & ~segment), lane & segment
        if mode == "up":
            j = lane - b
            valid = j >= most
        else:
            j = {"down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
            valid = j <= most
        return (j if valid else lane), valid

    loads = "add.u64 %d2, %d1, %at2; sub.u64 %d2, %d2, %at1; ld.global.u32 %r2, [%d2];"
    loads += "add.u64 %d2, %d1, %at3; sub.u64 %d2, %d2, %at1; ld.global.u32 %r3, [%d2];"
    shuffle = f"shfl.sync.{mode}.b32 %r0|%p1, %r1, %r2, %r3, -1;"
    pairs = [source(t % 32, int(b), int(c)) for t, (b, c) in enumerate(zip(by, clamp))]
    want = [a[t - t % 32 + j] for t, (j, _) in enumerate(pairs)]
    np.testing.assert_array_equal(results(loads + shuffle, a, by, clamp, threads=64), want)
    got = results(loads + shuffle + "selp.u32 %r0, 1, 0, %p1;", a, by, clamp, threads=64)
    np.testing.assert_array_equal(got, [valid for _, valid in pairs])
    for amount in (1, 4, 16):
        fixed = results(
            f"shfl.sync.{mode}.b32 %r0, %r1, {amount}, {0 if mode == 'up' else 31}, 0xffffffff;", a, threads=64
        )
        np.testing.assert_array_equal(
            fixed, [a[t - t % 32 + source(t % 32, amount, 0 if mode == "up" else 31)[0]] for t in range(64)]
        )


def test_shfl_within_half_a_warp():
    """Both sides of a branch shuffle with their own members."""
    a = RNG.integers(0, 2**32, 64, U32)
    body = """
    mov.u32 %r4, %laneid; setp.lt.u32 %p1, %r4, 16; @%p1 bra LOW;
    shfl.sync.bfly.b32 %r0, %r1, 1, 31, 0xffff0000; bra END;
    LOW: shfl.sync.bfly.b32 %r0, %r1, 2, 31, 0x0000ffff;
    END:
    """
    want = [a[t ^ (2 if t % 32 < 16 else 1)] for t in range(64)]
    np.testing.assert_array_equal(results(body, a, threads=64), want)


def test_members_that_come_late_are_waited_for():
    """Odd lanes go around a loop once more before they reach the shuffle that even lanes wait at."""
    a = RNG.integers(0, 2**32, 32, U32)
    body = """
    bra START;
    SHUFFLE: shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1; bra END;
    START: and.b32 %r2, %tid, 1; setp.eq.u32 %p1, %r2, 0; @%p1 bra SHUFFLE;
    add.u32 %r1, %r1, 1; bra SHUFFLE;
    END:
    """
    b = a + (np.arange(32) % 2).astype(U32)
    np.testing.assert_array_equal(results(body, a), b[np.arange(32) ^ 1])


def test_votes():
    a = RNG.integers(0, 2, 96, U32)
    a[:32], a[32:64] = 1, 0
    warps = a.reshape(3, 32)
    head = "setp.ne.u32 %p1, %r1, 0; "
    for mode, want in [("all", warps.all(1)), ("any", warps.any(1)), ("uni", warps.all(1) | ~warps.any(1))]:
        got = results(head + f"vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %r0, 1, 0, %p2;", a, threads=96)
        np.testing.assert_array_equal(got, np.repeat(want, 32))
    got = results(head + "vote.sync.ballot.b32 %r0, %p1, -1;", a, threads=96)
    np.testing.assert_array_equal(got, np.repeat([sum(int(v) << n for n, v in enumerate(w)) for w in warps], 32))
    some = "@%p1 bra A; mov.u32 %r0, 9; bra B; A: activemask.b32 %r0; B:"
    want = [sum(int(v) << n for n, v in enumerate(w)) if x else 9 for w in warps for x in w]
    np.testing.assert_array_equal(results(head + some, a, threads=96), want)


def test_match_and_redux_and_elect():
    a = RNG.integers(0, 4, 64, U32)
    a[32:] = 3
    warps = a.reshape(2, 32)
    got = results("match.any.sync.b32 %r0, %r1, -1;", a, threads=64)
    np.testing.assert_array_equal(got, [sum(int(v == x) << n for n, v in enumerate(w)) for w in warps for x in w])
    got = results("match.all.sync.b32 %r0|%p1, %r1, -1; selp.u32 %r2, 1, 0, %p1; add.u32 %r0, %r0, %r2;", a, threads=64)
    np.testing.assert_array_equal(got, np.repeat([0, 0], 32))  # all lanes agree in the second: mask + 1 wraps to 0
    got = results("match.all.sync.b32 %r0|%p1, %r1, -1;", a, threads=64)
    np.testing.assert_array_equal(got, np.repeat([0, 0xFFFFFFFF], 32))

    b = RNG.integers(0, 2**32, 64, U32)
    groups = np.where(
        np.arange(32) % 3 == 0, sum(1 << n for n in range(0, 32, 3)), 0xFFFFFFFF ^ sum(1 << n for n in range(0, 32, 3))
    )
    reductions = {
        "add.u32": np.add,
        "min.u32": np.minimum,
        "max.u32": np.maximum,
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "xor.b32": np.bitwise_xor,
    }
    for name, function in reductions.items():
        got = results(f"redux.sync.{name} %r0, %r1, -1;", b, threads=64)
        np.testing.assert_array_equal(got, np.repeat(function.reduce(b.reshape(2, 32), axis=1, dtype=U32), 32))
        split = f"""mov.u32 %r4, %laneid; rem.u32 %r4, %r4, 3; setp.eq.u32 %p1, %r4, 0;
        selp.b32 %r5, {groups[0]}, {groups[1]}, %p1; redux.sync.{name} %r0, %r1, %r5;"""
        want = [
            function.reduce(w[(groups[t] >> np.arange(32)) & 1 == 1], dtype=U32)
            for w in b.reshape(2, 32)
            for t in range(32)
        ]
        np.testing.assert_array_equal(results(split, b, threads=64), want)
    signed = results("redux.sync.min.s32 %r0, %r1, -1;", b, threads=64).view(np.int32)
    np.testing.assert_array_equal(signed, np.repeat(b.view(np.int32).reshape(2, 32).min(1), 32))

    np.testing.assert_array_equal(results("elect.sync %r0|%p1, -1; selp.u32 %r0, 1, %r0, %p1;"), [1] + [0] * 31)
    late = "setp.lt.u32 %p2, %tid, 5; @%p2 bra B; elect.sync %r0|%p1, 0xffffffe0; selp.u32 %r0, 99, %r0, %p1; B:"
    np.testing.assert_array_equal(results("mov.u32 %r0, 0;" + late), [0] * 5 + [99] + [5] * 26)


def test_divergence_at_warp_instructions():
    half = "setp.lt.u32 %p1, %tid, 16; @%p1 bra END; {} END:"
    with pytest.raises(EmulatorError, match="is not in its own member mask 0x00000001"):
        results("shfl.sync.idx.b32 %r0, %r0, 0, 31, 1;")
    with pytest.raises(
        EmulatorError, match=r"thread \(16, 0, 0\): deadlock: a warp that diverged.*16 threads at PTX line"
    ):
        # the other half waits at a barrier of the block
        results(
            "setp.lt.u32 %p1, %tid, 16; @%p1 bra B; shfl.sync.idx.b32 %r0, %r0, 0, 31, -1; bra END; B: bar.sync 0; END:"
        )
    with pytest.raises(EmulatorError, match="ldmatrix.*needs all 32 lanes"):
        results("setp.lt.u32 %p1, %tid, 16; @%p1 ret; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r0];")
    # those who left need not be waited for
    np.testing.assert_array_equal(results(half.format("mov.u32 %r0, 1; bar.warp.sync 0xffff0000;"))[16:], 1)
    exited = "mov.u32 %r0, 0; setp.lt.u32 %p1, %tid, 16; @%p1 ret; shfl.sync.bfly.b32 %r0, %tid, 1, 31, -1;"
    np.testing.assert_array_equal(results(exited)[16:], np.arange(16, 32) ^ 1)


def test_trap():
    with pytest.raises(EmulatorError, match=r"block \(0, 0, 0\), thread \(7, 0, 0\): the kernel trapped\n +@%p1 trap;"):
        results("setp.eq.u32 %p1, %tid, 7; @%p1 trap;")
