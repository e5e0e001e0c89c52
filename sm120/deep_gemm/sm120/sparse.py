"""Logits of listed blocks of keys (DeepSeek-V4.1's candidates), and the metadata that they work by.

    logits[row, j * block + o] = sum_h weights[row, h] * relu(q[row, h] . key o of the row's jth block)

Queries and keys are MXFP4 or MXFP8: packed e2m1 or e4m3, times 2^(byte - 127) for every 32 of the 128 elements, the
scale bytes of a row standing in one int32. Which blocks a row has stands in the metadata, and so does where they lie:
lists and block tables are not read again. One piece of metadata serves all layers of a step.

Length of a row: of a run of N keys, a = min(max(ks, 0), N), b = max(a, min(ke, N)), length b - a; of a cache, its
context length, from 0 to what the columns of the block table hold. The first n = min(width, ceil(length / block))
entries of its list count; what follows is never looked at. Each entry stands for itself, so repeats and any order are
fine. All n * block columns are written, those of keys past the length too; nothing past them is.

Rounding: products and sums are fp32, and the sum over heads is rounded to bf16 once: as near to the exact sum as bf16
comes. (DeepGEMM's SM100 kernels also round each head's relu, and every partial sum of four chains over the heads, which
makes their error two to three times as large.)
"""

import torch

from . import arguments, checks, debug, jit
from .checks import refuse
from .kernels import logits, sparse
from .kernels.windows import windows_of_bounds, windows_of_lengths
from .settings import sms_to_use


def get_sparse_mqa_logits_metadata(
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    num_kv_tokens: int,
    sparse_kv_block_indices: torch.Tensor,
    qk_dtype: torch.dtype,
    sparse_block_kv: int,
    use_unaligned_ks: bool = False,
) -> torch.Tensor:
    """What `fp8_fp4_sparse_mqa_logits` needs to know of each row's blocks in one run of keys.

    cu_seq_len_k_start       int32 [rows], contiguous: ks, the row's first key
    cu_seq_len_k_end         int32 [rows], contiguous: ke, one past its last
    num_kv_tokens            keys of the run, N
    sparse_kv_block_indices  int32 [rows, width], any row stride: block i is keys i * block, i * block + 1, ... of the
                             run, or, with `use_unaligned_ks`, those ks % block further on
    qk_dtype                 torch.int8 (MXFP4) or torch.float8_e4m3fn (MXFP8); the metadata are the same
    sparse_block_kv          keys of a block: 8, 16, ... 64
    use_unaligned_ks         whether blocks begin at ks % block; else ks is taken for a multiple of it

    Returns uint8 [192 + rows * (16 + 4 * width)], width rounded up to a multiple of 4: it may be copied byte by byte
    into a larger buffer that begins at a multiple of 16. Made from what is on the device alone; graph-safe.
    """
    arguments.qk_dtype(qk_dtype)
    block = arguments.sparse_block(sparse_block_kv)
    if not isinstance(cu_seq_len_k_start, torch.Tensor) or cu_seq_len_k_start.dim() != 1:
        refuse("cu_seq_len_k_start", cu_seq_len_k_start, "an int32 tensor [rows]")
    rows, device = cu_seq_len_k_start.shape[0], checks.on_a_device("cu_seq_len_k_start", cu_seq_len_k_start)
    bounds = arguments.bounds(cu_seq_len_k_start, cu_seq_len_k_end, rows, device, other="cu_seq_len_k_start")
    checks.integer("num_kv_tokens", num_kv_tokens)
    lists = arguments.block_lists(sparse_kv_block_indices, rows, device, block, "cu_seq_len_k_start")
    checks.boolean("use_unaligned_ks", use_unaligned_ks)
    if debug.ON:
        debug.ragged(*bounds.values(), keys=num_kv_tokens)
        debug.lists(lists, cu_seq_len_k_start, cu_seq_len_k_end, block=block)
    metadata = torch.empty(sparse.size(*lists.shape), dtype=torch.uint8, device=device)
    windows = windows_of_bounds(cu_seq_len_k_start, cu_seq_len_k_end, num_kv_tokens)
    sparse.list_blocks(metadata, windows, bounds, lists, block, unaligned=use_unaligned_ks)
    return metadata


