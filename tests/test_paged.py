"""Paged logits against float64: every size, every mixture of lengths, and every way to lay out what comes in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import POISON, Paged, check, poisoned

import deep_gemm

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])


def run(problem: Paged, schedule: torch.Tensor | None = None, clean: bool = False, dtype=torch.float32) -> torch.Tensor:
    """Computes on a poisoned output, compares with float64, returns the logits."""
    if schedule is None:
        lens, slots = problem.context_lens, problem.slots
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, problem.block_kv, slots)
    rows = len(problem.lengths) * problem.next_n
    out = poisoned(rows, problem.max_context_len, dtype, problem.device)
    arguments = problem.arguments(schedule)
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(*arguments, clean, logits_dtype=dtype, out=out)
    assert logits is out
    check(logits.cpu(), problem.expected().cpu(), cleaned=clean)
    return logits


@FORMATS
@pytest.mark.parametrize("heads", [8, 16, 24, 32, 40, 48, 56, 64])
def test_heads(heads: int, fp4: bool, device: str) -> None:
    run(Paged([0, 37, 300], heads=heads, fp4=fp4, device=device))


@pytest.mark.parametrize("fp4, dim", [(False, 32), (False, 64), (False, 128), (True, 64), (True, 128)])
def test_dims(fp4: bool, dim: int, device: str) -> None:
    run(Paged([700, 1, 0, 16], dim=dim, heads=32, fp4=fp4, device=device))


@FORMATS
@pytest.mark.parametrize("block_kv", [16, 32, 48, 64, 80, 128, 256])
def test_page_sizes(block_kv: int, fp4: bool, device: str) -> None:
    run(Paged([block_kv - 1, block_kv, block_kv + 1, 600], block_kv=block_kv, heads=16, fp4=fp4, device=device))


@FORMATS
@pytest.mark.parametrize("offset", [4, 8, 16, 32])
def test_where_queries_begin(offset: int, fp4: bool, device: str) -> None:
    """A kernel loads as many bytes at once as they are aligned to: one row, of tiles and of eight keys; few; many."""
    for rows, keys, next_n in ((1, 1000, 3), (1, 40, 1), (3, 300, 1), (5, 90, 2)):
        problem = Paged([keys] * rows, next_n=next_n, slots=4, fp4=fp4, device=device)
        queries = problem.q[0] if fp4 else problem.q
        room = torch.empty(queries.numel() + 128, dtype=torch.uint8, device=device)
        begin = -room.data_ptr() % 64 + offset
        moved = room[begin : begin + queries.numel()].view(queries.dtype).view(queries.shape).copy_(queries)
        problem.q = (moved, problem.q[1]) if fp4 else moved
        run(problem)


@pytest.mark.parametrize("slots", [2, 1])
def test_more_tiles_than_a_warp_has_lanes(slots: int, device: str) -> None:
    """A lane holds the page of a tile to come: after 32 of them a warp asks for the next ones."""
    run(Paged([40_000], heads=8, dim=32, slots=slots, device=device))


@FORMATS
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5, 6, 7, 8, 13, 17, 40])
def test_next_n(next_n: int, fp4: bool, device: str) -> None:
    lengths = torch.randint(0, 700, (3, next_n)).tolist()
    run(Paged(lengths, next_n=next_n, heads=16, fp4=fp4, device=device))
    run(Paged([0, next_n // 2, 555], next_n=next_n, heads=16, fp4=fp4, device=device))  # 1-D lengths


@pytest.mark.parametrize("empty", [100, 150, 200, 270, 500])
@pytest.mark.parametrize("next_n", [1, 2])
def test_a_row_behind_many_empty_ones(empty: int, next_n: int, device: str) -> None:
    """In one slot: it looks for the next row that has keys, 128 lengths at a time."""
    rows = [5, *[0] * empty, 17, *[0] * 300, 40]
    run(Paged([[length] * next_n for length in rows], next_n=next_n, heads=8, dim=32, slots=1, device=device))


@FORMATS
@pytest.mark.parametrize("block_kv", [48, 64])
def test_a_long_row_among_many(block_kv: int, fp4: bool, device: str) -> None:
    """In one slot, whose warps share its tiles out: each looks up its pages several times, 32 tiles at a time."""
    run(Paged([26_000, *[30] * 7], heads=16, dim=64, block_kv=block_kv, fp4=fp4, slots=1, device=device))


@FORMATS
@pytest.mark.parametrize("block_kv", [16, 48, 64])
@pytest.mark.parametrize("next_n", [1, 2, 17, 40])
def test_one_short_row(block_kv: int, next_n: int, fp4: bool, device: str) -> None:
    """Fewer keys than the grid has tensor pipes: a warp takes eight, from either half of a tile."""
    lengths = [[int(torch.randint(20, 120, ())) for _ in range(next_n)]]
    run(Paged(lengths, next_n=next_n, block_kv=block_kv, heads=16, fp4=fp4, device=device))


@pytest.mark.parametrize(
    "lengths", [[0], [0] * 3, [0, 5], [5, 0], [0, 0, 900, 0, 1, 0, 0], [0] * 300 + [17] + [0] * 300]
)
def test_empty_rows(lengths: list[int], device: str) -> None:
    run(Paged(lengths, heads=16, max_context_len=1000, device=device))


def test_nothing_at_all(device: str) -> None:
    assert run(Paged([], device=device)).shape == (0, 0)
    assert run(Paged([], max_context_len=64, device=device)).shape == (0, 64)


@FORMATS
@pytest.mark.parametrize("padding", [4, 16, 32, 100])
def test_padded_cache(padding: int, fp4: bool, device: str) -> None:
    run(Paged([100, 257], padding=padding, heads=16, fp4=fp4, device=device))


def test_block_table_with_a_stride_of_its_own(device: str) -> None:
    problem = Paged([100, 257, 64], heads=16, device=device)
    wide = torch.full((3, 50), -1, dtype=torch.int32, device=device)
    wide[:, : problem.block_table.shape[1]] = problem.block_table
    problem.block_table = wide[:, : problem.block_table.shape[1]]
    run(problem)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
@FORMATS
def test_dtypes(weights: torch.dtype, logits: torch.dtype, fp4: bool, device: str) -> None:
    run(Paged([300, 40], heads=32, weights_dtype=weights, fp4=fp4, device=device), dtype=logits)


@FORMATS
def test_bf16_logits_are_the_rounded_fp32_ones(fp4: bool, device: str) -> None:
    problem = Paged([300, 40], heads=32, fp4=fp4, device=device)
    assert torch.equal(run(problem, dtype=torch.bfloat16), run(problem).bfloat16())


def test_weights_with_a_row_stride(device: str) -> None:
    problem = Paged([300, 40], heads=32, device=device)
    problem.weights = torch.cat([problem.weights, torch.full_like(problem.weights, torch.nan)], dim=1)[:, :32]
    run(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clean_logits(dtype: torch.dtype, device: str) -> None:
    run(Paged([[3, 700], [0, 0], [64, 65]], next_n=2, heads=16, max_context_len=2500, device=device), None, True, dtype)
    run(Paged([700, 0, 3], next_n=2, heads=16, max_context_len=2500, device=device), None, True, dtype)


def test_result_is_a_view_with_rows_of_1024_bytes(device: str) -> None:
    problem = Paged([300, 40], heads=16, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, problem.slots)
    for dtype in (torch.float32, torch.bfloat16):
        logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), logits_dtype=dtype)
        assert logits.shape == (2, 300) and logits.stride(1) == 1
        assert logits.stride(0) * logits.element_size() % 1024 == 0


def test_fp8_function_is_the_same(device: str) -> None:
    problem = Paged([300, 0, 40], heads=16, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, problem.slots)
    out = poisoned(3, 300, device=device)
    check(deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule), out=out).cpu(), problem.expected().cpu())


def test_context_far_below_the_maximum(device: str) -> None:
    run(Paged([30, 0, 700], heads=16, max_context_len=40_000, device=device))


def test_a_length_past_the_maximum_stays_inside_the_row(device: str) -> None:
    problem = Paged([900, 40], heads=16, device=device)
    expected = problem.expected()[:, :500]
    problem.max_context_len = 500
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, problem.slots)
    out = poisoned(2, 500, device=device)
    deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out)
    check(out.cpu(), expected.cpu())
    assert (out.as_strided((1, 7), (1, 1), 500) == POISON).all()


class TestSchedules:
    """Any schedule that keeps the contract gives the same logits, bit for bit."""

    @pytest.mark.parametrize("slots", [1, 2, 4, 5, 48, 170, 188, 1000])
    @FORMATS
    def test_slots(self, slots: int, fp4: bool, device: str) -> None:
        run(Paged([2000, 0, 37, 5000], heads=16, fp4=fp4, slots=slots, device=device))

    @pytest.mark.parametrize("more", [0, 8])  # few rows, which do without it, and as many as there are slots
    def test_poor_balance(self, more: int, device: str) -> None:
        problem = Paged([2000, 0, 37, 5000, *[300] * more], heads=16, device=device)
        end, late = [4 + more, 0], [[8, 1]] if more else []
        everything_last = [[0, 0]] * 9 + [[0, 3], end]
        everything_first = [[0, 0]] + [end] * 10
        in_crumbs = [[0, 0], [0, 1], [0, 1], [0, 7], [2, 0], [3, 0], [3, 1], [3, 19], *late, end, end]
        results = [
            run(problem, torch.tensor(entries, dtype=torch.int32, device=device))
            for entries in (everything_last, everything_first, in_crumbs)
        ]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    @pytest.mark.parametrize("slots", [1, 3, 20, 48])
    @FORMATS
    def test_many_rows_of_one_sequence(self, slots: int, fp4: bool, device: str) -> None:
        """Neighbouring rows are taken together, whatever the schedule says."""
        rows = 130
        problem = Paged([row // 4 + 300 for row in range(rows)], heads=16, fp4=fp4, slots=slots, device=device)
        problem.block_table[:] = problem.block_table[rows - 1].clone()
        run(problem)

    @pytest.mark.parametrize("slots", [1, 3, 20, 48])
    def test_many_rows_of_all_lengths(self, slots: int, device: str) -> None:
        lengths = torch.randint(0, 600, (130,))
        lengths[torch.rand(130) < 0.4] = 0
        lengths[77] = 6000
        run(Paged(lengths.tolist(), heads=16, slots=slots, device=device))

    @pytest.mark.parametrize("next_n", [2, 3, 5])
    def test_many_rows_with_drafts(self, next_n: int, device: str) -> None:
        lengths = torch.randint(0, 400, (90, next_n)).tolist()
        run(Paged(lengths, next_n=next_n, heads=16, slots=20, device=device))


class TestForeignBytes:
    """What lies outside the windows never shows."""

    def test_nan_keys_outside_the_window(self, device: str) -> None:
        problem = Paged([70, 300], heads=16, device=device)
        expected = problem.expected()
        used = problem.block_table[0, :2].tolist() + problem.block_table[1, :5].tolist()
        for page in range(problem.kv_cache.shape[0]):
            if page not in used:
                problem.kv_cache[page] = 0x7F
        # The last page of row 0 holds 6 keys of 64, that of row 1 44.
        for page, keys in ((used[1], 6), (used[6], 44)):
            flat = problem.kv_cache[page].reshape(-1).clone()
            flat[keys * 128 : 64 * 128] = 0x7F
            flat[64 * 128 + 4 * keys :] = 0xFF
            problem.kv_cache[page] = flat.view(64, 1, 132)
        assert torch.equal(problem.expected(), expected)
        run(problem)

    def test_nan_keys_inside_propagate(self, device: str) -> None:
        problem = Paged([70], heads=16, device=device)
        page = problem.block_table[0, 0]
        flat = problem.kv_cache[page].reshape(-1).clone()
        flat[3 * 128 + 17] = 0x7F
        problem.kv_cache[page] = flat.view(64, 1, 132)
        logits = run(problem)
        assert logits[0].isnan().nonzero().flatten().tolist() == [3]

    def test_order_of_pages_does_not_matter(self, device: str) -> None:
        problem = Paged([1000, 200], heads=16, device=device)
        before = run(problem)
        pages = problem.kv_cache.shape[0]
        order = torch.randperm(pages, device=device)
        problem.kv_cache = problem.kv_cache[order].contiguous()
        where = torch.argsort(order).to(torch.int32)
        for row, count in ((0, 16), (1, 4)):
            problem.block_table[row, :count] = where[problem.block_table[row, :count].long()]
        assert torch.equal(run(problem), before)


class TestRepeatability:
    def test_two_runs(self, device: str) -> None:
        problem = Paged([1000, 200, 0, 77], next_n=2, heads=32, device=device)
        assert torch.equal(run(problem), run(problem))

    def test_rows_over_two_calls(self, device: str) -> None:
        problem = Paged([1000, 200, 0, 77], heads=32, device=device)
        whole = run(problem)
        for rows in (slice(0, 2), slice(2, 4)):
            lens = problem.context_lens[rows]
            out = deep_gemm.fp8_fp4_paged_mqa_logits(
                problem.q[rows], problem.kv_cache, problem.weights[rows], lens, problem.block_table[rows],
                deep_gemm.get_paged_mqa_logits_metadata(lens, 64, 48), 1000, out=poisoned(2, 1000, device=device),
            )  # fmt: skip
            assert torch.equal(out, whole[rows])


@st.composite
def problems(draw: st.DrawFn) -> dict:
    fp4 = draw(st.booleans())
    next_n = draw(st.sampled_from([1, 1, 2, 3, 4, 9, 20]))
    length = st.integers(0, 400) | st.sampled_from([0, 1, 15, 16, 17, 255, 256, 257])
    batch = draw(st.integers(0, 40))
    if draw(st.booleans()):
        lengths = draw(st.lists(length, min_size=batch, max_size=batch))
    else:
        row = st.lists(length, min_size=next_n, max_size=next_n)
        lengths = draw(st.lists(row, min_size=batch, max_size=batch))
    return dict(
        lengths=lengths,
        next_n=next_n,
        heads=draw(st.sampled_from([8, 16, 24, 32, 64])),
        dim=draw(st.sampled_from([64, 128] if fp4 else [32, 64, 128])),
        block_kv=draw(st.sampled_from([16, 32, 48, 64, 128])),
        fp4=fp4,
        padding=draw(st.sampled_from([0, 4, 16, 64])),
        slots=draw(st.sampled_from([1, 7, 48, 188])),
    )


@given(problem=problems(), clean=st.booleans())
def test_any_problem(problem: dict, clean: bool, device: str) -> None:
    run(Paged(**problem, device=device), clean=clean)
