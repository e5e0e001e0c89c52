"""How long a decode step takes that does only what none can leave out, beside ours and the peer's.

    python tools/evidence/floors.py               builds, runs, writes docs/performance/floors.*
    python tools/evidence/floors.py run DIR       with the peer's kernels in DIR (silicon.py build --into DIR)
    python tools/evidence/floors.py show FILE     what a floors.json says

    --case "1 x 16K"     only cases whose names contain this; may be repeated
    --out FILE           instead of docs/performance/floors.json

A floor has our loads and nothing else: no MMA, no relu, no exchange, no schedule. Every word that it loads is added
up, and each lane stores its sum; the sum of these is compared with torch's.

    one row     the length and a page number together, then keys, their scales and the query, then one store. "own":
                each warp loads the query, as ours do; "straight": neighbouring bytes, 16 a lane. "shared": each warp
                of an SM loads a part of the queries, and none waits for the others'. 12 or 16 warps of 8 or 32 keys.
    many keys   all lengths, then pages from the block table, then every key of every page; no queries. "ldg": to
                registers, 1 or 2 tiles of 32 keys of a warp on their way; "bulk": whole pages to shared memory.

The fastest is the floor. Graphs, inputs and clock are those of silicon.py; ours and the peer's (form x1) run beside
them. Of a prefill the limit is what overlap.py measures: clocks of an MMA among as many other instructions as our loop
has.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import overlap
import peer
import sass
import silicon
import torch
from cuda.bindings import driver
from silicon_card import Clock, Function, PeerKernels, architecture, checked, copy_times, empty_us
from silicon_cases import Case, Inputs, Pool, plan
from silicon_report import copy_us, geometric_mean, markdown
from substitute import FORMS, Tree

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "docs" / "performance" / "floors.json"
PAGE, TILE, SMS = 64, 32, 132

COMMON = """
typedef unsigned char uint8;
typedef unsigned int uint32;
constexpr int kPage = 64, kPageBytes = kPage * (ROW + 4);

__device__ inline uint32 load(const void* address) {
    uint32 word;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(word) : "l"(address));
    return word;
}

struct Vector { uint32 x[4]; };
__device__ inline uint32 sum(const Vector& v) { return (v.x[0] + v.x[1]) + (v.x[2] + v.x[3]); }

