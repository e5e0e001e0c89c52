"""What `test_garbage.py` proves of the logits, of top-k, of candidates, and of logits and choice in one: whatever the
lengths, bounds and tables hold, nothing is touched that was not handed in, everything ends, and rows without garbage
are exact."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from problems import POISON, Paged, Ragged, assert_rows_apart, poisoned
from test_garbage import SIZES, SLOTS, ends, paged_problem, spoil

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import reference, settings
from deep_gemm.sm120.emulator import recording

KS = st.sampled_from([1, 8, 512])
SMS = st.sampled_from([None, 1, 4])  # with few of them some rows are many, and take turns


@contextmanager
def on_sms(count: int | None) -> Iterator[None]:
    """A call that has to come to an end."""
    settings._num_sms = count
    try:
        with ends():
            yield
    finally:
        settings._num_sms = None


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before != after).view(len(before), -1).any(dim=1)


@given(st.data())
def test_topk(device: str, data: st.DataObject) -> None:
    draw = data.draw
    rows, columns, k = (
        draw(st.integers(1, 9)),
        draw(st.sampled_from([1, 40, 700, 3000])),
        draw(st.sampled_from([1, 8, 512])),
    )
    page = draw(st.sampled_from([1, 64]))
    logits = torch.randn(rows, columns, device=device)
    lengths = torch.randint(0, columns + 1, (rows,), dtype=torch.int32, device=device)
    starts = torch.zeros(rows, dtype=torch.int32, device=device)
    offset = torch.zeros(rows, dtype=torch.int32, device=device)
    table = torch.arange(-(-columns // page), dtype=torch.int32, device=device).repeat(rows, 1)
    tensors = [(lengths, [columns, k]), (starts, [columns]), (offset, [0]), (table, [0])]
    before = [tensor.clone() for tensor, _ in tensors]
    for tensor, near in tensors:
        spoil(draw, tensor, near)
    garbage = torch.stack([changed(old, tensor) for old, (tensor, _) in zip(before, tensors)]).any(dim=0)
    if draw(st.booleans()):
        table = table[:, : draw(st.integers(1, table.shape[1]))].contiguous()  # narrower than the rows are long
    out, positions = (poisoned(rows, k, torch.int32, device) for _ in range(2))
    with on_sms(draw(SMS)):
        sm120.topk(
            logits, lengths, k,
            starts=starts, block_table=table, page=page, offset=offset, out=out, positions=positions,
        )  # fmt: skip
    assert_rows_apart(out, positions)
    assert ((positions >= -1) & (positions < columns)).all()
    kept = [row for row in range(rows) if not garbage[row]]
    wanted = reference.topk(logits[kept].cpu(), before[0][kept].tolist(), k)
    for row, expected in zip(kept, wanted):
        assert (
            sorted(positions[row, : len(expected)].tolist()) == expected
            and (positions[row, len(expected) :] == -1).all()
        )


@pytest.mark.parametrize("pages", [0, 1, 3])
@pytest.mark.parametrize("lengths, k", [([100, 60], 120), ([700, 500], 90), ([9000, 8000], 600)])
def test_a_table_that_is_too_narrow(device: str, lengths: list[int], k: int, pages: int) -> None:
    """What lies past it is on its last page; a table without columns is none."""
    page, rows = 16, len(lengths)
    table = torch.randint(0, 2**20, (rows, 5), dtype=torch.int32, device=device)[:, :pages]
    positions = torch.full((rows, k), POISON, dtype=torch.int32, device=device)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    logits = torch.randn(rows, max(lengths), device=device)
    out = sm120.topk(logits, lens, k, block_table=table, page=page, positions=positions)
    for row, expected in enumerate(reference.topk(logits.cpu(), lengths, k)):
        at = positions[row, : len(expected)].long()
        assert sorted(at.tolist()) == expected and (out[row, len(expected) :] == -1).all()
        places = table[row][(at // page).clamp(max=pages - 1)] * page + at % page if pages else at
        assert torch.equal(out[row, : len(expected)], places.int())


@pytest.mark.parametrize("columns, k", [(128, 1), (420, 5), (3000, 700), (9000, 600), (20_000, 512)])
def test_rows_that_begin_behind_their_length(device: str, columns: int, k: int) -> None:
    """Lengths count from the start, which may be larger; what lies before and behind the row is larger, too."""
    lengths = [0, 1, 7, k, k + 1, columns // 3]
    starts = [columns // 2 + row for row in range(6)]
    logits = -torch.rand(6, columns) - 1
    for row, (start, length) in enumerate(zip(starts, lengths)):
        logits[row, :start], logits[row, start + length :] = 5.0, 6.0
    begins, lens = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (starts, lengths))
    out = sm120.topk(logits.to(device), lens, k, starts=begins).cpu()
    for row, expected in enumerate(reference.topk(logits, lengths, k, starts)):
        assert sorted(out[row, : len(expected)].tolist()) == expected and (out[row, len(expected) :] == -1).all()


@pytest.mark.parametrize("width", [1, 20, 300])
def test_blocks_behind_the_last_key(device: str, width: int) -> None:
    """The largest of all, just behind each row's end, is never chosen, wherever in a block that is."""
    lengths = [80, 81, 87, 88, 8, 1, 0, 160, 159, 153]
    counts = [-(-length // 8) for length in lengths]
    maxima = torch.randn(len(lengths), 20, device=device)
    for row, count in enumerate(counts):
        maxima[row, count:] = torch.inf
    table = torch.randint(0, 2**20, (len(lengths), 3), dtype=torch.int32, device=device)
    pages = torch.full((len(lengths), width), POISON, dtype=torch.int32, device=device)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = sm120.candidate_blocks(maxima, lens, width, block_table=table, page=64, pages=pages)
    for row, expected in enumerate(reference.topk(maxima.cpu(), counts, width)):
        rest = [2**31 - 1] * (width - len(expected))
        assert out[row].tolist() == expected + rest
        assert pages[row].tolist() == [8 * int(table[row, block // 8]) + block % 8 for block in expected] + rest


@given(st.data())
def test_candidates(device: str, data: st.DataObject) -> None:
    draw = data.draw
    rows, columns, width = (
        draw(st.integers(1, 9)),
        draw(st.sampled_from([1, 40, 700])),
        draw(st.sampled_from([1, 8, 300])),
    )
    maxima = torch.randn(rows, columns, device=device)
    lengths = torch.randint(0, 8 * columns + 1, (rows,), dtype=torch.int32, device=device)
    table = torch.arange(-(-columns // 8), dtype=torch.int32, device=device).repeat(rows, 1)
    before = lengths.clone(), table.clone()
    spoil(draw, lengths, [8 * columns, 8 * width])
    spoil(draw, table, [0])
    garbage = changed(before[0], lengths)
    if draw(st.booleans()):
        table = table[:, : draw(st.integers(1, table.shape[1]))].contiguous()
    out, pages = (poisoned(rows, width, torch.int32, device) for _ in range(2))
    with ends():
        sm120.candidate_blocks(maxima, lengths, width, block_table=table, page=64, out=out, pages=pages)
    assert_rows_apart(out, pages)
    assert (((out >= 0) & (out < columns)) | (out == 2**31 - 1)).all()
    kept = [row for row in range(rows) if not garbage[row]]
    blocks = [-(-length // 8) for length in before[0][kept].tolist()]
    for row, expected in zip(kept, reference.topk(maxima[kept].cpu(), blocks, width)):
        assert out[row, : len(expected)].tolist() == expected


@given(st.data())
def test_candidates_of_a_run(device: str, data: st.DataObject) -> None:
    """Starts and lengths mean something whatever they are, so all rows are exact: a start below zero is zero, and what
    ends past the columns ends there."""
    draw = data.draw
    rows, columns, width = draw(st.integers(1, 9)), draw(st.sampled_from([1, 40, 700])), draw(KS)
    block, compressed = draw(st.sampled_from([1, 8, 24])), draw(st.booleans())
    keys = block * columns
    starts, lengths = (torch.randint(0, keys + 1, (rows,), dtype=torch.int32, device=device) for _ in range(2))
    table = torch.randint(-(2**31), 2**31 - 1, (rows, draw(st.integers(0, 90))), dtype=torch.int32, device=device)
    spoil(draw, starts, [keys, block])
    spoil(draw, lengths, [keys, block * width])
    begins = starts.clamp(min=0).tolist()
    ends_ = [begin + min(max(length, 0), 2**31 - 1 - begin) for begin, length in zip(begins, lengths.tolist())]
    first = [begin // block for begin in begins]
    counts = [-(-end // block) - at if end > begin else 0 for begin, end, at in zip(begins, ends_, first)]
    at = [0] * rows if compressed else [min(column, columns) for column in first]
    counts = [min(count, columns - column) for count, column in zip(counts, at)]
    maxima = torch.full((rows, columns), torch.inf, device=device)
    for row, (column, count) in enumerate(zip(at, counts)):
        maxima[row, column : column + count] = torch.randn(count)
    out, pages = (poisoned(rows, width, torch.int32, device) for _ in range(2))
    with on_sms(draw(SMS)), recording(sanitize=draw(st.booleans())):
        sm120.candidate_blocks(
            maxima, lengths, width, block=block, starts=starts, compressed=compressed,
            block_table=table, page=4 * block, out=out, pages=pages,
        )  # fmt: skip
    assert_rows_apart(out, pages)
    for row, chosen in enumerate(reference.topk(maxima.cpu(), counts, width, at)):
        ids = torch.tensor([first[row] + place for place in chosen], dtype=torch.int64)
        assert out[row].tolist() == ids.tolist() + [2**31 - 1] * (width - len(ids))
        if table.shape[1]:
            ids = table[row].cpu().long()[(ids // 4).clamp(max=table.shape[1] - 1)] * 4 + ids % 4
        assert torch.equal(pages[row, : len(ids)].cpu(), ids.int())


# ---- logits and choice in one: garbage means what it means for the logits, so all rows are exact ---------------------


@pytest.fixture(params=["at once", "some rows", "some keys"])
def turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("deep_gemm.sm120.topk")
    if request.param != "at once":
        monkeypatch.setattr(settings, "_num_sms", 4)
        monkeypatch.setattr(module, "_LOGITS_BYTES", 2000)
        monkeypatch.setattr(module, "_PIECE", 64)
        monkeypatch.setattr(module, "_LEAST_ROWS", 1 if request.param == "some rows" else 99)


def compare(positions: torch.Tensor, logits: torch.Tensor, starts: list[int], lengths: list[int], k: int) -> None:
    assert_rows_apart(positions)
    for row, expected in enumerate(reference.topk(logits.cpu(), lengths, k, starts)):
        assert sorted(positions[row, : len(expected)].tolist()) == expected
        assert (positions[row, len(expected) :] == -1).all()


@given(st.data())
def test_paged_logits_and_choice(device: str, data: st.DataObject) -> None:
    """Of a schedule that nobody has touched all rows are right, garbage taken as it is meant."""
    draw = data.draw
    problem, k = paged_problem(draw, device), draw(KS)
    page, columns = problem.block_kv, problem.max_context_len
    spoil(draw, problem.context_lens, [columns, problem.block_table.shape[1] * page])
    spoil(draw, problem.block_table, [len(problem.kv_cache), 0])
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, page, draw(SLOTS))
    whole = schedule.clone()
    spoiled = spoil(draw, schedule, [0, len(problem.lengths)])
    rows = len(problem.weights)
    out, positions = (poisoned(rows, k, torch.int32, device) for _ in range(2))
    with on_sms(draw(SMS)):
        sm120.fp8_fp4_paged_mqa_topk(
            *problem.arguments(schedule), k, translate=draw(st.booleans()), out=out, positions=positions
        )
    assert_rows_apart(out, positions)
    assert ((positions >= -1) & (positions < columns)).all()
    if not spoiled:
        logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(whole))
        limit = min(columns, problem.block_table.shape[1] * page)
        lengths = reference.windows(problem.context_lens.long(), problem.next_n).clamp(0, limit).flatten().tolist()
        compare(positions, logits, [0] * rows, lengths, k)


@given(st.data())
def test_ragged_logits_and_choice(device: str, data: st.DataObject) -> None:
    draw = data.draw
    keys, rows, k = draw(st.sampled_from([1, 31, 100, 513])), draw(st.integers(1, 40)), draw(KS)
    bound = st.integers(0, keys)
    starts, sizes = (draw(st.lists(bound, min_size=rows, max_size=rows)) for _ in range(2))
    heads, dim, fp4, _ = draw(SIZES)
    problem = Ragged(starts, [*map(sum, zip(starts, sizes))], keys, heads, dim, fp4, device=device)
    table = torch.zeros(rows, draw(st.integers(0, 9)), dtype=torch.int32, device=device)
    offset = torch.zeros(rows, dtype=torch.int32, device=device)
    for tensor, near in ((problem.ks, [0, keys]), (problem.ke, [0, keys]), (table, [0]), (offset, [0])):
        spoil(draw, tensor, near)
    out, positions = (poisoned(rows, k, torch.int32, device) for _ in range(2))
    with on_sms(draw(SMS)):
        sm120.fp8_fp4_mqa_topk(
            *problem.arguments(), k, offset=offset, block_table=table, page=16, out=out, positions=positions
        )
    assert_rows_apart(out, positions)
    begins = problem.ks.long().clamp(min=0)
    lengths = (problem.ke.long().clamp(max=keys) - begins).clamp(min=0).tolist()
    logits = deep_gemm.fp8_fp4_mqa_logits(*problem.arguments())
    compare(positions, logits, begins.clamp(max=keys).tolist(), lengths, k)


@pytest.mark.usefixtures("turns")
@given(data=st.data())
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_ragged_choice(device: str, data: st.DataObject) -> None:
    draw = data.draw
    keys, rows, k = draw(st.sampled_from([1, 100, 900])), draw(st.integers(8, 20)), draw(st.sampled_from([1, 50, 77]))
    bound = st.integers(0, keys)
    starts, stops = (draw(st.lists(bound, min_size=rows, max_size=rows)) for _ in range(2))
    problem = Ragged(starts, stops, keys, heads=8, dim=32, device=device)
    spoil(draw, problem.ks, [0, keys, 192])
    spoil(draw, problem.ke, [0, keys, 192])
    table = torch.randint(-(2**31), 2**31 - 1, (rows, draw(st.integers(0, 9))), dtype=torch.int32, device=device)
    positions = poisoned(rows, k, torch.int32, device)
    with ends():
        logits = deep_gemm.fp8_fp4_mqa_logits(*problem.arguments())
        sm120.fp8_fp4_mqa_topk(*problem.arguments(), k, block_table=table, page=64, positions=positions)
    begins = problem.ks.clamp(0, keys).tolist()
    lengths = [max(0, min(end, keys) - begin) for begin, end in zip(begins, problem.ke.tolist())]
    compare(positions, logits, begins, lengths, k)


@pytest.mark.usefixtures("turns")
@given(data=st.data())
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_paged_choice(device: str, data: st.DataObject) -> None:
    draw = data.draw
    next_n, k = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 50, 77]))
    batch = draw(st.integers(8, 14))
    row = st.lists(st.sampled_from([0, 1, 63, 64, 65, 130, 700]), min_size=next_n, max_size=next_n)
    lengths = draw(st.lists(row, min_size=batch, max_size=batch))
    columns = draw(st.sampled_from([40, 700]))
    problem = Paged(lengths, next_n, heads=8, dim=32, max_context_len=columns, slots=4, device=device)
    spoil(draw, problem.context_lens, [columns, 64 * problem.block_table.shape[1]])
    spoil(draw, problem.block_table, [len(problem.kv_cache), 0])
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 4)
    positions = poisoned(batch * next_n, k, torch.int32, device)
    with ends():
        logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule))
        sm120.fp8_fp4_paged_mqa_topk(*problem.arguments(schedule), k, translate=True, positions=positions)
    limit = min(columns, 64 * problem.block_table.shape[1])
    seen = reference.windows(problem.context_lens.long().cpu(), next_n).clamp(0, limit).flatten().tolist()
    compare(positions, logits, [0] * len(seen), seen, k)
