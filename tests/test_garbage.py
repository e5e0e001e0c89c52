"""Whatever the integer tensors hold: nothing is touched that was not handed in, and everything ends.

The emulator refuses every access outside the buffers that a call hands in. A few examples in `make test`, 500 of each
test in `make fuzz`. Garbage has a meaning (windows are cut at what there is, a page that is not there is the last one),
so the logits of all rows are compared with float64, those with garbage in them too.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import POISON, Paged, Ragged, Sparse, assert_rows_apart, check, poisoned, prefill_from

import deep_gemm
from deep_gemm.sm120 import reference
from deep_gemm.sm120.kernels import logits

TOLERANCE = 1e-4  # a row may have one key, and its logit be a small difference
PATIENCE = 120  # seconds; an example takes less than one
INT32 = st.integers(-(2**31), 2**31 - 1)
# What garbage is made of besides: ends of int32, signs, what overflows when it counts tiles, splits or bytes.
EDGES = st.sampled_from([-(2**31), 100 - 2**31, -257, -33, -1, 0, 1, 2**24, 2**26, 2**27, 2**28, 2**30, 2**31 - 1])
SIZES = st.sampled_from([(8, 32, False, 64), (8, 32, False, 16), (16, 64, True, 64), (8, 32, False, 48)])
SLOTS = st.sampled_from([1, 2, 5, 30])  # with fewer rows than slots the kernel works without a schedule


@contextmanager
def ends() -> Iterator[None]:
    """What does not come back is an error."""

    def stop(*_) -> None:
        raise TimeoutError(f"no end after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def spoil(draw: st.DrawFn, tensor: torch.Tensor, near: list[int]) -> bool:
    """Puts garbage into some places of `tensor`, or into all: any int32, above all those around `near`, where something
    ends, and at the ends. Returns whether it did."""
    value = INT32 | EDGES | st.sampled_from([n + more for n in near for more in (-1, 0, 1)])
    places = tensor.numel()
    if not places or draw(st.sampled_from([False, False, True])):
        return False
    flat = tensor.flatten().cpu()
    if draw(st.sampled_from([False, False, True])):
        several = torch.tensor(draw(st.lists(value, min_size=1, max_size=9)), dtype=torch.int32)
        flat = several[torch.arange(places) % len(several)]
    else:
        for place in draw(st.lists(st.integers(0, places - 1), min_size=1, max_size=12)):
            flat[place] = draw(value)
    tensor.copy_(flat.view(tensor.shape))
    return True


def paged_problem(draw: st.DrawFn, device: str) -> Paged:
    heads, dim, fp4, page = draw(SIZES)
    next_n = draw(st.sampled_from([1, 1, 2, 3, 9, 40]))
    batch = draw(st.integers(1, 20 if next_n < 9 else 5))
    length = st.sampled_from([0, 1, 31, 33, 64, 65, 130, 300])
    row = length if draw(st.booleans()) else st.lists(length, min_size=next_n, max_size=next_n)
    lengths = draw(st.lists(row, min_size=batch, max_size=batch))
    padding, columns = draw(st.sampled_from([0, 4, 32])), draw(st.sampled_from([1, 40, 700]))
    return Paged(
        lengths, next_n, heads, dim, page, fp4, padding=padding, max_context_len=columns, device=device,
    )  # fmt: skip


def meant(problem: Paged) -> torch.Tensor:
    """Float64 logits of what the tensors say, garbage included."""
    pages, page, columns = len(problem.kv_cache), problem.block_kv, problem.block_table.shape[1]
    limit = min(problem.max_context_len, columns * page) if pages else 0
    table = problem.block_table.long()
    table = torch.where((table < 0) | (table >= pages), pages - 1, table)
    lengths = reference.windows(problem.context_lens.long(), problem.next_n).clamp(0, limit)
    return reference.paged_logits(problem.q, problem.kv_cache, problem.weights, lengths, table, problem.max_context_len)


def assert_right_or_missing(out: torch.Tensor, expected: torch.Tensor) -> None:
    """What a schedule without sense has written is right all the same."""
    check(torch.where((out == POISON) & (expected != -torch.inf), expected.to(out.dtype), out), expected, TOLERANCE)


@given(st.data())
def test_paged_lengths_and_tables(device: str, data: st.DataObject) -> None:
    """With a plan of the lengths as they are, whatever they are, or of what they were."""
    problem, slots = paged_problem(data.draw, device), data.draw(SLOTS)
    page, columns = problem.block_kv, problem.block_table.shape[1]
    old = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, page, slots)
    spoiled = spoil(data.draw, problem.context_lens, [problem.max_context_len, columns * page])
    spoil(data.draw, problem.block_table, [len(problem.kv_cache), 0])
    clean, out = data.draw(st.booleans()), poisoned(len(problem.weights), problem.max_context_len, device=device)
    indices = torch.zeros(len(problem.lengths), dtype=torch.int32, device=device) if problem.next_n == 1 else None
    if indices is not None:
        spoil(data.draw, indices, [0])
    use_old, together = data.draw(st.booleans()), data.draw(st.booleans())
    with ends(), pytest.MonkeyPatch.context() as patch:
        prefill_from(patch, 1 if together else 1024)  # whether rows look whether they share keys
        new = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, page, slots)
        arguments = problem.arguments(old if use_old else new)
        deep_gemm.fp8_fp4_paged_mqa_logits(*arguments, clean, indices=indices, out=out)
    expected = meant(problem)
    assert_rows_apart(out)
    if use_old and spoiled:
        assert_right_or_missing(torch.where(out == -torch.inf, POISON, out) if clean else out, expected)
    else:
        check(out, expected, TOLERANCE, cleaned=clean)


@given(st.data())
def test_paged_schedules(device: str, data: st.DataObject) -> None:
    """Anything for a schedule: what is scored is right, and what has no keys stays as it is."""
    problem, slots = paged_problem(data.draw, device), data.draw(SLOTS)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, slots)
    spoil(data.draw, schedule, [0, len(problem.lengths)])
    spoil(data.draw, problem.context_lens, [problem.max_context_len])
    spoil(data.draw, problem.block_table, [len(problem.kv_cache)])
    out = poisoned(len(problem.weights), problem.max_context_len, device=device)
    with ends():
        deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out)
    assert_rows_apart(out)
    assert_right_or_missing(out, meant(problem))


@pytest.mark.parametrize("slots", [1, 30])
@pytest.mark.parametrize("next_n, flat", [(1, True), (1, False), (2, True), (2, False), (3, True)])
def test_lengths_at_the_ends_of_int32(device: str, next_n: int, flat: bool, slots: int) -> None:
    """One length a row, from which those of its tokens are counted, or one for each."""
    edges = [-(2**31), 5 - 2**31, -1, 0, 1, 70, 2**31 - 2, 2**31 - 1]
    lengths = edges if flat else [[edges[row - token] for token in range(next_n)] for row in range(len(edges))]
    problem = Paged([100] * 8 if flat else [[100] * next_n] * 8, next_n, heads=8, dim=32, device=device)
    problem.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
    out = poisoned(8 * next_n, 100, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, slots)
    deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule), out=out)
    check(out.cpu(), meant(problem).cpu(), TOLERANCE)


@pytest.mark.parametrize("together", [False, True])  # as many rows as no decode step has; a few stand for them here
@pytest.mark.parametrize("slots", [3, 60])
@pytest.mark.parametrize("block_kv, longest", [(16, 5), (16, 40), (48, 50), (64, 70)])
def test_a_table_that_just_fits(
    device: str, block_kv: int, longest: int, slots: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows of one request compare their pages, and a tile goes on behind the last of them."""
    prefill_from(monkeypatch, 1 if together else 1024)
    problem = Paged([longest] * 30, heads=8, dim=32, block_kv=block_kv, device=device)
    columns = -(-longest // block_kv)
    problem.block_table = problem.block_table[-1:, :columns].repeat(30, 1)
    out = poisoned(30, longest, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, block_kv, slots)
    deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule), out=out)
    check(out.cpu(), problem.expected().cpu(), TOLERANCE)


