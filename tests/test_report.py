"""The SASS parser, the arithmetic on it, the schedule model, and the peer's kernels."""

import re
import struct

import numpy as np
import peer
import pytest
import report
import sass
import schedules
import torch

MMA = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"

SOURCE = """
extern "C" __global__ void loop(const uint4* keys, float* out, int turns, unsigned q) {
    float total = 0;
    #pragma unroll 1
    for (int i = 0; i < turns; ++i) {
        uint4 k = keys[i * 32 + threadIdx.x];
        float d[4] = {};
        #pragma unroll
        for (int step = 0; step < MMAS; ++step)
            asm volatile("MMA" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                         : "r"(k.x), "r"(k.y), "r"(k.z), "r"(k.w), "r"(q + step), "r"(q ^ step));
        total += __shfl_xor_sync(0xffffffff, d[0] + d[3], 1);
    }
    out[threadIdx.x] = total;
}
"""


def small_kernel(mmas: int) -> peer.Binary:
    source = SOURCE.replace("MMAS", str(mmas)).replace("MMA", MMA)
    return peer.build(source, "loop", ["--gpu-architecture=sm_120f"])


def listing(*lines: tuple[str, int] | str) -> str:
    """What nvdisasm prints for (instruction, control word) pairs and labels."""
    text, address = [".text.kernel:"], 0
    for line in lines:
        if isinstance(line, str):
            text.append(f"{line}:")
            continue
        high = line[1] << 41
        text.append(f"        /*{address:04x}*/       {line[0]} ;       /* 0x{0x7918:016x} */")
        text.append(f"                                          /* 0x{high:016x} */")
        address += 16
    return "\n".join(text)


def word(stall=1, write=7, read=7, wait=0) -> int:
    return stall | write << 5 | read << 8 | wait << 11


def function(*lines) -> sass.Function:
    return sass.Function("kernel", sass.parse(listing(*lines))["kernel"], sass.Resources(100, 0, 0))


def test_control_words():
    first, second = function(
        ("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", word(stall=4, write=2, read=1)),
        ("QMMA.SF.16832.F32.E4M3.E4M3.E8 R8, R4, R12, R8, R20, R21, URZ", word(stall=11, wait=0b100110)),
    ).instructions
    assert (first.guard, first.opcode, first.stall, first.writes, first.reads) == ("!P0", "LDG.E.128", 4, 2, 1)
    assert (first.kind, first.bits, first.bytes, first.waits) == ("global", 128, 512, ())
    assert (second.stall, second.writes, second.reads, second.waits) == (11, None, None, (1, 2, 5))
    assert (second.kind, second.macs) == ("mma", 16 * 8 * 32)


def test_wavefronts_and_classes():
    kinds = {
        "LDSM.16.M88.4 R0, [R1]": ("ldsm", 4),
        "LDSM.16.M88.2 R0, [R1]": ("ldsm", 2),
        "SHFL.BFLY PT, R0, R1, 0x1, 0x1f": ("shuffle", 1),
        "LDS.64 R0, [R1]": ("shared", 1),
        "FMNMX R0, R1, R2, !PT": ("alu", 0),
        "FFMA R0, R1, R2, R3": ("fp32", 0),
        "IMAD.WIDE R0, R1, R2, R3": ("imad", 0),
        "UIADD3 UR4, UPT, UPT, UR5, UR6, URZ": ("uniform", 0),
        "UTMALDG.2D [UR8], [UR4]": ("tma", 0),
        "SYNCS.ARRIVE.TRANS64 RZ, [UR4], R0": ("sync", 0),
        "STL [R1], R0": ("local", 0),
        "LDGSTS.E.BYPASS.128 [R0], [R2.64]": ("global", 0),
    }
    parsed = function(*((text, word()) for text in kinds)).instructions
    assert [(i.kind, i.wavefronts) for i in parsed] == list(kinds.values())


@pytest.mark.parametrize("tma", [False, True])
def test_a_turn_skips_retries_and_takes_the_work(tma):
    nop = ("NOP", word())
    mma = ("QMMA.16832.F32.E4M3.E4M3 R8, R4, R12, RZ", word())
    kernel = function(
        ("UTMALDG.2D [UR8], [UR4], desc[UR6]", word()) if tma else nop,
        ".L_x_0",  # the loop
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0", word()),
        ("@!P0 BRA `(.L_x_3)", word()),
        ".L_x_1",
        ("@P1 BRA `(.L_x_2)", word()),  # around the work
        mma,
        ("@P3 BRA `(.L_x_4)", word()),  # around the next keys; with TMA, around bookkeeping
        ("LDG.E R4, desc[UR4][R2.64]", word()),
        ".L_x_4",
        mma,
        ("@P4 BRA `(.L_x_2)", word()),  # around what is no work
        nop,
        ".L_x_2",
        nop,
        ("@P2 BRA `(.L_x_0)", word()),
        ("EXIT", word()),
        ".L_x_3",  # out of line: try again
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0", word()),
        ("@!P0 BRA `(.L_x_3)", word()),
        ("BRA `(.L_x_1)", word()),
    )
    assert len(kernel.loops()) == 2
    loop = kernel.mma_loop()
    load = [] if tma else ["LDG"]
    assert [i.name for i in loop.turn] == ["SYNCS", "BRA", "BRA", "QMMA", "BRA", *load, "QMMA", "BRA", "NOP", "BRA"]
    assert loop.macs == 2 * 4096