// kBytes, 4 or 16, of them; zeros where they are not there. One instruction, no branch.
template <int kBytes>
__device__ inline void ask(Vector& to, const void* address, bool there = true) {
    to = {};
    if constexpr (kBytes == 4) {
        asm volatile("{ .reg .pred there; setp.ne.b32 there, %2, 0; @there ld.global.ncHINT.b32 %0, [%1]; }"
                     : "+r"(to.x[0]) : "l"(address), "r"(int(there)));
    } else {
        asm volatile("{ .reg .pred there; setp.ne.b32 there, %5, 0; "
                     "@there ld.global.ncHINT.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                     : "+r"(to.x[0]), "+r"(to.x[1]), "+r"(to.x[2]), "+r"(to.x[3]) : "l"(address), "r"(int(there)));
    }
}

// Where in rows of ROW bytes load `i` of a lane begins: as ours, a quad to a row, or one load after the other.
constexpr int kLoadsOfEight = 8 * ROW / (32 * PIECE);
__device__ inline int place(int i, int lane) {
    if (STRAIGHT) return i * (32 * PIECE) + lane * PIECE;
    return (8 * (i / kLoadsOfEight) + lane / 4) * ROW + (i % kLoadsOfEight) * (4 * PIECE) + lane % 4 * PIECE;
}
"""

ONE_ROW = (
    COMMON
    + """
// UNIT keys a warp and turn, UNITS turns.
extern "C" __global__ __launch_bounds__(32 * WARPS, 1) void one_row(
    const uint8* cache, const int* table, const int* lengths, const uint8* queries, const uint8* scales,
    const uint8* weights, uint32* out, int pages, int never) {
    constexpr int kShares = OWN ? WARPS / TOKENS : WARPS;
    constexpr int kKeys = UNIT * ROW / (32 * PIECE), kQuery = HEADS * ROW / (32 * PIECE);       // loads
    constexpr int kWeights = OWN && !STRAIGHT ? HEADS / 8 : (HEADS + 31) / 32;
    constexpr int kScales = ROW == 64 ? (HEADS + 31) / 32 : 0;
    constexpr int kParts = OWN ? 1 : WARPS;                         // of what belongs to queries a warp loads one
    constexpr int kTokens = OWN ? 1 : TOKENS;
    constexpr auto part = [](int loads) { return (kTokens * loads + kParts - 1) / kParts; };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token = OWN ? warp / kShares : 0;
    const int first = blockIdx.x + gridDim.x * (warp % kShares), step = gridDim.x * kShares;
    uint32 page[UNITS];
    #pragma unroll
    for (int u = 0; u < UNITS; ++u) page[u] = load(table + min((first + u * step) * UNIT / kPage, pages - 1));
    const int length = load(lengths + TOKENS - 1);
    bool nothing = (OWN ? first : blockIdx.x) * UNIT >= length;
    #pragma unroll
    for (int u = 0; u < UNITS; ++u) nothing |= page[u] == 0xffffffff;   // else it would be asked for after the length
    if (nothing) return;
    Vector keys[UNITS][kKeys + 1], query[part(kQuery) + part(kWeights) + part(kScales) + 1];
    #pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        const int key = (first + u * step) * UNIT;
        const uint8* values = cache + (long long)(page[u]) * kPageBytes;
        #pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            ask<PIECE>(keys[u][i], values + key % kPage * ROW + place(i, lane), key < length);
        }
        ask<4>(keys[u][kKeys], values + kPage * ROW + 4 * (key % kPage + lane), key < length && lane < UNIT);
    }
    int next = 0;
    #pragma unroll
    for (int i = 0; i < part(kQuery); ++i) {
        const int n = OWN ? i : i * WARPS + warp;
        const int offset = OWN ? place(i, lane) : n * (32 * PIECE) + lane * PIECE;
        ask<PIECE>(query[next++], queries + token * (HEADS * ROW) + offset, n < kTokens * kQuery);
    }
    #pragma unroll
    for (int i = 0; i < part(kWeights); ++i) {
        const int n = OWN && !STRAIGHT ? 8 * i + lane / 4 : (OWN ? i : i * WARPS + warp) * 32 + lane;
        ask<4>(query[next++], weights + 4 * (token * HEADS + n), n < kTokens * HEADS);
    }
    #pragma unroll
    for (int i = 0; i < part(kScales); ++i) {
        const int n = (OWN ? i : i * WARPS + warp) * 32 + lane;
        ask<4>(query[next++], scales + 4 * (token * HEADS + n), n < kTokens * HEADS);
    }
    // Never taken; wants all, so that the compiler asks for all before it waits for any.
    if (never) {
        volatile uint32* nowhere = out;
        #pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            #pragma unroll
            for (int i = 0; i <= kKeys; ++i) nowhere[i] = keys[u][i].x[0];
        }
        #pragma unroll
        for (int i = 0; i < part(kQuery) + part(kWeights) + part(kScales); ++i) nowhere[i] = query[i].x[0];
        return;
    }
    uint32 all = 0;
    #pragma unroll
    for (int i = 0; i < part(kQuery) + part(kWeights) + part(kScales); ++i) all += sum(query[i]);
    #pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        uint32 total = u == 0 ? all : 0;
        #pragma unroll
        for (int i = 0; i <= kKeys; ++i) total += sum(keys[u][i]);
        if (u == 0 || (first + u * step) * UNIT < length) out[((token * UNITS + u) * step + first) * 32 + lane] = total;
    }
}
"""
)

PAGES = """
// Of all rows: which keys a warp takes depends on every length.
__device__ inline int pages_of(const int* lengths, int rows, int next_n) {
    int pages = 0;
    for (int row = threadIdx.x % 32; row < rows; row += 32) {
        pages += (int(load(lengths + row * next_n + next_n - 1)) + kPage - 1) / kPage;
    }
    return __reduce_add_sync(0xffffffff, pages);
}
"""

MANY_KEYS = (
    COMMON
    + PAGES
    + """