@pytest.mark.parametrize("slots", [1, 30])
@pytest.mark.parametrize("what", ["columns", "pages"])
def test_no_room_at_all(device: str, what: str, slots: int) -> None:
    """A table of no columns, a cache of no pages: no row has a key."""
    problem = Paged([[300], [0], [70]], heads=8, dim=32, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, slots)
    if what == "columns":
        problem.block_table = problem.block_table[:, :0]
    else:
        problem.kv_cache = problem.kv_cache[:0]
    for clean in (False, True):
        out = poisoned(3, 300, device=device)
        deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule), clean, out=out)
        check(out, torch.full((3, 300), -torch.inf, dtype=torch.float64, device=device), cleaned=clean)


@given(st.data())
def test_ragged(device: str, data: st.DataObject) -> None:
    draw = data.draw
    keys, rows = draw(st.sampled_from([1, 31, 100, 513])), draw(st.integers(1, 40))
    bound = st.integers(0, keys)
    starts, sizes = (draw(st.lists(bound, min_size=rows, max_size=rows)) for _ in range(2))
    heads, dim, fp4, _ = draw(SIZES)
    problem = Ragged(starts, [*map(sum, zip(starts, sizes))], keys, heads, dim, fp4, device=device)
    spoil(draw, problem.ks, [0, keys])
    spoil(draw, problem.ke, [0, keys])
    columns, clean = draw(st.sampled_from([0, 1, 40, 700])), draw(st.booleans())
    out = poisoned(rows, columns or keys, device=device)
    with ends():
        deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), clean, columns, out=out)
    assert_rows_apart(out)
    problem.ks, problem.ke = problem.ks.long().clamp(min=0), problem.ke.long().clamp(max=keys)
    if columns:
        problem.ke = torch.minimum(problem.ke, problem.ks + columns)
    check(out, problem.expected(columns), TOLERANCE, cleaned=clean)