def test_the_loop_is_the_inner_one():
    kernel = function(
        ".L_x_0",
        ("QMMA.16832.F32.E4M3.E4M3 R8, R4, R12, RZ", word()),
        ".L_x_1",
        ("OMMA.SF.16864.F32.E2M1.E2M1.UE8 R8, R4, R12, R8, R20, R21, URZ", word()),
        ("@P0 BRA `(.L_x_1)", word()),
        ("@P1 BRA `(.L_x_0)", word()),
        ("EXIT", word()),
    )
    assert [i.name for i in kernel.mma_loop().turn] == ["OMMA", "BRA"]


def test_latency_of_a_turn():
    turn = function(
        ("LDG.E R4, [R2]", word(stall=2, write=0)),
        ("MOV R5, R6", word(stall=3)),
        ("FADD R4, R4, R5", word(stall=4, wait=1)),
        ("STG.E [R2], R4", word(stall=1, read=1)),
        ("MOV R4, R7", word(stall=5, wait=0b10)),
    ).instructions
    # 0: LDG, 2: MOV, 100: FADD waits for the load, 104: STG, 104 + 7: MOV waits until R4 is read, +5
    assert sass.turn_latency(turn, {"global": 100, "read": 7, "other": 0}) == (15, 116)


def test_loads_that_wait_for_each_other():
    kernel = function(
        ("LDG.E R2, desc[UR4][R20.64]", word(write=0)),
        ("LDG.E R3, desc[UR4][R22.64]", word(write=1)),  # at once with the first
        ("IADD3 R4, R2, R3", word(wait=0b11)),
        ("@P0 BRA `(.L_x_0)", word()),
        ("LDG.E R6, desc[UR4][R4.64]", word(write=2)),  # not on the shortest way
        ("MOV R7, R6", word(wait=0b100)),
        ".L_x_0",
        ("LDS R9, [R4]", word(write=3)),
        ("LDG.E R8, desc[UR4][R4.64]", word(write=0)),
        ("MOV R9, R9", word(wait=0b1000)),  # waits for shared memory only
        ("QMMA.16832.F32.E4M3.E4M3 R8, R4, R12, RZ", word(wait=0b1)),
        ("EXIT", word()),
    )
    path = kernel.first_mma()
    assert path[-1].kind == "mma" and len(path) == 8
    assert [load.operands.split(",")[0] for load in sass.awaited_loads(path)] == ["R2", "R8"]


def test_a_load_in_a_loop_is_waited_for():
    kernel = function(
        ("@P0 BRA `(.L_x_1)", word()),  # where there is nothing to go through
        ".L_x_0",
        ("LDG.E R2, desc[UR4][R20.64]", word(write=0)),
        ("MOV R3, R2", word(wait=0b1)),
        ("@P1 BRA `(.L_x_0)", word()),
        ".L_x_1",
        ("LDG.E R8, desc[UR4][R4.64]", word(write=0)),
        ("QMMA.16832.F32.E4M3.E4M3 R8, R4, R12, RZ", word(wait=0b1)),
        ("EXIT", word()),
    )
    assert [load.operands.split(",")[0] for load in sass.awaited_loads(kernel.first_mma())] == ["R2", "R8"]


@pytest.mark.parametrize("mmas", [1, 4, 7])
def test_a_compiled_kernel(mmas):
    binary = small_kernel(mmas)
    subject = report.Subject("ours", "small", "", binary, block_warps=4, math_warps=4)
    cost = report.cost(subject)
    counts = sass.count(cost.turn)
    assert (counts["mma"], counts["shuffle"], counts["global"], counts["local"]) == (mmas, 1, 1, 0)
    assert cost.mma_form == "QMMA"
    assert cost.units == pytest.approx(mmas / 32)
    bounds = cost.bounds()
    assert bounds["tensor"] == pytest.approx(512)
    assert cost.bounds(geforce=True)["tensor"] == pytest.approx(1024)
    assert bounds["issue"] == pytest.approx(len(cost.turn) * 32 / mmas)
    assert bounds["memory"] == pytest.approx((512 / 128 + 1) * 4 * 32 / mmas)  # 16 bytes a lane, and the shuffle
    assert cost.spills == 0 and cost.warps == 48
    assert bounds["latency"] * cost.units * 12 >= report.LATENCY["global"]  # the load is not in flight across turns
    assert report.markdown(report.bounds_table([cost])).count("\n") == 2