// Tiles of 32 keys, contiguous runs of them, TILES on their way to a warp's registers.
extern "C" __global__ __launch_bounds__(32 * WARPS, 1) void many_keys(
    const uint8* cache, const int* table, const int* lengths, uint32* out, int rows, int next_n) {
    const int pages = pages_of(lengths, rows, next_n);
    constexpr int kLoads = 32 * ROW / (32 * PIECE);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, takers = gridDim.x * WARPS;
    const int taker = blockIdx.x + gridDim.x * warp, tiles = 2 * pages;
    const int from = (long long)(tiles) * taker / takers, to = (long long)(tiles) * (taker + 1) / takers;
    Vector keys[TILES][kLoads];
    uint32 key_scales[TILES], ahead;
    const auto fetch = [&](int i, int tile) {
        const int n = tile - from;
        if (n % 32 == 0) ahead = load(table + min(tile + lane, tiles - 1) / 2);
        const uint8* values = cache + (long long)(__shfl_sync(0xffffffff, ahead, n % 32)) * kPageBytes;
        #pragma unroll
        for (int j = 0; j < kLoads; ++j) ask<PIECE>(keys[i][j], values + tile % 2 * (32 * ROW) + place(j, lane));
        key_scales[i] = load(values + kPage * ROW + 4 * (tile % 2 * 32 + lane));
    };
    #pragma unroll
    for (int i = 0; i < TILES; ++i) if (from + i < to) fetch(i, from + i);
    #pragma unroll 1
    for (int tile = from; tile < to; tile += TILES) {
        #pragma unroll
        for (int i = 0; i < TILES; ++i) {
            uint32 total = key_scales[i];
            #pragma unroll
            for (int j = 0; j < kLoads; ++j) total += sum(keys[i][j]);
            if (tile + i + TILES < to) fetch(i, tile + i + TILES);
            if (tile + i < to) out[(tile + i) * 32 + lane] = total;
        }
    }
}
"""
)

BULK = (
    COMMON
    + PAGES
    + """
