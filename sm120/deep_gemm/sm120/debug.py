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
from torch.nn import functional

from .checks import ArgumentError
from .kernels.sparse import FIRST_ROW, MAGIC

ON = os.environ.get("DG_SM120_DEBUG") == "1"

_SPLIT = 256  # keys, or columns, that a schedule counts as one


def _unless_captured(look: Callable) -> Callable:
    """`look`, unless the current stream is being captured, and must not be waited for; or a tensor has no memory, which
    the launch refuses."""

    @functools.wraps(look)
    def looked(*tensors, **sizes) -> None:
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if not captured and all(tensor is None or tensor.data_ptr() or not tensor.numel() for tensor in tensors):
            look(*(None if tensor is None else tensor.cpu().long() for tensor in tensors), **sizes)

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
def ragged(
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    keys: int,
    columns: int = 0,
    block: int = 1,
    names: tuple[str, str] = ("cu_seq_len_k_start", "cu_seq_len_k_end"),
) -> None:
    """Bounds within the keys, in order, and no further apart than there are columns (0: one for each key), in which
    blocks of `block` keys begin."""
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
def paged_lists(
    sparse_kv_block_indices: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    page: int,
    block: int,
) -> None:
    """Lengths within the table, and blocks in which the row has keys, on pages that a cache may have. How many the
    cache has is known where the metadata are used: see `sparse_metadata`."""
    _in_the_table("context_lens", context_lens, block_table, page)
    lens = context_lens.view(-1, 1)
    lists.__wrapped__(sparse_kv_block_indices, torch.zeros_like(lens[:, 0]), lens[:, 0], block=block)
    if block_table.shape[1]:
        counts = torch.arange(sparse_kv_block_indices.shape[1]) < (lens + block - 1) // block
        columns = torch.where(counts, sparse_kv_block_indices // (page // block), 0)
        used = torch.zeros_like(block_table).scatter_add(1, columns, counts.long()) > 0
        _look("block_table", block_table, (block_table < 0) & used, "a page from 0 on, since a block is listed there")


@_unless_captured
def sparse_metadata(
    metadata: torch.Tensor,
    context_lens: torch.Tensor | None,
    *,
    rows: int,
    pitch: int,
    seal: int,
    width: int,
    block: int,
    places: int,
) -> None:
    """A header for so many rows; each begins with the seal of the sizes that the call has, says how many columns it has
    and how many splits there are before it, and its blocks lie where there are keys. `context_lens`, if they are given,
    are of as many blocks."""
    words = (metadata[: FIRST_ROW + rows * pitch].view(-1, 4) << torch.arange(0, 32, 8)).sum(dim=1)
    head, words = words[:2], words[FIRST_ROW // 4 :].view(rows, pitch // 4)
    wrong = torch.stack([head[0] != MAGIC, head[1] < rows])
    _look("metadata", head, wrong, f"the header, {MAGIC} and the number of rows, of metadata for {rows} rows or more")
    seals, columns, before, blocks = words[:, 0], words[:, 1], words[:, 2], words[:, 4:]
    _look("metadata", seals, seals != seal, f"the seal {seal} of metadata made for these sizes")
    wrong = (columns > width * block) | (columns % block != 0)
    _look("metadata", columns, wrong, f"the columns of up to {width} blocks of {block} keys")
    splits = (columns + _SPLIT - 1) // _SPLIT
    _look("metadata", before, before != splits.cumsum(0) - splits, "the number of splits of the rows before it")
    if context_lens is not None:
        lens = context_lens.flatten()
        wrong = ((lens + block - 1) // block).clamp(max=width) != columns // block
        _look("context_lens", lens, wrong, "a length of as many blocks as the metadata have of the row")
    listed = torch.arange(blocks.shape[1]) < columns[:, None] // block
    _look("metadata", blocks, listed & (blocks >= places), f"a place from 0 to {places - 1}, where there are keys")


@_unless_captured
def choice(
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    offset: torch.Tensor | None,
    *,
    name: str,
    columns: int,
    page: int,
) -> None:
    """What top-k is told of its rows, `lengths` called `name`: windows lie within the columns and the table, and
    results are int32 that are not negative."""
    rest = torch.full_like(lengths, columns)
    if starts is not None:
        _look("starts", starts, (starts < 0) | (starts > columns), f"0 to {columns}, the number of columns")
        rest -= starts
    of_all = "" if starts is None else " behind the row's start"
    wrong = (lengths < 0) | (lengths > rest)
    _look(name, lengths, wrong, f"0 to {columns}, for which there are columns{of_all}")
    largest = lengths - 1
    if block_table is not None:
        _in_the_table(name, lengths, block_table, page)
        on_page = lengths[:, None] - torch.arange(block_table.shape[1]) * page
        _pages_that_have_places(block_table, on_page > 0, page)
        places = block_table * page + on_page.clamp(max=page) - 1
        largest = functional.pad(torch.where(on_page > 0, places, -1), (1, 0), value=-1).amax(dim=1)
    if offset is not None:
        wrong = (lengths > 0) & ((offset < 0) | (offset + largest >= 2**31))
        _look("offset", offset, wrong, "0 or more, and that every result is less than 2^31")


@_unless_captured
def candidates(
    context_lens: torch.Tensor,
    starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    *,
    columns: int,
    page: int,
    block: int,
    compressed: bool,
) -> None:
    """What the choice of blocks is told of its rows: their keys are in blocks that have a column each, and a page if
    there is a table."""
    lengths, keys, behind = context_lens.flatten(), columns * block, ""
    first = torch.zeros_like(lengths)
    if starts is not None:
        first, behind = starts, " behind the row's start"
        most, what = (2**31 - 1, "an int32") if compressed else (keys, "for which there are columns")
        _look("starts", first, (first < 0) | (first > most), f"0 to {most}, {what}")
    room = keys - (first % block if compressed else first)
    wrong = (lengths < 0) | (lengths > room)
    _look("context_lens", lengths, wrong, f"0 to {keys}, for which there are columns{behind}")
    if block_table is not None:
        _in_the_table("context_lens", lengths, block_table, page, starts)
        page_first = torch.arange(block_table.shape[1]) * page
        ends = torch.where(lengths > 0, first + lengths, 0)
        used = (page_first + page > first[:, None]) & (page_first < ends[:, None])
        _pages_that_have_places(block_table, used, page // block)


def _pages_that_have_places(block_table: torch.Tensor, used: torch.Tensor, size: int) -> None:
    """Those pages that are `used`, each of `size` places, have int32 for them."""
    most = 2**31 // size - 1
    wrong = used & ((block_table < 0) | (block_table > most))
    _look("block_table", block_table, wrong, f"a page from 0 to {most}, since the row has keys there")


def _in_the_table(
    name: str, lengths: torch.Tensor, block_table: torch.Tensor, page: int, starts: torch.Tensor | None = None
) -> None:
    """No row reaches past the columns of the table."""
    most, what = block_table.shape[1] * page, f"the {block_table.shape[1]} columns of block_table"
    ends, too = (lengths, "") if starts is None else (lengths + starts, " with those before its start")
    _look(name, lengths, (lengths < 0) | (ends > most), f"0 to {most} keys{too}, which {what} allow")


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