def get_paged_sparse_mqa_logits_metadata(
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    indices: torch.Tensor | None,
    page_kv: int,
    sparse_kv_block_indices: torch.Tensor,
    qk_dtype: torch.dtype,
    sparse_block_kv: int,
) -> torch.Tensor:
    """What `fp8_fp4_paged_sparse_mqa_logits` needs to know of each row's blocks in a paged cache.

    context_lens             int32 of any shape, contiguous: the length of each row
    block_table              int32 [rows, columns], any row stride, zero too: the pages of each row. A page that the
                             cache will not have is taken for the cache's last block
    indices                  int32 [rows] or None: which request each row belongs to; checked only
    page_kv                  keys of a page, a multiple of the block
    sparse_kv_block_indices  int32 [rows, width], any row stride: block i is keys i * block, i * block + 1, ... of the
                             row's context; past the table's columns it lies on the last one's page
    qk_dtype                 torch.int8 (MXFP4) or torch.float8_e4m3fn (MXFP8); the metadata are the same
    sparse_block_kv          keys of a block: 8, 16, ... 64

    Returns the same as `get_sparse_mqa_logits_metadata`.
    """
    arguments.qk_dtype(qk_dtype)
    block = arguments.sparse_block(sparse_block_kv)
    if checks.integer("page_kv", page_kv, 1, arguments.LARGEST_PAGE) % block:
        refuse("page_kv", page_kv, f"a multiple of {block}, the keys of a block")
    if not isinstance(context_lens, torch.Tensor):
        refuse("context_lens", context_lens, "an int32 tensor")
    rows, device = context_lens.numel(), checks.on_a_device("context_lens", context_lens)
    checks.tensor("context_lens", context_lens, arguments.INT32, context_lens.shape, device)
    checks.contiguous("context_lens", context_lens)
    arguments.block_table(block_table, rows, device, "context_lens")
    if indices is not None:
        checks.tensor("indices", indices, arguments.INT32, (rows,), device, "context_lens")
    lists = arguments.block_lists(sparse_kv_block_indices, rows, device, block, "context_lens")
    if debug.ON:
        debug.paged_lists(lists, context_lens, block_table, page=page_kv, block=block)
    metadata = torch.empty(sparse.size(*lists.shape), dtype=torch.uint8, device=device)
    limit = min(block_table.shape[1] * page_kv, 2**31 - 1)
    windows = windows_of_lengths(context_lens.view(-1), 1, limit)
    bounds = {"context_lens": context_lens}
    sparse.list_blocks(metadata, windows, bounds, lists, block, page=page_kv, block_table=block_table)
    return metadata


