"""The indexer's second half: which keys each row attends to. Each function: check, allocate, configure, launch.

The k largest of a row's logits: of equal ones those of smaller positions; -0 equals +0, and NaN ranks below everything.
A row of at most k keys gives all of its positions. Exact whatever the values are: where many of them fall together it
takes longer, and gives the same. The order within a row is not promised; two runs are bitwise equal.

Every error is an ArgumentError, which is a RuntimeError, raised before anything is launched or written.
"""

from collections.abc import Iterator
from typing import Any

import torch

from . import arguments, checks, debug
from .checks import Open, refuse
from .kernels import metadata
from .kernels import topk as kernels
from .kernels.windows import NO_LIMIT, Windows, windows_of_bounds, windows_of_lengths
from .paged import fp8_fp4_paged_mqa_logits
from .ragged import fp8_fp4_mqa_logits
from .settings import sms_to_use

_ROWS, _COLUMNS, _PAGES = Open("rows"), Open("columns"), Open("pages")
_INT32, _REAL = (torch.int32,), (torch.float32, torch.bfloat16)
LARGEST_K = 2048

_LOGITS_BYTES = 2**16  # of a row on average, that a prefill keeps for a while
_LEAST_ROWS = 16  # that it scores at once all the same


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
                 what lies outside is never looked at. The cost follows the lengths, not the width
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
    if not isinstance(logits, torch.Tensor) or not (logits.is_cpu or logits.is_cuda):
        refuse("logits", logits, "a tensor on the CPU or a CUDA device")
    device = logits.device
    checks.tensor("logits", logits, _REAL, (_ROWS, _COLUMNS), device)
    rows, columns = logits.shape
    if columns > 1 and logits.stride()[1] != 1:
        refuse("logits", logits, "stride 1 in the last dimension")
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
    block_table: torch.Tensor | None = None,
    page: int = 64,
    out: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The candidates of a sparse indexer: of each row the `width` blocks of keys whose largest logits are the largest.

    block_max     fp32 [rows, columns], stride 1 in the last dimension: the maximum of each block's logits, as
                  `block_max` of the logits functions has it: the newest block is +inf, so that it is a candidate
    context_lens  int32, `rows` elements of any rank, contiguous: keys of each row, in ceil(keys / block) blocks
    width         of the lists, 1 to 2,048
    block         keys of a block
    block_table   int32 [rows, columns], stride 1 in the last dimension, and
    page          keys of a page, a multiple of `block`: only for `pages`. Pages past the columns are taken for the last
    out           int32 [rows, width] of any row stride, written and returned
    pages         int32 [rows, width], written: block b as block_table[row, b // n] * n + b % n with n = page / block,
                  which is its place in the cache, in blocks
    workspace     as in `topk`, `topk_workspace_bytes(rows, columns, width)`

    Returns int32 [rows, width]: ascending, 2^31 - 1 past the end, as the sparse logits functions take them. A row of at
    most `width` blocks has all of them. Graph-safe; nothing is synchronised.
    """
    if not isinstance(block_max, torch.Tensor) or not (block_max.is_cpu or block_max.is_cuda):
        refuse("block_max", block_max, "a tensor on the CPU or a CUDA device")
    device = block_max.device
    checks.tensor("block_max", block_max, (torch.float32,), (_ROWS, _COLUMNS), device)
    rows, columns = block_max.shape
    if columns > 1 and block_max.stride()[1] != 1:
        refuse("block_max", block_max, "stride 1 in the last dimension")
    if not isinstance(context_lens, torch.Tensor) or context_lens.numel() != rows:
        refuse("context_lens", context_lens, f"an int32 tensor of {rows} elements to match block_max")
    checks.contiguous("context_lens", checks.tensor("context_lens", context_lens, _INT32, context_lens.shape, device))
    checks.integer("width", width, 1, LARGEST_K)
    checks.integer("block", block, 1, 2**16)
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
        lens = context_lens, None, block_table, None
        debug.choice(*lens, name="context_lens", columns=columns, page=page, unit=block)
    config, parts = kernels.configure(torch.float32, width, rows, columns, sms_to_use(device), ascending=True)
    workspace = _workspace(workspace, kernels.workspace_bytes(config, rows, parts), device)
    inputs = {"block_max": block_max, "context_lens": context_lens, "block_table": block_table}
    _memory(inputs, out=out, pages=pages, workspace=workspace)
    kernels.topk(
        config, parts,
        logits=block_max, windows=Windows(None, context_lens.data_ptr(), rows, 1, 1, NO_LIMIT), ends_are_lengths=True,
        bounds={"context_lens": context_lens}, k=width, page=page // block if pages is not None else 1,
        block_table=block_table, offset=None, workspace=workspace,
        out=out if pages is None else pages, positions=None if pages is None else out, scores=None,
        unit=block, nowhere=2**31 - 1,
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

    Returns int32 [batch * next_n, k]. Rows by the hundred are a prefill, which is scored some rows at a time: logits
    that are there at once take 64 KB a row on average (or they are 16 rows'), however long the rows are.
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
    arguments.schedule(schedule_meta, device)
    arguments.indices(indices, context_lens)
    num_sms = sms_to_use(device)
    plan = _Plan(rows, next_n, max_context_len, k, num_sms)
    workspace = _workspace(workspace, plan.bytes, device)
    inputs = {"context_lens": context_lens, "block_table": block_table, "indices": indices, "weights": weights}
    scored = {"q": query.values, "q scales": query.scales, "kv_cache": kv_cache, "schedule_meta": schedule_meta}
    _memory({**scored, **inputs}, out=out, positions=positions, scores=scores, workspace=workspace)
    if rows == 0:
        return out

    limit = min(max_context_len, block_table.shape[1] * page) if kv_cache.shape[0] else 0  # as in the logits
    for first, until in plan.turns():
        of, tokens = slice(first // next_n, until // next_n), slice(first, until)
        lens, table, schedule = _cut(context_lens, of), _cut(block_table, of), schedule_meta
        if until - first < rows:
            schedule = torch.empty_like(schedule_meta)
            metadata.plan(lens, schedule)
        logits = plan.logits(workspace, until - first, device)
        fp8_fp4_paged_mqa_logits(
            (_cut(query.values, of), _cut(query.scales, of)), kv_cache, _cut(weights, tokens), lens, table, schedule,
            max_context_len, False, torch.float32, _cut(indices, of), out=logits,
        )  # fmt: skip
        plan.choose(
            logits, windows_of_lengths(lens, next_n, limit), {"context_lens": lens}, workspace,
            table if translate else None, page if translate else 1, None,
            _cut(out, tokens), _cut(positions, tokens), _cut(scores, tokens),
        )  # fmt: skip
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

    Returns int32 [seq_len, k]. Rows by the hundred are scored some at a time, as there.
    """
    query = arguments.query(q, 3)
    device, rows = query.device, query.shape[0]
    checks.integer("k", k, 1, LARGEST_K)
    out = _results(out, positions, scores, rows, k, device)
    keys, _ = arguments.key_run(kv, query.fp4, query.values.shape[-1], device)
    arguments.weights(weights, rows, query.heads, device)
    arguments.bounds(ks, ke, rows, device)
    _places(block_table, page, offset, rows, device)
    plan = _Plan(rows, 1, keys.shape[0], k, sms_to_use(device))
    workspace = _workspace(workspace, plan.bytes, device)
    inputs = {"ks": ks, "ke": ke, "block_table": block_table, "offset": offset}
    scored = {"q": query.values, "q scales": query.scales, "kv": keys, "kv scales": kv[1], "weights": weights}
    _memory({**scored, **inputs}, out=out, positions=positions, scores=scores, workspace=workspace)
    if rows == 0:
        return out

    for first, until in plan.turns():
        of = slice(first, until)
        starts, ends = _cut(ks, of), _cut(ke, of)
        logits = plan.logits(workspace, until - first, device)
        fp8_fp4_mqa_logits(
            (_cut(query.values, of), _cut(query.scales, of)), kv, _cut(weights, of), starts, ends, out=logits
        )
        plan.choose(
            logits, windows_of_bounds(starts, ends, keys.shape[0]), {"ks": starts, "ke": ends}, workspace,
            _cut(block_table, of), page, _cut(offset, of), _cut(out, of), _cut(positions, of), _cut(scores, of),
        )  # fmt: skip
    return out


def mqa_topk_workspace_bytes(
    rows: int, columns: int, k: int, next_n: int = 1, device: torch.device | str | None = None
) -> int:
    """Bytes that `fp8_fp4_paged_mqa_topk` needs for `rows` query tokens, `next_n` of a request, and a max_context_len
    of `columns`; `fp8_fp4_mqa_topk` for `rows` tokens and `columns` keys."""
    for name, value in (("rows", rows), ("columns", columns)):
        checks.integer(name, value)
    checks.integer("k", k, 1, LARGEST_K)
    checks.integer("next_n", next_n, 1)
    return _Plan(rows, next_n, columns, k, sms_to_use(_device(device))).bytes


class _Plan:
    """How the rows of a call that scores and chooses take turns in its workspace: logits first, then `topk`'s own.

    step   rows of a turn: all in a decode step; in a prefill as many as `_LOGITS_BYTES` allow, whole requests
    """

    def __init__(self, rows: int, next_n: int, columns: int, k: int, num_sms: int) -> None:
        self.rows, self.columns, self.k = rows, columns, k
        self.stride = -(-columns // 256) * 256
        self.step = rows
        if rows >= 2 * num_sms and columns:
            fit = max(_LEAST_ROWS, rows * _LOGITS_BYTES // (4 * self.stride))
            self.step = min(rows, max(1, fit // next_n) * next_n)
        self.config, self.parts = kernels.configure(torch.float32, k, max(self.step, 1), columns, num_sms)
        self.logits_bytes = 4 * self.step * self.stride
        self.bytes = self.logits_bytes + kernels.workspace_bytes(self.config, self.step, self.parts)

    def turns(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.rows, self.step):
            yield first, min(first + self.step, self.rows)

    def logits(self, workspace: torch.Tensor | None, rows: int, device: torch.device) -> torch.Tensor:
        if not self.logits_bytes:
            return torch.empty((rows, self.columns), dtype=torch.float32, device=device)
        whole = workspace[: self.logits_bytes].view(torch.float32)
        return whole.view(self.step, self.stride)[:rows, : self.columns]

    def choose(self, logits, windows, bounds, workspace, block_table, page, offset, out, positions, scores) -> None:
        rest = None if self.parts == 1 else workspace[self.logits_bytes :]
        kernels.topk(
            self.config, self.parts, logits=logits, windows=windows, ends_are_lengths=False, bounds=bounds, k=self.k,
            page=page, block_table=block_table, offset=offset, workspace=rest, out=out, positions=positions,
            scores=scores, tokens=windows.next_n,
        )  # fmt: skip


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


def _cut(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Some rows of a tensor, itself if they are all."""
    return tensor if tensor is None or rows.stop - rows.start == len(tensor) else tensor[rows]


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return torch.device(device)


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