@pytest.mark.parametrize("keys", [1, 384, 2**31 - 1])
@pytest.mark.parametrize("rows", [1, 33, 2**31 - 1])
def test_a_grid_is_one_that_can_be_launched(rows: int, keys: int) -> None:
    """Of any size, on as many SMs as `set_num_sms` takes: parts are counted in 31 bits, and each stripe has some."""
    config = logits.configure("sm_120f", False, 64, 128, 0, torch.float32, torch.float32)
    for sms in (1, 188, 2**16):
        groups, parts, stripes = logits.parts(config, rows, keys, sms)
        assert 1 <= groups and 1 <= parts <= -(-keys // 32) and groups * parts < 2**31
        assert 1 <= stripes <= groups * parts


@given(st.data())
def test_metadata(device: str, data: st.DataObject) -> None:
    """However long rows claim to be, and however many do, the plan is that of these lengths."""
    draw = data.draw
    rows, tokens, slots = draw(st.integers(1, 2200)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 7, 188, 3000]))
    lengths = torch.randint(0, 700, (rows, tokens), dtype=torch.int32, device=device)
    spoil(draw, lengths, [256, 0])
    with ends():
        assert_plan(lengths, slots)


@pytest.mark.parametrize("length", [2**31 - 1, 2**31 - 255, 2**31 - 256, -(2**31)])
@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 2000])
def test_metadata_of_lengths_at_the_ends_of_int32(device: str, rows: int, length: int) -> None:
    """None overflows, neither alone nor in the sum."""
    assert_plan(torch.full((rows, 1), length, dtype=torch.int32, device=device), 7)


