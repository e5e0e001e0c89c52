"""The indexer's second half: which keys each row attends to. Each function: check, allocate, configure, launch.

The k largest of a row's logits: of equal ones those of smaller positions; -0 equals +0, and NaN ranks below everything.
A row of at most k keys gives all of its positions. Exact whatever the values are: where many of them fall together it
takes longer, and gives the same. The order within a row is not promised; two runs are bitwise equal.

Every error is an ArgumentError, which is a RuntimeError, raised before anything is launched or written.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import arguments, checks, debug
from .arguments import LARGEST_K
from .checks import Open, refuse
from .kernels import carry, listed_columns, metadata, sparse
from .kernels import topk as kernels
from .kernels.logits import fronts_bytes, leaves_fronts
from .kernels.windows import NO_LIMIT, Windows, windows_of_bounds, windows_of_lengths
from .paged import paged_logits
from .ragged import ragged_logits
from .settings import sms_to_use
from .sparse import paged_sparse_logits

_ROWS, _COLUMNS, _PAGES = Open("rows"), Open("columns"), Open("pages")
_INT32, _REAL = (torch.int32,), (torch.float32, torch.bfloat16)
_LOGITS_BYTES = 2**16  # of a row on average, that a prefill keeps for a while, and what goes with them
_LEAST_ROWS = 64  # that it scores at once if it takes all of their keys: with fewer, pieces of all rows' are faster
_PIECE = 256  # keys: what a piece has a multiple of, at least


def topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    starts: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    page: int = 1,
    offset: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The k largest logits of each row, as positions or as places in pages.

    logits       fp32 or bf16 [rows, columns], stride 1 in the last dimension; rows may be any distance apart
    lengths      int32 [rows]: row i chooses among `lengths[i]` columns from `starts[i]` on, none of them past the last;
                 what lies outside is never looked at. Less than 0 is 0, of starts too. The cost follows the lengths,
                 not the width
    k            1 to 2,048
    starts       int32 [rows]; without it 0. Positions count from there
    block_table  int32 [rows, columns], stride 1 in the last dimension: position p becomes
                 block_table[row, p // page] * page + p % page; pages past its columns are taken for the last one
    page         keys of a page
    offset       int32 [rows], added to the results of each row
    out          int32 [rows, k] of any row stride, written and returned
    positions    int32 [rows, k], written: the plain positions, in the same order
    scores       float32 [rows, k], written: their logits (-0 as 0), -inf past the end; without it the logits of a row
                 of at most k keys are not read
    workspace    uint8, contiguous, of at least `topk_workspace_bytes(...)` bytes, aligned to 16; its content does
                 not matter. Calls that may run at the same time need one each. Without it one is allocated

    Returns int32 [rows, k]; past the length of a row it is -1. Graph-safe; nothing is synchronised.
    """
    rows, columns, device = _chosen_from("logits", logits, _REAL)
    checks.contiguous("lengths", checks.tensor("lengths", lengths, _INT32, (rows,), device, "logits"))
    checks.integer("k", k, 1, LARGEST_K)
    if starts is not None:
        checks.contiguous("starts", checks.tensor("starts", starts, _INT32, (rows,), device))
    _places(block_table, page, offset, rows, device)
    out = _results(out, positions, scores, rows, k, device)
    if rows == 0:
        return out

    if debug.ON:
        debug.choice(lengths, starts, block_table, offset, name="lengths", columns=columns, page=page)
    config, parts = kernels.configure(logits.dtype, k, rows, columns, sms_to_use(device))
    workspace = _workspace(workspace, kernels.workspace_bytes(config, rows, parts), device)
    inputs = {"logits": logits, "lengths": lengths, "starts": starts, "block_table": block_table, "offset": offset}
    _memory(inputs, out=out, positions=positions, scores=scores, workspace=workspace)
    starts_pointer = None if starts is None else starts.data_ptr()
    kernels.topk(
        config, parts,
        logits=logits, windows=Windows(starts_pointer, lengths.data_ptr(), rows, 1, 1, NO_LIMIT), ends_are_lengths=True,
        bounds={"lengths": lengths, "starts": starts}, k=k, page=page, block_table=block_table, offset=offset,
        workspace=workspace, out=out, positions=positions, scores=scores,
    )  # fmt: skip
    return out


