"""Each detector finds the fault that is planted for it, and says where; our kernels are clean under all of them."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reduced
import torch
from emulator_harness import kernel, launch
from problems import Paged, Ragged, Sparse, check, poisoned

import deep_gemm
from deep_gemm.sm120.emulator import Buffer, EmulatorError, Module, recording
from deep_gemm.sm120.jit import compiler
from deep_gemm.sm120.kernels import metadata
from deep_gemm.sm120.kernels.windows import windows_of_lengths

SHARED = ".shared .align 1024 .b8 tile[4096]; .shared .align 8 .b8 bar[16];"
WHO = "mov.u32 %r20, %tid.x; shr.u32 %r21, %r20, 5; mov.u32 %r30, tile; mov.u32 %r31, bar;"


def run(body: str, threads=96, blocks=1, words=8, sanitize=True, **options) -> np.ndarray:
    """%r20 is the thread, %r21 its warp, %r30 shared memory, %r31 an mbarrier, %at0 an output of so many words."""
    out = np.zeros(words, np.uint32)
    launch(WHO + body, [out], threads, blocks, SHARED, sanitize=sanitize, **options)
    return out


def finds(message: str, body: str, thread: int, line: str, **options) -> None:
    """The sanitizers stop at the statement ``line``, in ``thread`` of some block; without them it runs."""
    run(body, sanitize=False, **options)
    with pytest.raises(EmulatorError) as caught:
        run(body, **options)
    text = str(caught.value)
    assert re.search(message, text), text
    assert f"thread ({thread}, 0, 0)" in text and text.endswith(f"    {line}"), text
    assert re.search(r"kernel 'k', PTX line \d+:", text), text


# --- what nobody wrote -----------------------------------------------------------------------------------------------


def test_a_register() -> None:
    finds("register %r2 is read and was never written", "add.u32 %r1, %r2, 1;", 0, "add.u32 %r1, %r2, 1;")


def test_a_register_in_some_lanes() -> None:
    body = "setp.lt.u32 %p1, %r20, 70; @%p1 mov.u32 %r1, 5;\nst.shared.u32 [%r30], %r1;"
    finds("register %r1 is read and was never written", body, 70, "st.shared.u32 [%r30], %r1;")


def test_a_guard() -> None:
    finds("register %p3 is read", "@%p3 add.u32 %r1, %r20, 1;", 0, "@%p3 add.u32 %r1, %r20, 1;")


@pytest.mark.parametrize("space, name", [("shared", "tile"), ("local", "mine")])
def test_scratch_memory(space: str, name: str) -> None:
    body = f"""{".local .align 16 .b8 mine[2048];" if space == "local" else ""}
        mov.u32 %r1, {name}; shl.b32 %r2, %r20, 4; add.u32 %r1, %r1, %r2;
        st.{space}.v2.u32 [%r1], {{%r2, %r2}}; setp.ne.u32 %p1, %r20, 41; @%p1 st.{space}.u32 [%r1+8], %r2;
        ld.{space}.v2.u32 {{%r3, %r4}}, [%r1]; ld.{space}.u32 %r3, [%r1+8];"""
    message = f"read of 4 bytes of {space} memory that were never written"
    finds(message, body, 41, f"ld.{space}.u32 %r3, [%r1+8];")


def test_an_unwritten_buffer() -> None:
    """Its first half is written by the kernel, then more is read."""
    out = np.zeros(96, np.uint32)
    body = (
        WHO
        + """mad.wide.u32 %d1, %r20, 4, %at0; setp.lt.u32 %p1, %r20, 64; @%p1 st.global.u32 [%d1], %r20;
        @%p1 ld.global.u32 %r1, [%d1];
        ld.global.u32 %r2, [%d1];"""
    )
    launch(body, [out], 96, extra=SHARED, sanitize=True)
    module = Module(kernel(body, 1, SHARED))
    with pytest.raises(EmulatorError, match=r"thread \(64, 0, 0\): read of 4 bytes of 'out' that were never written"):
        module.launch("k", 1, 96, [out.ctypes.data], [Buffer.of(out, "out", unwritten=True)], sanitize=True)


# --- races -----------------------------------------------------------------------------------------------------------

# Warp 0 writes a word that warp 1 reads.
WRITE = "setp.ge.u32 %p1, %r20, 32; @%p1 bra READ; st.shared.u32 [%r30], %r20; READ:"
READ = "setp.eq.u32 %p2, %r21, 1; @%p2 ld.shared.u32 %r5, [%r30];"


def test_a_read_after_a_write() -> None:
    message = (
        r"race on shared memory: the read of 4 bytes touches what warp 0 of block \(0, 0, 0\) has written at PTX line"
    )
    finds(message, WRITE + READ, 32, "@%p2 ld.shared.u32 %r5, [%r30];")
    run(WRITE + "bar.sync 0;" + READ)


def test_a_write_after_a_read() -> None:
    body = "setp.eq.u32 %p1, %r21, 2; @%p1 st.shared.u32 [%r30], %r20; bar.sync 0; ld.shared.u32 %r5, [%r30]; {0}"
    write = "@%p1 st.shared.u32 [%r30], %r5;"
    finds(r"touches what warp \d of block \(0, 0, 0\) has read", body.format(write), 64, write)
    run(body.format("bar.sync 0;" + write))


def test_two_writes_at_once() -> None:
    message = r"the write of 2 bytes touches what warp 0 .* has written"
    finds(message, "cvt.u16.u32 %h1, %r20;\nst.shared.u16 [%r30], %h1;", 32, "st.shared.u16 [%r30], %h1;")


def test_neighbours_are_no_race() -> None:
    """Warps write to bytes of the same word; lanes of one warp are not looked at."""
    run("add.u32 %r1, %r30, %r21; cvt.u16.u32 %h1, %r20; st.shared.u8 [%r1], %h1;")


def test_a_barrier_of_others() -> None:
    """Warps 0 and 1 meet, warp 2 does not."""
    body = (
        WRITE
        + """setp.eq.u32 %p3, %r21, 2; @%p3 bra LATE; bar.sync 1, 64; ld.shared.u32 %r5, [%r30]; bra DONE;
        LATE: {0}\nld.shared.u32 %r6, [%r30]; DONE:"""
    )
    run(body.format("bar.sync 2, 32; bra DONE;"))
    finds("touches what warp 0", body.format("bar.sync 2, 32;"), 64, "ld.shared.u32 %r6, [%r30];")


def test_arriving_tells_and_does_not_ask() -> None:
    """bar.arrive gives to those who wait, and gets nothing from them."""
    body = """setp.ne.u32 %p1, %r21, 0; @%p1 bra OTHER; st.shared.u32 [%r30], %r20; bar.arrive 1, 96; {0} bra DONE;
        OTHER: ld.shared.u32 %r7, [%r30+64]; bar.sync 1, 96; ld.shared.u32 %r5, [%r30]; DONE:"""
    first = "setp.eq.u32 %p2, %r21, 0; @%p2 st.shared.u32 [%r30+64], %r20; bar.sync 0;"
    run(first + body.format(""))
    write = "st.shared.u32 [%r30+64], %r20;"
    with pytest.raises(EmulatorError, match=r"the (read|write) of 4 bytes touches what warp . of block"):
        run(first + body.format("\n" + write))


def test_atomics_agree_with_each_other_alone() -> None:
    zero = "setp.eq.u32 %p1, %r20, 0; @%p1 st.shared.u32 [%r30], 0; bar.sync 0;"
    atomic = "atom.shared.add.u32 %r1, [%r30], 1;"
    run(zero + atomic)
    finds("the read of 4 bytes touches what warp . .* has written", zero + atomic + READ, 32,
          "@%p2 ld.shared.u32 %r5, [%r30];")  # fmt: skip
    body = zero + "setp.eq.u32 %p2, %r21, 1;\n@%p2 ld.shared.u32 %r5, [%r30];\n" + atomic
    with pytest.raises(EmulatorError, match="the atomic of 4 bytes touches what warp 1 .* has read"):
        run(body)


@pytest.mark.parametrize("blocks, threads", [(2, 32), (1, 64), (9, 1024)])
def test_global_memory(blocks: int, threads: int) -> None:
    """Between warps, between blocks of one wave and of two."""
    finds(
        r"race on global memory: the write of 4 bytes touches what warp . of block \(\d, 0, 0\) has written",
        "st.global.u32 [%at0+4], %r20;", 32 if blocks == 1 or threads > 32 else 0, "st.global.u32 [%at0+4], %r20;",
        blocks=blocks, threads=threads,
    )  # fmt: skip
    run("mad.wide.u32 %d1, %tid, 4, %at0; st.global.u32 [%d1], %tid;", threads, blocks, blocks * threads)


def test_a_barrier_does_not_join_blocks() -> None:
    body = "setp.eq.u32 %p1, %tid, 0; @%p1 st.global.u32 [%at0], %r20; bar.sync 0;\nld.global.u32 %r1, [%at0];"
    run(body, blocks=1)
    finds(r"what warp 0 of block \(0, 0, 0\) has written", body, 0, "ld.global.u32 %r1, [%at0];", blocks=2)


# --- mbarriers and copies --------------------------------------------------------------------------------------------

COPY = """setp.ne.u32 %p9, %r20, 0; @%p9 bra SET; mbarrier.init.shared.b64 [%r31], 1; SET: bar.sync 0; @%p9 bra GO;
    mbarrier.arrive.expect_tx.shared.b64 %d1, [%r31], 16;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r30], [%at0], 16, [%r31]; GO:"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared.b64 %p8, [%r31], 0; @!%p8 bra WAIT;"


