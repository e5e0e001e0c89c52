"""The arguments that several functions take, checked alike in all of them, and the two generations of callers.

Functions are named after what they check; what a kernel needs to know of it is what they return. Every error is an
ArgumentError, which is a RuntimeError, raised before anything is launched or written.
"""

from typing import Any, NamedTuple

import torch

from . import checks
from .checks import Open, refuse

DIMS = {False: (32, 64, 128), True: (64, 128)}  # fp4 -> head dims
E4M3, PACKED_E2M1 = (torch.float8_e4m3fn,), (torch.int8, torch.uint8)
INT32, FP32, REAL = (torch.int32,), (torch.float32,), (torch.float32, torch.bfloat16)
LARGEST_PAGE = 2**16
LARGEST_K = 2048

_ROW_BYTES = 1024  # row strides of the logits are multiples of so many bytes
_BATCH, _NEXT_N, _ROWS, _HEADS = Open("batch"), Open("next_n"), Open("seq_len"), Open("heads")
_QUERY = {  # (dimensions, fp4) -> shape
    (4, False): (_BATCH, _NEXT_N, _HEADS, Open("dim")),
    (4, True): (_BATCH, _NEXT_N, _HEADS, Open("dim / 2")),
    (3, False): (_ROWS, _HEADS, Open("dim")),
    (3, True): (_ROWS, _HEADS, Open("dim / 2")),
}
_PAGES, _BLOCK_KV, _COLUMNS, _SLOTS, _KEYS = map(Open, ("pages", "block_kv", "columns", "num_sms + 1", "seq_len_kv"))
_WIDTH, _BYTES = Open("blocks of a row"), Open("bytes")

Pair = tuple[torch.Tensor, torch.Tensor | None]


class Query(NamedTuple):
    """Checked queries: values [..., heads, row bytes], scales (FP4 alone has them) [..., heads]."""

    fp4: bool
    values: torch.Tensor
    scales: torch.Tensor | None
    device: torch.device
    shape: torch.Size  # of the values
    heads: int
    dim: int


def pair(q: Any) -> tuple[Any, Any]:
    """Values and scales in `q`, FP8 without scales."""
    return q if isinstance(q, (tuple, list)) and len(q) == 2 else (q, None)


def query(q: Any, dimensions: int) -> Query:
    """The queries in `q`: FP4 if scales come with the values. `dimensions` of the values: 4 paged, 3 ragged."""
    values, scales = pair(q)
    fp4 = scales is not None
    if not isinstance(values, torch.Tensor):
        refuse("q", q, "a tensor, (tensor, None) or (tensor, scales)")
    device = checks.on_a_device("q", values)
    dtypes, shape = PACKED_E2M1 if fp4 else E4M3, values.shape
    if values.dtype not in dtypes or len(shape) != dimensions or not values.is_contiguous():
        checks.contiguous("q", checks.tensor("q", values, dtypes, _QUERY[dimensions, fp4], device))
    heads, dim = shape[-2], shape[-1] * 2 if fp4 else shape[-1]
    if heads % 8 or not 8 <= heads <= 64:
        refuse("q", values, "8, 16, ... 64 heads")
    if dim not in DIMS[fp4]:
        refuse("q", values, f"a head dim among {DIMS[fp4]} in {'FP4' if fp4 else 'FP8'}")
    if fp4:
        checks.contiguous("q scales", checks.tensor("q scales", scales, INT32, shape[:-1], device, "q"))
    return Query(fp4, values, scales, device, shape, heads, dim)


def mx_query(q: Any, dimensions: int) -> Query:
    """The queries in `q`, values and UE8M0 scales for every 32 of their 128 elements: packed e2m1, or e4m3 (MXFP8)."""
    if not isinstance(q, (tuple, list)) or len(q) != 2 or not all(isinstance(part, torch.Tensor) for part in q):
        refuse("q", q, "(values, scales)")
    values, scales = q
    device, fp4 = checks.on_a_device("q", values), values.dtype in PACKED_E2M1
    shape = _QUERY[dimensions, fp4]
    if dimensions == 4:
        shape = (_ROWS, 1, *shape[2:])
    checks.contiguous("q", checks.tensor("q", values, (*PACKED_E2M1, *E4M3), shape, device))
    heads, dim = values.shape[-2], values.shape[-1] * 2 if fp4 else values.shape[-1]
    if heads % 8 or not 8 <= heads <= 64:
        refuse("q", values, "8, 16, ... 64 heads")
    if dim != 128:
        refuse("q", values, "a head dim of 128")
    checks.contiguous("q scales", checks.tensor("q scales", scales, INT32, values.shape[:-1], device))
    return Query(fp4, values, scales, device, values.shape, heads, dim)


def weights(weights: Any, rows: int, heads: int, device: torch.device) -> torch.Tensor:
    """`weights`, fp32 or bf16 [rows, heads], of any row stride."""
    checks.tensor("weights", weights, REAL, (rows, heads), device, "q")
    if weights.stride()[1] != 1:
        refuse("weights", weights, "stride 1 in the last dimension")
    return weights


