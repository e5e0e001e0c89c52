"""From candidates to the final choice: what `topk` gives of the sparse logits, taken back to positions and pages."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import POISON, Ragged, Sparse, assert_rows_apart, keys_read, poisoned
from test_garbage import ends, spoil

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import ArgumentError, debug, reference
from deep_gemm.sm120.emulator import recording


def arguments(problem: Sparse, metadata: torch.Tensor) -> tuple:
    """All before k."""
    last = (problem.width, problem.block, problem.lists, problem.context_lens)
    return problem.q, problem.kv_cache, problem.weights, metadata, *last


def positions_of(problem: Sparse) -> list[list[int]]:
    """Of each row's columns that a choice may be made from the positions: as long as blocks are full, and of the first
    one that is not those below the length."""
    rows = []
    for blocks, length in zip(problem.lists.tolist(), problem.context_lens.flatten().tolist()):
        row: list[int] = []
        for block in blocks[: -(-max(length, 0) // problem.block)]:
            first = block * problem.block
            row += [p for p in range(first, first + problem.block) if 0 <= p < length]
            if not 0 <= first <= length - problem.block:
                break
        rows.append(row)
    return rows


def check(
    problem: Sparse, k: int, metadata: torch.Tensor | None = None, rows: list[int] | None = None, **options
) -> None:
    """Positions, places and scores of the rows named (else all) against a stable sort of the logits; twice each."""
    metadata = problem.metadata() if metadata is None else metadata
    logits = problem.logits(metadata).float().cpu()
    count = len(logits)
    runs = []
    for translate in (False, True):
        for _ in range(2):
            out, scores = (poisoned(count, k, dtype, problem.device) for dtype in (torch.int32, torch.float32))
            assert sm120.fp8_fp4_paged_sparse_mqa_topk(
                *arguments(problem, metadata), k, translate=translate, out=out, scores=scores, **options
            ) is out  # fmt: skip
            assert_rows_apart(out, scores)
            runs.append((out.cpu(), scores.cpu()))
            unscored = poisoned(count, k, torch.int32, problem.device)
            sm120.fp8_fp4_paged_sparse_mqa_topk(
                *arguments(problem, metadata), k, translate=translate, out=unscored, **options
            )
            some = slice(None) if rows is None else rows
            assert torch.equal(unscored[some].sort().values, out[some].sort().values)
    for (out, scores), (again, scores_again) in zip(runs[::2], runs[1::2]):
        assert torch.equal(out, again) and torch.equal(scores.view(torch.int32), scores_again.view(torch.int32))
    (positions, scores), (places, same_scores) = runs[0], runs[2]
    assert torch.equal(scores.view(torch.int32), same_scores.view(torch.int32))
    columns = positions_of(problem)
    table, page = problem.block_table.cpu(), problem.kv_cache.shape[1]
    for row in range(count) if rows is None else rows:
        (want,) = reference.topk(logits[row : row + 1], [len(columns[row])], k)
        chosen = sorted(columns[row][column] for column in want)
        got = positions[row, : len(want)]
        assert sorted(got.tolist()) == chosen, (row, sorted(got.tolist()), chosen)
        assert (positions[row, len(want) :] == -1).all() and (places[row, len(want) :] == -1).all()
        assert (scores[row, len(want) :] == -torch.inf).all()
        assert sorted(scores[row, : len(want)].tolist()) == sorted((logits[row, want] + 0.0).tolist())
        assert torch.equal(places[row, : len(want)], table[row, got.long() // page] * page + got % page)


@pytest.mark.parametrize("fp4", [True, False], ids=["mxfp4", "mxfp8"])
@pytest.mark.parametrize("k", [1, 100, 512, 2048])
def test_any_k(k: int, fp4: bool, device: str) -> None:
    """Rows with fewer candidates than k, with as many, with more; the last block is full, or not."""
    lengths = [0, 1, 7, 8, 9, k - 1, k, k + 1, 700, 2500, 2505]
    check(Sparse(lengths, width=400, fp4=fp4, heads=8, device=device), k)


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_keys_of_rows_that_are_chosen_whole_are_not_read(rows: int) -> None:
    """Unless scores are wanted. Candidates count in whole blocks here."""
    problem = Sparse([0, 64, 100, 104][-rows:] * (rows // 4 or 1), width=20, heads=8)
    call = partial(sm120.fp8_fp4_paged_sparse_mqa_topk, *arguments(problem, problem.metadata()))
    scores = poisoned(len(problem.lengths), 104, torch.float32, "cpu")
    for options, some in (({"k": 104}, False), ({"k": 103}, True), ({"k": 104, "scores": scores}, True)):
        assert (keys_read(call, "kv_cache", 68, **options) > 0) == some


@pytest.mark.parametrize("block, block_kv", [(8, 64), (8, 128), (16, 64), (24, 48), (64, 64)])
def test_blocks_and_pages(block: int, block_kv: int, device: str) -> None:
    check(Sparse([700, 333, 64, 65, 5], width=20, block=block, block_kv=block_kv, heads=8, device=device), 77)


@pytest.mark.parametrize("tail", ["largest", "last", "garbage"])
def test_what_comes_after_a_list_does_not_count(tail: str, device: str) -> None:
    check(Sparse([130, 1, 0, 400, 90, 128], width=32, heads=8, tail=tail, device=device), 200)


@pytest.mark.parametrize("shared", [False, True])
def test_a_prefill(shared: bool, device: str) -> None:
    problem = Sparse([300 + row for row in range(200)], width=16, heads=8, shared=shared, device=device)
    check(problem, 50)


def test_against_float64(device: str) -> None:
    """The chosen are the largest of the true logits, but for what bf16 rounds away."""
    problem = Sparse([3000, 2999], width=300, heads=32, device=device)
    positions = sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, problem.metadata()), 256).cpu()
    exact, columns = problem.expected().cpu(), positions_of(problem)
    for row in range(2):
        value = dict(zip(columns[row], exact[row, : len(columns[row])].tolist()))
        assert len(set(positions[row].tolist())) == 256 and set(positions[row].tolist()) <= set(value)
        least = sorted(value.values())[-256]
        assert min(value[position] for position in positions[row].tolist()) >= least - 2**-6 * abs(least)


def test_tokens_past_the_length_are_not_chosen(device: str) -> None:
    """What lies there would be the largest: its keys are the queries' own."""
    problem = Sparse([65, 69, 127], width=16, fp4=False, heads=8, device=device)
    problem.weights.copy_(problem.weights.abs() + 1)
    values, scales = problem.q
    flat = problem.kv_cache.view(len(problem.kv_cache), -1)
    for row, length in enumerate(problem.lengths):
        page = flat[problem.block_table[row, length // 64]]
        for slot in range(length % 64, 64):
            page[128 * slot : 128 * slot + 128] = values[row, 0, 0].view(torch.uint8)
            page[8192 + 4 * slot : 8196 + 4 * slot] = scales[row].flatten()[:1].clone().view(torch.uint8)
    check(problem, 40)


def test_repeated_blocks(device: str) -> None:
    """Each entry for itself; the last block, which is not full, ends the list."""
    problem = Sparse([100, 100, 96], width=13, heads=8, device=device)
    problem.lists[0] = torch.tensor([0, 0, 3, 3, 3, 5, 12, 12, 12, 12, 12, 12, 12], dtype=torch.int32)
    problem.lists[1] = torch.tensor([11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11], dtype=torch.int32)
    problem.lists[2] = torch.tensor([0, 1, 1, 11, 11, 11, 11, 11, 11, 11, 11, 11, 99], dtype=torch.int32)
    check(problem, 60)
    positions = sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, problem.metadata()), 60)
    assert (positions[0] >= 96).sum() <= 4
    assert (positions[1].unique(return_counts=True)[1] > 1).any()


