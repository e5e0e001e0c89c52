"""Launcher of paged.cuh and ragged.cuh: configuration, parameters, grid; sparse.py is that of sparse.cuh."""

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from ..arguments import Query
from ..jit import MOST, Kernel, launch
from .windows import Windows

Tensors = Mapping[str, torch.Tensor | None]
Maxima = torch.Tensor | None

TILE = 32  # keys that a warp takes at a time
EIGHTS_WARPS = 16  # of a block, where each takes eight keys of a row
FEW_ROWS = (1, 32, 256)  # at most so many: one, one for each lane, or eight
FEW_TOKENS = 8  # of each, at most: a warp for each
_MOST_REQUESTS = 1024  # of a decode step
# One token whose blocks leave fronts: so many blocks, that fronts hardly ever lack a key; so many keys chosen, at most;
# rows longer than that, where it is faster (H200, 29 Nov 2026); tiles that a warp keeps, at most
_FRONTS, _MOST_OF_FRONTS, _LEAST_COLUMNS, _FRONTS_TILES = range(96, 257), 512, 8192, 22
_ROOM = 64  # entries of a front
_QUARTERS = 4  # of an SM, each with a tensor pipe of its own
_SIZES = 64  # of calls that are remembered: all layers of a step make the same one
# ragged: parts of an SM, at most; of them in a stripe, at least; stripes, at most
_PARTS_OF_SM, _PARTS_IN_STRIPE, _STRIPES = 256, 16, 4

_QUERIES = [
    ("query", ctypes.c_void_p),
    ("query_scales", ctypes.c_void_p),
    ("weights", ctypes.c_void_p),
    ("weights_stride", ctypes.c_int64),
]
_OUTPUT = [
    ("logits", ctypes.c_void_p),
    ("logits_stride", ctypes.c_int64),
    ("maxima", ctypes.c_void_p),
    ("maxima_stride", ctypes.c_int64),
    ("maxima_blocks", ctypes.c_int32),
]


class FewRows(ctypes.Structure):
    """Field by field as in rows.cuh."""

    _fields_ = [
        ("shares", ctypes.c_int32),
        ("takers", ctypes.c_int32),
        ("quarters", ctypes.c_int32),
        ("pairs", ctypes.c_int32),
        ("takers_inverse", ctypes.c_uint32),
        ("spare_inverse", ctypes.c_uint32),
    ]