// Pages, a contiguous run of them for an SM, dealt out to its warps; STAGES of them on their way to a warp's part of
// shared memory.
extern "C" __global__ __launch_bounds__(32 * WARPS, 1) void many_keys(
    const uint8* cache, const int* table, const int* lengths, uint32* out, int rows, int next_n) {
    const int pages = pages_of(lengths, rows, next_n);
    extern __shared__ __align__(128) uint8 shared[];
    __shared__ unsigned long long barriers[WARPS * STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int from = (long long)(pages) * blockIdx.x / gridDim.x + warp;
    const int to = (long long)(pages) * (blockIdx.x + 1) / gridDim.x;
    const uint32 stages = uint32(__cvta_generic_to_shared(shared)) + warp * (STAGES * kPageBytes);
    const uint32 full = uint32(__cvta_generic_to_shared(barriers + warp * STAGES));
    if (lane == 0) {
        for (int i = 0; i < STAGES; ++i) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(full + 8 * i));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    uint32 ahead;
    const auto fetch = [&](int stage, int n) {
        const int page = from + n * WARPS;
        if (n % 32 == 0) ahead = load(table + min(page + lane * WARPS, pages - 1));
        const uint8* values = cache + (long long)(__shfl_sync(0xffffffff, ahead, n % 32)) * kPageBytes;
        if (lane == 0 && page < to) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                         :: "r"(full + 8 * stage), "r"(kPageBytes) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         :: "r"(stages + stage * kPageBytes), "l"(values), "r"(kPageBytes), "r"(full + 8 * stage)
                         : "memory");
        }
    };
    for (int i = 0; i < STAGES; ++i) fetch(i, i);
    uint32 parity = 0;
    #pragma unroll 1
    for (int n = 0, stage = 0; from + n * WARPS < to; ++n) {
        asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
                     :: "r"(full + 8 * stage), "r"(parity) : "memory");
        uint32 total[2] = {};
        #pragma unroll
        for (int i = 0; i < (kPageBytes + 511) / 512; ++i) {
            Vector v{};
            if (i * 512 + lane * 16 < kPageBytes) {
                asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
                             : "r"(stages + stage * kPageBytes + i * 512 + lane * 16));
            }
            total[i % 2] += sum(v);
        }
        __syncwarp();
        fetch(stage, n + STAGES);
        uint32* row = out + (long long)(from + n * WARPS) * kPage + lane;
        row[0] = total[0], row[32] = total[1];
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
}
"""
)


# One thread, for 5 ms: how many clocks its SM has meanwhile.
CLOCK = """
extern "C" __global__ void watch(unsigned long long* out) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    const long long first = clock64();
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - begin < 5000000);
    out[0] = clock64() - first, out[1] = now - begin;
}
"""


# ---- what is timed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """A kernel of this file: its name in the results, its text, and what the text leaves open."""

    name: str
    text: str
    row: int
    warps: int
    more: tuple[tuple[str, int | str], ...]

    @property
    def macros(self) -> dict[str, int | str]:
        return {"ROW": self.row, "WARPS": self.warps, "PIECE": 16, "STRAIGHT": 0, "HINT": "", **dict(self.more)}

    @property
    def shared_bytes(self) -> int:
        """One row: more than half, so that no SM gets two blocks while another has none."""
        return 120 << 10 if self.text is ONE_ROW else self.macros.get("STAGES", 0) * self.warps * PAGE * (self.row + 4)

    def stores(self, pages: int, sms: int) -> int:
        """Words."""
        return self.macros["UNITS"] * sms * self.warps * 32 if self.text is ONE_ROW else pages * PAGE

    @property
    def entry(self) -> str:
        return "one_row" if self.text is ONE_ROW else "many_keys"

    @property
    def source(self) -> str:
        text, macros = self.text, self.macros
        text = text.replace("HINT", str(macros.pop("HINT")))
        return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + text

    def build(self, arch: str) -> peer.Binary:
        return peer.build(self.source, self.entry, [f"--gpu-architecture={arch}", "--std=c++17"], {})


def floors(case: Case, sms: int) -> list[Floor]:
    """The forms tried for a case."""
    row, pages = case.row_bytes, case.distinct_pages
    ours = {"PIECE": 4 if case.fp4 else 16}
    found = []

    def add(name: str, text: str, warps: int, **more: int | str) -> None:
        found.append(Floor(name, text, row, warps, tuple(more.items())))

    if case.rows == 1 and pages * PAGE // TILE <= 2 * 12 * sms:
        few = pages * PAGE // 8 <= 4 * sms
        for warps in (12, 16):
            for own in (1, 0):
                for unit in (8,) if few else (32, 8):
                    units = -(-(pages * PAGE // unit) // (sms * (warps // case.next_n if own else warps)))
                    if units * unit > (32 if case.fp4 and own else 64):  # keys of a warp: more would spill
                        continue
                    sizes = {"UNIT": unit, "UNITS": units, "TOKENS": case.next_n, "HEADS": case.heads, "OWN": own}
                    name = f"{'own' if own else 'shared'} {warps}x{unit}"
                    if own:
                        add(name, ONE_ROW, warps, **sizes, **ours)
                    add(name + " straight" * own, ONE_ROW, warps, **sizes, STRAIGHT=1)
        return found
    for warps, tiles in ((12, 1), (16, 1)):
        add(f"ldg {warps}x{tiles}", MANY_KEYS, warps, TILES=tiles, **ours)
    for hint in ("", "no_allocate", "evict_first"):
        hinted = {"HINT": f".L1::{hint}"} if hint else {}
        add(f"ldg 12x2 straight {hint}".strip(), MANY_KEYS, 12, TILES=2, STRAIGHT=1, **hinted)
        if hint:
            add(f"ldg 12x1 {hint}", MANY_KEYS, 12, TILES=1, **hinted, **ours)
    budget = 220 << 10
    for warps, stages in ((8, 3), (12, 2)):
        stages *= 2 if case.fp4 else 1
        if warps * stages * PAGE * (row + 4) <= budget:
            add(f"bulk {warps}x{stages}", BULK, warps, STAGES=stages)
    return found


def flat_pages(it: Inputs) -> torch.Tensor:
    """Numbers of all pages, row after row."""
    return torch.cat([it.block_table[row, : int(n)] for row, n in enumerate(it.case.pages)]).contiguous()


def bind(floor: Floor, function: Function, it: Inputs, table: torch.Tensor, out: torch.Tensor, sms: int) -> Callable:
    pointer = lambda tensor: struct.pack("Q", 0 if tensor is None else tensor.data_ptr())  # noqa: E731
    values, scales = it.q if it.case.fp4 else (it.q, None)
    if floor.text is ONE_ROW:
        tensors, numbers = (it.kv_cache, table, it.lengths, values, scales, it.weights, out), (len(table), 0)
    else:
        tensors, numbers = (it.kv_cache, table, it.lengths, out), (it.case.rows, it.case.next_n)
    arguments = (*map(pointer, tensors), *(struct.pack("i", number) for number in numbers))
    return function.bind((sms, 1, 1), 32 * floor.warps, *arguments)


def expected(floor: Floor, it: Inputs, table: torch.Tensor, sms: int) -> int:
    """The sum of all words that the kernel loads, as often as it does, modulo 2^32."""

    def words(tensor: torch.Tensor) -> int:
        return int(tensor.contiguous().view(torch.uint8).view(-1, 4).view(torch.int32).sum(dtype=torch.int64))

    case, macros = it.case, floor.macros
    flat = it.kv_cache.view(len(it.kv_cache), -1)
    keys = sum(words(flat[piece.long()]) for piece in table.split(4096))
    if floor.text is not ONE_ROW:
        return keys % 2**32
    units, weights = len(table) * PAGE // macros["UNIT"], words(it.weights)
    values, scales = it.q if case.fp4 else (it.q, None)
    queries = words(values) + (words(scales) if case.fp4 else 0)
    if macros["OWN"]:  # each warp that has keys, its token's; a weight by four lanes
        warps = min(units, sms * (floor.warps // case.next_n))
        return (case.next_n * keys + warps * (queries + (1 if macros["STRAIGHT"] else 4) * weights)) % 2**32
    return (keys + min(units, sms) * (queries + weights)) % 2**32


def measure(case: Case, built: dict[Floor, Function], clock: Clock, pool: Pool, sms: int) -> dict[str, float]:
    """Microseconds of each form."""
    inputs = pool.inputs(case)
    tables = [flat_pages(it) for it in inputs]
    forms, times = floors(case, sms), {}
    words = max(floor.stores(len(tables[0]), sms) for floor in forms)
    outs = [torch.zeros(words, dtype=torch.int32, device=clock.flush.device) for _ in inputs]
    for floor in forms:
        calls = [bind(floor, built[floor], *each, sms) for each in zip(inputs, tables, outs, strict=True)]
        outs[0].zero_()
        calls[0]()
        got = int(outs[0].sum(dtype=torch.int64)) % 2**32
        if got != expected(floor, inputs[0], tables[0], sms):
            raise RuntimeError(f"{case.name}, {floor.name}: not every word was read once")
        times[floor.name] = clock.time(calls, case.launches)
    return times


def beside(case: Case, tree: Tree, kernels: PeerKernels, clock: Clock, pool: Pool, sms: int) -> dict[str, float]:
    """Ours and the peer's, form x1."""
    tree.use("x1")
    inputs, times = pool.inputs(case), {}
    for name, call in (("ours", functools.partial(silicon.our_call, tree)),
                       ("peer", functools.partial(silicon.peer_call, kernels, "x1"))):  # fmt: skip
        times[name] = clock.time([call(it, sms) for it in inputs], case.launches)
    return times