def test_a_list_that_does_not_ascend_ends_early(device: str) -> None:
    problem = Sparse([100, 64, 100], width=13, heads=8, device=device)
    problem.lists[0] = torch.tensor([5, 12, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11], dtype=torch.int32)
    problem.lists[1] = torch.tensor([7, 3, 5, 1, 0, -4, 2, 6, 7, 8, 9, 10, 11], dtype=torch.int32)
    problem.lists[2, 1:4] = torch.tensor([99, 12, 3], dtype=torch.int32)
    assert [len(row) for row in positions_of(problem)] == [12, 40, 8]
    check(problem, 60)


def test_a_workspace_may_hold_anything(device: str) -> None:
    problem = Sparse([3000, 100], width=375, heads=8, device=device)
    size = sm120.sparse_mqa_topk_workspace_bytes(2, 375, 8, 512, device)
    workspace = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    check(problem, 512, workspace=workspace)
    with pytest.raises(ArgumentError, match=f"workspace: expected at least {size} bytes"):
        sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, problem.metadata()), 512, workspace=workspace[:-1])


def test_from_the_source_to_the_consumer(device: str) -> None:
    """A step of V4.1: dense logits with maxima, candidates, their logits and the choice."""
    from problems import Paged

    lengths, width = [300, 41, 1], 12
    source = Paged([[length] for length in lengths], heads=8, fp4=True, device=device)
    maxima = torch.full((3, 38), torch.nan, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(source.context_lens, 64, source.slots)
    sm120.fp8_fp4_paged_mqa_logits(*source.arguments(schedule), block_max=maxima)
    consumer = Sparse(lengths, width=width, heads=8, device=device)
    consumer.kv_cache, consumer.block_table = source.kv_cache, source.block_table
    consumer.lists = sm120.candidate_blocks(maxima, source.context_lens, width)
    assert [max(position for position in row) for row in positions_of(consumer)] == [299, 40, 0]
    check(consumer, 64)


@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
def test_from_the_source_to_the_consumer_in_a_run(compressed: bool, device: str, monkeypatch) -> None:
    """A prefill's step, rows beginning anywhere: dense logits with maxima, candidates, their logits and the choice,
    each as float64 has it. Scores are multiples of 1/64 that fp32 sums hold, so there is no rounding but to bf16."""
    width, k, keys = 6, 20, 300
    starts = [0, 8, 5, 13, 7, 250, 100, 100, 299, 300, 61, 3, 40]
    stops = [300, 300, 299, 230, 60, 300, 100, 90, 300, 300, 300, 4, 43]
    source, consumer = (Ragged(starts, stops, keys, heads=8, fp4=True, device=device) for _ in range(2))
    scales = torch.randint(127, 129, (len(starts), 8, 4), dtype=torch.uint8).view(torch.int32).squeeze(-1)
    run = source.kv[0], torch.randint(126, 129, (keys, 4), dtype=torch.uint8).view(torch.int32).flatten().to(device)
    for problem in (source, consumer):
        problem.kv, problem.q = run, (problem.q[0], scales.to(device))
        problem.weights = torch.randint(-16, 17, (len(starts), 8), device=device) / 8.0

    columns = 300 + 4 if compressed else keys  # room for one block more than the longest row has at the least
    maxima = torch.full((len(starts), -(-columns // 8)), torch.nan, device=device)
    sm120.fp8_fp4_mqa_logits(*source.arguments(), False, columns if compressed else 0, block_max=maxima)
    lens = (source.ke - source.ks).clamp(min=0)
    lists = sm120.candidate_blocks(maxima, lens, width, starts=source.ks, compressed=compressed)

    exact = source.expected().cpu()
    largest = reference.block_max(exact, starts, stops)
    blocks = [range(start // 8, -(-stop // 8)) if start < stop else range(0) for start, stop in zip(starts, stops)]
    firsts = [row.start for row in blocks]
    wanted = [
        [first + at for at in chosen]
        for first, chosen in zip(firsts, reference.topk(largest, [len(row) for row in blocks], width, firsts))
    ]
    assert [row[: len(want)] for row, want in zip(lists.tolist(), wanted)] == wanted
    assert [(row == 2**31 - 1).sum().item() for row in lists] == [width - len(want) for want in wanted]

    aligned = source.ks // 8 * 8  # so that all blocks of a row count
    until = torch.where(lens > 0, source.ke, aligned)
    monkeypatch.setattr(debug, "ON", True)  # which agrees
    metadata = deep_gemm.get_sparse_mqa_logits_metadata(aligned, until, keys, lists, torch.int8, 8)
    logits = deep_gemm.fp8_fp4_sparse_mqa_logits(consumer.q, run, consumer.weights, metadata, width, 8)
    skipped = torch.where(lists[:, 0] == source.ks // 8, source.ks % 8, 0)  # those of keys before the row's first
    count = 8 * (lists < 2**31 - 1).sum(dim=1) - -source.ke % 8
    chosen = sm120.topk(logits, (count - skipped).clamp(min=0).int(), k, starts=skipped.int()).cpu()

    exact = consumer.expected().to(torch.bfloat16).double().cpu()
    for row, ids in enumerate(wanted):
        seen = [key for block in ids for key in range(8 * block, 8 * block + 8) if starts[row] <= key < stops[row]]
        best = reference.topk(exact[row : row + 1, seen], [len(seen)], k)[0]
        places = [at + skipped[row].item() for at in chosen[row].tolist() if at >= 0]
        assert sorted(ids[at // 8] * 8 + at % 8 for at in places) == [seen[at] for at in best]
        assert (chosen[row] == -1).sum() == k - len(best)


@given(st.data())
def test_any_problem(device: str, data: st.DataObject) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 900) | st.sampled_from([0, 1, 8, 63, 64, 65, 512]), min_size=1, max_size=12))
    block = draw(st.sampled_from([8, 16, 40]))
    problem = Sparse(
        lengths, draw(st.integers(1, 90)), block, block * draw(st.integers(1, 8)), heads=8, fp4=draw(st.booleans()),
        tail=draw(st.sampled_from(["largest", "last", "garbage"])), shared=draw(st.booleans()), device=device,
    )  # fmt: skip
    with recording(sanitize=draw(st.booleans())):
        check(problem, draw(st.sampled_from([1, 64, 513, 2048])))


@given(st.data())
def test_garbage(device: str, data: st.DataObject) -> None:
    """In lengths, lists, tables, metadata: no place but the results is written, and rows without garbage are exact."""
    draw = data.draw
    lengths = draw(st.lists(st.sampled_from([0, 1, 7, 8, 100, 300]), min_size=1, max_size=9))
    problem = Sparse(lengths, width=draw(st.sampled_from([1, 5, 16])), heads=8, device=device)
    problem.block_table = problem.block_table.contiguous()
    tensors = [(problem.lists, [40]), (problem.block_table, [0]), (problem.context_lens, [128, 300])]
    before = [tensor.clone() for tensor, _ in tensors]
    for tensor, near in tensors:
        spoil(draw, tensor, near)
    garbage = torch.zeros(len(lengths), dtype=torch.bool)
    for old, (tensor, _) in zip(before, tensors):
        garbage |= (old != tensor).view(len(lengths), -1).any(dim=1).cpu()
    metadata = problem.metadata()
    problem.lengths = problem.context_lens.tolist()
    k = draw(st.sampled_from([1, 64, 513]))
    with ends():
        check(problem, k, metadata, rows=(~garbage).nonzero().flatten().tolist())
    spoil(draw, metadata.view(torch.int32), [0, 16])
    spoil(draw, problem.context_lens, [128])
    out, scores = (poisoned(len(lengths), k, dtype, device) for dtype in (torch.int32, torch.float32))
    with ends():
        sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, metadata), k, translate=True, out=out, scores=scores)
    assert_rows_apart(out, scores)


def test_no_rows_no_pages(device: str) -> None:
    none = Sparse([], heads=8, device=device)
    none.block_table = none.block_table.view(0, 2)
    assert sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(none, none.metadata()), 5).shape == (0, 5)
    problem = Sparse([40], heads=8, device=device)
    metadata = problem.metadata()
    problem.context_lens.fill_(-3)
    assert (sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, metadata), 5) == -1).all()
    problem.context_lens.fill_(40)
    problem.kv_cache = problem.kv_cache[:0]
    assert (sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, metadata), 5) == -1).all()