def candidate_blocks(
    block_max: torch.Tensor,
    context_lens: torch.Tensor,
    width: int = LARGEST_K,
    *,
    block: int = 8,
    starts: torch.Tensor | None = None,
    compressed: bool = False,
    block_table: torch.Tensor | None = None,
    page: int = 64,
    out: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The candidates of a sparse indexer: of each row the `width` blocks of keys whose largest logits are the largest.

    block_max     fp32 [rows, columns], stride 1 in the last dimension: the maximum of each block's logits, as
                  `block_max` of the logits functions has it: the newest block is +inf, so that it is a candidate
    context_lens  int32, `rows` elements of any rank, contiguous: keys of each row; less than 0 is 0
    width         of the lists, 1 to 2,048
    block         keys of a block
    starts        int32 [rows]: rows within one run of keys; row i has keys starts[i] .. starts[i] + context_lens[i].
                  Without it rows begin at key 0. Blocks are those of the run, block b its keys b * block to
                  b * block + block - 1, whether the row sees all of them or, at its ends, only some
    compressed    with starts: column 0 is the block with the row's first key, as beside compressed logits; else
                  column b is block b. Blocks past the last column are no candidates: where rows do not begin at
                  multiples of `block`, max_seqlen_k has to be up to block - 1 more than the longest row
    block_table   int32 [rows, columns], stride 1 in the last dimension, and
    page          keys of a page, a multiple of `block`: only for `pages`. Pages past the columns are taken for the last
    out           int32 [rows, width] of any row stride, written and returned
    pages         int32 [rows, width], written: block b as block_table[row, b // n] * n + b % n with n = page / block,
                  which is its place in the cache, in blocks
    workspace     as in `topk`, `topk_workspace_bytes(rows, columns, width)`

    Returns int32 [rows, width]: ascending, 2^31 - 1 past the end, as the sparse logits functions take them. A row of at
    most `width` blocks has all of them. Graph-safe; nothing is synchronised.

    With starts the sparse functions of a run take the lists with `use_unaligned_ks=False`, and as
    `cu_seq_len_k_start` the row's first block's first key, starts - starts % block (as its end, too, if the row has no
    keys), so that they count all of its blocks. In a list's first and last block may be keys that the row does not see:
    `topk` of those logits leaves them out by its `starts` and `lengths`.
    """
    rows, columns, device = _chosen_from("block_max", block_max, (torch.float32,))
    _lengths_of_rows(context_lens, rows, device)
    checks.integer("width", width, 1, LARGEST_K)
    checks.integer("block", block, 1, 2**16)
    if starts is not None:
        checks.contiguous("starts", checks.tensor("starts", starts, _INT32, (rows,), device))
    checks.boolean("compressed", compressed)
    if checks.integer("page", page, 1) % block:
        refuse("page", page, f"a multiple of {block}")
    if (block_table is None) != (pages is None):
        refuse("block_table", block_table, "to be given with pages, and only then")
    out = _result("out", out, torch.int32, rows, width, device)
    if pages is not None:
        checks.tensor("block_table", block_table, _INT32, (rows, _PAGES), device)
        if block_table.shape[1] > 1 and block_table.stride()[1] != 1:
            refuse("block_table", block_table, "stride 1 in the last dimension")
        _result("pages", pages, torch.int32, rows, width, device)
    if rows == 0:
        return out

    if debug.ON:
        debug.candidates(
            context_lens, starts, block_table, columns=columns, page=page, block=block, compressed=compressed
        )
    config, parts = kernels.configure(torch.float32, width, rows, columns, sms_to_use(device), ascending=True)
    workspace = _workspace(workspace, kernels.workspace_bytes(config, rows, parts), device)
    inputs = {"block_max": block_max, "context_lens": context_lens, "starts": starts, "block_table": block_table}
    _memory(inputs, out=out, pages=pages, workspace=workspace)
    starts_pointer = None if starts is None else starts.data_ptr()
    kernels.topk(
        config, parts,
        logits=block_max, windows=Windows(starts_pointer, context_lens.data_ptr(), rows, 1, 1, NO_LIMIT),
        ends_are_lengths=True, bounds={"context_lens": context_lens, "starts": starts}, k=width,
        page=page // block if pages is not None else 1, block_table=block_table, offset=None, workspace=workspace,
        out=out if pages is None else pages, positions=None if pages is None else out, scores=None,
        unit=block, compressed=compressed, nowhere=2**31 - 1,
    )  # fmt: skip
    return out


def fp8_fp4_paged_mqa_topk(
    q: torch.Tensor | arguments.Pair,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor,
    max_context_len: int,
    k: int,
    *,
    indices: torch.Tensor | None = None,
    translate: bool = False,
    out: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The keys that each query token attends to, out of a paged cache: `topk` of what `fp8_fp4_paged_mqa_logits` gives.

    q ... max_context_len, indices   as in `fp8_fp4_paged_mqa_logits`
    k                                1 to 2,048
    translate                        places in the cache instead of positions: position p becomes
                                     block_table[b, p // block_kv] * block_kv + p % block_kv
    out, positions, scores           as in `topk`, batch * next_n rows
    workspace                        uint8, contiguous, of at least `mqa_topk_workspace_bytes(...)` bytes, aligned to
                                     16; its content does not matter

    Returns int32 [batch * next_n, k]. Keys of rows that see at most k of them are not read, unless `scores` are wanted.
    Rows by the hundred are a prefill: what is kept of it takes 64 KB a row at most, however long the rows are. It is
    scored some rows at a time, or some keys: the best so far are carried along.
    """
    query = arguments.query(q, 4)
    device, (batch, next_n) = query.device, query.shape[:2]
    rows = batch * next_n
    checks.integer("k", k, 1, LARGEST_K)
    checks.integer("max_context_len", max_context_len)
    checks.boolean("translate", translate)
    out = _results(out, positions, scores, rows, k, device)
    page, _ = arguments.key_pages(kv_cache, query.values.shape[-1], device)
    arguments.weights(weights, rows, query.heads, device)
    arguments.lengths(context_lens, device, batch, next_n)
    arguments.block_table(block_table, batch, device)
    slots = arguments.schedule(schedule_meta, device)
    arguments.indices(indices, context_lens)
    plan = _plan(rows, next_n, max_context_len, k, page, sms_to_use(device))
    workspace = _workspace(workspace, plan.bytes, device)
    inputs = {"context_lens": context_lens, "block_table": block_table, "indices": indices, "weights": weights}
    scored = {"q": query.values, "q scales": query.scales, "kv_cache": kv_cache, "schedule_meta": schedule_meta}
    _memory({**scored, **inputs}, out=out, positions=positions, scores=scores, workspace=workspace)
    if rows == 0:
        return out
    if debug.ON:
        pages = kv_cache.shape[0]
        debug.paged(context_lens, block_table, schedule_meta, pages=pages, page=page, limit=max_context_len)

    limit = min(max_context_len, block_table.shape[1] * page) if kv_cache.shape[0] else 0  # as in the logits

    def score(rows: slice, keys: slice, lens: torch.Tensor, logits: torch.Tensor, least: int = 0, **fronts) -> None:
        of, schedule = slice(rows.start // next_n, rows.stop // next_n), schedule_meta
        table = _cut(block_table, of)
        if keys.start:
            table = table[:, keys.start // page :]
        if lens is not context_lens:
            schedule = torch.empty_like(schedule_meta)
            metadata.plan(lens, schedule)
        paged_logits(
            _pair(query, of), kv_cache, _cut(weights, rows), lens, table, schedule, logits.shape[1],
            False, torch.float32, _cut(indices, of), logits, None, least, **fronts,
        )  # fmt: skip

    results = _Results(block_table if translate else None, page if translate else 1, None, out, positions, scores)
    if isinstance(plan, _Pieces):
        windows = windows_of_lengths(context_lens, next_n, limit)
        for piece in plan.run(workspace, limit, windows, {"context_lens": context_lens}, results):
            score(piece.rows, piece.keys, piece.ends.view(batch, next_n), piece.logits)
        return out
    if slots <= plan.blocks and leaves_fronts(rows, max_context_len, k, slots):
        one, keys = slice(0, 1), slice(0, max_context_len)
        logits, fronts = plan.logits(workspace, one, device), workspace[plan.logits_bytes :]
        score(one, keys, context_lens, logits, results.least, fronts=fronts, translate=translate)
        kernels.choose_of_fronts(
            kernels.fronts(slots), fronts, logits=logits, windows=windows_of_lengths(context_lens, next_n, limit), k=k,
            ends_are_lengths=False, bounds={"context_lens": context_lens}, **results._asdict(),
        )  # fmt: skip
        return out
    for rows in plan.turns():
        lens = _cut(context_lens, slice(rows.start // next_n, rows.stop // next_n))
        logits = plan.logits(workspace, rows, device)
        score(rows, slice(0, max_context_len), lens, logits, results.least)
        windows = windows_of_lengths(lens, next_n, limit)
        plan.choose(logits, windows, {"context_lens": lens}, workspace, results.of(rows, next_n))
    return out


def fp8_fp4_mqa_topk(
    q: torch.Tensor | arguments.Pair,
    kv: arguments.Pair,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    k: int,
    *,
    offset: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    page: int = 1,
    out: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The keys that each query token attends to, out of one run of keys: `topk` of what `fp8_fp4_mqa_logits` gives.

    q ... ke                     as in `fp8_fp4_mqa_logits`; row i sees keys [ks[i], ke[i])
    k                            1 to 2,048
    offset, block_table, page    as in `topk`. Positions count from ks: with `offset=ks` results are keys of the run
    out, positions, scores       as in `topk`
    workspace                    as in `fp8_fp4_paged_mqa_topk`

    Returns int32 [seq_len, k]. Which keys are not read, and how rows by the hundred are scored, is as there.
    """
    query = arguments.query(q, 3)
    device, rows = query.device, query.shape[0]
    checks.integer("k", k, 1, LARGEST_K)
    out = _results(out, positions, scores, rows, k, device)
    keys, key_scales = arguments.key_run(kv, query.fp4, query.values.shape[-1], device)
    arguments.weights(weights, rows, query.heads, device)
    arguments.bounds(ks, ke, rows, device, ("ks", "ke"))
    _places(block_table, page, offset, rows, device)
    plan = _plan(rows, 1, keys.shape[0], k, 1, sms_to_use(device))
    workspace = _workspace(workspace, plan.bytes, device)
    inputs = {"ks": ks, "ke": ke, "block_table": block_table, "offset": offset}
    scored = {"q": query.values, "q scales": query.scales, "kv": keys, "kv scales": kv[1], "weights": weights}
    _memory({**scored, **inputs}, out=out, positions=positions, scores=scores, workspace=workspace)
    if rows == 0:
        return out
    if debug.ON:
        debug.ragged(ks, ke, keys=keys.shape[0], names=("ks", "ke"))
        debug.choice(ke - ks, None, block_table, offset, name="ke - ks", columns=keys.shape[0], page=page)

    def score(rows: slice, of: slice, starts: torch.Tensor, ends: torch.Tensor, logits: torch.Tensor, least=0) -> None:
        run, row_weights = (_cut(keys, of), _cut(key_scales, of)), _cut(weights, rows)
        queries, dtype = _pair(query, rows), torch.float32
        ragged_logits(queries, run, row_weights, starts, ends, False, 0, dtype, logits, None, least)

    results = _Results(block_table, page, offset, out, positions, scores)
    if isinstance(plan, _Pieces):
        windows = windows_of_bounds(ks, ke, keys.shape[0])
        for piece in plan.run(workspace, keys.shape[0], windows, {"ks": ks, "ke": ke}, results):
            score(piece.rows, piece.keys, piece.starts, piece.ends, piece.logits)
        return out
    for rows in plan.turns():
        starts, ends = _cut(ks, rows), _cut(ke, rows)
        logits = plan.logits(workspace, rows, device)
        score(rows, slice(0, keys.shape[0]), starts, ends, logits, results.least)
        windows = windows_of_bounds(starts, ends, keys.shape[0])
        plan.choose(logits, windows, {"ks": starts, "ke": ends}, workspace, results.of(rows))
    return out


def fp8_fp4_paged_sparse_mqa_topk(
    q: arguments.Pair,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    metadata: torch.Tensor,
    num_max_sparse_blocks: int,
    sparse_block_kv: int,
    sparse_kv_block_indices: torch.Tensor,
    context_lens: torch.Tensor,
    k: int,
    *,
    translate: bool = False,
    out: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The keys that each query token attends to, out of its candidates: `topk` of what
    `fp8_fp4_paged_sparse_mqa_logits` gives, each column taken back to the key that it is the logit of.

    q ... sparse_block_kv    as in `fp8_fp4_paged_sparse_mqa_logits`
    sparse_kv_block_indices  int32 [rows, num_max_sparse_blocks], any row stride: what the metadata were made from, each
                             list ascending, as `candidate_blocks` makes them
    context_lens             int32, `rows` elements of any rank, contiguous: the length of each row. If it is not what
                             the metadata were made from, positions are of the row's list all the same, but not the best
    k                        1 to 2,048
    translate                places in the cache instead of positions: block_table[row, p // page_kv] * page_kv
                             + p % page_kv for position p, out of the metadata
    out, scores              as in `topk`; the logits are bf16
    workspace                uint8, contiguous, of at least `sparse_mqa_topk_workspace_bytes(...)` bytes, aligned to 16;
                             its content does not matter

    Returns int32 [rows, k], -1 past the row's candidates. Of equal logits those of smaller columns are chosen, which
    are smaller positions. Tokens at or past the length in the block with the row's last key are not chosen. Each entry
    of a list stands for itself: a block listed twice may be chosen twice, unless it is the last one and not full, which
    ends the list. (So it does where a list does not ascend: what comes after it is not looked at.)
    """
    query = arguments.mx_query(q, 4)
    device, rows = query.device, query.shape[0]
    block = arguments.sparse_block(sparse_block_kv)
    page, _ = arguments.key_pages(kv_cache, query.shape[-1], device, block)
    arguments.weights(weights, rows, query.heads, device)
    width = checks.integer("num_max_sparse_blocks", num_max_sparse_blocks, 1, (2**31 - 1) // block)
    arguments.sparse_metadata(metadata, sparse.size(rows, width), device)
    lists = arguments.block_lists(sparse_kv_block_indices, rows, device, block, "q")
    if lists.shape[1] != width:
        refuse("sparse_kv_block_indices", lists, f"lists of num_max_sparse_blocks = {width} blocks")
    _lengths_of_rows(context_lens, rows, device, "q")
    checks.integer("k", k, 1, LARGEST_K)
    checks.boolean("translate", translate)
    out = _results(out, None, scores, rows, k, device)
    plan = _Sparse(rows, width * block, k, sms_to_use(device))
    workspace = _workspace(workspace, plan.bytes, device)
    inputs = {"q": query.values, "q scales": query.scales, "kv_cache": kv_cache, "weights": weights}
    listed = {"metadata": metadata, "sparse_kv_block_indices": lists, "context_lens": context_lens}
    _memory({**inputs, **listed}, out=out, scores=scores, workspace=workspace)
    if rows == 0:
        return out
    if debug.ON:
        lens = context_lens.view(-1)
        debug.lengths(context_lens)
        debug.lists(lists, torch.zeros_like(lens), lens, block=block)
        debug.ascending(lists, lens, block=block)
        if places := kv_cache.shape[0] * (page // block):
            sizes = sparse.sizes(rows, width, block, page, False)
            debug.sparse_metadata(metadata, context_lens, **sizes, places=places)

    logits, columns, rest = plan.parts_of(workspace)
    results = _Results(sparse.places(metadata, rows, width) if translate else lists, block, None, out, None, scores)
    paged_sparse_logits(query, kv_cache, weights, metadata, width, block, logits, results.least)
    limit = NO_LIMIT if kv_cache.shape[0] else 0
    listed_columns.count_columns(lists, context_lens, block, limit, columns)
    kernels.topk(
        plan.config, plan.parts,
        logits=logits, windows=Windows(None, columns.data_ptr(), rows, 1, 1, NO_LIMIT), ends_are_lengths=True,
        bounds={"columns": columns}, k=k, workspace=rest, **results._asdict(),
    )  # fmt: skip
    return out


def sparse_mqa_topk_workspace_bytes(
    rows: int, width: int, sparse_block_kv: int, k: int, device: torch.device | str | None = None
) -> int:
    """Bytes that `fp8_fp4_paged_sparse_mqa_topk` needs for `rows` query tokens and lists of `width` blocks."""
    checks.integer("rows", rows)
    block = arguments.sparse_block(sparse_block_kv)
    checks.integer("width", width, 1, (2**31 - 1) // block)
    checks.integer("k", k, 1, LARGEST_K)
    return _Sparse(rows, width * block, k, sms_to_use(_device(device))).bytes


def mqa_topk_workspace_bytes(
    rows: int, columns: int, k: int, next_n: int = 1, device: torch.device | str | None = None, *, page: int = 64
) -> int:
    """Bytes that `fp8_fp4_paged_mqa_topk` needs for `rows` query tokens, `next_n` of a request, a max_context_len of
    `columns` and pages of `page` keys; `fp8_fp4_mqa_topk` for `rows` tokens and `columns` keys."""
    for name, value in (("rows", rows), ("columns", columns)):
        checks.integer(name, value)
    checks.integer("k", k, 1, LARGEST_K)
    checks.integer("next_n", next_n, 1)
    checks.integer("page", page, 1)
    return _plan(rows, next_n, columns, k, page, sms_to_use(_device(device))).bytes


class _Results(NamedTuple):
    """Where a choice goes, and as what: arguments of `topk`."""

    block_table: torch.Tensor | None
    page: int
    offset: torch.Tensor | None
    out: torch.Tensor
    positions: torch.Tensor | None
    scores: torch.Tensor | None

    @property
    def least(self) -> int:
        """Who sees no more keys than so many is given them all: their logits do not matter."""
        return self.out.shape[1] if self.scores is None else 0

    def of(self, rows: slice, next_n: int = 1) -> "_Results":
        """Those of some rows, whole requests."""
        requests = slice(rows.start // next_n, rows.stop // next_n)
        cut = [_cut(tensor, rows) for tensor in (self.offset, self.out, self.positions, self.scores)]
        return _Results(_cut(self.block_table, requests), self.page, *cut)


def _plan(rows: int, next_n: int, columns: int, k: int, page: int, num_sms: int) -> "_Turns | _Pieces":
    """How a call that scores and chooses goes about it. A decode step takes all at once. A prefill keeps no more than
    `_LOGITS_BYTES` a row: rows take turns, as long as there are enough of them in each; else the keys come in pieces.
    """
    if rows < 2 * num_sms:
        return _Turns(rows, rows, columns, k, num_sms)
    budget, row = rows * _LOGITS_BYTES, max(4 * _stride(columns), 1)
    step = min(rows, budget // row) // next_n * next_n
    while step >= min(rows, _LEAST_ROWS) and step > 0:
        turns = _Turns(rows, step, columns, k, num_sms)
        if turns.bytes <= budget:
            return turns
        step -= -(-(turns.bytes - budget) // (row * next_n)) * next_n
    return _Pieces(rows, columns, k, page, num_sms)


def _stride(columns: int) -> int:
    return -(-columns // 256) * 256


class _Turns:
    """Rows take turns, `step` of them at a time, in a workspace for their logits; behind these is `topk`'s own."""

    def __init__(self, rows: int, step: int, columns: int, k: int, num_sms: int) -> None:
        self.rows, self.step, self.columns, self.k = rows, step, columns, k
        self.config, self.parts = kernels.configure(torch.float32, k, max(step, 1), columns, num_sms)
        self.logits_bytes = 4 * step * _stride(columns)
        self.bytes = self.logits_bytes + kernels.workspace_bytes(self.config, step, self.parts)
        self.blocks = num_sms if leaves_fronts(rows, columns, k, num_sms) else 0  # for whose fronts there is room
        if self.blocks:
            self.bytes = max(self.bytes, self.logits_bytes + fronts_bytes(num_sms))

    def turns(self) -> Iterator[slice]:
        for first in range(0, self.rows, self.step):
            yield slice(first, min(first + self.step, self.rows))

    def logits(self, workspace: torch.Tensor | None, rows: slice, device: torch.device) -> torch.Tensor:
        count = rows.stop - rows.start
        if not self.logits_bytes:
            return torch.empty((count, self.columns), dtype=torch.float32, device=device)
        whole = workspace[: self.logits_bytes].view(torch.float32)
        return whole.view(self.step, _stride(self.columns))[:count, : self.columns]

    def choose(self, logits, windows, bounds, workspace, results: _Results) -> None:
        rest = None if self.parts == 1 else workspace[self.logits_bytes :]
        kernels.topk(
            self.config, self.parts, logits=logits, windows=windows, ends_are_lengths=False, bounds=bounds, k=self.k,
            workspace=rest, tokens=windows.next_n, **results._asdict(),
        )  # fmt: skip


class _Piece(NamedTuple):
    """Keys whose logits are wanted: of each row those from starts to ends, counted from the piece's first key."""

    rows: slice
    keys: slice
    starts: torch.Tensor
    ends: torch.Tensor
    logits: torch.Tensor


class _Pieces:
    """All rows at once, and their keys piece by piece: the k best so far are carried from one to the next (carry.cuh).

    A row of the workspace has room for those that are carried and for a piece; then come, of all rows, what was chosen
    last, positions of the carried, and the windows of the next piece.
    """

    def __init__(self, rows: int, columns: int, k: int, page: int, num_sms: int) -> None:
        self.rows, self.columns, self.k = rows, columns, k
        self.front = -(-k // 64) * 64
        room = _LOGITS_BYTES // 4 - self.front - 2 * k - 4
        unit = math.lcm(page, _PIECE) if math.lcm(page, _PIECE) <= room else page
        self.size = max(room // unit, 1) * unit
        self.stride = self.front + self.size
        self.config, self.parts = kernels.configure(torch.float32, k, rows, self.stride, num_sms, ascending=True)
        self.own = 4 * (-(-rows * (self.stride + 2 * k + 4) // 4) * 4)
        self.bytes = self.own + kernels.workspace_bytes(self.config, rows, self.parts)

    def run(self, workspace, columns: int, windows: Windows, bounds, results: _Results) -> Iterator[_Piece]:
        """Yields pieces; each one's logits must be there when the next one is asked for."""
        rows, k, front = self.rows, self.k, self.front
        words = workspace[: 4 * rows * (self.stride + 2 * k + 4)].view(torch.int32)
        sizes = [rows * self.stride, rows * k, rows * k, rows, rows, rows, rows]
        buffer, chosen, carried, *four = words.split(sizes)
        buffer = buffer.view(torch.float32).view(rows, self.stride)
        pieces = dict(zip(("starts", "ends", "firsts", "lengths"), four))
        rest = None if self.parts == 1 else workspace[self.own :]
        in_buffer = Windows(pieces["firsts"].data_ptr(), pieces["lengths"].data_ptr(), rows, 1, 1, NO_LIMIT)

        at = until = 0
        while True:
            next = min(until + self.size, columns)
            carry.carry(
                at, until, next, buffer=buffer, front=front, k=k, windows=windows, bounds=bounds,
                chosen=chosen.view(rows, k), carried=carried, pieces=pieces, least=results.least, **results._asdict(),
            )  # fmt: skip
            if next == until:
                return
            at, until = until, next
            width = until - at
            logits = buffer[:, front : front + width]
            yield _Piece(slice(0, rows), slice(at, until), pieces["starts"], pieces["ends"], logits)
            kernels.topk(
                self.config, self.parts, logits=buffer[:, : front + width], windows=in_buffer, ends_are_lengths=True,
                bounds={name: pieces[name] for name in ("firsts", "lengths")}, k=k, page=1, block_table=None,
                offset=None, workspace=rest, out=chosen.view(rows, k), positions=None, scores=None,
            )  # fmt: skip


class _Sparse:
    """The workspace of sparse logits and a choice among them: logits, columns of each row, `topk`'s own."""

    def __init__(self, rows: int, columns: int, k: int, num_sms: int) -> None:
        self.rows, self.columns = rows, columns
        self.stride = -(-columns // 512) * 512
        self.config, self.parts = kernels.configure(torch.bfloat16, k, max(rows, 1), columns, num_sms)
        self.own = 2 * rows * self.stride + -(-4 * rows // 16) * 16
        self.bytes = self.own + kernels.workspace_bytes(self.config, rows, self.parts)

    def parts_of(self, workspace: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        logits_bytes = 2 * self.rows * self.stride
        logits = workspace[:logits_bytes].view(torch.bfloat16).view(self.rows, self.stride)[:, : self.columns]
        columns = workspace[logits_bytes : logits_bytes + 4 * self.rows].view(torch.int32)
        return logits, columns, None if self.parts == 1 else workspace[self.own :]


def topk_workspace_bytes(
    rows: int,
    columns: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> int:
    """Bytes that `topk` needs for logits [rows, columns] of `dtype` on `device` (the current one): 0 where one block
    takes a whole row. The number of SMs to use is part of it."""
    checks.integer("rows", rows)
    checks.integer("columns", columns)
    checks.integer("k", k, 1, LARGEST_K)
    if dtype not in _REAL:
        refuse("dtype", dtype, "torch.float32 or torch.bfloat16")
    if rows == 0:
        return 0
    config, parts = kernels.configure(dtype, k, rows, columns, sms_to_use(_device(device)))
    return kernels.workspace_bytes(config, rows, parts)


def _pair(query: arguments.Query, rows: slice) -> arguments.Pair:
    return _cut(query.values, rows), _cut(query.scales, rows)


def _cut(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Some rows of a tensor, itself if they are all."""
    return tensor if tensor is None or rows.stop - rows.start == len(tensor) else tensor[rows]


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _chosen_from(name: str, values: Any, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int, torch.device]:
    """Rows, columns and device of what the largest are taken of."""
    if not isinstance(values, torch.Tensor):
        refuse(name, values, "a tensor on the CPU or a CUDA device")
    device = checks.on_a_device(name, values)
    checks.tensor(name, values, dtypes, (_ROWS, _COLUMNS), device)
    rows, columns = values.shape
    if columns > 1 and values.stride()[1] != 1 or columns >= 2**31:
        refuse(name, values, "stride 1 in the last dimension, and fewer than 2^31 columns")
    return rows, columns, device


def _lengths_of_rows(context_lens: Any, rows: int, device: torch.device, other: str = "block_max") -> None:
    if not isinstance(context_lens, torch.Tensor) or context_lens.numel() != rows:
        refuse("context_lens", context_lens, f"an int32 tensor of {rows} elements to match {other}")
    checks.contiguous("context_lens", checks.tensor("context_lens", context_lens, _INT32, context_lens.shape, device))


def _places(block_table: Any, page: Any, offset: Any, rows: int, device: torch.device) -> None:
    """What becomes of positions."""
    checks.integer("page", page, 1)
    if block_table is not None:
        checks.tensor("block_table", block_table, _INT32, (rows, _PAGES), device)
        if block_table.shape[1] > 1 and block_table.stride()[1] != 1:
            refuse("block_table", block_table, "stride 1 in the last dimension")
    elif page != 1:
        refuse("page", page, "1 where there is no block_table")
    if offset is not None:
        checks.contiguous("offset", checks.tensor("offset", offset, _INT32, (rows,), device))


def _results(out: Any, positions: Any, scores: Any, rows: int, k: int, device: torch.device) -> torch.Tensor:
    """`out`, or a new one."""
    if positions is not None:
        _result("positions", positions, torch.int32, rows, k, device)
    if scores is not None:
        _result("scores", scores, torch.float32, rows, k, device)
    return _result("out", out, torch.int32, rows, k, device)


def _result(argument: str, value: Any, dtype: torch.dtype, rows: int, k: int, device: torch.device) -> torch.Tensor:
    if value is None:
        return torch.empty((rows, k), dtype=dtype, device=device)
    checks.tensor(argument, value, (dtype,), (rows, k), device, "the rows of q, or of what is chosen from")
    if value.requires_grad:
        refuse(argument, value, "a tensor that requires no grad")
    row_stride, column_stride = value.stride()
    if k > 1 and column_stride != 1 or rows > 1 and row_stride < k:
        refuse(argument, value, "stride 1 in the last dimension and rows that do not overlap")
    return value


def _workspace(workspace: Any, size: int, device: torch.device) -> torch.Tensor | None:
    if workspace is None:
        return torch.empty(size, dtype=torch.uint8, device=device) if size else None
    checks.contiguous("workspace", checks.tensor("workspace", workspace, (torch.uint8,), (Open("bytes"),), device))
    if workspace.shape[0] < size or workspace.data_ptr() % 16:
        refuse("workspace", workspace, f"at least {size} bytes, aligned to 16")
    return workspace


def _memory(inputs: dict[str, torch.Tensor | None], **outputs: torch.Tensor | None) -> None:
    """`checks.memory` of all that a call is given, by the names that its caller has for it."""
    checks.memory(inputs, {name: output for name, output in outputs.items() if output is not None})