def gigahertz(
    calls: list[Callable], launches: int, watch: Callable, side: torch.cuda.Stream, out: torch.Tensor
) -> float:
    """Of the SMs while so many launches run."""
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        watch()
    for n in range(launches):
        calls[n % len(calls)]()
    torch.cuda.synchronize()
    clocks, nanoseconds = out.tolist()
    return clocks / nanoseconds


def measure_loops(
    cases: list[Case], tree: Tree, kernels: PeerKernels, clock: Clock, pool: Pool, sms: int
) -> list[dict]:
    """Prefills: microseconds of ours and the peer's in each form, and the clock rate that ours leaves the SMs."""
    out = torch.zeros(2, dtype=torch.int64, device=clock.flush.device)
    binary = peer.build(CLOCK, "watch", [f"--gpu-architecture={architecture()}"], {})
    watch = Function(binary.name, binary.cubin).bind((1, 1, 1), 1, struct.pack("Q", out.data_ptr()))
    found = []
    for case in cases:
        if case.kind == "prefill":
            pool.pages(case.fp4, case.distinct_pages * (case.sets + 1))
        inputs = pool.inputs(case)
        for form in FORMS:
            tree.use(form)
            ours = [silicon.our_call(tree, it, sms) for it in inputs]
            theirs = [silicon.peer_call(kernels, form, it, sms) for it in inputs]
            times = {"ours": clock.time(ours, case.launches), "peer": clock.time(theirs, case.launches)}
            times["ghz"] = gigahertz(ours, 1 + int(10e3 / times["ours"]), watch, clock.side, out)
            found.append({"name": case.name, "form": form, "mmas": case.mmas, **times})
    return found