NAMES = (
    "q", "kv_cache", "weights", "metadata", "num_max_sparse_blocks", "sparse_block_kv", "sparse_kv_block_indices",
    "context_lens", "k",
)  # fmt: skip
WRONG = [
    ("q", lambda q: q[0], "(values, scales)"),
    ("kv_cache", lambda cache: cache[..., :64], "68"),
    ("weights", lambda weights: weights[:1], "[3, 8]"),
    ("metadata", lambda metadata: metadata[:-1], "bytes one after another"),
    ("num_max_sparse_blocks", lambda width: 0, "from 1"),
    ("num_max_sparse_blocks", lambda width: 15, "sparse_kv_block_indices: expected lists of"),
    ("sparse_block_kv", lambda block: 12, "multiple of 8"),
    ("sparse_kv_block_indices", lambda lists: lists.long(), "int32"),
    ("sparse_kv_block_indices", lambda lists: lists[:2], "[3, blocks of a row]"),
    ("sparse_kv_block_indices", lambda lists: lists[:, :8], "num_max_sparse_blocks = 16"),
    ("context_lens", lambda lens: lens[:2], "3 elements"),
    ("context_lens", lambda lens: lens.long(), "int32"),
    ("context_lens", lambda lens: None, "None"),
    ("k", lambda k: 0, "from 1"),
    ("k", lambda k: 2049, "to 2048"),
    ("translate", lambda translate: 1, "a bool"),
    ("out", lambda out: torch.zeros(3, 4, dtype=torch.int32), "[3, 5]"),
    ("out", lambda out: torch.zeros(3, 5), "int32"),
    ("scores", lambda scores: torch.zeros(3, 5, dtype=torch.bfloat16), "float32"),
    ("workspace", lambda workspace: torch.zeros(10, dtype=torch.uint8), "at least"),
]


