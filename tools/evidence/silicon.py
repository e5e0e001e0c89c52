"""Ours beside NVIDIA's SM120 kernels on the card at hand, every case timed in one run.

    python tools/evidence/silicon.py                    builds both sides, runs, writes docs/performance/silicon.*
    python tools/evidence/silicon.py build --into DIR   builds the peer's kernels into DIR; needs no GPU
    python tools/evidence/silicon.py run DIR            runs with those; builds only ours, fetches nothing

On SM120 both sides run as they are (form `native`). On SM90 the MMA of both is replaced (forms `x1`, `x2`, `x2s`; see
substitute.py), and everything around it is what is timed. Without a GPU everything is built, and the plan printed.

    --only decode,metadata  --formats fp8  --forms x1  --heads 64  --case "1 x 16K"      some of the cases
    --tree before=PATH --tree after=PATH                several source trees of ours in the same run
    --ncu "fp8 1 x 64" --side peer                      launches one case of one side a few times, for a profiler

A time is the median of 7 replays of a CUDA graph of 12 or more launches, which take turns over inputs that lie in DRAM:
L2 is filled with something else before each replay, and no launch finds what another one has read. Schedules are made
beforehand, each side's by its own planner. Results are compared with each other and, on a sample of rows, with float64.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import statistics
import struct
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import peer
import silicon_report
from substitute import COUNTS, FORMS, NATIVE, Tree, build_peer, number_pairs

ROOT = Path(__file__).parent.parent.parent
DIM, PAGE, SMS = 128, 64, 132
REPLAYS = 7
KINDS = ("decode", "prefill", "ragged", "metadata")


# ---- cases: arithmetic ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call. `rows` are requests (decode, metadata) or query tokens; `keys` is what the longest row sees."""

    kind: str
    fp4: bool
    rows: int
    keys: int
    next_n: int = 1
    heads: int = 64
    style: str = ""  # decode: mixed lengths; prefill: varlen, rows named as one sequence's; ragged: compressed

    @property
    def tokens(self) -> int:
        return self.rows * self.next_n

    @property
    def name(self) -> str:
        words = ["" if self.kind == "metadata" else "fp4" if self.fp4 else "fp8"]
        words += ["" if self.kind == "decode" else self.kind, f"{self.rows} x {short(self.keys)}"]
        words += [
            f"n{self.next_n}" if self.next_n > 1 else "",
            f"h{self.heads}" if self.heads != 64 else "",
            self.style,
        ]
        return " ".join(word for word in words if word)

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        """int32 [rows, next_n]: the keys that each query token sees."""
        row = torch.arange(self.rows).unsqueeze(1)
        if self.style == "mixed" or self.kind == "metadata":
            rng = torch.Generator().manual_seed(self.rows)
            exponents = torch.rand((self.rows, 1), generator=rng, dtype=torch.float64)
            last = (64 * (self.keys / 64) ** exponents).long()
            last[0] = self.keys
        elif self.kind == "decode":
            last = torch.full_like(row, self.keys)
        else:
            last = self.keys - (self.rows - 1 - row) // (4 if self.kind == "prefill" else 1)
        return (last - self.next_n + 1 + torch.arange(self.next_n)).clamp(min=1).int()

    @functools.cached_property
    def pairs(self) -> int:
        return int(self.lengths.sum())

    @property
    def row_bytes(self) -> int:
        return DIM // 2 if self.fp4 else DIM

    @functools.cached_property
    def pages(self) -> torch.Tensor:
        """Pages of each row."""
        return (self.lengths[:, -1].long() + PAGE - 1) // PAGE

    @functools.cached_property
    def distinct_pages(self) -> int:
        return int(self.pages.sum()) if self.kind == "decode" else int(self.pages.max())

    @property
    def key_bytes(self) -> int:
        """Every key once, with its scale."""
        keys = int(self.lengths[:, -1].sum()) if self.kind == "decode" else self.keys
        return 0 if self.kind == "metadata" else keys * (self.row_bytes + 4)

    @property
    def footprint(self) -> int:
        return self.key_bytes + self.tokens * self.heads * (self.row_bytes + 8)

    @property
    def mmas(self) -> int:
        """Of 16 x 8 x 32 (FP8) or 64 (FP4)."""
        return 0 if self.kind == "metadata" else self.pairs * self.heads * DIM // (16 * 8 * (64 if self.fp4 else 32))

    @property
    def launches(self) -> int:
        """In a graph: many where a launch is short."""
        return 24 if self.mmas < 1 << 19 else 12 if self.mmas < 1 << 26 else 4

    @property
    def sets(self) -> int:
        """Of inputs that take turns: as many as launches, or enough to fill L2 several times."""
        return min(self.launches, max(4, -(-(192 << 20) // max(1, self.footprint))))


def short(number: int) -> str:
    return f"{number >> 10}K" if number >= 1024 and number % 1024 == 0 else str(number)


def plan() -> list[Case]:
    """All cases."""
    k = 1 << 10
    decode = [
        *((b, n, 1, 64, "") for b, n in [(1, 64), (1, k), (1, 4 * k), (1, 16 * k), (1, 64 * k), (1, 256 * k)]),
        *((1, 16 * k, n, 64, "") for n in (2, 4)),
        *((b, n, 1, 64, "") for b, n in [(2, 16 * k), (4, 16 * k), (8, 4 * k), (8, 16 * k), (16, 16 * k)]),
        *((8, 16 * k, n, 64, "") for n in (2, 3, 4, 6)),
        *((b, n, 1, 64, "") for b, n in [(64, 4 * k), (64, 16 * k), (256, 4 * k), (1024, 4 * k)]),
        *((64, 16 * k, n, 64, "") for n in (2, 4)),
        *((b, n, 1, 64, "mixed") for b, n in [(4, 64 * k), (16, 64 * k), (64, 32 * k), (256, 16 * k)]),
        *((b, n, 1, 32, "") for b, n in [(1, 64), (1, 16 * k), (8, 16 * k), (64, 16 * k), (1024, 4 * k)]),
        *((b, 16 * k, 4, 32, "") for b in (1, 64)),
        *((b, n, 1, 16, "") for b, n in [(1, 16 * k), (8, 16 * k), (64, 16 * k)]),
    ]
    prefill = [(512, 8 * k, 64, ""), (2048, 8 * k, 64, ""), (2048, 8 * k, 64, "varlen"), (4096, 16 * k, 64, "")]
    prefill += [(4096, 16 * k, 64, "varlen"), (2048, 8 * k, 32, ""), (2048, 8 * k, 32, "varlen")]
    ragged = [(r, n, h, "") for r, n in [(2048, 8 * k), (4096, 32 * k)] for h in (64, 32)]
    ragged += [(2048, 8 * k, 16, ""), (2048, 8 * k, 64, "compressed"), (2048, 8 * k, 32, "compressed")]
    cases = []
    for fp4 in (False, True):
        cases += [Case("decode", fp4, *sizes) for sizes in decode]
        cases += [Case("prefill", fp4, rows, keys, 1, heads, style) for rows, keys, heads, style in prefill]
        cases += [Case("ragged", fp4, rows, keys, 1, heads, style) for rows, keys, heads, style in ragged]
    return cases + [Case("metadata", False, rows, 64 * k) for rows in (1, 64, 1024, 4096)]


# ---- the peer's kernels, built here or elsewhere --------------------------------------------------------------------


def peer_kernels(case: Case, sms: int) -> tuple[peer.Kernel | None, peer.Kernel | None]:
    """Of a case: logits, schedule."""
    kind, varlen = "fp4" if case.fp4 else "fp8", case.style == "varlen"
    planner = None if case.kind == "ragged" else peer.metadata(case.rows, sms, varlen=varlen)
    if case.kind == "metadata":
        return None, planner
    if case.kind == "ragged":
        return peer.ragged(kind, case.heads, compressed=case.style == "compressed", num_sms=sms), None
    return peer.paged(kind, case.heads, case.next_n, varlen=varlen), planner


class Built:
    """The peer's cubins by form and instantiation: out of a folder, else built when asked for."""

    FILE = "peer.zip"

    def __init__(self, folder: Path | None = None) -> None:
        self.binaries: dict[tuple[str, str], tuple[str, bytes]] = {}
        if folder is not None:
            with zipfile.ZipFile(folder / self.FILE) as archive:
                for entry in json.loads(archive.read("index.json")):
                    self.binaries[entry["form"], entry["instance"]] = (entry["name"], archive.read(entry["file"]))

    def get(self, kernel: peer.Kernel, form: str) -> tuple[str, bytes]:
        """Symbol and cubin."""
        key = (form if form == NATIVE or "metadata" not in kernel.instance else FORMS[0], kernel.instance)
        if key not in self.binaries:
            binary = build_peer(kernel, key[0])
            self.binaries[key] = (binary.name, binary.cubin)
        return self.binaries[key]

    def build(self, cases: list[Case], forms: Iterable[str], sms: int) -> None:
        kernels = dict.fromkeys(k for case in cases for k in peer_kernels(case, sms) if k is not None)
        for form, kernel in itertools.product(forms, kernels):
            self.get(kernel, form)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / self.FILE, "w", zipfile.ZIP_LZMA) as archive:
            index = []
            for number, ((form, instance), (name, cubin)) in enumerate(self.binaries.items()):
                index.append({"form": form, "instance": instance, "name": name, "file": f"{number}.cubin"})
                archive.writestr(f"{number}.cubin", cubin)
            archive.writestr("index.json", json.dumps(index, indent=1))


# ---- the driver -----------------------------------------------------------------------------------------------------


def checked(result: tuple):
    from cuda.bindings import driver

    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver: {error.name}")
    return values[0] if values else None


class Function:
    """A kernel of a cubin, loaded on the current device."""

    def __init__(self, name: str, cubin: bytes, shared_bytes: int = 0) -> None:
        from cuda.bindings import driver

        self.driver, self.shared_bytes = driver, shared_bytes
        library = checked(driver.cuLibraryLoadData(cubin, None, None, 0, None, None, 0))
        kernel = checked(driver.cuLibraryGetKernel(library, name.encode()))
        if shared_bytes > 48 << 10:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, torch.cuda.current_device()))
        self.handle = driver.CUfunction(int(kernel))

    def bind(self, grid: tuple[int, int, int], threads: int, *arguments: bytes) -> Callable[[], None]:
        """The call that launches it on the current stream."""
        values = [ctypes.create_string_buffer(argument, len(argument)) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))

        def call(_=values) -> None:
            stream, where = torch.cuda.current_stream().cuda_stream, ctypes.addressof(pointers)
            checked(self.driver.cuLaunchKernel(self.handle, *grid, threads, 1, 1, self.shared_bytes, stream, where, 0))

        return call