def run(cases: list[Case], loops: list[Case], tree: Tree, built: silicon.Built) -> dict:
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    sms, arch = properties.multi_processor_count, architecture()
    wanted = list(dict.fromkeys(floor for case in cases for floor in floors(case, sms)))
    with ThreadPoolExecutor() as workers:
        binaries = list(workers.map(lambda floor: floor.build(arch), wanted))
    functions = {
        floor: Function(binary.name, binary.cubin, floor.shared_bytes)
        for floor, binary in zip(wanted, binaries, strict=True)
    }
    clock, pool, kernels = Clock(device), Pool(device), PeerKernels(built.get)
    report = {
        "date": str(date.today()),
        "device": properties.name,
        "sms": sms,
        "empty_us": empty_us(clock, sms),
        "copy_us": copy_times(clock, device),
        "ghz": checked(driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 0)) / 1e6,
        "cases": [],
    }
    for fp4 in (False, True):
        mine = [case for case in cases if case.fp4 is fp4]
        if mine:
            pool.pages(fp4, max(case.distinct_pages * (case.sets + 1) for case in mine))
        for case in mine:
            times = {
                "floors": measure(case, functions, clock, pool, sms),
                **beside(case, tree, kernels, clock, pool, sms),
            }
            sizes = {"name": case.name, "key_bytes": case.key_bytes, "mmas": case.mmas}
            report["cases"].append(sizes | times)
    report["loops"] = measure_loops(loops, tree, kernels, clock, pool, sms)
    report["overlap"] = overlap.measure()
    return report


# ---- what it says ---------------------------------------------------------------------------------------------------

TO_BE_ABOVE_EMPTY = {"1 x 64": 1.6, "1 x 1K": 1.6, "1 x 16K": 2.8, "1 x 16K n4": 4.0}  # us, at most
TO_BE_A_COPY = ("64 x 16K", "256 x 4K", "1024 x 4K", "64 x 16K h32", "1024 x 4K h32", "64 x 16K h16")


def limit_us(report: dict, entry: dict) -> float:
    """What a decode step takes at least. One row: its loads, and then, since all of them arrive at once, the MMAs of
    the sub-partition that has most of them. Several rows: their keys, or all MMAs, whichever takes longer."""
    case, floor = next(c for c in plan() if c.name == entry["name"]), min(entry["floors"].values())
    partitions, clocks = 4 * report["sms"], report["overlap"]["x1"]["4"]["half each"][0]
    if case.rows > 1:
        return max(floor, entry["mmas"] / partitions * clocks / (report["ghz"] * 1e3))
    eights = case.next_n * case.keys // 8
    unit = 1 if eights <= partitions else TILE // 8  # of ours: eight keys, or a tile
    mmas = math.ceil(eights / unit / partitions) * unit * case.heads * case.row_bytes // (16 * 32)
    return floor + mmas * clocks / (report["ghz"] * 1e3)


def bar_us(report: dict, entry: dict) -> tuple[str, float] | None:
    """What is asked of ours, in words and in microseconds."""
    name = entry["name"].partition(" ")[2]
    if name in TO_BE_ABOVE_EMPTY:
        return f"{TO_BE_ABOVE_EMPTY[name]} above empty", report["empty_us"] + TO_BE_ABOVE_EMPTY[name]
    return ("a copy", copy_us(report, entry["key_bytes"])) if name in TO_BE_A_COPY else None


def verdict(bar: float, limit: float, ours: float) -> str:
    return "met" if ours <= bar else "out of reach" if limit > bar else "not met"