@pytest.mark.parametrize("argument, change, word", WRONG)
def test_refused(argument: str, change: Callable, word: str) -> None:
    problem = Sparse([40, 0, 100], heads=8)
    given_arguments = dict(zip(NAMES, (*arguments(problem, problem.metadata()), 5)))
    given_arguments["out"] = out = poisoned(3, 5, torch.int32, "cpu")
    given_arguments[argument] = change(given_arguments.get(argument))
    with pytest.raises(ArgumentError) as caught:
        sm120.fp8_fp4_paged_sparse_mqa_topk(**given_arguments)
    assert (argument in str(caught.value) or argument == "num_max_sparse_blocks") and word in str(caught.value)
    assert (out == POISON).all()


def test_debug_mode_looks_whether_lists_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "ON", True)
    problem = Sparse([40, 100], heads=8)
    metadata = problem.metadata()
    problem.lists[0, :5] = torch.tensor([0, 1, 2, 2, 4])
    sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, metadata), 5)
    problem.lists[1, 7] = 0
    with pytest.raises(ArgumentError, match=r"sparse_kv_block_indices\[1, 7\], row 1, is 0; .*ascends"):
        sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, metadata), 5)


@pytest.mark.parametrize("value, words", [(-1, "expected 0 or more"), (97, "blocks"), (2**31 - 1, "blocks")])
def test_debug_mode_names_lengths_that_the_metadata_were_not_made_from(
    value: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where lists are long enough for any length, nothing but the metadata tells what it was."""
    monkeypatch.setattr(debug, "ON", True)
    problem = Sparse([40, 96, 200], width=13, heads=8)
    problem.lists[:] = torch.arange(13)
    metadata, out = problem.metadata(), poisoned(3, 5, torch.int32, "cpu")
    problem.context_lens[0] = 33  # of as many blocks
    sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, metadata), 5)
    problem.context_lens[1] = value
    with pytest.raises(ArgumentError) as caught:
        sm120.fp8_fp4_paged_sparse_mqa_topk(*arguments(problem, metadata), 5, out=out)
    place = f"context_lens[1], row 1, is {value}; "
    assert f"fp8_fp4_paged_sparse_mqa_topk: {place}" in str(caught.value) and words in str(caught.value)
    assert (out == POISON).all()


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_100a", "sm_121f"])
def test_other_cards(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    check(Sparse([40, 0, 333], width=32, heads=8), 64)


@pytest.mark.parametrize("tail", ["largest", "last", "garbage"])
def test_what_follows_the_entries_that_count(tail: str, device: str) -> None:
    """Rows of whole blocks, shorter than their lists: what stands behind is never looked at."""
    problem = Sparse([64, 80, 8, 0, 168], width=21, heads=8, tail=tail, device=device)
    check(problem, 200)
    check(problem, 9)