def test_a_copy_is_waited_for() -> None:
    read = "ld.shared.u32 %r1, [%r30];"
    run(COPY + WAIT + read)
    finds(r"the read of 4 bytes touches what a bulk copy of block \(0, 0, 0\) has written", COPY + "\n" + read, 0, read)
    # Not even its issuer may look before.
    with pytest.raises(EmulatorError, match="what a bulk copy"):
        run(COPY + "\n" + read, threads=1)


def test_a_copy_over_what_others_read() -> None:
    fill = "setp.eq.u32 %p1, %r20, 0; @%p1 st.shared.v4.u32 [%r30], {%r20, %r20, %r20, %r20}; bar.sync 0;"
    read = "ld.shared.u32 %r1, [%r30];"
    run(fill + read + COPY)  # its bar.sync lies between
    with pytest.raises(EmulatorError, match="the copy of 16 bytes touches what warp . .* has read"):
        run(fill + COPY.replace("SET: bar.sync 0;", f"SET: bar.sync 0; {read}"))


def test_an_mbarrier_orders() -> None:
    body = """setp.ne.u32 %p9, %r20, 0; @%p9 bra SET; mbarrier.init.shared.b64 [%r31], 32; SET: bar.sync 0;
        setp.ne.u32 %p1, %r21, 0; @%p1 bra GO; st.shared.u32 [%r30], %r20; mbarrier.arrive.shared.b64 %d1, [%r31];
        {1} GO: @!%p1 bra DONE; {0} ld.shared.u32 %r1, [%r30]; DONE:"""
    run(body.format(WAIT, ""))
    with pytest.raises(EmulatorError, match="the read of 4 bytes touches what warp 0"):
        run(body.format("", ""))
    with pytest.raises(EmulatorError, match="race on shared memory"):  # what comes after the arrival is not covered
        run(body.format(WAIT, "st.shared.u32 [%r30], %r21;"))