def fp8_fp4_sparse_mqa_logits(
    q: arguments.Pair,
    kv: arguments.Pair,
    weights: torch.Tensor,
    metadata: torch.Tensor,
    num_max_sparse_blocks: int,
    sparse_block_kv: int,
    use_unaligned_ks: bool = False,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of each row's listed blocks of one run of keys.

    q                      MXFP4: (int8 [rows, heads, 64], int32 [rows, heads]); MXFP8: (e4m3 [rows, heads, 128], the
                           same). heads: multiples of 8 up to 64
    kv                     (int8 [N, 64], int32 [N]) or (e4m3 [N, 128], int32 [N])
    weights                bf16 or fp32 [rows, heads], any row stride
    metadata               uint8, one-dimensional, from `get_sparse_mqa_logits_metadata` for the same sizes, or longer
    num_max_sparse_blocks  width of the lists
    sparse_block_kv        keys of a block
    use_unaligned_ks       as the metadata were made
    out                    a tensor of the result's shape and dtype, of any row stride, that is written and returned

    Returns bf16 [rows, width * block], a view whose rows are a multiple of 1024 bytes apart. Keys past the run count as
    zeros.

    Metadata that are too short, of another type or badly placed are refused. What they say can be seen on the device
    alone: rows that were not made for these sizes have no keys, so their logits are not written, and no place leads
    outside the keys.
    """
    query = arguments.mx_query(q, 3)
    keys, key_scales = arguments.key_run(kv, query.fp4, query.shape[-1], query.device, mx=True)
    checks.boolean("use_unaligned_ks", use_unaligned_ks)
    return _sparse(
        query, {"kv": keys, "kv scales": key_scales}, 0, 0, keys.shape[0],
        weights, metadata, num_max_sparse_blocks, arguments.sparse_block(sparse_block_kv), use_unaligned_ks, out,
    )  # fmt: skip


def fp8_fp4_paged_sparse_mqa_logits(
    q: arguments.Pair,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    metadata: torch.Tensor,
    num_max_sparse_blocks: int,
    sparse_block_kv: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of each row's listed blocks of a paged cache.

    q                      MXFP4: (int8 [rows, 1, heads, 64], int32 [rows, 1, heads]); MXFP8: (e4m3 [rows, 1, heads,
                           128], the same). heads: multiples of 8 up to 64
    kv_cache               uint8 [pages, page_kv, 1, row + 4], row = 64 or 128 bytes. A page holds all its values
                           (page_kv x row bytes), then all its scales (page_kv x 4 bytes). stride(0) may exceed the
                           page; page_kv: a multiple of the block
    weights                bf16 or fp32 [rows, heads], any row stride
    metadata               uint8, one-dimensional, from `get_paged_sparse_mqa_logits_metadata` for the same sizes, or
                           longer
    num_max_sparse_blocks  width of the lists
    sparse_block_kv        keys of a block
    out                    a tensor of the result's shape and dtype, of any row stride, that is written and returned

    Returns bf16 [rows, width * block], and treats bad metadata, as `fp8_fp4_sparse_mqa_logits` does.
    """
    return paged_sparse_logits(
        arguments.mx_query(q, 4), kv_cache, weights, metadata, num_max_sparse_blocks, sparse_block_kv, out
    )


def paged_sparse_logits(
    query: arguments.Query, kv_cache, weights, metadata, num_max_sparse_blocks, sparse_block_kv, out, least=0
) -> torch.Tensor:
    """The same of checked queries; rows of no more than `least` columns are left out."""
    block = arguments.sparse_block(sparse_block_kv)
    page, page_stride = arguments.key_pages(kv_cache, query.shape[-1], query.device, block)
    places = kv_cache.shape[0] * (page // block)
    if places >= 2**32:
        refuse("kv_cache", kv_cache, "fewer than 2^32 blocks")
    return _sparse(
        query, {"kv_cache": kv_cache}, page, page_stride, places,
        weights, metadata, num_max_sparse_blocks, block, False, out, least,
    )  # fmt: skip


def _sparse(
    query: arguments.Query, keys: dict[str, torch.Tensor], page, page_stride, places,
    weights, metadata, width, block, unaligned, out, least=0,
) -> torch.Tensor:  # fmt: skip
    fp4, values, scales, device, (rows, *_), heads, dim = query
    arguments.weights(weights, rows, heads, device)
    checks.integer("num_max_sparse_blocks", width, 1, (2**31 - 1) // block)
    arguments.sparse_metadata(metadata, sparse.size(rows, width), device)
    arguments.output(out, rows, width * block, torch.bfloat16, device)
    if out is None:
        out = arguments.new_output(rows, width * block, torch.bfloat16, device)
    if rows == 0 or places == 0:
        return out

    if debug.ON:
        debug.sparse_metadata(metadata, None, **sparse.sizes(rows, width, block, page, unaligned), places=places)
    slots = sms_to_use(device)
    eights = logits.eights(rows, width * block, slots)
    addresses = (tensor.data_ptr() for tensor in (values, *keys.values()))
    config = logits.configure(
        jit.architecture_of(device), fp4, heads, dim, page, weights.dtype, torch.bfloat16,
        not eights and logits.few_rows(rows, 1, slots), alignment=logits.alignment(*addresses, page_stride),
        block=block, eights=eights,
    )  # fmt: skip
    sparse.sparse(
        config, slots,
        query=values, query_scales=scales, weights=weights, keys=keys, page_stride=page_stride, places=places,
        metadata=metadata, width=width, unaligned=unaligned, out=out, least=least,
    )  # fmt: skip
    return out
