"""Debug mode (`DG_SM120_DEBUG=1`): before each launch, what the integer tensors hold is looked at on the host.

Whatever they hold, no kernel touches what it was not handed, and a row with garbage in it gets garbage. Who hands it in
is found here: the first value that breaks a function's contract is an ArgumentError that names function, tensor, place,
row and value. Looking waits for the GPU, so a call that is being captured into a CUDA graph goes unseen.
"""

import functools
import os
import sys
from collections.abc import Callable

import torch

from .checks import ArgumentError

ON = os.environ.get("DG_SM120_DEBUG") == "1"

_SPLIT = 256  # keys that the schedule counts as one


def _unless_captured(look: Callable) -> Callable:
    """`look`, unless the current stream is being captured, and must not be waited for."""

    @functools.wraps(look)
    def looked(*tensors, **sizes) -> None:
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            look(*(tensor.cpu().long() for tensor in tensors), **sizes)

    return looked


@_unless_captured
def lengths(context_lens: torch.Tensor) -> None:
    """What the metadata are made from: no length is negative."""
    _look("context_lens", context_lens, context_lens < 0, "0 or more keys")


@_unless_captured
def paged(
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor,
    *,
    pages: int,
    page: int,
    limit: int,
) -> None:
    """Lengths within the columns and the table, pages that are there, and a schedule of just these lengths."""
    room = block_table.shape[1] * page
    most, what = min((limit, "max_context_len"), (room, f"the {block_table.shape[1]} columns of block_table"))
    wrong = (context_lens < 0) | (context_lens > most)
    _look("context_lens", context_lens, wrong, f"0 to {most} keys, which {what} allow")
    longest = context_lens if context_lens.dim() == 1 else context_lens.amax(dim=1)
    column = torch.arange(block_table.shape[1]) * page
    wrong = ((block_table < 0) | (block_table >= pages)) & (column < longest[:, None])
    _look("block_table", block_table, wrong, f"a page from 0 to {pages - 1}, since the row has keys there")
    _schedule(schedule_meta, (longest + _SPLIT - 1) // _SPLIT)


def _schedule(schedule_meta: torch.Tensor, splits: torch.Tensor) -> None:
    """Entries in order, from the first split of all rows to past the last one."""
    rows, total = len(splits), int(splits.sum())
    row, split = schedule_meta.unbind(1)
    _look("schedule_meta", row, (row < 0) | (row > rows), f"a row from 0 to {rows}", ", 0")
    before = torch.cat([torch.zeros(1, dtype=torch.long), splits.cumsum(0)])
    most = torch.cat([splits, torch.zeros(1, dtype=torch.long)])[row]
    _look("schedule_meta", split, (split < 0) | (split > most), "a split that its row has", ", 1")
    place = before[row] + split
    backwards = torch.cat([torch.zeros(1, dtype=torch.bool), place[1:] < place[:-1]])
    _look("schedule_meta", row, backwards, "an entry behind the one before it", ", 0")
    ends = torch.zeros(len(row), dtype=torch.bool)
    ends[0], ends[-1] = place[0] != 0, place[-1] != total
    _look("schedule_meta", row, ends, f"a schedule of all {total} splits of these context_lens", ", 0")


@_unless_captured
def ragged(starts: torch.Tensor, ends: torch.Tensor, *, keys: int, columns: int, block: int = 1) -> None:
    """Bounds within the keys, in order, and no further apart than there are columns (0: one for each key), in which
    blocks of `block` keys begin."""
    names = "cu_seq_len_k_start", "cu_seq_len_k_end"
    for name, bound in zip(names, (starts, ends)):
        _look(name, bound, (bound < 0) | (bound > keys), f"0 to {keys}, the number of keys")
    _look(names[1], ends, ends < starts, f"at least {names[0]} of the row")
    if columns:
        _look(names[1], ends, ends - starts > columns, f"at most max_seqlen_k = {columns} keys from {names[0]}")
        _look(names[0], starts, starts % block != 0, f"a multiple of {block}, the keys of a block")


@_unless_captured
def lists(sparse_kv_block_indices: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, *, block: int) -> None:
    """Those entries that count are blocks in which the row has keys."""
    first, last = starts[:, None] // block, (ends[:, None] - starts[:, None] + block - 1) // block
    counts = torch.arange(sparse_kv_block_indices.shape[1]) < last
    wrong = (sparse_kv_block_indices < first) | (sparse_kv_block_indices >= first + last)
    _look("sparse_kv_block_indices", sparse_kv_block_indices, wrong & counts, "a block in which the row has keys")


@_unless_captured
def ascending(sparse_kv_block_indices: torch.Tensor, lengths: torch.Tensor, *, block: int) -> None:
    """No entry that counts is smaller than the one before it."""
    counts = torch.arange(1, sparse_kv_block_indices.shape[1]) < ((lengths + block - 1) // block)[:, None]
    smaller = torch.zeros_like(sparse_kv_block_indices, dtype=torch.bool)
    smaller[:, 1:] = (sparse_kv_block_indices[:, 1:] < sparse_kv_block_indices[:, :-1]) & counts
    _look("sparse_kv_block_indices", sparse_kv_block_indices, smaller, "a list that ascends")


@_unless_captured
def sparse_metadata(metadata: torch.Tensor, *, rows: int, pitch: int, seal: int) -> None:
    """Each row begins with the seal of the sizes that the call has."""
    bytes_ = metadata[192 : 192 + rows * pitch].view(rows, pitch)[:, :4]
    seals = (bytes_ << torch.arange(0, 32, 8)).sum(dim=1)
    _look("metadata", seals, seals != seal, f"the seal {seal} of metadata made for these sizes")


def _look(name: str, values: torch.Tensor, wrong: torch.Tensor, expected: str, rest: str = "") -> None:
    """Refuses `values`, called `name`, if there is one that is `wrong`. `rest` completes its place."""
    if not wrong.any():
        return
    index = wrong.nonzero()[0].tolist()
    place, count = ", ".join(map(str, index)) + rest, int(wrong.sum())
    row = "entry" if name == "schedule_meta" else "row"
    raise ArgumentError(
        f"{_function()}: {name}[{place}], {row} {index[0]}, is {values[tuple(index)].item()}; expected {expected} "
        f"({count} such value{'s' * (count > 1)})"
    )


def _function() -> str:
    """Which of the package's functions was called."""
    names, found = set(sys.modules[__package__].__all__), "?"
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__package__") == __package__ and frame.f_code.co_name in names:
            found = frame.f_code.co_name
        frame = frame.f_back
    return found