def key_pages(kv_cache: Any, row_bytes: int, device: torch.device, multiple: int = 16) -> tuple[int, int]:
    """Keys of a page, so many or a multiple, and bytes from page to page, of a cache uint8 [pages, block_kv, 1,
    row_bytes + 4]."""
    checks.tensor("kv_cache", kv_cache, (torch.uint8,), (_PAGES, _BLOCK_KV, 1, row_bytes + 4), device, "q")
    pages, page, _, _ = kv_cache.shape
    if page % multiple or not multiple <= page <= LARGEST_PAGE:
        refuse("kv_cache", kv_cache, f"pages of a multiple of {multiple} keys, up to {LARGEST_PAGE}")
    page_bytes = page * (row_bytes + 4)
    page_stride, row_stride, _, byte_stride = kv_cache.stride()
    if pages <= 1:
        page_stride = page_bytes
    whole = row_stride == row_bytes + 4 and byte_stride == 1
    if not whole or not page_bytes <= page_stride < 2**32 or page_stride % 4:
        refuse("kv_cache", kv_cache, f"whole pages, a multiple of 4 bytes and at least {page_bytes} apart")
    return page, page_stride


def block_table(block_table: Any, rows: int, device: torch.device, other: str = "q") -> torch.Tensor:
    """`block_table`, int32 [rows, columns], of any row stride, zero too, that keeps it within 2^31 entries."""
    checks.tensor("block_table", block_table, INT32, (rows, _COLUMNS), device, other)
    table_stride, entry_stride = block_table.stride()
    if entry_stride != 1 and block_table.shape[1] > 1 or rows * table_stride >= 2**31:
        refuse("block_table", block_table, "stride 1 in the last dimension, and rows within 2^31 entries")
    return block_table


def lengths(
    context_lens: Any, device: torch.device | None = None, batch: int | Open = _BATCH, next_n: int | Open = _NEXT_N
) -> torch.Tensor:
    """`context_lens`, contiguous int32 [batch] or [batch, next_n]; without `device`, on any."""
    one_dimensional, other = False, "q" if device else ""
    if isinstance(context_lens, torch.Tensor):
        one_dimensional = context_lens.dim() == 1
        device = device or checks.on_a_device("context_lens", context_lens)
    shape = (batch,) if one_dimensional else (batch, next_n)
    checks.tensor("context_lens", context_lens, INT32, shape, device, other)
    return checks.contiguous("context_lens", context_lens)


def indices(indices: Any, context_lens: torch.Tensor) -> None:
    """None, or int32 [batch] where `context_lens` have one token a row."""
    if indices is None:
        return
    checks.tensor("indices", indices, INT32, context_lens.shape[:1], context_lens.device, "context_lens")
    if context_lens.dim() == 2 and context_lens.shape[1] != 1:
        refuse("context_lens", context_lens, "next_n = 1 where indices are given")


def schedule(schedule_meta: Any, device: torch.device) -> int:
    """Slots of a schedule, contiguous int32 [slots + 1, 2]."""
    checks.tensor("schedule_meta", schedule_meta, INT32, (_SLOTS, 2), device)
    slots = schedule_meta.shape[0] - 1
    if slots < 1 or not schedule_meta.is_contiguous() or schedule_meta.data_ptr() % 8:  # read by pairs
        refuse("schedule_meta", schedule_meta, "a contiguous tensor [num_sms + 1, 2] at a multiple of 8 bytes")
    return slots