def test_an_mbarrier_is_initialised_before_others_come() -> None:
    init = "setp.eq.u32 %p9, %r20, 0; @%p9 mbarrier.init.shared.b64 [%r31], 96; {0}\n"
    arrive = "mbarrier.arrive.shared.b64 _, [%r31];"
    run(init.format("bar.sync 0;") + arrive)
    finds("the atomic of 8 bytes touches what warp 0 .* has written", init.format("") + arrive, 32, arrive)


# --- warps -----------------------------------------------------------------------------------------------------------


def test_a_shuffle_from_a_lane_that_is_not_there() -> None:
    body = "and.b32 %r1, %r20, 16; setp.ne.u32 %p1, %r1, 0; @%p1 ret;\nshfl.sync.idx.b32 %r2, %r20, {0}, 31, 0xffff;"
    run(body.format(7))
    line = "shfl.sync.idx.b32 %r2, %r20, 17, 31, 0xffff;"
    finds(r"'shfl.sync.idx.b32' reads from lane 17, which does not take part", body.format(17), 0, line)


@pytest.mark.parametrize("instruction", ["bar.warp.sync 0xffffffff;", "setmaxnreg.dec.sync.aligned.u32 40;"])
def test_hints_run_divergent(instruction: str) -> None:
    """These wait for nobody who has exited."""
    run(f"setp.lt.u32 %p1, %r20, 5; @%p1 ret; {instruction}")