def assert_plan(lengths: torch.Tensor, slots: int) -> None:
    schedule, rows = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, slots), len(lengths)
    limit = min(2**31 - 256, (2**31 - 1) // rows * 256)  # past it, splits could not be counted
    ends_at = ((lengths.cpu().long().amax(dim=1).clamp(0, limit) + 255) // 256).numpy().cumsum()
    share, longer = divmod(int(ends_at[-1]), slots)
    for slot, (row, split) in enumerate(schedule.tolist()):
        start = slot * share + max(0, slot - (slots - longer))
        if start == ends_at[-1]:
            assert (row, split) == (rows, 0)
        else:
            expected = int(np.searchsorted(ends_at, start, side="right"))
            assert (row, split) == (expected, start - (ends_at[expected - 1] if expected else 0)), slot


def sparse_problem(draw: st.DrawFn, device: str) -> Sparse:
    paged, block = draw(st.booleans()), draw(st.sampled_from([8, 16]))
    lengths = draw(
        st.lists(st.sampled_from([0, 1, 7, 8, 100, 300]), min_size=1, max_size=draw(st.sampled_from([6, 150])))
    )
    starts = None if paged else [draw(st.integers(0, 9)) * block for _ in lengths]
    return Sparse(
        lengths, width=draw(st.sampled_from([1, 5, 16])), block=block, block_kv=64 if paged else 0, heads=8,
        fp4=draw(st.booleans()), starts=starts, device=device,
    )  # fmt: skip


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before != after).view(len(before), -1).any(dim=1)


@given(st.data())
def test_sparse(device: str, data: st.DataObject) -> None:
    """Lengths, bounds, tables and lists: rows without garbage are exact. Then the metadata made from them."""
    draw = data.draw
    problem = sparse_problem(draw, device)
    expected, rows = problem.expected(), len(problem.lengths)
    if problem.block_kv:
        problem.block_table = problem.block_table.contiguous()
        near = [len(problem.kv_cache), 0]
        tensors = [
            (problem.lists, [40]),
            (problem.context_lens, [300, problem.width * problem.block]),
            (problem.block_table, near),
        ]
    else:
        tensors = [(problem.lists, [40]), (problem.ks, [0, problem.keys]), (problem.ke, [0, problem.keys])]
    before = [tensor.clone() for tensor, _ in tensors]
    for tensor, near in tensors:
        spoil(draw, tensor, near)
    garbage = torch.stack([changed(old, tensor) for old, (tensor, _) in zip(before, tensors)]).any(dim=0)
    out = poisoned(rows, problem.width * problem.block, torch.bfloat16, device)
    with ends():
        metadata = problem.metadata()
        problem.logits(metadata, out)
    assert_rows_apart(out)
    inside = (expected != -torch.inf) & ~garbage[:, None]
    assert torch.allclose(out[inside].double(), expected[inside], rtol=2**-7, atol=1e-2)
    assert (out[~garbage[:, None] & (expected == -torch.inf)] == POISON).all()
    words = metadata.view(torch.int32)
    spoil(draw, words, [0, rows, problem.width])
    with ends():
        problem.logits(metadata, out)
    assert_rows_apart(out)


@pytest.mark.parametrize("fp4", [False, True])
def test_where_listed_blocks_lie_that_are_nowhere(device: str, fp4: bool) -> None:
    """Past the table's columns on its last one's page; on a page that there is not, in the cache's last block."""
    problem = Sparse([100, 300, 64], width=13, heads=8, fp4=fp4, device=device)
    table = problem.block_table = problem.block_table.contiguous()
    pages, columns, blocks = len(problem.kv_cache), table.shape[1], 64 // 8
    table[0, -1] = 2  # where what lies past the columns is
    problem.lists[0, :5] = torch.tensor([-1, 2**31 - 1, columns * blocks, 3, columns * blocks - 1], dtype=torch.int32)
    problem.lists[1] = torch.arange(13)
    table[1, 0], table[1, 1] = -1, pages
    table[2, 0] = 2**31 - 1
    out, meant = (torch.full((3, 13 * 8), torch.inf, dtype=torch.bfloat16, device=device) for _ in range(2))
    problem.logits(problem.metadata(), out)
    ids = problem.lists.long() % 2**32
    on_page = table.long().gather(1, (ids // blocks).clamp(max=columns - 1)) % 2**32
    problem.lists = (on_page * blocks + ids % blocks).clamp(max=pages * blocks - 1).to(torch.int32)
    problem.block_table = torch.arange(pages, dtype=torch.int32, device=device).repeat(3, 1)
    problem.logits(problem.metadata(), meant)
    assert torch.equal(out, meant) and out.isfinite().sum() == (13 + 13 + 8) * 8