class PagedParams(ctypes.Structure):
    """Field by field as in paged.cuh."""

    _fields_ = [
        *_QUERIES,
        ("keys", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("page_stride", ctypes.c_uint32),
        ("table_stride", ctypes.c_int32),
        ("pages", ctypes.c_uint32),
        ("columns", ctypes.c_uint32),
        *_OUTPUT,
        ("windows", Windows),
        ("schedule", ctypes.c_void_p),
        ("rows_per_group", ctypes.c_int32),
        ("few", FewRows),
    ]


class PagedFrontsParams(PagedParams):
    """Field by field as in paged_fronts.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("heads", "values", "positions", "places")]


class RaggedParams(ctypes.Structure):
    """Field by field as in ragged.cuh."""

    _fields_ = [
        *_QUERIES,
        ("keys", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        *_OUTPUT,
        ("windows", Windows),
        ("columns", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("stripes", ctypes.c_int32),
    ]


class Lists(ctypes.Structure):
    """Field by field as in lists.cuh."""

    _fields_ = [
        ("metadata", ctypes.c_void_p),
        ("seal", ctypes.c_uint32),
        ("pitch", ctypes.c_uint32),
        ("rows", ctypes.c_int32),
        ("limit", ctypes.c_int32),
        ("least", ctypes.c_int32),
    ]


class SparseParams(ctypes.Structure):
    """Field by field as in sparse.cuh."""

    _fields_ = [
        *_QUERIES,
        ("keys", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("pitch", ctypes.c_uint32),
        ("page_stride", ctypes.c_uint32),
        ("places", ctypes.c_uint32),
        *_OUTPUT,
        ("windows", Lists),
        ("rows_per_group", ctypes.c_int32),
        ("few", FewRows),
    ]


@dataclass(frozen=True, eq=False)  # one object of the same arguments (`configure`), which is quicker to find
class Config:
    """What the kernel is compiled for.

    page       keys of a page; 0: ragged
    few_rows   paged, sparse: the grid shares out the tiles of all rows, one of FEW_ROWS at most; 0: blocks take groups
    next_n     paged: so many tokens, at most, are likely to see the same keys (`together`)
    alignment  of every row of FP8 queries and keys, in bytes: the widest load is one of so many
    block      sparse: keys of a listed block
    maxima     of blocks of keys are stored too
    eights     sparse: one row, and a warp for every eight keys of it; else as `few_rows` says
    fronts     paged, one token: each block leaves the largest of its logits for the choice
    """

    arch: str
    fp4: bool
    heads: int
    dim: int
    page: int
    weights: torch.dtype
    logits: torch.dtype
    few_rows: int = 0
    next_n: int = 1
    alignment: int = 32
    block: int = 0
    maxima: bool = False
    eights: bool = False
    fronts: bool = False

    @cached_property
    def block_scaled(self) -> bool:
        """Whether the block-scaled MMA does the work. FP4 and MXFP8 have no other; on GeForce it runs FP8 twice as fast
        as the plain form does, on PRO cards as fast (`DG_SM120_FP8_MMA` = plain or block_scaled decides otherwise)."""
        if not self.arch.startswith("sm_12"):
            return False
        return self.fp4 or self.block > 0 or os.environ.get("DG_SM120_FP8_MMA", "block_scaled") == "block_scaled"

    @cached_property
    def padded_heads(self) -> int:
        """As the tensor core takes them: 16 at a time."""
        return -(-self.heads // 16) * 16

    @cached_property
    def tokens(self) -> int:
        """Of a warp: two where a query takes at most 16 registers of a lane, since what it takes to bring a key is then
        worth the while; in few rows at most 32 (FP8, 64 x 16K with next_n 4 and 32 heads: 72 instead of 90 us; stand-in
        on an H100, 28 Nov 2026). Paged, no more than are likely to see the same keys. A list of blocks is one row's."""
        small = self.padded_heads <= (32 if self.fp4 or self.few_rows > 1 else 16)
        most = 2 if small and self.arch.startswith("sm_12") and not self.block else 1
        return min(most, self.next_n) if self.page else most

    @cached_property
    def warps(self) -> int:
        """Of a block, and of an SM: as many as the registers of resident queries allow."""
        if self.eights:
            return EIGHTS_WARPS
        if self.arch.startswith("sm_12"):
            query = self.tokens * self.padded_heads * self.dim // (2 if self.fp4 else 1)
            if self.block:  # eight places take registers too
                return 16 if query <= 2048 else 12 if query <= 4096 else 8
            return 12 if query > 4096 or query == 4096 and (self.few_rows and self.fp4 or self.tokens > 1) else 16
        return 8  # the plain MMA widens FP8 to FP16 first on SM90 and SM100, and FP4 to FP8 everywhere

    @cached_property
    def kernel(self) -> Kernel:
        return _kernel(self, self.block_scaled)


# Of the same arguments the same object, which knows its kernel and has read the switch. Configurations that differ in
# nothing compiled share a kernel: what is warm for one is for all.
configure, _one = lru_cache(MOST)(Config), lru_cache(MOST)(Kernel)

_NUMBER = {torch.float32: ("fp32", "float"), torch.bfloat16: ("bf16", "ptx::bf16")}


@lru_cache(MOST)
def _kernel(config: Config, block_scaled: bool) -> Kernel:
    if config.fp4:
        # Few rows alone load queries by 16 bytes; of lists and of the widened form that has not been timed.
        few = config.page and config.few_rows and not config.block
        if block_scaled and few and config.alignment >= 16 and config.dim == 128:
            tag, format = "fp4_v16", f"Fp4<{config.dim}, 16>"
        else:
            tag, format = "fp4", f"{'Fp4' if block_scaled else 'Fp4Widened'}<{config.dim}>"
    elif config.block:
        vector = min(config.alignment, 8)
        tag = f"mxfp8_v{vector}"
        format = f"{'Mxfp8' if block_scaled else 'Mxfp8Unscaled'}<{config.dim}, {vector}>"
    else:
        vector = min(config.alignment, 32 if config.arch.startswith(("sm_10", "sm_11", "sm_12")) else 16)
        tag = f"fp8_{'' if block_scaled else 'plain_'}v{vector}"
        format = f"Fp8<{config.dim}, {str(block_scaled).lower()}, {vector}>"
    (weights, weight), (logits, logit) = _NUMBER[config.weights], _NUMBER[config.logits]
    # Profilers, upstream's tests among them, look for `mqa_logits` and `paged_mqa_logits`.
    sizes = f"{format}, {config.heads}"
    if config.maxima:
        logits, logit = f"{logits}_maxima", f"WithMaxima<{logit}>"
    types = f"{weight}, {logit}, {config.warps}, {config.tokens}"
    rows = {0: "many", 1: "one"}.get(config.few_rows, f"few{config.few_rows}")
    run = {0: "run_many", 1: "run_one"}.get(config.few_rows, f"run_few<{config.few_rows}>")
    if config.block:
        layout = "paged_sparse" if config.page else "sparse"
        page, header = f"_p{config.page}_s{config.block}_{'eights' if config.eights else rows}", "sparse.cuh"
        blocks, parameters = f"{config.page}, {config.block}", SparseParams
        template, run = ("SparseEights", "run") if config.eights else ("Sparse", run)
        call = f"{template}<{sizes}, {blocks}, {weight}, {logit}, {config.warps}>::{run}(p);"
    elif config.page:
        # A key that one warp alone reads need not stay in L1: up to 7% less time (16 x 16K), and 2% in the mean. Where
        # warps of several tokens share it, 2 to 8% more (stand-in on an H100, 28 Nov 2026).
        once = config.few_rows > 0 and config.next_n == 1
        layout, header = "paged", "paged.cuh"
        page = f"_p{config.page}_{rows}_t{config.tokens}" + "_once" * once
        # Few rows gain up to 10% by that, and one of FP4 as well; one of FP8 loses up to 5% (stand-in on an H100,
        # 28 Nov 2026). With many rows it has not been timed.
        past_end = str(config.few_rows > (0 if config.fp4 else 1)).lower()
        reading = f"{past_end}, {str(once).lower()}"
        call, parameters = f"Paged<{sizes}, {config.page}, {types}, {reading}>::{run}(p);", PagedParams
        if config.fronts:
            page, header, parameters = f"{page}_fronts", "paged_fronts.cuh", PagedFrontsParams
            types = f"{weight}, {config.warps}, {reading}, {_FRONTS_TILES}"
            call = f"PagedFronts<{sizes}, {config.page}, {types}>::run(p);"
    else:
        layout, page, header = "ragged", "", "ragged.cuh"
        call, parameters = f"Ragged<{sizes}, {types}>::run(p);", RaggedParams
    name = f"{tag}_{layout}_mqa_logits_h{config.heads}_d{config.dim}{page}_{weights}_{logits}"
    return _one(name, header, f"    {call}", 32 * config.warps, parameters)


def alignment(*places: int) -> int:
    """The largest power of two, up to 32, that divides all of them: addresses, and bytes from page to page."""
    together = 32
    for place in places:
        together |= place
    return together & -together


def few_rows(rows: int, next_n: int, slots: int) -> int:
    """Which of FEW_ROWS holds `rows`, if they are taken one by one, else 0. Rows by the hundred are a prefill, whose
    neighbours see the same keys, which should leave L2 once. Fewer rows than slots, or not many more, are a decode
    step, whose requests have nothing in common. (Where they have nothing in common all the same, taking 8 at once
    costs or saves less than 3%: H200, 256 rows of 1K to 8K keys, 24 Nov 2026.)"""
    if next_n > FEW_TOKENS:
        return 0
    if rows >= slots and (rows <= FEW_ROWS[1] or rows >= 2 * slots or rows * next_n > 6 * slots):
        return 0  # a run for each row alone would leave warps idle
    return next((most for most in FEW_ROWS if rows <= most), 0)


def eights(rows: int, columns: int, slots: int) -> bool:
    """Whether there is one row of listed blocks, and a warp for every eight keys of it."""
    return rows == 1 and columns <= 8 * EIGHTS_WARPS * slots


def together(rows: int, next_n: int) -> int:
    """How many tokens it pays to take together, if there is room for them: 1 or 2. Those of a row; and neighbours
    where there are more rows than a decode step has."""
    return 2 if rows > _MOST_REQUESTS else min(2, next_n)


def rows_per_group(config: Config, next_n: int) -> int:
    """How many neighbouring rows a block takes at once, where there are many."""
    return max(1, min(32, config.warps * config.tokens) // next_n)


def parts(config: Config, rows: int, keys: int, num_sms: int) -> tuple[int, int, int]:
    """How the ragged kernel's work is cut: groups of rows; in how many parts the keys of each; and in how many stripes
    the list of all these, from each of which a block takes neighbouring parts. Parts are small, so that blocks have
    equally much; stripes are few, since each is one more time that a block loads queries."""
    groups, tiles = -(-rows // min(32, config.warps * config.tokens)), max(1, -(-keys // TILE))
    each = min(tiles, -(-_PARTS_OF_SM * num_sms // groups))
    return groups, each, max(1, min(_STRIPES, groups * each // (_PARTS_IN_STRIPE * num_sms)))


@lru_cache(_SIZES)
def plan_of_few(config: Config, slots: int, rows: int, next_n: int) -> FewRows:
    """What a kernel of few rows would otherwise divide for."""
    if not config.few_rows:
        return FewRows()
    sets = -(-next_n // config.tokens)
    shares = config.warps // sets
    takers = slots * shares
    inverse, spare = (min(2**32 - 1, 2**32 // number) for number in (takers, takers - rows))
    pairs = int(shares % 2 == 0 and not config.block)  # of lists it has not been timed
    return FewRows(shares, takers, slots * min(shares, max(1, _QUARTERS // sets)), pairs, inverse, spare)


def leaves_fronts(rows: int, columns: int, k: int, blocks: int) -> bool:
    """Whether `k` keys of each row are chosen faster out of what so many blocks of its logits leave. Any query's blocks
    have 8 warps at least, which have room for a row's logits."""
    room = 8 * blocks * _FRONTS_TILES * TILE
    return rows == 1 and blocks in _FRONTS and k <= _MOST_OF_FRONTS and _LEAST_COLUMNS < columns <= room


def _room_of_fronts(blocks: int) -> int:
    """Bytes of one of a front's three, as of all."""
    return 4 * -(-blocks // 32) * 32 * _ROOM


def fronts_bytes(blocks: int) -> int:
    """What the blocks of one token leave for the choice (fronts.cuh)."""
    return 3 * _room_of_fronts(blocks) + 8 * blocks


def places_of_fronts(address: int, blocks: int) -> tuple[int, ...]:
    """Of values, positions, places and heads."""
    return tuple(address + i * _room_of_fronts(blocks) for i in range(4))


class Plan(NamedTuple):
    """How a call is made, which follows from types, sizes and strides; its parameters are without addresses."""

    config: Config
    grid: tuple[int, int]
    parameters: PagedParams | RaggedParams


def plan_paged(
    arch: str, query: Query, weights: torch.Tensor, kv_cache: torch.Tensor, page: int, page_stride: int,
    block_table: torch.Tensor, slots: int, windows: Windows, dtype: torch.dtype, maxima: Maxima, fronts: bool = False,
) -> Plan:  # fmt: skip
    """Of checked arguments; shapes as in `paged.fp8_fp4_paged_mqa_logits`."""
    rows, next_n = windows.rows, windows.next_n
    config = configure(
        arch, query.fp4, query.heads, query.dim, page, weights.dtype, dtype,
        few_rows=few_rows(rows, next_n, slots), next_n=together(rows, next_n),
        alignment=alignment(query.values.data_ptr(), kv_cache.data_ptr(), page_stride), maxima=maxima is not None,
        fronts=fronts,
    )  # fmt: skip
    p = PagedFrontsParams(windows=windows) if fronts else PagedParams(windows=windows)
    _set_strides(p, weights, maxima)
    p.page_stride = page_stride
    p.table_stride = block_table.stride()[0]
    p.pages = kv_cache.shape[0]
    p.columns = min(block_table.shape[1], 2**32 // page)
    p.rows_per_group = rows_per_group(config, next_n)
    p.few = plan_of_few(config, slots, rows, next_n)
    return Plan(config, (slots, 1), p)


def plan_ragged(
    arch: str, query: Query, weights: torch.Tensor, keys: torch.Tensor,
    columns: int, num_sms: int, windows: Windows, dtype: torch.dtype, maxima: Maxima,
) -> Plan:  # fmt: skip
    """Of checked arguments; shapes as in `ragged.fp8_fp4_mqa_logits`. Compressed if `columns`."""
    config = configure(
        arch, query.fp4, query.heads, query.dim, 0, weights.dtype, dtype,
        alignment=alignment(query.values.data_ptr(), keys.data_ptr()), maxima=maxima is not None,
    )  # fmt: skip
    p = RaggedParams(windows=windows)
    _set_strides(p, weights, maxima)
    p.columns = columns
    p.groups, p.parts, p.stripes = parts(config, windows.rows, min(windows.limit, columns or windows.limit), num_sms)
    return Plan(config, (min(num_sms, p.groups * p.parts), 1), p)


def _set_strides(p: PagedParams | RaggedParams, weights: torch.Tensor, maxima: Maxima) -> None:
    p.weights_stride = weights.stride()[0]
    if maxima is not None:
        p.maxima_stride, p.maxima_blocks = maxima.stride()[0], maxima.shape[1]


def paged(
    plan: Plan, inputs: Tensors, addresses: Sequence[int], out: torch.Tensor, maxima: torch.Tensor | None,
    fronts: torch.Tensor | None = None, translate: bool = False,
) -> Windows:  # fmt: skip
    """Starts the kernel on checked arguments. `addresses` are those of `inputs`, of which the first are q, weights,
    kv_cache, context_lens, block_table, schedule_meta, and in FP4 q's scales. Returns what the rows see."""
    p = type(plan.parameters).from_buffer_copy(plan.parameters)
    if fronts is not None:
        p.values, p.positions, places, p.heads = places_of_fronts(fronts.data_ptr(), plan.grid[0])
        p.places = places if translate else None
    p.query, p.weights, p.keys, p.windows.ends, p.block_table, p.schedule = addresses[:6]
    return _start(plan, p, inputs, addresses, out, maxima, fronts)


def ragged(
    plan: Plan, inputs: Tensors, addresses: Sequence[int], out: torch.Tensor, maxima: torch.Tensor | None
) -> Windows:
    """The same; the first of `inputs` are q, weights, kv, its scales, starts, ends, and in FP4 q's scales."""
    p = RaggedParams.from_buffer_copy(plan.parameters)
    p.query, p.weights, p.keys, p.key_scales, p.windows.starts, p.windows.ends = addresses[:6]
    return _start(plan, p, inputs, addresses, out, maxima)


def _start(
    plan: Plan, p, inputs: Tensors, addresses: Sequence[int], out: torch.Tensor, maxima: Maxima,
    fronts: torch.Tensor | None = None,
) -> Windows:  # fmt: skip
    if plan.config.fp4:
        p.query_scales = addresses[6]
    p.logits, p.logits_stride = out.data_ptr(), out.stride()[0]
    outputs = {"logits": out}
    if maxima is not None:
        p.maxima, outputs["block_max"] = maxima.data_ptr(), maxima
    if fronts is not None:
        outputs["fronts"] = fronts
    launch(plan.config.kernel, out.device, plan.grid, p, inputs, outputs, checked=True)
    return p.windows