def test_divergence_at_an_aligned_instruction() -> None:
    """Found without sanitizers, too."""
    body = "setp.eq.u32 %p1, %r20, 35; @%p1 ret;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 %r1, [%r30];"
    for sanitize in (False, True):
        with pytest.raises(EmulatorError, match=r"needs all 32 lanes of a warp; lanes 0xfffffff7 are left"):
            run(body, sanitize=sanitize)


# --- our kernels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sanitized():
    with recording(sanitize=True) as launches:
        yield launches
    assert launches


FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
ARCHITECTURES = pytest.mark.parametrize("arch", ["sm_120f", "sm_90a"])


@ARCHITECTURES
@pytest.mark.parametrize("rows", [1, 40, 1025, 2500])
def test_metadata_is_clean(rows: int, arch: str, monkeypatch, sanitized) -> None:
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    deep_gemm.get_paged_mqa_logits_metadata(torch.randint(0, 4000, (rows, 2), dtype=torch.int32), 64, 170)


@ARCHITECTURES
@FORMATS
@pytest.mark.parametrize(
    "lengths, next_n, slots, heads",
    [([[300, 301], [0, 5]], 2, 12, 64), ([0, 77, 512, 1], 1, 3, 24), ([[40] * 17, [9] * 17], 17, 5, 16),
     ([130 + row // 3 for row in range(40)], 1, 6, 8), ([[400, 401, 402], [90] * 3], 3, 4, 16)],
)  # fmt: skip
def test_paged_is_clean(lengths, next_n: int, slots: int, heads: int, fp4: bool, arch: str, monkeypatch, sanitized):
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    problem = Paged(lengths, next_n=next_n, heads=heads, fp4=fp4)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, slots)
    out = poisoned(len(lengths) * next_n, problem.max_context_len)
    deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), True, out=out)
    check(out, problem.expected(), cleaned=True)


@ARCHITECTURES
@FORMATS
@pytest.mark.parametrize("columns", [0, 200])
def test_ragged_is_clean(columns: int, fp4: bool, arch: str, monkeypatch, sanitized) -> None:
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    starts = [0, 0, 5, 17, 100, 100, 150] * 3
    ends = [1, 33, 5, 190, 101, 160, 200] * 3
    problem = Ragged(starts, ends, 200, heads=32, fp4=fp4)
    out = poisoned(len(starts), columns or 200)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), True, columns, torch.float32, out=out)
    check(out, problem.expected(columns), cleaned=True)


def test_bf16_logits_are_clean(sanitized) -> None:
    """Warps write to halves of the same word."""
    problem = Ragged([0, 3, 50], [77, 90, 91], 91, heads=16)
    out = poisoned(3, 91, torch.bfloat16)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), True, 0, torch.bfloat16, out=out)
    check(out, problem.expected(), cleaned=True)


