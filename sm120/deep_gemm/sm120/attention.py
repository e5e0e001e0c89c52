"""The five functions of the Lightning Indexer. Each one: check, allocate, configure, launch.

    logits[i, n] = sum_h weights[i, h] * relu(sum_d q[i, h, d] * k[n, d])          scales applied to q and k

FP8: q is e4m3, its scale folded into the weights; k is e4m3 times one fp32 scale a token. FP4: q and k are e2m1, two
to a byte, low nibble first, times 2^(byte - 127) for every 32 elements; the scale bytes of a row stand in one int32,
byte j for elements 32j to 32j + 31. Sums are fp32. (DeepSeek-V3.2-Exp report, section 2; the formats are DeepGEMM's.)

relu keeps a NaN, as torch's does: a NaN (or, with a weight of zero, an infinity) in a key that a row sees makes that
one logit NaN. Keys that no row sees may hold anything.

Two generations of callers are served (sgl-deep-gemm 0.2.3 and DeepGEMM's main; sgl-deep-gemm 0.2.5 and vLLM). They
differ in what comes after `max_context_len` and after the bounds; the types tell them apart, and what fits neither is
refused. Every error is an ArgumentError, which is a RuntimeError, raised before anything is launched or written.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import checks
from .checks import Open, refuse
from .jit import architecture_of
from .kernels import clean, logits, metadata
from .kernels.windows import windows_of_bounds, windows_of_lengths
from .settings import sms_to_use

_ROW_BYTES = 1024  # row strides of the logits are multiples of so many bytes
_E4M3, _PACKED_E2M1 = (torch.float8_e4m3fn,), (torch.int8, torch.uint8)
_BATCH, _NEXT_N, _ROWS, _HEADS = Open("batch"), Open("next_n"), Open("seq_len"), Open("heads")
_QUERY = {  # (dimensions, fp4) -> shape
    (4, False): (_BATCH, _NEXT_N, _HEADS, Open("dim")),
    (4, True): (_BATCH, _NEXT_N, _HEADS, Open("dim / 2")),
    (3, False): (_ROWS, _HEADS, Open("dim")),
    (3, True): (_ROWS, _HEADS, Open("dim / 2")),
}
_PAGES, _BLOCK_KV, _COLUMNS, _SLOTS, _KEYS = map(Open, ("pages", "block_kv", "columns", "num_sms + 1", "seq_len_kv"))
DIMS = {False: (32, 64, 128), True: (64, 128)}  # fp4 -> head dims
_INT32, _REAL = (torch.int32,), (torch.float32, torch.bfloat16)
_LARGEST_PAGE = 2**16

Pair = tuple[torch.Tensor, torch.Tensor | None]


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, block_kv: int, num_sms: int, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """Plans paged logits: which 256-key splits of which rows each of `num_sms` blocks takes.

    context_lens  int32 [batch] or [batch, next_n], contiguous: keys of each row; a row is as long as its longest token
    block_kv      keys of a page, a multiple of 16
    num_sms       slots to plan for
    indices       int32 [batch]: which sequence each row belongs to; checked only, since rows are planned one by one

    Returns int32 [num_sms + 1, 2]: slot j works from entry j, (row, split), up to entry j + 1, in the list of all
    splits, rows in order. With T splits the first num_sms - T % num_sms slots get T // num_sms of them, the others one
    more; past the last split an entry is (batch, 0). Any batch size; graph-safe.
    """
    _lengths(context_lens, context_lens.device if isinstance(context_lens, torch.Tensor) else None)
    if checks.integer("block_kv", block_kv, 16, _LARGEST_PAGE) % 16:
        refuse("block_kv", block_kv, "a multiple of 16")
    checks.integer("num_sms", num_sms, 1, 2**24)
    _indices(indices, context_lens)
    schedule = torch.empty((num_sms + 1, 2), dtype=torch.int32, device=context_lens.device)
    metadata.plan(context_lens, schedule)
    return schedule


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    indices: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of FP8 queries against a paged FP8 key cache, in fp32.

    As `fp8_fp4_paged_mqa_logits` with an e4m3 `q`.
    """
    clean_logits, indices = _either_generation(clean_logits, indices)
    fp4, query = _query(q, 4)
    if fp4:
        refuse("q", q, "e4m3; fp8_fp4_paged_mqa_logits takes FP4")
    return _paged(
        fp4, query, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
        clean_logits, torch.float32, indices, out,
    )  # fmt: skip


