"""The indexer's second half: which keys each row attends to. Each function: check, allocate, configure, launch.

The k largest of a row's logits: of equal ones those of smaller positions; -0 equals +0, and NaN ranks below everything.
A row of at most k keys gives all of its positions. Exact whatever the values are: where many of them fall together it
takes longer, and gives the same. The order within a row is not promised; two runs are bitwise equal.

Every error is an ArgumentError, which is a RuntimeError, raised before anything is launched or written.
"""

from typing import Any

import torch

from . import checks
from .checks import Open, refuse
from .kernels import topk as kernels
from .kernels.windows import NO_LIMIT, Windows
from .settings import sms_to_use

_ROWS, _COLUMNS, _PAGES = Open("rows"), Open("columns"), Open("pages")
_INT32, _REAL = (torch.int32,), (torch.float32, torch.bfloat16)
LARGEST_K = 2048


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
                 block_table[row, p // page] * page + p % page
    page         keys of a page
    offset       int32 [rows], added to the results of each row
    out          int32 [rows, k] of any row stride, written and returned
    positions    int32 [rows, k], written: the plain positions, in the same order
    scores       float32 [rows, k], written: their logits (-0 as 0), -inf past the end; without it the logits of a row
                 of at most k keys are not read
    workspace    uint8, contiguous, of at least `topk_workspace_bytes(...)` bytes, aligned to 8; its content does not
                 matter. Calls that may run at the same time need one each. Without it one is allocated

    Returns int32 [rows, k]; past the length of a row it is -1. Graph-safe; nothing is synchronised.
    """
    if not isinstance(logits, torch.Tensor) or not (logits.is_cpu or logits.is_cuda):
        refuse("logits", logits, "a tensor on the CPU or a CUDA device")
    device = logits.device
    checks.tensor("logits", logits, _REAL, (_ROWS, _COLUMNS), device)
    rows, columns = logits.shape
    if columns > 1 and logits.stride()[1] != 1:
        refuse("logits", logits, "stride 1 in the last dimension")
    checks.contiguous("lengths", checks.tensor("lengths", lengths, _INT32, (rows,), device))
    checks.integer("k", k, 1, LARGEST_K)
    if starts is not None:
        checks.contiguous("starts", checks.tensor("starts", starts, _INT32, (rows,), device))
    checks.integer("page", page, 1)
    if block_table is not None:
        checks.tensor("block_table", block_table, _INT32, (rows, _PAGES), device)
        if block_table.shape[1] > 1 and block_table.stride()[1] != 1:
            refuse("block_table", block_table, "stride 1 in the last dimension")
    elif page != 1:
        refuse("page", page, "1 where there is no block_table")
    if offset is not None:
        checks.contiguous("offset", checks.tensor("offset", offset, _INT32, (rows,), device))
    out = _result("out", out, torch.int32, rows, k, device)
    if positions is not None:
        _result("positions", positions, torch.int32, rows, k, device)
    if scores is not None:
        _result("scores", scores, torch.float32, rows, k, device)
    if rows == 0:
        return out

    num_sms = sms_to_use(device)
    config = kernels.configure(logits.dtype, k, rows, num_sms)
    parts = kernels.parts(config, rows, columns, num_sms)
    starts_pointer = None if starts is None else starts.data_ptr()
    kernels.topk(
        config, parts,
        logits=logits, windows=Windows(starts_pointer, lengths.data_ptr(), rows, 1, 1, NO_LIMIT), ends_are_lengths=True,
        bounds={"lengths": lengths, "starts": starts}, k=k, page=page, block_table=block_table, offset=offset,
        workspace=_workspace(workspace, kernels.workspace_bytes(config, rows, parts), device),
        out=out, positions=positions, scores=scores,
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
    block_table   int32 [rows, pages], stride 1 in the last dimension, and
    page          keys of a page, a multiple of `block`: only for `pages`
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
        refuse("context_lens", context_lens, f"an int32 tensor of {rows} elements")
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

    num_sms = sms_to_use(device)
    config = kernels.configure(torch.float32, width, rows, num_sms, ascending=True)
    parts = kernels.parts(config, rows, columns, num_sms)
    kernels.topk(
        config, parts,
        logits=block_max, windows=Windows(None, context_lens.data_ptr(), rows, 1, 1, NO_LIMIT), ends_are_lengths=True,
        bounds={"context_lens": context_lens}, k=width, page=page // block if pages is not None else 1,
        block_table=block_table, offset=None,
        workspace=_workspace(workspace, kernels.workspace_bytes(config, rows, parts), device),
        out=out if pages is None else pages, positions=None if pages is None else out, scores=None,
        unit=block, nowhere=2**31 - 1,
    )  # fmt: skip
    return out


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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    num_sms = sms_to_use(device)
    config = kernels.configure(dtype, k, rows, num_sms)
    return kernels.workspace_bytes(config, rows, kernels.parts(config, rows, columns, num_sms))


def _result(argument: str, value: Any, dtype: torch.dtype, rows: int, k: int, device: torch.device) -> torch.Tensor:
    if value is None:
        return torch.empty((rows, k), dtype=dtype, device=device)
    checks.tensor(argument, value, (dtype,), (rows, k), device)
    row_stride, column_stride = value.stride()
    if k > 1 and column_stride != 1 or rows > 1 and row_stride < k:
        refuse(argument, value, "stride 1 in the last dimension and rows that do not overlap")
    return value


def _workspace(workspace: Any, size: int, device: torch.device) -> torch.Tensor | None:
    if workspace is None:
        return torch.empty(size, dtype=torch.uint8, device=device) if size else None
    checks.contiguous("workspace", checks.tensor("workspace", workspace, (torch.uint8,), (Open("bytes"),), device))
    if workspace.shape[0] < size or workspace.data_ptr() % 8:
        refuse("workspace", workspace, f"at least {size} bytes, aligned to 8")
    return workspace