def encode(described: peer.TensorMap) -> bytes:
    """The 128 bytes of a tensor map."""
    from cuda.bindings import driver as d

    types = {
        1: d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        4: d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_INT32,
    }
    rank = len(described.dims)
    strides = [-(-max(stride, 16) // 16) * 16 for stride in described.strides[1:]]
    made = checked(
        d.cuTensorMapEncodeTiled(
            types[described.element_bytes],
            rank,
            described.address,
            [d.cuuint64_t(size) for size in described.dims],
            [d.cuuint64_t(stride) for stride in strides],
            [d.cuuint32_t(size) for size in described.box],
            [d.cuuint32_t(1)] * rank,
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(
                d.CUtensorMapSwizzle,
                "CU_TENSOR_MAP_SWIZZLE_" + (f"{described.swizzle}B" if described.swizzle else "NONE"),
            ),
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(made.getPtr(), 128)


class PeerKernels:
    """Loads and launches what `Built` has."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.functions: dict[tuple[str, peer.Kernel], Function] = {}

    def bind(self, launch: peer.Launch, form: str) -> Callable[[], None]:
        key = (form, launch.kernel)
        if key not in self.functions:
            self.functions[key] = Function(*self.built.get(launch.kernel, form), launch.kernel.shared_bytes)
        arguments = (encode(a) if isinstance(a, peer.TensorMap) else struct.pack(*a) for a in launch.arguments)
        return self.functions[key].bind(launch.grid, launch.kernel.threads, *arguments)


# ---- inputs ---------------------------------------------------------------------------------------------------------


def random_bytes(rows: int, width: int, device: torch.device) -> torch.Tensor:
    """uint8 [rows, width]: as pairs finite fp16 from 1/8 to 2, as e4m3 no NaN, as e2m1 anything."""
    words = torch.randint(-(2**31), 2**31 - 1, (rows, width // 4), dtype=torch.int32, device=device)
    return words.bitwise_and_(0x8F778F77 - 2**32).bitwise_or_(0x30003000).view(torch.uint8)


def random_scales(count: int, fp4: bool, device: torch.device) -> torch.Tensor:
    """fp32, or words of UE8M0."""
    if not fp4:
        return torch.rand(count, device=device) + 0.5
    return torch.randint(122, 132, (count, 4), dtype=torch.uint8, device=device).view(torch.int32)[:, 0]


@dataclass
class Inputs:
    """Arguments of one call, and where its logits go."""

    case: Case
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    weights: torch.Tensor
    lengths: torch.Tensor
    logits: torch.Tensor  # as large as the peer wants it
    kv_cache: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    kv: tuple[torch.Tensor, torch.Tensor] | None = None
    starts: torch.Tensor | None = None
    made: dict = field(default_factory=dict)

    @property
    def out(self) -> torch.Tensor:
        return self.logits[: self.case.tokens, : self.case.keys]


class Pool:
    """Pages of random keys: every paged case takes some of them, each of its sets others."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.fp4, self.cache = device, None, None

    def pages(self, fp4: bool, count: int) -> torch.Tensor:
        if self.fp4 is not fp4 or len(self.cache) < count:
            self.cache = None
            row = DIM // 2 if fp4 else DIM
            flat = torch.empty((count, PAGE * (row + 4)), dtype=torch.uint8, device=self.device)
            for piece in flat.split(1 << 15):
                piece[:, : PAGE * row] = random_bytes(len(piece), PAGE * row, self.device)
                scales = random_scales(len(piece) * PAGE, fp4, self.device).contiguous()
                piece[:, PAGE * row :] = scales.view(torch.uint8).view(len(piece), -1)
            self.fp4, self.cache = fp4, flat.view(count, PAGE, 1, row + 4)
        return self.cache

    def inputs(self, case: Case) -> list[Inputs]:
        """`case.sets` of them, and one more to begin with."""
        made, device, count = [], self.device, case.sets + 1
        lengths = case.lengths.to(device)
        if case.kind == "metadata":
            nothing = torch.empty(0, device=device)
            return [Inputs(case, nothing, nothing, lengths.clone(), nothing) for _ in range(count)]
        if case.kind != "ragged":
            cache = self.pages(case.fp4, case.distinct_pages * count)
            order = torch.randperm(len(cache), device=device).int()
            columns = int(case.pages.max())
            if case.kind == "decode":
                place = torch.arange(columns).expand(case.rows, -1) + (case.pages.cumsum(0) - case.pages).unsqueeze(1)
                place = place.clamp(max=case.distinct_pages - 1).to(device)
        for index in range(count):
            shape = (case.rows,) if case.kind == "ragged" else (case.rows, case.next_n)
            values = random_bytes(case.tokens * case.heads, case.row_bytes, device).view(*shape, case.heads, -1)
            if case.fp4:
                scales = random_scales(case.tokens * case.heads, True, device).view(*shape, case.heads).contiguous()
                q = (values.view(torch.int8), scales)
            else:
                q = values.view(torch.float8_e4m3fn)
            weights = torch.randn((case.tokens, case.heads), device=device)
            one = Inputs(case, q, weights, lengths.clone(), torch.empty(0))
            if case.kind == "ragged":
                compressed = case.keys if case.style == "compressed" else 0
                rows = -(-case.rows // (128 // case.heads)) * (128 // case.heads)
                width = -(-case.keys // 256) * 256 if compressed else -(-(case.keys + 256) // 64) * 64
                one.logits = torch.empty((rows, width), device=device)
                keys = random_bytes(case.keys, case.row_bytes, device)
                keys = keys.view(torch.int8 if case.fp4 else torch.float8_e4m3fn)
                one.kv = (keys, random_scales(case.keys, case.fp4, device).contiguous())
                one.lengths = one.lengths.flatten()
                one.starts = torch.zeros_like(one.lengths)
            else:
                one.logits = torch.empty((case.tokens, -(-case.keys // 256) * 256), device=device)
                mine = order[index * case.distinct_pages : (index + 1) * case.distinct_pages]
                one.kv_cache = cache
                one.block_table = mine[place] if case.kind == "decode" else mine.expand(case.rows, -1).contiguous()
                if case.style == "varlen":
                    one.indices = torch.zeros(case.rows, dtype=torch.int32, device=device)
            made.append(one)
        return made


# ---- the two sides: the call for a set of inputs --------------------------------------------------------------------


def our_call(tree: Tree, it: Inputs, sms: int) -> Callable[[], None]:
    api, case = tree.sm120, it.case
    if case.kind == "metadata":
        return functools.partial(api.get_paged_mqa_logits_metadata, it.lengths, PAGE, sms)
    if case.kind == "ragged":
        return functools.partial(
            api.fp8_fp4_mqa_logits, it.q, it.kv, it.weights, it.starts, it.lengths,
            max_seqlen_k=case.keys if case.style == "compressed" else 0, out=it.out,
        )  # fmt: skip
    schedule = api.get_paged_mqa_logits_metadata(it.lengths, PAGE, sms)
    return functools.partial(
        api.fp8_fp4_paged_mqa_logits, it.q, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, case.keys,
        indices=it.indices, out=it.out,
    )  # fmt: skip


def peer_call(kernels: PeerKernels, form: str, it: Inputs, sms: int) -> Callable[[], None]:
    case = it.case
    if case.kind == "ragged":
        compressed = case.keys if case.style == "compressed" else 0
        launch = peer.launch_ragged(it.q, it.kv, it.weights, it.starts, it.lengths, it.logits, compressed, num_sms=sms)
        return kernels.bind(launch, form)
    if "schedule" not in it.made:
        it.made["schedule"] = torch.full((sms + 1, 2), -1, dtype=torch.int32, device=it.lengths.device)
    schedule = it.made["schedule"]
    planner = kernels.bind(peer.launch_metadata(it.lengths, schedule, it.indices), form)
    if case.kind == "metadata":
        return planner
    planner()
    launch = peer.launch_paged(
        it.q, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, it.logits, it.indices
    )
    return kernels.bind(launch, form)


# ---- are they right -------------------------------------------------------------------------------------------------


def keys_of(it: Inputs, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, uint8 [keys, row bytes], and scales, uint8 [keys, 4], that a token sees."""
    case, count = it.case, int(it.lengths.flatten()[token])
    if case.kind == "ragged":
        return it.kv[0][:count].view(torch.uint8), it.kv[1][:count].view(torch.uint8).view(count, 4)
    pages = it.block_table[token // case.next_n, : -(-count // PAGE)].long()
    found = it.kv_cache.view(len(it.kv_cache), -1)[pages]
    split = PAGE * case.row_bytes
    return found[:, :split].reshape(-1, case.row_bytes)[:count], found[:, split:].reshape(-1, 4)[:count]


def expected(it: Inputs, form: str, token: int, dequantize: Callable) -> torch.Tensor:
    """Float64 logits of one token, by the definition of the form's MMA."""
    fp4 = it.case.fp4
    values, scales = it.q if fp4 else (it.q, None)
    query = values.flatten(0, -3)[token].contiguous()
    keys, key_scales = keys_of(it, token)
    if form == NATIVE:
        query = dequantize(query, scales.flatten(0, -2)[token] if fp4 else None)
        words = key_scales.contiguous().view(torch.int32 if fp4 else torch.float32)[:, 0]
        keys = dequantize(keys.contiguous().view(torch.int8 if fp4 else torch.float8_e4m3fn), words)
    else:
        query, keys = number_pairs(query), number_pairs(keys.contiguous())
        if not fp4:
            keys = keys * key_scales.contiguous().view(torch.float32).double()  # [keys, 1]
    return torch.relu(keys @ query.T) @ it.weights[token].double() * COUNTS[form]


def error_against_float64(it: Inputs, form: str, logits: torch.Tensor, dequantize: Callable) -> float:
    """Relative norm over the first, the last and a row between; infinite if not finite."""
    apart = length = 0.0
    for token in sorted({0, it.case.tokens // 2, it.case.tokens - 1}):
        want = expected(it, form, token, dequantize)
        apart += float((logits[token, : len(want)].double() - want).square().sum())
        length += float(want.square().sum())
    return math.sqrt(apart / length) if math.isfinite(apart) else math.inf


def distance(it: Inputs, a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative norm between two results, over every logit that is seen."""
    lengths, apart, length = it.lengths.flatten(), 0.0, 0.0
    step = max(1, (1 << 25) // it.case.keys)
    column = torch.arange(it.case.keys, device=a.device)
    for first in range(0, it.case.tokens, step):
        rows = slice(first, first + step)
        seen = column < lengths[rows].unsqueeze(1)
        x, y = a[rows].where(seen, 0), b[rows].where(seen, 0)
        apart += (
            float((x - y).double().square().sum()) if len(x) * len(column) < 1 << 20 else float((x - y).square().sum())
        )
        length += float(y.square().sum())
    return math.sqrt(apart / length) if math.isfinite(apart) else math.inf


# ---- time -----------------------------------------------------------------------------------------------------------


class Clock:
    """Times graphs of launches."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.zeros(3 * l2 // 4, dtype=torch.int32, device=device)
        self.side = torch.cuda.Stream(device)

    def capture(self, calls: list[Callable], launches: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.side):
            graph.capture_begin(capture_error_mode="thread_local")
            for call in itertools.islice(itertools.cycle(calls), launches):
                call()
            graph.capture_end()
        return graph

    def time(self, calls: list[Callable], launches: int) -> float:
        """Microseconds of one launch. The last call goes ahead of each replay, so that the kernel's code is there."""
        turns = calls[:-1] or calls
        for call in calls:
            call()
        torch.cuda.synchronize()
        first, graph = self.capture(calls[-1:], 1), self.capture(turns, launches)
        marks = []
        torch.cuda.synchronize()
        with torch.cuda.stream(self.side):
            graph.replay()
            for _ in range(REPLAYS):
                self.flush.sum()
                first.replay()
                marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                marks[-1][0].record()
                graph.replay()
                marks[-1][1].record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in marks) * 1e3 / launches


EMPTY = 'extern "C" __global__ void empty() {}'
MMAS = 8  # in a turn of the loop, each with an operand of its own: else ptxas takes the second of x2s out of the loop
PROBE = """
#include "ptx.cuh"
extern "C" __global__ __launch_bounds__(512, 1) void probe(long long* clocks, float* sink, int turns) {
    uint32 a[8][4], b[2];
    for (int i = 0; i < 32; ++i) a[i / 4][i %% 4] = (threadIdx.x * 40503u + i * 2654435761u) & 0x3bff3bff;
    for (int i = 0; i < 2; ++i) b[i] = (threadIdx.x * 2246822519u + i) & 0x3bff3bff;
    float sums[%(chains)d][4] = {};
    __syncthreads();
    const long long begin = clock64();
    #pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const uint32 signs = uint32(turn) * 2654435761u & 0x80008000;
        const uint32 b0 = b[0] ^ signs, b1 = b[1] ^ signs;
        #pragma unroll
        for (int i = 0; i < 8; ++i) ptx::mma_e4m3_block_scaled(sums[i %% %(chains)d], a[i], b0, b1, 0x7f7f7f7f);
    }
    __syncthreads();
    const long long end = clock64();
    float all = 0;
    for (int c = 0; c < %(chains)d; ++c) all += sums[c][0] + sums[c][1] + sums[c][2] + sums[c][3];
    sink[blockIdx.x * blockDim.x + threadIdx.x] = all;
    if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
}
"""


def probe(tree: Tree, form: str, chains: int) -> bytes:
    arch = "sm_120f" if form == NATIVE else tree.arch
    options = [f"--gpu-architecture={arch}", "--std=c++17"]
    return peer.build(PROBE % {"chains": chains}, "probe", options, tree.headers(form)).cubin


def mma_figures(tree: Tree, form: str, sms: int, device: torch.device) -> dict[str, float]:
    """Of one MMA as a form has it: clocks of a sub-partition, clocks from one to the next that depends on it, and how
    many a second the whole card does."""
    clocks = torch.zeros(sms, dtype=torch.int64, device=device)
    sink = torch.zeros(sms * 512, device=device)
    turns, found = 4096, {}
    arguments = struct.pack("Q", clocks.data_ptr()), struct.pack("Q", sink.data_ptr()), struct.pack("i", turns)
    for name, chains, threads in (("interval", MMAS, 512), ("latency", 1, 32)):
        call = Function("probe", probe(tree, form, chains)).bind((sms, 1, 1), threads, *arguments)
        call()
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        call()
        marks[1].record()
        torch.cuda.synchronize()
        per_partition = turns * MMAS * max(1, threads // 128)
        found[name] = float(clocks.double().median()) / per_partition
        if name == "interval":
            found["rate"] = sms * turns * MMAS * threads / 32 / (marks[0].elapsed_time(marks[1]) * 1e-3)
    return found


def copy_times(clock: Clock, device: torch.device) -> dict[int, float]:
    """Microseconds that a pass takes which reads and writes so many bytes in all, half of them each."""
    times = {}
    for size in (1 << n for n in range(16, 31, 2)):
        sets = min(24, max(4, -(-(192 << 20) // size))) + 1
        buffers = torch.zeros((sets, 2, size // 8), dtype=torch.int32, device=device)
        times[size] = clock.time(
            [functools.partial(torch.neg, a, out=b) for a, b in buffers], 24 if size < 1 << 26 else 12
        )
    return times


# ---- the run --------------------------------------------------------------------------------------------------------


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}a"


def run(cases: list[Case], forms: list[str], trees: list[Tree], built: Built, limit: float) -> dict:
    """Times everything; returns what silicon.json holds."""
    began, device = time.perf_counter(), torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    sms = properties.multi_processor_count
    clock, pool, kernels = Clock(device), Pool(device), PeerKernels(built)
    dequantize = trees[0].reference.dequantize
    empty = Function("empty", peer.build(EMPTY, "empty", [f"--gpu-architecture={architecture()}"], {}).cubin)
    empty_us = clock.time([empty.bind((sms, 1, 1), 384)], 24)
    report = {
        "date": str(date.today()),
        "device": properties.name,
        "sms": sms,
        "command": "python " + " ".join(["tools/evidence/silicon.py", *sys.argv[1:]]),
        "trees": [tree.label for tree in trees],
        "empty_us": empty_us,
        "copy_us": copy_times(clock, device),
        "mma": {form: mma_figures(trees[0], form, sms, device) for form in forms},
        "cases": [],
        "missed": [],
    }
    # Pages for the largest first, so that the pool is made once for each format.
    for fp4 in (False, True):
        wanted = [c.distinct_pages * (c.sets + 1) for c in cases if c.fp4 is fp4 and c.kind in ("decode", "prefill")]
        for number, case in enumerate(c for c in cases if c.fp4 is fp4):
            if time.perf_counter() - began > limit:
                report["missed"].append(case.name)
                continue
            if number == 0 and wanted:
                pool.pages(fp4, max(wanted))
            try:
                report["cases"].append(measure(case, forms, trees, kernels, clock, pool, sms, dequantize))
            except Exception as problem:  # one case that fails leaves the others
                traceback.print_exc()
                report["missed"].append(f"{case.name} ({type(problem).__name__})")
                if len(report["missed"]) > 5:
                    raise
    report["seconds"] = time.perf_counter() - began
    return report


def measure(case, forms, trees, kernels, clock, pool, sms, dequantize) -> dict:
    """Times of one case by form and side, and how far off the results were."""
    inputs = pool.inputs(case)
    measured = asdict(case) | {"name": case.name, "key_bytes": case.key_bytes, "mmas": case.mmas, "forms": {}}
    for form in forms[:1] if case.kind == "metadata" else forms:
        entry = {"ours": {}, "peer": None, "off": {}, "apart": {}}
        their_logits, one = None, inputs[0]
        try:
            calls = [peer_call(kernels, form, it, sms) for it in inputs]
        except RuntimeError as problem:
            entry["refused"] = str(problem).splitlines()[0]
        else:
            one.logits.fill_(math.nan)
            calls[0]()
            if case.kind != "metadata":
                entry["off"]["peer"] = error_against_float64(one, form, one.out, dequantize)
                their_logits = one.out.clone()
            entry["peer"] = clock.time(calls, case.launches)
        for tree in trees:
            tree.use(form)
            calls = [our_call(tree, it, sms) for it in inputs]
            one.logits.fill_(math.nan)
            calls[0]()
            if case.kind != "metadata":
                entry["off"][tree.label] = error_against_float64(one, form, one.out, dequantize)
                if their_logits is not None:
                    entry["apart"][tree.label] = distance(one, one.out, their_logits)
            entry["ours"][tree.label] = clock.time(calls, case.launches)
        measured["forms"][form] = entry
    return measured


# ---- the command line -----------------------------------------------------------------------------------------------


def selected(arguments: argparse.Namespace) -> list[Case]:
    """Cases that the arguments leave, metadata whatever the format."""
    cases = [case for case in plan() if case.kind in arguments.only]
    cases = [case for case in cases if case.kind == "metadata" or ("fp4" if case.fp4 else "fp8") in arguments.formats]
    cases = [case for case in cases if case.kind == "metadata" or case.heads in arguments.heads]
    if arguments.case:
        cases = [case for case in cases if any(wanted in case.name for wanted in arguments.case)]
    return cases


def several(kind: Callable = str, among: tuple = ()) -> Callable:
    """An argument parser's type: a list with commas."""

    def parse(text: str) -> list:
        values = [kind(word) for word in text.split(",")]
        if among and not set(values) <= set(among):
            raise argparse.ArgumentTypeError(f"{text}: expected some of {', '.join(map(str, among))}")
        return values

    return parse


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", nargs="?", choices=("all", "build", "run", "show"), default="all")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="run: where `build --into` has put the peer's kernels; show: a silicon.json",
    )
    parser.add_argument("--into", type=Path, help="build: the folder")
    parser.add_argument("--only", type=several(among=KINDS), default=list(KINDS))
    parser.add_argument("--formats", type=several(among=("fp8", "fp4")), default=["fp8", "fp4"])
    parser.add_argument("--forms", type=several(among=(*FORMS, NATIVE)), help="default: what the card allows")
    parser.add_argument("--heads", type=several(int), default=[64, 32, 16])
    parser.add_argument("--case", action="append", help="only cases whose names contain this; may be repeated")
    parser.add_argument("--tree", action="append", metavar="LABEL=PATH", help="a source tree of ours; may be repeated")
    parser.add_argument("--sms", type=int, default=SMS, help="build: SMs of the card that will run it")
    parser.add_argument("--ncu", metavar="CASE", help="launch one case a few times and stop")
    parser.add_argument("--side", choices=("ours", "peer"), default="ours", help="with --ncu")
    parser.add_argument("--limit", type=float, default=90, help="seconds after which no more cases are begun")
    parser.add_argument("--compact", action="store_true", help="one line a case")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results, or a file *.json; default: docs/performance, if nothing is left out",
    )
    arguments = parser.parse_args(words)
    if arguments.mode in ("run", "show") and arguments.folder is None:
        parser.error(f"{arguments.mode}: which one?")
    return arguments


def profile(case: Case, side: str, form: str, tree: Tree, built: Built) -> None:
    """A few launches of one case, each on inputs of its own."""
    device = torch.device("cuda", torch.cuda.current_device())
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    kernels = PeerKernels(built)
    tree.use(form)
    for it in Pool(device).inputs(case)[:4]:
        (our_call(tree, it, sms) if side == "ours" else peer_call(kernels, form, it, sms))()
    torch.cuda.synchronize()


def main() -> None:
    arguments = parse_arguments()
    if arguments.mode == "show":
        return silicon_report.show(json.loads(arguments.folder.read_text()), arguments.compact)
    on_card = torch.cuda.is_available() and arguments.mode != "build"
    arch = architecture() if on_card else "sm_90a"
    forms = arguments.forms or ([NATIVE] if arch.startswith("sm_12") else list(FORMS))
    cases = selected(arguments)
    trees = [Tree(*pair.split("=", 1), arch=arch) for pair in arguments.tree or [f"ours={ROOT}"]]
    built = Built(arguments.folder)
    sms = torch.cuda.get_device_properties(0).multi_processor_count if on_card else arguments.sms
    if arguments.ncu:
        case = next(case for case in plan() if case.name == arguments.ncu)
        return profile(case, arguments.side, forms[0], trees[-1], built)

    began = time.perf_counter()
    sizes = {(case.heads, case.fp4) for case in cases}
    for tree in trees:
        count = tree.prepare(sizes, forms)
        print(
            f"{tree.label}: {count} kernels of ours built for {', '.join(forms)} ({time.perf_counter() - began:.0f} s)"
        )
    if arguments.mode != "run":
        built.build(cases, forms, sms)
        print(f"{len(built.binaries)} kernels of the peer built ({time.perf_counter() - began:.0f} s)")
    if arguments.into:
        built.write(arguments.into)
    if not on_card:
        if arguments.mode != "build":
            print(f"No GPU here. On one would be timed, in the forms {', '.join(forms)}:")
            print("\n".join(f"  {case.name}" for case in cases))
        return

    report = run(cases, forms, trees, built, arguments.limit)
    silicon_report.show(report, arguments.compact)
    if arguments.out:
        silicon_report.write(report, arguments.out)
    print(f"{report['seconds']:.0f} s on the card")


if __name__ == "__main__":
    main()