def decode_table(report: dict) -> list[list[str]]:
    rows = [["case", "asked", "us", "floor", "by", "limit", "ours", "peer", "verdict", "peer / limit", "peer / ours"]]
    for entry in report["cases"]:
        if (bar := bar_us(report, entry)) is None:
            continue
        by, limit = min(entry["floors"], key=entry["floors"].get), limit_us(report, entry)
        ours, peers = entry["ours"], entry["peer"]
        numbers = [f"{us:.2f}" for us in (bar[1], entry["floors"][by], limit, ours, peers)]
        last = [verdict(bar[1], limit, ours), f"{peers / limit:.2f}", f"{peers / ours:.2f}"]
        rows.append([entry["name"], bar[0], *numbers[:2], by, *numbers[2:], *last])
    return rows


def turn_of(tree: Tree, case: Case, form: str) -> tuple[float, int]:
    """Of the loop that scores a prefill: other instructions to an MMA (what a form needs for its second MMA is the
    MMA's), and warps of a sub-partition."""
    tokens = 2 if case.fp4 and case.heads == 32 and case.rows > 1024 else 1
    wanted = "_ragged_" if case.kind == "ragged" else f"_many_t{tokens}"
    kernel = next(kernel for kernel in tree.kernels(case.heads, case.fp4) if wanted in kernel.name)
    turn = next(iter(sass.disassemble(tree.compile(kernel, form)).values())).mma_loop().turn
    count = sum(i.name == "HMMA" for i in turn)
    mmas = count if form == "x1" else count // 2
    return (len(turn) - count) / mmas - (form == "x2s"), kernel.threads // 128


def beside_an_mma(clocks: list[float], others: float) -> float:
    """Clocks of an MMA and so many others, between the whole numbers that were measured."""
    low = min(int(others), len(clocks) - 2)
    return clocks[low] + (clocks[low + 1] - clocks[low]) * (others - low)


def loop_table(report: dict, tree: Tree) -> list[list[str]]:
    rows = [
        ["case", "form", "others", "alone", "limit", "ours", "peer", "share: limit", "ours", "ratio: limit", "ours"]
    ]
    for loop in report["loops"]:
        case = next(case for case in plan() if case.name == loop["name"])
        others, warps = turn_of(tree, case, loop["form"])
        clocks = report["overlap"][loop["form"]][str(warps)]["half each"]
        alone, limit = clocks[0], beside_an_mma(clocks, others)
        ours, peers = (loop[side] * loop["ghz"] * 1e3 * 4 * report["sms"] / loop["mmas"] for side in ("ours", "peer"))
        shares = alone / limit, alone / ours, peers / limit, peers / ours
        numbers = [f"{clock:.1f}" for clock in (others, alone, limit, ours, peers)]
        rows.append([case.name, loop["form"], *numbers, *(f"{share:.2f}" for share in shares)])
    return rows


def show(report: dict) -> None:
    empty, cases = report["empty_us"], report["cases"]
    print(f"{report['date']}, {report['device']}, an empty kernel {empty:.2f} us\n\n{markdown(decode_table(report))}")
    limit = geometric_mean([entry["peer"] / limit_us(report, entry) for entry in cases])
    ours = geometric_mean([entry["peer"] / entry["ours"] for entry in cases])
    print(f"The peer's time, geometric means of {len(cases)} cases: over the limit {limit:.2f}, over ours {ours:.2f}\n")
    print("Clocks of a sub-partition for an MMA; share of its rate; the peer's time over the limit and over ours:\n")
    print(markdown(loop_table(report, Tree("counted", ROOT))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", nargs="?", choices=("all", "run", "show"), default="all")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--case", action="append")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.mode == "show":
        show(json.loads(arguments.folder.read_text()))
        return 0
    if not torch.cuda.is_available():
        print("This needs a GPU.")
        return 1
    everything = [case for case in plan() if any(wanted in case.name for wanted in arguments.case or [""])]
    cases = [case for case in everything if case.kind == "decode"]
    loops = [case for case in everything if case.kind in ("prefill", "ragged") and not case.style and case.heads > 16]
    tree = Tree("ours", ROOT, arch=architecture())
    tree.prepare({(case.heads, case.fp4) for case in cases}, FORMS)
    report = run(cases, loops, tree, silicon.Built(arguments.folder))
    if out := arguments.out or (OUT if not arguments.case else None):
        out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.mode == "all":
        show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