def fp8_fp4_paged_mqa_logits(
    q: torch.Tensor | Pair,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of FP8 or FP4 queries against a paged key cache.

    q                FP8: e4m3 [batch, next_n, heads, dim], alone or as (q, None)
                     FP4: (int8 [batch, next_n, heads, dim / 2], int32 [batch, next_n, heads])
                     heads: multiples of 8 up to 64; dim: FP8 32, 64, 128, FP4 64, 128; next_n: any
    kv_cache         uint8 [pages, block_kv, 1, row + 4], row = dim or dim / 2 bytes. A page holds all its values
                     (block_kv x row bytes), then all its scales (block_kv x 4 bytes: fp32, or the packed UE8M0 word).
                     stride(0) may exceed the page; block_kv: multiples of 16
    weights          fp32 or bf16 [batch * next_n, heads]
    context_lens     int32 [batch, next_n]: token i of row b sees keys [0, context_lens[b, i]); or [batch]: it sees
                     context_lens[b] - next_n + i + 1 of them. Zero is fine
    block_table      int32 [batch, columns]: the pages of each row; entries past its length are never followed
    schedule_meta    int32 [slots + 1, 2], from `get_paged_mqa_logits_metadata` or any planner with the same contract
    max_context_len  columns of the result; no row is longer
    clean_logits     -inf past each row's length; otherwise what lies there is not touched
    logits_dtype     float32 or bfloat16
    indices          int32 [batch]: which sequence each row belongs to (next_n is 1); the result does not depend on it
    out              a tensor of the result's shape and dtype, of any row stride, that is written and returned

    Returns [batch * next_n, max_context_len], a view whose rows are a multiple of 1024 bytes apart.
    As the eighth positional argument a tensor or None is `indices` (sgl-deep-gemm 0.2.5, vLLM).
    """
    clean_logits, indices = _either_generation(clean_logits, indices)
    fp4, query = _query(q, 4)
    return _paged(
        fp4, query, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
        clean_logits, logits_dtype, indices, out,
    )  # fmt: skip


def _bounds_by_either_name(function: Callable) -> Callable:
    """Takes the bounds as `ks`, `ke` or as `cu_seq_len_k_start`, `cu_seq_len_k_end`; `function` has one pair."""
    short, long = ("ks", "ke"), ("cu_seq_len_k_start", "cu_seq_len_k_end")
    aliases = dict(zip(long, short) if "ks" in inspect.signature(function).parameters else zip(short, long))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        for alias, name in aliases.items():
            if alias in kwargs:
                if name in kwargs:
                    refuse(alias, kwargs[alias], f"one of {alias} and {name}, not both")
                kwargs[name] = kwargs.pop(alias)
        return function(*args, **kwargs)

    return call


@_bounds_by_either_name
def fp8_mqa_logits(
    q: torch.Tensor,
    kv: Pair,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    clean_logits: bool = False,
    max_seqlen_k: int = 0,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of FP8 queries against one run of FP8 keys, in fp32.

    As `fp8_fp4_mqa_logits` with an e4m3 `q`; the bounds may be given under the names it has for them.
    """
    clean_logits, max_seqlen_k = _either_generation_of_ragged(clean_logits, max_seqlen_k)
    fp4, query = _query(q, 3)
    if fp4:
        refuse("q", q, "e4m3; fp8_fp4_mqa_logits takes FP4")
    return _ragged(fp4, query, kv, weights, ks, ke, clean_logits, max_seqlen_k, torch.float32, out)


@_bounds_by_either_name
def fp8_fp4_mqa_logits(
    q: torch.Tensor | Pair,
    kv: Pair,
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool = False,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
    schedule_meta: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of FP8 or FP4 queries against one run of keys, of which row i sees [start[i], end[i]).

    q                   FP8: e4m3 [seq_len, heads, dim], alone or as (q, None)
                        FP4: (int8 [seq_len, heads, dim / 2], int32 [seq_len, heads])
    kv                  FP8: (e4m3 [seq_len_kv, dim], fp32 [seq_len_kv])
                        FP4: (int8 [seq_len_kv, dim / 2], int32 [seq_len_kv])
    weights             fp32 or bf16 [seq_len, heads]
    cu_seq_len_k_start  int32 [seq_len], also `ks`
    cu_seq_len_k_end    int32 [seq_len], also `ke`; start == end is an empty row
    clean_logits        -inf outside each row's range; otherwise what lies there is not touched
    max_seqlen_k        0: column n is key n. More: column n is key start[i] + n, and there are so many columns
    logits_dtype        float32 or bfloat16
    schedule_meta       taken for the callers' sake; the grid follows from the shapes
    out                 a tensor of the result's shape and dtype, of any row stride, that is written and returned

    Returns [seq_len, seq_len_kv], or [seq_len, max_seqlen_k], a view whose rows are a multiple of 1024 bytes apart.
    As the sixth positional argument an int is `max_seqlen_k`, and `schedule_meta` follows (sgl-deep-gemm 0.2.5, vLLM).
    """
    if isinstance(max_seqlen_k, torch.Tensor) or max_seqlen_k is None:
        max_seqlen_k = 0  # the seventh positional argument of 0.2.5 is schedule_meta
    clean_logits, max_seqlen_k = _either_generation_of_ragged(clean_logits, max_seqlen_k)
    fp4, query = _query(q, 3)
    return _ragged(
        fp4, query, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k, logits_dtype, out
    )


# ---- two generations of signatures ----------------------------------------------------------------------------------


def _either_generation(clean_logits: Any, indices: Any) -> tuple[bool, Any]:
    if isinstance(clean_logits, bool):
        return clean_logits, indices
    if clean_logits is not None and not isinstance(clean_logits, torch.Tensor):
        refuse("clean_logits", clean_logits, "a bool, or, in its place, indices: a tensor or None")
    if indices is not None:
        refuse("indices", indices, "to be given once; a tensor stands in the place of clean_logits already")
    return False, clean_logits


def _either_generation_of_ragged(clean_logits: Any, max_seqlen_k: Any) -> tuple[bool, int]:
    if isinstance(clean_logits, bool):
        return clean_logits, max_seqlen_k
    if not isinstance(clean_logits, int):
        refuse("clean_logits", clean_logits, "a bool, or, in its place, max_seqlen_k: an int")
    if max_seqlen_k != 0:
        refuse("max_seqlen_k", max_seqlen_k, "to be given once; an int stands in the place of clean_logits already")
    return False, clean_logits


# ---- arguments that several functions share -------------------------------------------------------------------------


class Query(NamedTuple):
    """Checked queries: values [..., heads, row bytes], scales (FP4) [..., heads]."""

    values: torch.Tensor
    scales: torch.Tensor | None
    device: torch.device
    shape: torch.Size  # of the values
    heads: int
    dim: int


def _query(q: Any, dimensions: int) -> tuple[bool, Query]:
    values, scales = q if isinstance(q, (tuple, list)) and len(q) == 2 else (q, None)
    fp4 = scales is not None
    if not isinstance(values, torch.Tensor):
        refuse("q", q, "a tensor, (tensor, None) or (tensor, scales)")
    if not (values.is_cpu or values.is_cuda):
        refuse("q", values, "a tensor on the CPU or a CUDA device")
    device = values.device
    checks.contiguous("q", checks.tensor("q", values, _PACKED_E2M1 if fp4 else _E4M3, _QUERY[dimensions, fp4], device))
    shape = values.shape
    heads, dim = shape[-2], shape[-1] * 2 if fp4 else shape[-1]
    if heads % 8 or not 8 <= heads <= 64:
        refuse("q", values, "8, 16, ... 64 heads")
    if dim not in DIMS[fp4]:
        refuse("q", values, f"a head dim among {DIMS[fp4]} in {'FP4' if fp4 else 'FP8'}")
    if fp4:
        checks.contiguous("q scales", checks.tensor("q scales", scales, _INT32, shape[:-1], device))
    return fp4, Query(values, scales, device, shape, heads, dim)


def _weights(weights: Any, rows: int, query: Query) -> torch.Tensor:
    checks.tensor("weights", weights, _REAL, (rows, query.heads), query.device)
    if weights.stride()[1] != 1:
        refuse("weights", weights, "stride 1 in the last dimension")
    return weights


def _lengths(context_lens: Any, device: Any, batch: int | Open = _BATCH, next_n: int | Open = _NEXT_N) -> None:
    one_dimensional = isinstance(context_lens, torch.Tensor) and context_lens.dim() == 1
    checks.tensor("context_lens", context_lens, _INT32, (batch,) if one_dimensional else (batch, next_n), device)
    checks.contiguous("context_lens", context_lens)


def _indices(indices: Any, context_lens: torch.Tensor) -> None:
    if indices is None:
        return
    checks.tensor("indices", indices, _INT32, context_lens.shape[:1], context_lens.device)
    if context_lens.dim() == 2 and context_lens.shape[1] != 1:
        refuse("context_lens", context_lens, "next_n = 1 where indices are given")


def _output(out: Any, rows: int, columns: int, dtype: Any, device: torch.device) -> torch.Tensor:
    if dtype not in _REAL:
        refuse("logits_dtype", dtype, "torch.float32 or torch.bfloat16")
    if out is not None:
        checks.tensor("out", out, (dtype,), (rows, columns), device)
        row_stride, column_stride = out.stride()
        if columns > 1 and column_stride != 1 or rows > 1 and row_stride < columns:
            refuse("out", out, "stride 1 in the last dimension and rows that do not overlap")
        return out
    per_row = _ROW_BYTES // dtype.itemsize
    return torch.empty((rows, -(-columns // per_row) * per_row), dtype=dtype, device=device)[:, :columns]


# ---- paged ----------------------------------------------------------------------------------------------------------


def _paged(
    fp4: bool, query: Query, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
    clean_logits, logits_dtype, indices, out,
) -> torch.Tensor:  # fmt: skip
    values, scales, device, (batch, next_n, _, row_bytes), heads, dim = query

    checks.tensor("kv_cache", kv_cache, (torch.uint8,), (_PAGES, _BLOCK_KV, 1, row_bytes + 4), device)
    pages, page, _, _ = kv_cache.shape
    if page % 16 or not 16 <= page <= _LARGEST_PAGE:
        refuse("kv_cache", kv_cache, f"pages of a multiple of 16 keys, up to {_LARGEST_PAGE}")
    page_bytes = page * (row_bytes + 4)
    page_stride, row_stride, _, byte_stride = kv_cache.stride()
    if pages <= 1:
        page_stride = page_bytes
    whole = row_stride == row_bytes + 4 and byte_stride == 1
    if not whole or not page_bytes <= page_stride < 2**32 or page_stride % 4:
        refuse("kv_cache", kv_cache, f"whole pages, a multiple of 4 bytes and at least {page_bytes} apart")
    _weights(weights, batch * next_n, query)
    _lengths(context_lens, device, batch, next_n)
    checks.tensor("block_table", block_table, _INT32, (batch, _COLUMNS), device)
    table_stride, entry_stride = block_table.stride()
    if entry_stride != 1 and block_table.shape[1] > 1 or batch * table_stride >= 2**31:
        refuse("block_table", block_table, "stride 1 in the last dimension, and rows within 2^31 entries")
    checks.tensor("schedule_meta", schedule_meta, _INT32, (_SLOTS, 2), device)
    slots = schedule_meta.shape[0] - 1
    if slots < 1 or not schedule_meta.is_contiguous():
        refuse("schedule_meta", schedule_meta, "a contiguous tensor [num_sms + 1, 2]")
    checks.integer("max_context_len", max_context_len)
    checks.boolean("clean_logits", clean_logits)
    _indices(indices, context_lens)
    if indices is not None and next_n != 1:
        refuse("q", values, "next_n = 1 where indices are given")
    out = _output(out, batch * next_n, max_context_len, logits_dtype, device)
    if out.numel() == 0:
        return out

    config = logits.configure(
        architecture_of(device), fp4, heads, dim, page, weights.dtype, logits_dtype,
        logits.few_rows(batch, slots), logits.alignment(values.data_ptr(), kv_cache.data_ptr(), page_stride),
    )  # fmt: skip
    # No key lies past what the table's columns hold.
    limit = min(max_context_len, block_table.shape[1] * page) if pages else 0
    windows = windows_of_lengths(context_lens, next_n, limit)
    logits.paged(
        config, slots,
        query=values, query_scales=scales, weights=weights, kv_cache=kv_cache, page_stride=page_stride,
        block_table=block_table, schedule_meta=schedule_meta, context_lens=context_lens, windows=windows, out=out,
    )  # fmt: skip
    if clean_logits:
        clean.clean(out, windows, {"context_lens": context_lens})
    return out


# ---- ragged ---------------------------------------------------------------------------------------------------------


def _ragged(
    fp4: bool, query: Query, kv, weights, starts, ends, clean_logits, max_seqlen_k, logits_dtype, out
) -> torch.Tensor:
    values, scales, device, (rows, _, row_bytes), heads, dim = query

    if not isinstance(kv, (tuple, list)) or len(kv) != 2:
        refuse("kv", kv, "(keys, scales)")
    keys, key_scales = kv
    checks.tensor("kv", keys, _PACKED_E2M1 if fp4 else _E4M3, (_KEYS, row_bytes), device)
    checks.contiguous("kv", keys)
    num_keys = keys.shape[0]
    checks.tensor("kv scales", key_scales, _INT32 if fp4 else (torch.float32,), (num_keys,), device)
    checks.contiguous("kv scales", key_scales)
    _weights(weights, rows, query)
    for name, bound in (("cu_seq_len_k_start", starts), ("cu_seq_len_k_end", ends)):
        checks.contiguous(name, checks.tensor(name, bound, _INT32, (rows,), device))
    checks.boolean("clean_logits", clean_logits)
    checks.integer("max_seqlen_k", max_seqlen_k)
    out = _output(out, rows, max_seqlen_k or num_keys, logits_dtype, device)
    if out.numel() == 0:
        return out

    config = logits.configure(
        architecture_of(device), fp4, heads, dim, 0, weights.dtype, logits_dtype,
        alignment=logits.alignment(values.data_ptr(), keys.data_ptr()),
    )  # fmt: skip
    windows = windows_of_bounds(starts, ends, num_keys)
    bounds = {"cu_seq_len_k_start": starts, "cu_seq_len_k_end": ends}
    logits.ragged(
        config, sms_to_use(device), max_seqlen_k,
        query=values, query_scales=scales, weights=weights, keys=keys, key_scales=key_scales,
        bounds=bounds, windows=windows, out=out,
    )  # fmt: skip
    if clean_logits:
        clean.clean(out, windows, bounds, compressed=max_seqlen_k > 0)
    return out