def test_warps_of_an_sm():
    def warps(registers, block, math, shared=0):
        kernel = sass.Function("kernel", (), sass.Resources(registers, 0, 1024 if shared else 0))
        return report.Cost(report.Subject("ours", "", "", None, block, math, shared), kernel).warps

    assert warps(166, 4, 4) == 12
    assert warps(121, 4, 4) == 16
    assert warps(128, 8, 8) == 16
    assert warps(168, 12, 8) == 8
    assert warps(32, 8, 8) == 48
    assert warps(32, 4, 4, shared=50000) == 8


def walked(lengths, schedule, split, tile, empty):
    """Each slot's keys by walking the schedule a split at a time."""
    loads = []
    for (row, at), end in zip(schedule[:-1], schedule[1:], strict=True):
        load = 0
        while (row, at) != tuple(end):
            left = lengths[row] - at * split
            load += min(-(-left // tile) * tile, split) if left > 0 else empty
            at += 1
            if at * split >= lengths[row]:
                row, at = row + 1, 0
                while not empty and row < len(lengths) and lengths[row] == 0:
                    row += 1
        loads.append(load)
    return loads


@pytest.mark.parametrize("planned, split, tile, empty", [(256, 256, 16, 0), (128, 128, 128, 128), (256, 128, 128, 128)])
def test_schedules_against_a_walk(planned, split, tile, empty):
    rng = np.random.default_rng()
    for _ in range(60):
        lengths = rng.integers(0, 2000, rng.integers(1, 40)) * rng.integers(0, 2)
        lengths[rng.integers(len(lengths))] = rng.integers(1, 100_000)
        schedule = schedules.plan(lengths, int(rng.integers(1, 60)), planned)
        expected = walked(lengths.tolist(), list(map(tuple, schedule.tolist())), split, tile, empty)
        assert schedules.work(lengths, schedule, split, tile, empty).tolist() == expected


def test_plan_follows_the_contract():
    assert schedules.plan(np.array([0, 300, 0, 256]), 4, 256).tolist() == [[1, 0], [1, 0], [1, 1], [3, 0], [4, 0]]
    assert schedules.plan(np.array([1000]), 3, 256).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_the_mismatch_that_users_met():
    """Batch 1 of 16K keys and batch 4 of 32K on 188 SMs: 65 and 131 tiles of 128 keys on the longest SM."""
    for batch, length, reported, right in ((1, 1 << 14, 65, 1), (4, 1 << 15, 131, 6)):
        lengths = np.full(batch, length)
        loads = [schedules.work(lengths, schedules.plan(lengths, 188, by), 128, 128, 128) for by in (256, 128)]
        assert [load.max() // 128 for load in loads] == [reported, right]


@pytest.fixture(scope="module")
def fetched():
    try:
        return peer.fetch()
    except peer.PeerUnavailable as error:
        pytest.skip(str(error).splitlines()[-1])


PEERS = [peer.paged("fp8"), peer.paged("fp4", next_n=2), peer.ragged("fp8"), peer.ragged("fp4")]


@pytest.mark.peer
@pytest.mark.parametrize("kernel", PEERS, ids=lambda k: k.label)
def test_the_peers_loops(fetched, kernel):
    subject = report.Subject(
        "peer", kernel.label, "", kernel.compile(), 12, 8, kernel.shared_bytes, kernel.copied_bytes
    )
    cost = report.cost(subject)
    fp4 = "fp4" in kernel.label
    assert (cost.mma_form, cost.per_unit("mma")) == (("OMMA.SF", 16) if fp4 else ("QMMA", 32))
    assert cost.bounds()["tensor"] == (256 if fp4 else 512)
    assert (cost.registers, cost.warps, cost.spills) == (232, 8, 0)
    assert cost.per_unit("sync") * cost.units == 3  # wait for the keys (two probes), hand their place back
    assert cost.per_unit("shuffle") == 4


def small_launches() -> list[peer.Launch]:
    int32 = torch.int32
    lens = torch.tensor([[100, 101], [0, 0], [300, 301]], dtype=int32)
    schedule, table = torch.zeros(9, 2, dtype=int32), torch.zeros(3, 5, dtype=int32)
    weights = torch.ones(6, 32)
    fp8 = torch.zeros(3, 2, 32, 128, dtype=torch.float8_e4m3fn)
    fp4 = torch.zeros(3, 2, 32, 64, dtype=torch.int8), torch.zeros(3, 2, 32, dtype=int32)
    logits = peer.paged_logits(6, 301)
    ends = torch.full((6,), 50, dtype=int32)
    ragged = [
        (q, kv, weights, 0 * ends, ends, peer.ragged_logits(6, 32, 50))
        for q, kv in (
            (fp8.view(6, 32, 128), (torch.zeros(50, 128, dtype=torch.float8_e4m3fn), torch.ones(50))),
            (
                (fp4[0].view(6, 32, 64), fp4[1].view(6, 32)),
                (torch.zeros(50, 64, dtype=torch.int8), torch.zeros(50, dtype=int32)),
            ),
        )
    ]
    caches = [torch.zeros(7, 64, 1, width, dtype=torch.uint8) for width in (132, 68)]
    return [
        peer.launch_metadata(lens, schedule),
        *(
            peer.launch_paged(q, c, weights, lens, table, schedule, logits)
            for q, c in zip((fp8, fp4), caches, strict=True)
        ),
        *(peer.launch_ragged(*case, num_sms=8) for case in ragged),
    ]


@pytest.mark.peer
@pytest.mark.parametrize("launch", small_launches(), ids=lambda launch: launch.kernel.label)
def test_parameters_fit_the_peers_signature(fetched, launch):
    binary = launch.kernel.compile()
    signature = re.search(rf"\.entry {re.escape(binary.name)}\((.*?)\)", binary.ptx, re.S)[1]
    sizes = {"u8": 1, "u32": 4, "u64": 8, "b8": 1}
    offset, expected = 0, []
    for line in signature.split(","):
        kind = re.search(r"\.(u8|u32|u64|b8)\b", line)[1]
        align = int(m[1]) if kind == "b8" and (m := re.search(r"\.align (\d+)", line)) else sizes[kind]
        length = int(m[1]) if (m := re.search(r"\[(\d+)\]", line)) else sizes[kind]
        offset = -(-offset // align) * align
        expected.append((offset, length))
        offset += length
    block, maps = launch.parameters()
    assert len(block) == offset
    assert [(at, 128) for at in maps] == [entry for entry in expected if entry[1] == 128]
    assert len(launch.arguments) == len(expected)
    for argument, (at, length) in zip(launch.arguments, expected, strict=True):
        if not isinstance(argument, peer.TensorMap):
            assert struct.calcsize(argument[0]) == length
            assert struct.unpack_from(argument[0], block, at)[0] == argument[1]


def test_tensor_maps():
    """What the driver asks of a map: strides of whole 16 bytes, and a swizzle as wide as a row of the box."""
    for launch in small_launches():
        for tensor_map in (a for a in launch.arguments if isinstance(a, peer.TensorMap)):
            assert tensor_map.strides[0] == tensor_map.element_bytes
            assert len(tensor_map.dims) == len(tensor_map.strides) == len(tensor_map.box)
            assert all(s % 16 == 0 for s in tensor_map.strides[1:])
            assert tensor_map.swizzle in (0, tensor_map.box[0] * tensor_map.element_bytes)
    paged = small_launches()[1]
    keys, scales = paged.arguments[9:11]
    assert (keys.dims, keys.strides, keys.box, keys.swizzle) == ((128, 64, 7), (1, 128, 8448), (128, 64, 1), 128)
    assert (scales.dims, scales.strides, scales.box) == ((64, 7), (4, 8448), (64, 1))
    assert scales.address - keys.address == 64 * 128


def test_a_guarded_load_stands_for_a_wrong_guess() -> None:
    def load(address: int, register: str, guard: str, waits: tuple[int, ...], writes: int) -> sass.Instruction:
        return sass.Instruction(
            address, guard, "LDG.E.CONSTANT", f"{register}, desc[UR6][R2.64]", 1, writes, None, waits, None
        )

    schedule, guess = load(0, "R4", "", (), 0), load(16, "R8", "!P0", (0,), 1)
    page, key = load(32, "R8", "P1", (1,), 2), load(48, "R12", "", (1, 2), 3)
    use = sass.Instruction(64, "", "FADD", "R1, R12, R12", 1, None, None, (3,), None)
    assert sass.awaited_loads([schedule, guess, page, key, use]) == [schedule, guess, key]
    elsewhere = load(32, "R9", "P1", (1,), 2)
    assert sass.awaited_loads([schedule, guess, elsewhere, key, use]) == [schedule, guess, elsewhere, key]
