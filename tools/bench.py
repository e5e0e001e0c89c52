"""Times the Lightning Indexer on a GPU, beside whatever else computes it there, against what the card can do.

    python tools/bench.py             the whole grid, at most 10 minutes, into bench-<device>-<date>/
    python tools/bench.py --quick     a few sizes, at most 90 seconds
    python tools/bench.py --dry-run   what would be timed, and how big it is; no GPU needed

Any card from SM89 up, from the wheel or the source tree; rich and matplotlib are used where they are installed. The
folder then holds bench.json (everything), bench.txt (the table) and roofline.png.

decode    requests of equal length, each with pages of its own; next_n query tokens each
prefill   4,096 query tokens of one sequence as SGLang makes them: paged rows, their lengths growing by 1 every 4 rows
ragged    4,096 query tokens over one run of keys, their lengths growing by 1 every row
metadata  the schedule of rows of random lengths

Each result is first compared with float64 on a sample of its rows; one that is wrong is reported and not timed. Times
are between CUDA events, the launches queued up beforehand. Cold: L2 is filled by reading something else before each
call, and calls take turns with several sets of inputs. Warm: the same call again and again. Ours runs on SM90 and SM100
too. The roof is the card's own: the longer of the time that the fewest possible bytes take at the bandwidth of a copy,
and the time that the multiplications take at the rate of a loop of nothing but MMAs.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("deep_gemm") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "sm120"))

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import reference, upstream
from deep_gemm.sm120.jit import Kernel, architecture_of, launch

SCHEMA = 1
DIM, PAGE, PREFILL = 128, 64, 4096
BATCHES, KEYS, NEXT_N = (1, 8, 64, 256, 1024), (1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10), (1, 2, 4)
PREFILL_KEYS, RAGGED_KEYS = (1 << 10, 8 << 10, 32 << 10, 128 << 10), (4 << 10, 8 << 10, 32 << 10, 128 << 10)
METADATA_ROWS = (1, 64, 1024, 4096, 12000)
TOLERANCE = 1e-3  # relative norm: the tensor cores of some cards keep 14 bits of an FP8 sum
SETS = 3  # of inputs that take turns


# ---- what is timed: arithmetic --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call. `rows` are requests (decode) or query tokens; `keys` is what the longest row sees."""

    kind: str
    fp4: bool
    rows: int
    keys: int
    next_n: int = 1
    heads: int = 64

    @property
    def tokens(self) -> int:
        return self.rows * self.next_n

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [rows, next_n]: the keys that each query token sees."""
        row = torch.arange(self.rows, dtype=torch.int32).unsqueeze(1)
        if self.kind == "decode":
            last = torch.full_like(row, self.keys)
        else:
            last = self.keys - (self.rows - 1 - row) // (4 if self.kind == "prefill" else 1)
        return (last - self.next_n + 1 + torch.arange(self.next_n, dtype=torch.int32)).clamp(min=0)

    @functools.cached_property
    def pairs(self) -> int:
        """Query tokens times the keys they see: so many logits."""
        return int(self.lengths.sum())

    @property
    def distinct_keys(self) -> int:
        return self.keys * (self.rows if self.kind == "decode" else 1)

    @property
    def row_bytes(self) -> int:
        return DIM // 2 if self.fp4 else DIM

    @property
    def key_bytes(self) -> int:
        """Every key once, with its scale."""
        return self.distinct_keys * (self.row_bytes + 4)

    @property
    def bytes(self) -> int:
        """The fewest that can move: each input read once, each logit written once."""
        query = self.tokens * self.heads * (self.row_bytes + 4 * self.fp4)
        weights, windows = 4 * self.tokens * self.heads, 4 * self.tokens * (2 if self.kind == "ragged" else 1)
        pages = 0 if self.kind == "ragged" else 4 * self.rows * -(-self.keys // PAGE)
        return self.key_bytes + query + weights + windows + pages + 4 * self.pairs

    @property
    def flops(self) -> int:
        return 2 * self.heads * DIM * self.pairs

    @property
    def footprint(self) -> int:
        """Device memory for one set of inputs and its logits."""
        return self.bytes - 4 * self.pairs + 4 * self.tokens * self.keys

    @property
    def name(self) -> str:
        size = f"{self.rows}" if self.next_n == 1 else f"{self.rows}x{self.next_n}"
        return f"{'fp4' if self.fp4 else 'fp8'} {self.kind} {size} x {short(self.keys)}"


def short(number: int) -> str:
    return f"{number >> 10}K" if number >= 1024 and number % 1024 == 0 else str(number)


def plan(quick: bool = False, heads: int = 64) -> list[Case]:
    """The cases, those of --quick first: if time runs out, the others are missed."""
    first, rest = [], []
    for fp4 in (False, True):
        sizes = [("decode", b, k, n) for n, b, k in itertools.product(NEXT_N, BATCHES, KEYS)]
        sizes += [("prefill", PREFILL, k, 1) for k in PREFILL_KEYS] + [("ragged", PREFILL, k, 1) for k in RAGGED_KEYS]
        important = {("decode", 1, 16 << 10, 1), ("decode", 64, 16 << 10, 1), ("decode", 64, 16 << 10, 4)}
        important |= {("decode", 256, 4 << 10, 1), ("prefill", PREFILL, 8 << 10, 1), ("ragged", PREFILL, 8 << 10, 1)}
        for size in sizes:
            (first if size in important else rest).append(Case(size[0], fp4, *size[1:], heads))
    return first if quick else first + sorted(rest, key=lambda case: (case.next_n, case.flops))


def figures(case: Case, microseconds: float, ceilings: dict) -> dict[str, float]:
    """What a time means. The roof: no version of this call runs faster than `floor_us` on this card."""
    seconds = microseconds * 1e-6
    peak = peak_for(case.fp4, ceilings["mma_tflops"])
    floor = max(case.bytes / (ceilings["copy_tbps"] * 1e12), case.flops / (peak * 1e12))
    return {
        "tbps": case.bytes / seconds * 1e-12,
        "tflops": case.flops / seconds * 1e-12,
        "of_copy": case.bytes / seconds * 1e-12 / ceilings["copy_tbps"],
        "of_mma": case.flops / seconds * 1e-12 / peak,
        "floor_us": floor * 1e6,
        "of_roof": floor / seconds,
    }


def peak_for(fp4: bool, mma: dict[str, float]) -> float:
    """The best MMA there is for a format, of those measured; cards without an FP4 unit widen FP4 to FP8."""
    return mma["fp4"] if fp4 and "fp4" in mma else max(rate for name, rate in mma.items() if name != "fp4")


# ---- inputs ---------------------------------------------------------------------------------------------------------


def random_rows(count: int, fp4: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [count, row bytes] and scales [count] of as many keys or heads. Random: zeros would run cooler."""
    if fp4:
        values = torch.randint(-128, 128, (count, DIM // 2), dtype=torch.int8, device=device)
        return values, torch.randint(122, 132, (count, 4), dtype=torch.uint8, device=device).view(torch.int32)[:, 0]
    values = torch.empty((count, DIM), dtype=torch.float8_e4m3fn, device=device)
    for piece in values.split(1 << 22):
        piece.copy_(torch.randn(piece.shape, device=device))
    return values, torch.rand(count, device=device) + 0.5


@dataclass
class Inputs:
    """Arguments of one call, and where its logits go."""

    case: Case
    q: tuple[torch.Tensor, torch.Tensor | None]
    weights: torch.Tensor
    lengths: torch.Tensor
    out: torch.Tensor
    kv_cache: torch.Tensor | None = None  # decode, prefill
    block_table: torch.Tensor | None = None
    kv: tuple[torch.Tensor, torch.Tensor] | None = None  # ragged
    starts: torch.Tensor | None = None
    ends: torch.Tensor | None = None


class Cache:
    """Pages of random keys, made once for each format: every decode and prefill case takes some of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pages: dict[bool, torch.Tensor] = {}

    def reserve(self, fp4: bool, pages: int) -> None:
        self.pages.clear()  # one format at a time
        row = DIM // 2 if fp4 else DIM
        cache = torch.empty((pages, PAGE * (row + 4)), dtype=torch.uint8, device=self.device)
        for piece in cache.split(1 << 16):
            values, scales = random_rows(len(piece) * PAGE, fp4, self.device)
            piece[:, : PAGE * row] = values.view(torch.uint8).view(len(piece), -1)
            piece[:, PAGE * row :] = scales.contiguous().view(torch.uint8).view(len(piece), -1)
        self.pages[fp4] = cache.view(pages, PAGE, 1, row + 4)

    def inputs(self, case: Case, sets: int) -> list[Inputs]:
        """Sets with different queries, pages and outputs; of pages as different as there are enough of."""
        made = []
        if case.kind != "ragged":
            if case.fp4 not in self.pages:
                self.reserve(case.fp4, case.distinct_keys // PAGE * sets)
            cache = self.pages[case.fp4]
            each = case.distinct_keys // PAGE
            order = torch.randperm(len(cache), device=self.device).to(torch.int32)
        for index in range(sets):
            query, scales = random_rows(case.tokens * case.heads, case.fp4, self.device)
            shape = (case.tokens,) if case.kind == "ragged" else (case.rows, case.next_n)
            made.append(
                Inputs(
                    case,
                    (query.view(*shape, case.heads, -1), scales.reshape(*shape, case.heads) if case.fp4 else None),
                    torch.randn((case.tokens, case.heads), device=self.device),
                    case.lengths.to(self.device),
                    torch.empty((case.tokens, -(-case.keys // 256) * 256), device=self.device)[:, : case.keys],
                )
            )
            if case.kind == "ragged":
                made[-1].kv = tuple(part.contiguous() for part in random_rows(case.keys, case.fp4, self.device))
                made[-1].starts = torch.zeros(case.tokens, dtype=torch.int32, device=self.device)
                made[-1].ends = made[-1].lengths.flatten()
            else:
                mine = order.roll(-index * each)[:each]
                table = mine.view(case.rows, -1) if case.kind == "decode" else mine.expand(case.rows, -1).contiguous()
                made[-1].kv_cache, made[-1].block_table = cache, table
        return made


# ---- is it right ----------------------------------------------------------------------------------------------------


def relative_error(inputs: Inputs, logits: torch.Tensor, samples: int = 4) -> float:
    """Distance from float64 in relative norm, over the first, the last and some other rows; infinite if not finite."""
    case = inputs.case
    tokens = {0, case.tokens - 1, *torch.randint(case.tokens, (max(0, samples - 2),)).tolist()}
    apart = length = 0.0
    for token in sorted(tokens):
        row, count = token // case.next_n, int(inputs.lengths.flatten()[token])
        values, scales = inputs.q
        flat = values.flatten(0, -3)[token], None if scales is None else scales.flatten(0, -2)[token]
        if inputs.kv is None:
            pages = inputs.block_table[row, : -(-count // PAGE)]
            found = inputs.kv_cache.view(len(inputs.kv_cache), -1)[pages.long()]
            split = PAGE * case.row_bytes
            keys = found[:, :split].reshape(-1, case.row_bytes)[:count]
            key_scales = found[:, split:].reshape(-1, 4)[:count]
        else:
            keys, key_scales = (part[:count] for part in inputs.kv)
        if case.fp4:
            keys = reference.dequantize(keys.view(torch.int8), key_scales.view(torch.int32).reshape(-1))
        else:
            keys = reference.dequantize(keys.view(torch.float8_e4m3fn), key_scales.view(torch.float32).reshape(-1))
        query = reference.dequantize(*flat)
        want = reference.logits_of(query.unsqueeze(0), keys, inputs.weights[token : token + 1])[0]
        got = logits[token, :count].double()
        apart += float((got - want).square().sum())
        length += float(want.square().sum())
    error = math.sqrt(apart / length) if length and math.isfinite(apart) else math.inf
    return error if length else 0.0


def poison(inputs: Inputs) -> None:
    """NaN where the logits will be: into our output, and into the memory that a peer's would be allocated from."""
    inputs.out.fill_(math.nan)
    torch.full((inputs.case.tokens, -(-inputs.case.keys // 256) * 256), math.nan, device=inputs.out.device)


# ---- who computes it: each takes Inputs and returns the call to be timed --------------------------------------------


class Unsupported(Exception):
    """This one does not do this case."""


def only(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def ours(inputs: Inputs) -> Callable[[], torch.Tensor]:
    it = inputs
    if it.kv is not None:
        arguments = (it.q, it.kv, it.weights, it.starts, it.ends)
        return functools.partial(sm120.fp8_fp4_mqa_logits, *arguments, out=it.out)
    slots = sm120.settings.sms_of(it.lengths.device)
    schedule = sm120.get_paged_mqa_logits_metadata(it.lengths, PAGE, slots)
    arguments = (it.q, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, it.case.keys)
    return functools.partial(sm120.fp8_fp4_paged_mqa_logits, *arguments, out=it.out)


def deep_gemm_package(package: Any, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """DeepGEMM's own functions, whichever generation."""
    it, fp8 = inputs, not inputs.case.fp4
    wanted = "mqa_logits" if it.kv is not None else "paged_mqa_logits"
    old, new = getattr(package, f"fp8_{wanted}", None), getattr(package, f"fp8_fp4_{wanted}", None)
    function, query = (old, it.q[0]) if fp8 and old else (new, it.q)
    only(function is not None, "not in this package")
    keywords = {}
    try:
        if "clean_logits" in inspect.signature(function).parameters:
            keywords["clean_logits"] = False
    except ValueError:  # a compiled function that does not say
        pass
    if it.kv is not None:
        return functools.partial(function, query, it.kv, it.weights, it.starts, it.ends, **keywords)
    schedule = package.get_paged_mqa_logits_metadata(it.lengths, PAGE, package.get_num_sms())
    arguments = (query, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, it.case.keys)
    return functools.partial(function, *arguments, **keywords)


def flashinfer(module: Any, inputs: Inputs) -> Callable[[], torch.Tensor]:
    it = inputs
    only(it.kv is None and not it.case.fp4, "FP8 paged only")
    slots = torch.cuda.get_device_properties(it.lengths.device).multi_processor_count
    schedule = module.get_paged_mqa_logits_metadata(it.lengths, PAGE, slots)
    arguments = (it.q[0], it.kv_cache, it.weights, it.lengths, it.block_table, schedule, it.case.keys)
    return functools.partial(module.fp8_paged_mqa_logits, *arguments)


def sglang(function: Callable, inputs: Inputs) -> Callable[[], torch.Tensor]:
    it = inputs
    only(it.kv is None and not it.case.fp4 and it.case.next_n == 1, "FP8 paged, next_n 1 only")
    arguments = (it.q[0], it.kv_cache, it.weights, it.lengths[:, 0].contiguous(), it.block_table, None, it.case.keys)
    return functools.partial(function, *arguments, clean_logits=False)


def plain_torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Operators of torch alone: dequantise to fp32, multiply in TF32 (exact for these numbers), relu, weigh, sum."""
    it, case = inputs, inputs.case
    rows = 1 if it.kv is not None else case.rows
    needed = 4 * (rows * case.keys * 2 * DIM + 2 * case.tokens * case.heads * case.keys)
    only(needed < 8 << 30, "more than 8 GiB of temporaries")

    def run() -> torch.Tensor:
        values, scales = (part.flatten(0, -2) if part.dim() > 1 else part for part in keys_of())
        keys = to_float(values, scales).view(rows, -1, DIM)[:, : case.keys]
        scale_of_query = None if it.q[1] is None else it.q[1]
        query = to_float(it.q[0], scale_of_query).view(rows, -1, DIM)
        scores = torch.baddbmm(query.new_zeros(1), query, keys.transpose(1, 2), beta=0).relu_()
        scores = scores.view(case.tokens, case.heads, -1)
        return torch.bmm(it.weights.unsqueeze(1), scores).squeeze(1)

    def keys_of() -> tuple[torch.Tensor, torch.Tensor]:
        if it.kv is not None:
            return it.kv
        split = PAGE * case.row_bytes
        found = it.kv_cache.view(len(it.kv_cache), -1)[it.block_table.long()].flatten(0, 1)
        values, scales = found[:, :split].reshape(-1, case.row_bytes), found[:, split:].reshape(-1, 4)
        if case.fp4:
            return values.view(torch.int8), scales.view(torch.int32)[:, 0]
        return values.view(torch.float8_e4m3fn), scales.view(torch.float32)[:, 0]

    def to_float(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        if not case.fp4:
            return values.float() if scales is None else values.float() * scales.unsqueeze(-1)
        code = values.view(torch.uint8).int()
        numbers = e2m1[torch.stack([code & 15, code >> 4], dim=-1).flatten(-2)]
        exponents = scales.contiguous().view(torch.uint8).view(*scales.shape, 4).float() - 127
        return (numbers.unflatten(-1, (4, 32)) * exponents.exp2().unsqueeze(-1)).flatten(-2)

    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=it.weights.device)
    e2m1 = torch.cat([e2m1, -e2m1])
    return run


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:

    @triton.jit
    def _triton_logits(
        q, values, scales, table, ends, weights, logits, table_stride, value_stride, scale_stride, logits_stride,
        NEXT_N: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
    ):  # fmt: skip
        """One program: one query token and one page of keys."""
        token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        end = tl.load(ends + token)
        if block * PAGE < end:
            page = block.to(tl.int64)
            if PAGED:
                page = tl.load(table + token // NEXT_N * table_stride + block).to(tl.int64)
            key, head, dim = tl.arange(0, PAGE), tl.arange(0, HEADS), tl.arange(0, DIM)
            inside = block * PAGE + key < end
            query = tl.load(q + token * HEADS * DIM + head[:, None] * DIM + dim[None, :])
            keys = tl.load(values + page * value_stride + key[None, :] * DIM + dim[:, None], inside[None, :], 0.0)
            scores = tl.maximum(tl.dot(query, keys), 0.0) * tl.load(weights + token * HEADS + head)[:, None]
            result = tl.sum(scores, 0) * tl.load(scales + page * scale_stride + key, inside, 0.0)
            tl.store(logits + token * logits_stride + block * PAGE + key, result, inside)


def triton_kernel(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A plain Triton kernel: what an afternoon gives."""
    it, case = inputs, inputs.case
    only(not case.fp4, "FP8 only")
    only(case.heads >= 16, "16 heads or more")
    if it.kv is not None:
        values, scales, strides = *it.kv, (PAGE * DIM, PAGE)
    else:
        flat = it.kv_cache.view(-1)
        values, scales = flat.view(torch.float8_e4m3fn), flat.view(torch.float32)[PAGE * DIM // 4 :]
        strides = PAGE * (DIM + 4), PAGE * (DIM + 4) // 4
    table = it.block_table if it.kv is None else it.lengths
    grid = (case.tokens, -(-case.keys // PAGE))

    def run() -> torch.Tensor:
        _triton_logits[grid](
            it.q[0], values, scales, table, it.lengths, it.weights, it.out, table.stride(0), *strides,
            it.out.stride(0), case.next_n, case.heads, DIM, PAGE, it.kv is None,
        )  # fmt: skip
        return it.out

    return run


Prepare = Callable[[Inputs], Callable[[], torch.Tensor]]


def find_peers() -> tuple[dict[str, Prepare], dict[str, str]]:
    """Who is installed: {name: prepare}, and of the others {name: why not}."""
    found: dict[str, Prepare] = {"ours": ours}
    missing: dict[str, str] = {}

    def look(name: str, load: Callable[[], Prepare]) -> None:
        try:
            found[name] = load()
        except Exception as error:  # whatever the import of someone else's package raises
            missing[name] = f"{type(error).__name__}: {error}".partition("\n")[0]

    def package(name: str) -> Prepare:
        upstream.module()  # loads through the face, which upstream's own imports go through
        if name in upstream.failures:
            raise RuntimeError(upstream.failures[name])
        return functools.partial(deep_gemm_package, importlib.import_module(name))

    def from_module(prepare: Callable, module: str, attribute: str = "") -> Prepare:
        loaded = importlib.import_module(module)
        return functools.partial(prepare, getattr(loaded, attribute) if attribute else loaded)

    for name in upstream.CANDIDATES:
        look(name, functools.partial(package, name))
    look("flashinfer", lambda: from_module(flashinfer, "flashinfer.sm120_paged_mqa_logits"))
    tilelang = ("sglang.kernels.ops.attention.dsa.tilelang_kernel", "tilelang_fp8_paged_mqa_logits")
    look("sglang tilelang", lambda: from_module(sglang, *tilelang))
    in_torch = ("sglang.srt.layers.attention.dsv4.indexer", "fp8_paged_mqa_logits_torch_sm120")
    look("sglang torch", lambda: from_module(sglang, *in_torch))
    if triton is None:
        missing["triton"] = "triton is not installed"
    else:
        found["triton"] = triton_kernel
    found["torch"] = plain_torch
    return found, missing


# ---- what the card can do -------------------------------------------------------------------------------------------


class ProbeParams(ctypes.Structure):
    _fields_ = [("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("count", ctypes.c_int64)]


class Probe(Kernel):
    """A kernel of this file's own, compiled and launched like the package's."""

    @property
    def source(self) -> str:
        return (
            '#include "ptx.cuh"\nstruct ProbeParams { const uint8* input; uint32* output; int64 count; };\n'
            f'static_assert(sizeof(ProbeParams) == {ctypes.sizeof(self.parameters)}, "as in the launcher");\n'
            f'extern "C" __global__ __launch_bounds__({self.threads}, 1)\n'
            f"void {self.name}(const __grid_constant__ ProbeParams p) {{\n"
            "    const int64 id = int64(blockIdx.x) * blockDim.x + threadIdx.x;\n"
            f"{self.body}\n}}\n"
        )


_READS = 8  # of 16 bytes, by a thread at once

READ = Probe(
    "read_all",
    "ptx.cuh",
    f"""
    const int64 threads = int64(gridDim.x) * blockDim.x;
    uint32 all = 0;
    for (int64 turn = 0; turn < p.count; ++turn) {{
        uint32 words[{_READS}][4];
        #pragma unroll
        for (int i = 0; i < {_READS}; ++i) {{
            ptx::load<4>(words[i], p.input + 16 * (id + threads * (turn * {_READS} + i)));
        }}
        #pragma unroll
        for (int i = 0; i < {_READS}; ++i) all ^= words[i][0] ^ words[i][1] ^ words[i][2] ^ words[i][3];
    }}
    p.output[id] = all;""",
    1024,
    ProbeParams,
)

_CHAINS = 8  # independent sums of a warp
_MMA = {  # name: (instruction, k)
    "fp8_plain": ("ptx::mma_e4m3(sums[c], a, b0, b1)", 32),
    "fp8_block_scaled": ("ptx::mma_e4m3_block_scaled(sums[c], a, b0, b1, 0x7f7f7f7f)", 32),
    "fp4": ("ptx::mma_e2m1<0, 0, 0>(sums[c], a, b0, b1, 0x7f7f7f7f, 0x7f7f7f7f)", 64),
}


@functools.cache
def mma_loop(name: str) -> Probe:
    """Nothing but MMAs on random numbers: `count` turns of _CHAINS in each of 16 warps.

    Every chain has a `b` of its own and every turn other signs: where the instruction is emulated (SM90: the product
    first, then a plain addition) the compiler would else multiply once and only add in the loop (24 Nov 2026).
    """
    body = f"""
    uint32 a[4], b[{_CHAINS}][2];
    #pragma unroll
    for (int i = 0; i < 4 + 2 * {_CHAINS}; ++i) {{
        uint32 word = uint32(id * (4 + 2 * {_CHAINS}) + i + 1) * 2654435761u;
        word = (word ^ word >> 15) * 2246822519u & 0xf7f7f7f7;    // no NaN among them
        (i < 4 ? a[i] : b[(i - 4) / 2][i % 2]) = word;
    }}
    float sums[{_CHAINS}][4] = {{}};
    for (int64 turn = 0; turn < p.count; ++turn) {{
        const uint32 signs = uint32(turn) * 2654435761u & 0x80808080;
        #pragma unroll
        for (int c = 0; c < {_CHAINS}; ++c) {{
            const uint32 b0 = b[c][0] ^ signs, b1 = b[c][1] ^ signs;
            {_MMA[name][0]};
        }}
    }}
    float all = 0;
    #pragma unroll
    for (int c = 0; c < {_CHAINS}; ++c) all += sums[c][0] + sums[c][1] + sums[c][2] + sums[c][3];
    p.output[id] = __float_as_uint(all);"""
    return Probe(f"mma_{name}", "ptx.cuh", body, 512, ProbeParams)


def mma_flops(name: str, blocks: int, turns: int) -> int:
    return blocks * (512 // 32) * turns * _CHAINS * 2 * 16 * 8 * _MMA[name][1]


def mma_kinds(arch: str) -> list[str]:
    return ["fp8_plain", "fp8_block_scaled", "fp4"] if arch.startswith("sm_12") else ["fp8_plain"]


def run_probe(kernel: Probe, blocks: int, source: torch.Tensor, sink: torch.Tensor, count: int) -> None:
    parameters = ProbeParams(source.data_ptr(), sink.data_ptr(), count)
    launch(kernel, sink.device, (blocks, 1), parameters, {"input": source}, {"output": sink})


class Reader:
    """Reads a buffer from end to end: what DRAM gives, and how L2 is emptied of everything else."""

    def __init__(self, at_least: int, device: torch.device, blocks: int) -> None:
        step = blocks * READ.threads * 16 * _READS
        self.turns, self.blocks = -(-at_least // step), blocks
        self.buffer = torch.randint(-(2**31), 2**31 - 1, (self.turns * step // 4,), dtype=torch.int32, device=device)
        self.sink = torch.empty(blocks * READ.threads, dtype=torch.int32, device=device)
        self.bytes = self.turns * step

    def __call__(self) -> None:
        run_probe(READ, self.blocks, self.buffer, self.sink, self.turns)


# ---- time -----------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Microseconds of the GPU: median, and the tenth and ninetieth percentile; of the host per call."""

    median_us: float
    low_us: float
    high_us: float
    repeats: int
    host_us: float


class Clock:
    """Times calls on the current device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        properties = torch.cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 128 << 20)
        self.flush = Reader(max(2 * l2, 32 << 20), device, 2 * properties.multi_processor_count)
        self.seconds = seconds

    def time(self, calls: list[Callable[[], Any]], cold: bool) -> Timing:
        """Of the calls in turn. The GPU is kept busy until all of them are queued, so the host's time does not show."""
        turns = itertools.cycle(calls)
        start = time.perf_counter()
        for call in calls:  # whatever the first call of each has to do
            call()
        torch.cuda.synchronize()
        first = (time.perf_counter() - start) / len(calls)
        repeats = 1
        if first < 0.5:
            start = time.perf_counter()
            next(turns)()
            host = time.perf_counter() - start
            torch.cuda.synchronize()
            once = time.perf_counter() - start
            repeats = max(3, min(40, int(self.seconds / max(once, 20e-6))))
            torch.cuda._sleep(int(2e9 * min(0.05, (host + 20e-6) * repeats)))
        events, host_times = [], []
        for _ in range(repeats):
            if cold:
                self.flush()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call = next(turns)
            begin.record()
            start = time.perf_counter()
            call()
            host_times.append(time.perf_counter() - start)
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times = sorted(1e3 * begin.elapsed_time(end) for begin, end in events)
        low, high = times[len(times) // 10], times[-1 - len(times) // 10]
        return Timing(statistics.median(times), low, high, repeats, 1e6 * statistics.median(host_times))


def measure_ceilings(device: torch.device, clock: Clock) -> dict[str, Any]:
    """Bandwidths in TB/s, a copy's counting what is read and what is written; MMA rates in TFLOPS."""
    properties = torch.cuda.get_device_properties(device)
    size = min(2 << 30, properties.total_memory // 8)
    reader = Reader(size, device, 2 * properties.multi_processor_count)
    target = torch.empty_like(reader.buffer)
    copied = clock.time([lambda: target.copy_(reader.buffer)], cold=False)
    read = clock.time([reader], cold=False)
    blocks, rates = properties.multi_processor_count, {}
    for name in mma_kinds(architecture_of(device)):
        turns, loop = 64, mma_loop(name)
        for _ in range(2):  # the first tells how many turns take 10 ms
            call = functools.partial(run_probe, loop, blocks, reader.sink, reader.sink, turns)
            took = clock.time([call], cold=False).median_us
            rates[name] = mma_flops(name, blocks, turns) / took * 1e-6
            turns = int(turns * 10_000 / took)
    nothing = clock.time([lambda: None], cold=False)
    return {
        "copy_tbps": 2 * reader.bytes / copied.median_us * 1e-6,
        "read_tbps": reader.bytes / read.median_us * 1e-6,
        "mma_tflops": rates,
        "empty_us": nothing.median_us,
    }


# ---- one case after the other ---------------------------------------------------------------------------------------


def judge(inputs: list[Inputs], prepare: Prepare) -> tuple[list[Callable], dict[str, Any]]:
    """The calls to time, none unless the first one's logits are right; and a status, which says what is the matter."""
    try:
        calls = [prepare(each) for each in inputs]
        poison(inputs[0])
        error = relative_error(inputs[0], calls[0]())
    except Unsupported as reason:
        return [], {"status": "unsupported", "reason": str(reason)}
    except Exception as problem:  # a peer's kernel may fail in any way; the others go on
        return [], {"status": "failed", "reason": f"{type(problem).__name__}: {problem}".partition("\n")[0][:300]}
    if error > TOLERANCE:
        return [], {"status": "wrong", "error": error}
    return calls, {"status": "right", "error": error}


def run_case(case: Case, cache: Cache, peers: dict[str, Prepare], clock: Clock, ceilings: dict) -> list[dict]:
    """One entry for each peer: what it said, and what its cold and warm times mean."""
    inputs = cache.inputs(case, SETS if case.footprint < 1 << 30 else 1)
    entries = []
    for name, prepare in peers.items():
        calls, entry = judge(inputs, prepare)
        for mode, chosen in (("cold", calls), ("warm", calls[:1])):
            if calls:
                timing = clock.time(chosen, cold=mode == "cold")
                entry[mode] = {**asdict(timing), **figures(case, timing.median_us, ceilings)}
        entries.append({**asdict(case), "name": case.name, "peer": name, **entry})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next case has other sizes
    return entries


def run_metadata(rows: int, device: torch.device, peers: dict[str, Prepare], clock: Clock) -> list[dict]:
    """Ours against the contract; upstream's, whose splits differ from card to card, as it comes."""
    lengths = torch.randint(0, 9000, (rows, 1), dtype=torch.int32, device=device)
    slots = torch.cuda.get_device_properties(device).multi_processor_count
    planners = {"ours": sm120.get_paged_mqa_logits_metadata}
    for name, prepare in peers.items():
        package = prepare.args[0] if isinstance(prepare, functools.partial) else None
        if hasattr(package, "get_paged_mqa_logits_metadata"):
            planners[name] = package.get_paged_mqa_logits_metadata
    entries = []
    for name, planner in planners.items():
        entry = {"kind": "metadata", "name": f"metadata {rows}", "rows": rows, "peer": name, "status": "right"}
        try:
            made = planner(lengths, PAGE, slots)
            same = torch.equal(made, reference.schedule(lengths, slots))
            if name == "ours" and not same:
                entry["status"] = "wrong"
            else:
                entry["same_contract"] = same
                entry["cold"] = asdict(clock.time([functools.partial(planner, lengths, PAGE, slots)], cold=True))
        except Exception as problem:
            entry |= {"status": "failed", "reason": f"{type(problem).__name__}: {problem}".partition("\n")[0][:300]}
        entries.append(entry)
    return entries


def fits(case: Case, free: int) -> bool:
    """With the logits of a peer that allocates its own, and room to work."""
    return case.footprint + 4 * case.tokens * case.keys + (2 << 30) < free


def run(args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything: the content of bench.json."""
    began = time.monotonic()
    peers, missing = find_peers()
    if args.peers:
        missing.update({name: "not asked for" for name in peers if name not in (*args.peers, "ours")})
        peers = {name: prepare for name, prepare in peers.items() if name not in missing}
    say(f"peers: {', '.join(peers)}")
    for name, reason in missing.items():
        say(f"not here: {name} ({reason})")
    with exact_tf32():
        clock = Clock(device, args.seconds)
        ceilings = measure_ceilings(device, clock)
        say(f"ceilings: {json.dumps(rounded(ceilings))}")
        result = {
            "schema": SCHEMA,
            **describe(device),
            "options": {"quick": args.quick, "heads": args.heads, "seconds": args.seconds, "minutes": args.minutes},
            "ceilings": ceilings,
            "missing_peers": missing,
            "results": [],
            "left_out": {},
        }
        for rows in METADATA_ROWS[1:3] if args.quick else METADATA_ROWS:
            result["results"] += run_metadata(rows, device, peers, clock)
        cases = plan(args.quick, args.heads)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        cache = Cache(device)
        quick = len(plan(True, args.heads))
        for group in (cases[:quick], cases[quick:]):
            for fp4 in (False, True):
                mine = [case for case in group if case.fp4 == fp4 and fits(case, free)]
                paged = [case for case in mine if case.kind != "ragged"]
                for case in group:
                    if case.fp4 == fp4 and case not in mine:
                        result["left_out"][case.name] = f"does not fit in {free / 2**30:.0f} GiB"
                if time.monotonic() - began > 60 * args.minutes:
                    result["left_out"].update({case.name: "out of time" for case in mine})
                    continue
                cache.pages.clear()
                torch.cuda.empty_cache()
                if paged:
                    most = max(case.distinct_keys * (SETS if case.footprint < 1 << 30 else 1) for case in paged)
                    cache.reserve(fp4, most // PAGE)
                for case in mine:
                    if time.monotonic() - began > 60 * args.minutes:
                        result["left_out"][case.name] = "out of time"
                        continue
                    entries = run_case(case, cache, peers, clock, ceilings)
                    result["results"] += entries
                    say("  ".join(summary(entry) for entry in entries if entry["status"] != "unsupported"))
    result["took_s"] = time.monotonic() - began
    return result


@contextmanager
def exact_tf32() -> Iterator[None]:
    """FP8 and FP4 numbers are TF32 numbers: torch may use its tensor cores."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- what is said about it ------------------------------------------------------------------------------------------


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as far as the figures depend on it; nothing that tells whose it is."""
    properties = torch.cuda.get_device_properties(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "deep_gemm": deep_gemm.__version__}
    for name in ("cuda-bindings", "cuda-core", "nvidia-cuda-nvrtc", "triton", "flashinfer-python", "sglang", "vllm"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    smi = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    said = [part.strip() for part in output_of([*smi, f"--id={device.index or 0}"]).split(",")]
    names = ("driver", "power_limit", "max_sm_clock", "max_memory_clock")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "built_for": architecture_of(device),
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            **(dict(zip(names, said)) if len(said) == len(names) else {}),
        },
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "switches": {name: value for name, value in os.environ.items() if re.match("DG_SM120_", name)},
        "revision": output_of(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]) or None,
    }


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def rounded(value: Any) -> Any:
    """Four digits are more than a clock gives."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def summary(entry: dict) -> str:
    if "cold" not in entry:
        return f"{entry['peer']}: {entry['status'].upper()} {entry.get('reason', entry.get('error'))}"
    if entry["peer"] != "ours" or "of_roof" not in entry["cold"]:
        return f"{entry['peer']} {entry['cold']['median_us']:.1f} us"
    cold = entry["cold"]
    return f"{entry['name']}: {cold['median_us']:.1f} us, {cold['tbps']:.2f} TB/s, {cold['tflops']:.0f} TFLOPS,"


HEADINGS = ("case", "us", "spread", "warm us", "TB/s", "TFLOPS", "of copy", "of MMA", "of roof", "error")


def table_of(result: dict) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a line for each case, ours first, then every peer's time, and how many times ours it is."""
    peers = list(dict.fromkeys(entry["peer"] for entry in result["results"]))
    others = [peer for peer in peers if peer != "ours"]
    cases: dict[str, dict[str, dict]] = {}
    for entry in result["results"]:
        cases.setdefault(entry["name"], {})[entry["peer"]] = entry
    rows = []
    for name, entries in cases.items():
        mine = entries.get("ours", {})
        cold, warm = mine.get("cold", {}), mine.get("warm", {})
        row = [name, *([mine.get("status", "-").upper()] if not cold else [f"{cold['median_us']:.1f}"])]
        row.append(f"{cold['low_us']:.1f}-{cold['high_us']:.1f}" if cold else "-")
        row.append(f"{warm['median_us']:.1f}" if warm else "-")
        row += [f"{cold[key]:.3g}" if key in cold else "-" for key in ("tbps", "tflops")]
        row += [f"{cold[key]:.0%}" if key in cold else "-" for key in ("of_copy", "of_mma", "of_roof")]
        row.append(f"{mine['error']:.0e}" if mine.get("error") is not None else "-")
        for other in others:
            theirs = entries.get(other, {})
            if "cold" not in theirs:
                row.append({"unsupported": "-"}.get(theirs.get("status", "-"), theirs.get("status", "-")))
            else:
                ratio = theirs["cold"]["median_us"] / cold["median_us"] if cold else math.nan
                row.append(f"{theirs['cold']['median_us']:.1f} ({ratio:.2f}x)")
        rows.append(row)
    return [*HEADINGS, *others], rows


def as_text(headings: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths)) for line in [headings, *rows])
    ]
    return "\n".join(line.rstrip() for line in lines)


def draw(result: dict, path: Path) -> None:
    """The roofline: work per byte across, rate upwards; and what part of the roof each case of ours reaches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    figure.suptitle(f"{result['device']['name']}, {result['date'][:10]}, cold L2", fontweight="bold")
    roofline, share = figure.subplots(1, 2, width_ratios=(3, 2))
    ceilings = result["ceilings"]
    timed = [entry for entry in result["results"] if "of_roof" in entry.get("cold", {})]
    cases = {id(entry): Case(*(entry[key] for key in Case.__dataclass_fields__)) for entry in timed}
    peers = list(dict.fromkeys(entry["peer"] for entry in timed))
    for number, peer in enumerate(peers):
        for fp4 in (False, True):
            mine = [entry for entry in timed if entry["peer"] == peer and entry["fp4"] == fp4]
            x = [cases[id(entry)].flops / cases[id(entry)].bytes for entry in mine]
            style = {"s": 34, "alpha": 0.8, "color": f"C{number}", "marker": "s" if fp4 else "o"}
            if mine:
                label = f"{peer}, {'FP4' if fp4 else 'FP8'}"
                roofline.scatter(x, [entry["cold"]["tflops"] for entry in mine], label=label, **style)
            if mine and peer == "ours":
                floors = [entry["cold"]["floor_us"] for entry in mine]
                share.scatter(floors, [100 * entry["cold"]["of_roof"] for entry in mine], label=label, **style)
    peaks, copy = ceilings["mma_tflops"], ceilings["copy_tbps"]
    tallest = max([*peaks.values(), *(entry["cold"]["tflops"] for entry in timed)])
    roofline.plot([10, tallest / copy], [10 * copy, tallest], color="grey", label=f"copy: {copy:.2f} TB/s")
    for (name, peak), dashes in zip(peaks.items(), ("-", "--", ":")):
        roofline.plot([peak / copy, 2e4], [peak, peak], dashes, color="black", label=f"MMA {name}: {peak:.0f} TFLOPS")
    roofline.set(xscale="log", yscale="log", xlabel="FLOP a byte, every byte once", ylabel="TFLOPS", title="Roofline")
    share.set(
        xscale="log", xlabel="the roof's time, us", ylabel="% of the roof", title="Ours: part of the roof reached"
    )
    share.set_ylim(0)
    for panel in (roofline, share):
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write(result: dict, folder: Path, say: Callable[[str], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    headings, rows = table_of(result)
    text = as_text(headings, rows)
    (folder / "bench.txt").write_text(text + "\n")
    show(headings, rows, text)
    try:
        draw(result, folder / "roofline.png")
    except ImportError:
        say("no picture: matplotlib is not installed")
    say(f"{result['took_s']:.0f} s; {folder / 'bench.json'} is the file to send")


def show(headings: list[str], rows: list[list[str]], text: str) -> None:
    """With rich where it is and there is a terminal; else as in bench.txt."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(text)
        return
    console = Console()
    if not console.is_terminal:
        print(text)
        return
    table = Table(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_plan(args: argparse.Namespace) -> None:
    """--dry-run: the cases and their sizes."""
    headings = ["case", "keys GB", "logits GB", "bytes GB", "GFLOP", "FLOP/byte", "memory GB"]
    rows = []
    for case in plan(args.quick, args.heads):
        sizes = (case.key_bytes, 4 * case.pairs, case.bytes, case.flops)
        cells = [f"{size * 1e-9:.3g}" for size in sizes]
        rows.append([case.name, *cells, f"{case.flops / case.bytes:.0f}", f"{case.footprint * 1e-9:.3g}"])
    show(headings, rows, as_text(headings, rows))
    print(f"{len(rows)} cases, and metadata of {METADATA_ROWS} rows; cold and warm; every peer that is installed")


# ---- the program ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few sizes")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its sizes, time nothing")
    parser.add_argument("--heads", type=int, choices=(64, 32, 16), default=64, help="of the indexer (64)")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="beside ours only these (all that are installed)")
    parser.add_argument("--out", type=Path, help="folder for the results (./bench-<device>-<date>)")
    parser.add_argument("--device", type=int, default=0, help="which GPU (0)")
    parser.add_argument("--seconds", type=float, default=0.15, help="about so many for each time taken (0.15)")
    parser.add_argument("--minutes", type=float, help="start no case after so many (9, --quick 1.2)")
    args = parser.parse_args(arguments)
    args.minutes = args.minutes or (1.2 if args.quick else 9)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.dry_run:
        show_plan(args)
        return 0
    if not torch.cuda.is_available():
        print("bench: there is no GPU that PyTorch can use; --dry-run shows what would be timed", file=sys.stderr)
        return 2
    device = torch.device("cuda", args.device)
    if torch.cuda.get_device_capability(device) < (8, 9):
        print(f"bench: {torch.cuda.get_device_name(device)} has no FP8 MMA; SM89 or later is needed", file=sys.stderr)
        return 2
    torch.cuda.set_device(device)
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-").lower()
    folder = args.out or Path(f"bench-{name}-{datetime.date.today().isoformat()}")
    write(run(args, device, functools.partial(print, flush=True)), folder, print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
