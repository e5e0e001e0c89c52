"""Logits against a paged key cache, and the schedule that they work by."""

import torch

from . import arguments, checks, debug, jit
from .checks import refuse
from .kernels import clean, logits, metadata
from .kernels.windows import windows_of_lengths


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, block_kv: int, num_sms: int, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """Plans paged logits: which 256-key splits of which rows each of `num_sms` blocks takes.

    context_lens  int32 [batch] or [batch, next_n], contiguous: keys of each row; a row is as long as its longest token.
                  Less than zero is zero, and what is so long that all rows' splits would not count in 31 bits is cut
    block_kv      keys of a page, a multiple of 16
    num_sms       slots to plan for
    indices       int32 [batch]: which sequence each row belongs to; checked only, since rows are planned one by one

    Returns int32 [num_sms + 1, 2]: slot j works from entry j, (row, split), up to entry j + 1, in the list of all
    splits, rows in order. With T splits the first num_sms - T % num_sms slots get T // num_sms of them, the others one
    more; past the last split an entry is (batch, 0). Any batch size; graph-safe.
    """
    arguments.lengths(context_lens)
    if checks.integer("block_kv", block_kv, 16, arguments.LARGEST_PAGE) % 16:
        refuse("block_kv", block_kv, "a multiple of 16")
    checks.integer("num_sms", num_sms, 1, 2**24)
    arguments.indices(indices, context_lens)
    if debug.ON:
        debug.lengths(context_lens)
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
    block_max: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of FP8 queries against a paged FP8 key cache, in fp32.

    As `fp8_fp4_paged_mqa_logits` with an e4m3 `q`.
    """
    clean_logits, indices = arguments.of_either_generation(clean_logits, indices)
    if arguments.pair(q)[1] is not None:
        refuse("q", q, "e4m3; fp8_fp4_paged_mqa_logits takes FP4")
    return paged_logits(
        q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
        clean_logits, torch.float32, indices, out, block_max,
    )  # fmt: skip


def fp8_fp4_paged_mqa_logits(
    q: torch.Tensor | arguments.Pair,
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
    block_max: torch.Tensor | None = None,
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
                     context_lens[b] - next_n + i + 1 of them. Zero is fine; less is zero, and what exceeds
                     max_context_len or the columns of block_table is cut
    block_table      int32 [batch, columns]: the pages of each row; entries past its length are never followed, and a
                     page that the cache does not have is taken for its last one
    schedule_meta    int32 [slots + 1, 2], from `get_paged_mqa_logits_metadata` or any planner with the same contract;
                     what another one leaves out may stay unwritten
    max_context_len  columns of the result; no row is longer
    clean_logits     -inf past each row's length; otherwise what lies there is not touched
    logits_dtype     float32 or bfloat16
    indices          int32 [batch]: which sequence each row belongs to (next_n is 1); the result does not depend on it
    out              a tensor of the result's shape and dtype, of any row stride, that is written and returned
    block_max        fp32 [batch * next_n, ceil(max_context_len / 8)], of any row stride, written in the same pass: the
                     largest logit of keys 8b to 8b + 7, those of them that the row sees; +inf for the block with its
                     last key, the newest. NaN counts only where nothing else is in a block; blocks without keys that
                     the row sees are not touched. The logits are those that are stored, bf16 ones too

    Returns [batch * next_n, max_context_len], a view whose rows are a multiple of 1024 bytes apart.
    As the eighth positional argument a tensor or None is `indices` (sgl-deep-gemm 0.2.5, vLLM).
    """
    clean_logits, indices = arguments.of_either_generation(clean_logits, indices)
    return paged_logits(
        q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
        clean_logits, logits_dtype, indices, out, block_max,
    )  # fmt: skip


_known = checks.Known()


def paged_logits(
    q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
    clean_logits, logits_dtype, indices, out, block_max, least=0, fronts=None, translate=False,
) -> torch.Tensor:  # fmt: skip
    """The same without defaults; tokens that see no more than `least` keys are left out. Of one token, blocks leave in
    `fronts` what the choice is made from, if that is given (`translate`: with places in the cache)."""
    checks.integer("max_context_len", max_context_len)
    arguments.logits_dtype(logits_dtype)
    values, scales = arguments.pair(q)
    inputs = {
        "q": values,
        "weights": weights,
        "kv_cache": kv_cache,
        "context_lens": context_lens,
        "block_table": block_table,
        "schedule_meta": schedule_meta,
        "q scales": scales,
        "indices": indices,
    }
    tensors = *inputs.values(), out, block_max
    asked = q, inputs, max_context_len, logits_dtype, out, block_max, least, fronts is not None
    try:
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        layouts, arch = checks.layouts(tensors), jit.architecture_of(values.device)
        aligned = (addresses[0] | addresses[2]) & 31, addresses[5] & 7
        call = layouts, aligned, max_context_len, logits_dtype, least, fronts is not None, arch
    except (AttributeError, IndexError, RuntimeError):
        _check(*asked)  # says what is wrong
        raise
    shape, sizes, plan = _known.get(call) or _known.keep(call, _check(*asked))
    if plan is not None:
        checks.memory_at(addresses, sizes, inputs, {"logits": out, "block_max": block_max})
        if debug.ON:
            pages, page = kv_cache.shape[0], plan.config.page
            debug.paged(context_lens, block_table, schedule_meta, pages=pages, page=page, limit=max_context_len)
    if out is None:
        out = arguments.new_output(*shape, logits_dtype, values.device)
    if plan is not None:
        windows = logits.paged(plan, inputs, addresses, out, block_max, fronts, translate)
        if clean_logits:
            clean.clean(out, windows, {"context_lens": context_lens})
    return out


def _check(
    q, inputs, max_context_len, dtype, out, block_max, least, fronts
) -> tuple[tuple[int, int], list[int], logits.Plan | None]:
    """Refuses what a call cannot be made with. Returns the result's shape, all tensors' sizes in bytes, and, unless
    nothing is to be done, how the call is made."""
    query = arguments.query(q, 4)
    _, values, _, device, (batch, next_n, _, row_bytes), heads, _ = query
    _, weights, kv_cache, context_lens, block_table, schedule_meta, _, indices = inputs.values()
    page, page_stride = arguments.key_pages(kv_cache, row_bytes, device)
    arguments.weights(weights, batch * next_n, heads, device)
    arguments.lengths(context_lens, device, batch, next_n)
    arguments.block_table(block_table, batch, device)
    slots = arguments.schedule(schedule_meta, device)
    arguments.indices(indices, context_lens)
    if indices is not None and next_n != 1:
        refuse("q", values, "next_n = 1 where indices are given")
    shape = batch * next_n, max_context_len
    arguments.output(out, *shape, dtype, device)
    arguments.block_max(block_max, *shape, device)
    sizes = checks.sizes(*inputs.values(), out, block_max)
    if 0 in shape:
        return shape, sizes, None
    # No key lies past what the table's columns hold, or in a cache without pages.
    limit = min(max_context_len, block_table.shape[1] * page) if kv_cache.shape[0] else 0
    windows = windows_of_lengths(context_lens, next_n, limit, least)
    plan = logits.plan_paged(
        jit.architecture_of(device), query, weights, kv_cache, page, page_stride, block_table, slots, windows, dtype,
        block_max, fronts,
    )  # fmt: skip
    return shape, sizes, plan