def block_lists(lists: Any, rows: int | Open, device: torch.device, block: int, other: str = "") -> torch.Tensor:
    """`sparse_kv_block_indices`, int32 [rows, width], of any row stride, of blocks of `block` keys."""
    name = "sparse_kv_block_indices"
    checks.tensor(name, lists, INT32, (rows, _WIDTH), device, other)
    rows, width = lists.shape
    row_stride, entry_stride = lists.stride()
    if width < 1 or width > 1 and entry_stride != 1 or row_stride < 0:
        refuse(name, lists, "rows of at least one block, with stride 1 in the last dimension")
    if -(-width * block // 256) * max(rows, 1) >= 2**31 or width * block >= 2**31:
        refuse(name, lists, "fewer than 2^31 columns in a row, and than 2^39 in all")
    return lists


def sparse_block(sparse_block_kv: Any) -> int:
    """Keys of a listed block."""
    if checks.integer("sparse_block_kv", sparse_block_kv, 8, 64) % 8:
        refuse("sparse_block_kv", sparse_block_kv, "a multiple of 8")
    return sparse_block_kv


def qk_dtype(qk_dtype: Any) -> None:
    """What queries and keys are: places of blocks do not depend on it."""
    if qk_dtype not in (*PACKED_E2M1, *E4M3):
        refuse("qk_dtype", qk_dtype, "torch.int8 (packed e2m1) or torch.float8_e4m3fn")


def sparse_metadata(metadata: Any, size: int, device: torch.device) -> torch.Tensor:
    """`metadata` of sparse logits: at least `size` bytes, at a multiple of 16."""
    checks.tensor("metadata", metadata, (torch.uint8,), (_BYTES,), device)
    if metadata.shape[0] < size or not metadata.is_contiguous() or metadata.data_ptr() % 16:
        refuse("metadata", metadata, f"at least {size} bytes one after another, beginning at a multiple of 16")
    return metadata


def key_run(
    kv: Any, fp4: bool, row_bytes: int, device: torch.device, mx: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [seq_len_kv, row_bytes] and their scales [seq_len_kv] in `kv`: e4m3 and fp32, or packed e2m1 and int32, or
    (`mx`) e4m3 and int32."""
    if not isinstance(kv, (tuple, list)) or len(kv) != 2:
        refuse("kv", kv, "(keys, scales)")
    keys, scales = kv
    checks.contiguous("kv", checks.tensor("kv", keys, PACKED_E2M1 if fp4 else E4M3, (_KEYS, row_bytes), device, "q"))
    if keys.shape[0] >= 2**31:
        refuse("kv", keys, "fewer than 2^31 keys")
    checks.tensor("kv scales", scales, INT32 if fp4 or mx else FP32, keys.shape[:1], device, "kv")
    return keys, checks.contiguous("kv scales", scales)


def bounds(
    starts: Any,
    ends: Any,
    rows: int,
    device: torch.device,
    names: tuple[str, str] = ("cu_seq_len_k_start", "cu_seq_len_k_end"),
    other: str = "q",
) -> dict[str, torch.Tensor]:
    """The bounds of each row's keys by name, contiguous int32 [rows] both."""
    named = dict(zip(names, (starts, ends)))
    for name, bound in named.items():
        checks.contiguous(name, checks.tensor(name, bound, INT32, (rows,), device, other))
    return named


def logits_dtype(dtype: Any) -> None:
    """What logits are stored as."""
    if dtype not in REAL:
        refuse("logits_dtype", dtype, "torch.float32 or torch.bfloat16")


def output(out: Any, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Where the logits go, [rows, columns], or None. Nothing is differentiated."""
    if out is None:
        return
    checks.tensor("out", out, (dtype,), (rows, columns), device)
    row_stride, column_stride = out.stride()
    if out.requires_grad:
        refuse("out", out, "a tensor that requires no grad")
    if columns > 1 and column_stride != 1 or rows > 1 and row_stride < columns:
        refuse("out", out, "stride 1 in the last dimension and rows that do not overlap")


def new_output(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Where the logits of a caller go who brings nothing for them: rows are a multiple of 1024 bytes apart."""
    per_row = _ROW_BYTES // dtype.itemsize
    return torch.empty((rows, -(-columns // per_row) * per_row), dtype=dtype, device=device)[:, :columns]


def block_max(block_max: Any, rows: int, columns: int, device: torch.device) -> None:
    """Where the maxima of blocks of 8 columns of the logits go, fp32 [rows, ceil(columns / 8)], or None."""
    if block_max is None:
        return
    checks.tensor("block_max", block_max, FP32, (rows, -(-columns // 8)), device, "out")
    row_stride, column_stride = block_max.stride()
    if block_max.requires_grad:
        refuse("block_max", block_max, "a tensor that requires no grad")
    if columns > 8 and column_stride != 1 or rows > 1 and row_stride < block_max.shape[1]:
        refuse("block_max", block_max, "stride 1 in the last dimension and rows that do not overlap")


# ---- two generations of callers -------------------------------------------------------------------------------------
# sgl-deep-gemm 0.2.3 and DeepGEMM's main; sgl-deep-gemm 0.2.5 and vLLM. They differ in what comes after
# `max_context_len` and after the bounds; the types tell them apart, and what fits neither is refused.


def of_either_generation(clean_logits: Any, indices: Any) -> tuple[bool, Any]:
    """`clean_logits` and `indices` of a paged call; the second generation has `indices` in the first's place."""
    if isinstance(clean_logits, bool):
        return clean_logits, indices
    if clean_logits is not None and not isinstance(clean_logits, torch.Tensor):
        refuse("clean_logits", clean_logits, "a bool, or, in its place, indices: a tensor or None")
    if indices is not None:
        refuse("indices", indices, "to be given once; a tensor stands in the place of clean_logits already")
    return False, clean_logits


def of_either_generation_ragged(clean_logits: Any, max_seqlen_k: Any) -> tuple[bool, Any]:
    """`clean_logits` and `max_seqlen_k` of a ragged call; the second generation has `max_seqlen_k` in the first's
    place."""
    if isinstance(clean_logits, bool):
        return clean_logits, max_seqlen_k
    if not isinstance(clean_logits, int):
        refuse("clean_logits", clean_logits, "a bool, or, in its place, max_seqlen_k: an int")
    if max_seqlen_k != 0:
        refuse("max_seqlen_k", max_seqlen_k, "to be given once; an int stands in the place of clean_logits already")
    return False, clean_logits