@ARCHITECTURES
@FORMATS
@pytest.mark.parametrize("block_kv", [64, 0])
@pytest.mark.parametrize("copies, block, width", [(1, 8, 21), (40, 16, 9)])
def test_sparse_is_clean(
    copies: int, block: int, width: int, block_kv: int, fp4: bool, arch: str, monkeypatch, sanitized
):
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    lengths = [100, 0, 37, 300, 150] * copies
    problem = Sparse(lengths, width, block, block_kv, heads=16, fp4=fp4, kind="any", tail="garbage")
    out = poisoned(len(lengths), width * block, torch.bfloat16)
    check(problem.logits(problem.metadata(), out), problem.expected())


@pytest.mark.parametrize("which", range(4))
def test_a_barrier_less_in_our_own_kernel(which: int, tmp_path: Path, monkeypatch) -> None:
    """Each of the schedule's barriers is needed: without it there is a race."""
    headers = tmp_path / "kernels"
    shutil.copytree(compiler.HEADERS, headers)
    source = (headers / "metadata.cuh").read_text()
    barriers = [found.start() for found in re.finditer(r"__syncthreads\(\);", source)]
    assert len(barriers) == 4

    def race(text: str) -> str | None:
        (headers / "metadata.cuh").write_text(text)
        monkeypatch.setattr(compiler, "HEADERS", headers)
        module = Module(compiler.compile_kernel(metadata.MANY, "sm_120f", "ptx").rstrip(b"\0").decode())
        lengths, schedule = torch.randint(1, 9000, (3000,), dtype=torch.int32), torch.zeros(13, 2, dtype=torch.int32)
        parameters = metadata.MetadataParams(schedule.data_ptr(), 12, windows_of_lengths(lengths, 1))
        buffers = [Buffer.of(lengths, "lengths"), Buffer.of(schedule, "schedule", unwritten=True)]
        assert ctypes.sizeof(parameters) == module.kernel(metadata.MANY.name).param_bytes
        try:
            module.launch(metadata.MANY.name, 1, metadata.MANY.threads, bytes(parameters), buffers, sanitize=True)
        except EmulatorError as error:
            return str(error)
        return None

    assert race(source) is None
    at = barriers[which]
    assert re.search("race on shared memory|never written", race(source[:at] + source[at + 16 :]) or "")


@pytest.mark.parametrize("garbage", [False, True], ids=["", "garbage"])
@pytest.mark.parametrize("case", reduced.Suite("cpu").cases())
def test_small_problems(case: str, garbage: bool, device: str) -> None:
    """Those that compute-sanitizer's tools watch on a GPU. With garbage two blocks may compute the same: a race."""
    with recording(sanitize=device == "cpu" and not garbage):
        reduced.Suite(device, garbage).cases()[case]()


def compute_sanitizer(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, reduced.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer here")
@pytest.mark.parametrize("tool", reduced.FAULTS)
def test_compute_sanitizer(tool: str) -> None:
    """Each of its tools finds the fault that is planted for it, and nothing in our kernels, whatever tensors hold."""
    planted = compute_sanitizer(tool, "--planted", tool)
    assert planted.returncode == 9 and "planted" in planted.stdout, planted.stdout
    for arguments in ([], ["--garbage"]):
        done = compute_sanitizer(tool, *arguments)
        assert done.returncode == 0, done.stdout[-5000:]
        assert "cases on cuda are right" in done.stdout


@pytest.mark.peer
@FORMATS
def test_the_peers_are_clean(fp4: bool) -> None:
    """Warps that copy, warps that multiply, and rings of mbarriers between them."""
    import peer
    from sidebyside import their_paged, their_ragged

    try:
        peer.fetch()
    except peer.PeerUnavailable as problem:
        pytest.skip(f"the peer's wheel cannot be fetched: {str(problem).splitlines()[0]}")
    their_paged(Paged([[200, 201], [577, 590]], next_n=2, heads=32, fp4=fp4), sanitize=True)
    their_ragged(Ragged([0, 9, 40, 100, 3], [200, 250, 280, 500, 300], 500, heads=32, fp4=fp4), sanitize=True)
