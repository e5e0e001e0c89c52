"""Maxima of blocks of eight beside the logits: those of the logits that were stored, to the bit, and of float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import POISON, Paged, Ragged, assert_rows_apart, check, poisoned
from test_garbage import EDGES, SIZES, ends, meant, paged_problem, spoil

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import ArgumentError, debug, reference
from deep_gemm.sm120.emulator import recording
from deep_gemm.sm120.jit import compiler
from deep_gemm.sm120.kernels import logits as kernels

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])


def blocks(columns: int) -> int:
    return -(-columns // 8)


def compare(maxima: torch.Tensor, expected: torch.Tensor) -> None:
    """What is expected to the bit (-0 is 0); poison where it is -inf."""
    wanted = torch.where(expected == -torch.inf, POISON, expected)
    wrong = ~((maxima.double().cpu() == wanted) | (maxima.cpu().isnan() & wanted.isnan()))
    assert not wrong.any(), [
        f"block_max[{row}, {block}] = {maxima[row, block].item()}, expected {wanted[row, block].item()}"
        for row, block in wrong.nonzero()[:5].tolist()
    ]


def run_paged(problem: Paged, schedule: torch.Tensor | None = None, dtype=torch.float32, clean=False) -> torch.Tensor:
    """Logits and maxima against the reference; the logits are those that come without maxima, to the bit."""
    rows, columns = len(problem.weights), problem.max_context_len
    if schedule is None:
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, problem.slots)
    out, plain = (poisoned(rows, columns, dtype, problem.device) for _ in range(2))
    maxima = poisoned(rows, blocks(columns), device=problem.device, pad=3)
    function, arguments = sm120.fp8_fp4_paged_mqa_logits, problem.arguments(schedule)
    assert function(*arguments, clean, logits_dtype=dtype, out=out, block_max=maxima) is out
    function(*arguments, clean, logits_dtype=dtype, out=plain)
    assert torch.equal(out, plain)
    assert_rows_apart(maxima)
    exact = problem.expected().cpu()
    lengths = reference.windows(problem.context_lens.cpu(), problem.next_n).flatten().clamp(0, columns).tolist()
    compare(maxima, reference.block_max(out.cpu(), [0] * rows, lengths))
    check_maxima(maxima, reference.block_max(exact, [0] * rows, lengths), dtype)
    return maxima


def run_ragged(problem: Ragged, columns: int = 0, dtype=torch.float32) -> torch.Tensor:
    rows, width = len(problem.starts), columns or problem.keys
    out, plain = (poisoned(rows, width, dtype, problem.device) for _ in range(2))
    maxima = poisoned(rows, blocks(width), device=problem.device, pad=3)
    function, arguments = sm120.fp8_fp4_mqa_logits, problem.arguments()
    function(*arguments, False, columns, dtype, out=out, block_max=maxima)
    function(*arguments, False, columns, dtype, out=plain)
    assert torch.equal(out, plain)
    assert_rows_apart(maxima)
    starts = [max(0, start) for start in problem.starts]
    stops = [min(problem.keys, end, start + (columns or end)) for start, end in zip(starts, problem.ends)]
    compare(maxima, reference.block_max(out.cpu(), starts, stops, columns > 0))
    problem.ks, problem.ke = (torch.tensor(bounds, device=problem.device) for bounds in (starts, stops))
    exact = problem.expected(columns).cpu()
    check_maxima(maxima, reference.block_max(exact, starts, stops, columns > 0), dtype)
    return maxima


def check_maxima(maxima: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    check(maxima.cpu(), exact, 1e-5 if dtype == torch.float32 else 2**-7)


@FORMATS
@pytest.mark.parametrize("heads", [8, 16, 24, 32, 48, 64])
def test_heads(heads: int, fp4: bool, device: str) -> None:
    run_paged(Paged([0, 37, 300], heads=heads, fp4=fp4, device=device))


@FORMATS
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 8, 17])
def test_next_n(next_n: int, fp4: bool, device: str) -> None:
    """Each token has its own newest block."""
    lengths = torch.randint(0, 300, (3, next_n)).tolist()
    run_paged(Paged(lengths, next_n=next_n, heads=16, fp4=fp4, device=device))
    run_paged(Paged([0, next_n // 2, 150], next_n=next_n, heads=16, fp4=fp4, device=device))


@FORMATS
@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 128])
def test_one_short_row(length: int, fp4: bool, device: str) -> None:
    """A warp takes eight keys: one block."""
    run_paged(Paged([[length]], heads=16, fp4=fp4, device=device))
    run_paged(Paged([[length, max(0, length - 1)]], next_n=2, heads=16, fp4=fp4, device=device))


@FORMATS
def test_one_row(fp4: bool, device: str) -> None:
    run_paged(Paged([[9000]], heads=8, dim=64, fp4=fp4, device=device))


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("next_n", [1, 2])
def test_many_rows(next_n: int, slots: int, device: str) -> None:
    """More rows than slots: by the schedule, rows of one sequence and of many."""
    lengths = torch.randint(0, 500, (9, next_n)).tolist()
    lengths[2][-1], lengths[5][0] = 0, 0  # one of two tokens that a warp takes together
    problem = Paged(lengths, next_n, heads=16, dim=64, slots=slots, device=device)
    run_paged(problem)
    problem.block_table[:] = problem.block_table[problem.context_lens.amax(dim=1).argmax()].clone()
    run_paged(problem)


@FORMATS
@pytest.mark.parametrize("block_kv", [16, 48, 128])
def test_pages(block_kv: int, fp4: bool, device: str) -> None:
    run_paged(Paged([block_kv - 1, block_kv + 1, 300], block_kv=block_kv, heads=16, fp4=fp4, device=device))


@FORMATS
@pytest.mark.parametrize("columns", [0, 1, 8, 77, 300, 700])
def test_ragged(columns: int, fp4: bool, device: str) -> None:
    """Rows begin anywhere: compressed ones too, where blocks are those of the keys all the same."""
    starts = [0, 5, 8, 64, 100, 299, 300, 7, 16, -9, 40, 13, 46] * 3
    stops = [300, 5, 9, 300, 90, 300, 300, 8, 24, 31, 999, 300, 200] * 3
    run_ragged(Ragged(starts, stops, 300, heads=16, fp4=fp4, device=device), columns)


def test_bf16_maxima_are_those_of_the_rounded_logits(device: str) -> None:
    run_paged(Paged([300, 40], heads=32, device=device), dtype=torch.bfloat16)
    run_ragged(Ragged([0, 3], [100, 90], 100, heads=32, device=device), dtype=torch.bfloat16)


def test_clean_logits_leave_the_maxima_alone(device: str) -> None:
    run_paged(Paged([[3], [130], [0]], heads=16, max_context_len=200, device=device), clean=True)


def test_a_length_past_the_maximum(device: str) -> None:
    """The newest block is that of the last column."""
    problem = Paged([[300], [200]], heads=16, device=device)
    problem.max_context_len = 203
    maxima = poisoned(2, 26, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, problem.slots)
    out = sm120.fp8_paged_mqa_logits(*problem.arguments(schedule), block_max=maxima)
    compare(maxima, reference.block_max(out.cpu(), [0, 0], [203, 200]))


@FORMATS
def test_nan_counts_only_where_nothing_else_is(fp4: bool, device: str) -> None:
    """Keys 3 and 9 to 15 are NaN, and 16 to 23 all: of the row's 24, 20 and 60 keys."""
    problem = Ragged([0, 9, 0], [24, 20, 60], 60, heads=16, fp4=fp4, device=device)
    broken = [3, *range(9, 24)]
    if fp4:
        problem.kv[1][broken] = -1  # UE8M0 of 255
    else:
        problem.kv[1][broken] = torch.nan
    out, maxima = poisoned(3, 60, device=device), poisoned(3, 8, device=device)
    sm120.fp8_fp4_mqa_logits(*problem.arguments(), out=out, block_max=maxima)
    assert out[0, broken].isnan().all() and not out[2, 24:].isnan().any()
    compare(maxima, reference.block_max(out.cpu(), problem.starts, problem.ends))
    assert maxima[0, :2].isfinite().all() and maxima[0, 2] == torch.inf
    assert maxima[2, 2].isnan() and maxima[1, 1].isnan() and maxima[1, 2] == torch.inf


def test_the_fp8_functions(device: str) -> None:
    paged, ragged = Paged([70, 9], heads=16, device=device), Ragged([0, 16], [30, 31], 31, heads=16, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(paged.context_lens, 64, paged.slots)
    maxima = poisoned(2, 9, device=device)
    out = deep_gemm.fp8_paged_mqa_logits(*paged.arguments(schedule), block_max=maxima)
    compare(maxima, reference.block_max(out.cpu(), [0, 0], [70, 9]))
    maxima = poisoned(2, 4, device=device)
    out = deep_gemm.fp8_mqa_logits(*ragged.arguments(), block_max=maxima)
    compare(maxima, reference.block_max(out.cpu(), [0, 16], [30, 31]))


def test_candidates_from_logits(device: str) -> None:
    """From the logits' maxima to the lists, and the newest block is among them."""
    lens = [1, 130, 8 * 40, 8 * 40 + 1]
    problem = Paged([[length] for length in lens], heads=16, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, problem.slots)
    maxima = torch.full((4, 41), torch.nan, device=device)
    out = sm120.fp8_paged_mqa_logits(*problem.arguments(schedule), block_max=maxima)
    lists = sm120.candidate_blocks(maxima, problem.context_lens, 20)
    largest = reference.block_max(out.cpu(), [0] * 4, lens)
    for row, want in enumerate(reference.topk(largest, [blocks(length) for length in lens], 20)):
        assert lists[row].tolist() == want + [2**31 - 1] * (20 - len(want))
        assert blocks(lens[row]) - 1 in want


@given(st.data())
def test_any_paged(device: str, data: st.DataObject) -> None:
    draw = data.draw
    next_n, heads = draw(st.sampled_from([1, 1, 2, 3, 4, 9])), draw(st.sampled_from([8, 16, 24, 40]))
    length = st.integers(0, 400) | st.sampled_from([0, 1, 7, 8, 9, 31, 32, 33, 64, 256, 257])
    row = st.lists(length, min_size=next_n, max_size=next_n)
    problem = Paged(
        draw(st.lists(row, min_size=1, max_size=12)), next_n, heads, draw(st.sampled_from([64, 128])),
        draw(st.sampled_from([16, 48, 64])), draw(st.booleans()), slots=draw(st.sampled_from([1, 3, 40, 188])),
        device=device,
    )  # fmt: skip
    with recording(sanitize=draw(st.booleans())):
        run_paged(problem, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])))


@given(st.data())
def test_any_ragged(device: str, data: st.DataObject) -> None:
    draw = data.draw
    keys = draw(st.integers(1, 300) | st.sampled_from([16, 32, 256]))
    bound = st.integers(-5, keys + 20) | st.sampled_from([0, 8, 15, 16, 17, 32, keys])
    windows = draw(st.lists(st.tuples(bound, bound), min_size=1, max_size=40))
    problem = Ragged(
        [start for start, _ in windows], [end for _, end in windows], keys, draw(st.sampled_from([8, 16, 40])), 64,
        draw(st.booleans()), device=device,
    )  # fmt: skip
    with recording(sanitize=draw(st.booleans())):
        run_ragged(problem, draw(st.just(0) | st.integers(1, 400)))


# --- garbage ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_garbage_in_a_paged_call(device: str, data: st.DataObject) -> None:
    """Lengths, tables, schedules: blocks with keys have a maximum of the logits that are there, or stay poison."""
    draw = data.draw
    problem, slots = paged_problem(draw, device), draw(st.sampled_from([1, 2, 5, 30]))
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, slots)
    spoil(draw, schedule, [0, len(problem.lengths)])
    spoil(draw, problem.context_lens, [problem.max_context_len, problem.block_table.shape[1] * problem.block_kv])
    spoil(draw, problem.block_table, [len(problem.kv_cache), 0])
    rows, columns = len(problem.weights), problem.max_context_len
    out, maxima = (poisoned(rows, n, device=device) for n in (columns, blocks(columns)))
    with ends():
        sm120.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out, block_max=maxima)
    assert_rows_apart(out)
    assert_rows_apart(maxima)
    counts = (meant(problem) != -torch.inf).sum(dim=1).tolist()
    expected = reference.block_max(out.cpu(), [0] * rows, counts)
    left_out = out.cpu()[:, ::8] == POISON  # by a schedule without sense; a block is stored as a whole
    compare(maxima, torch.where(left_out, -torch.inf, expected))


@given(st.data())
def test_garbage_in_bounds(device: str, data: st.DataObject) -> None:
    draw = data.draw
    keys, rows = draw(st.sampled_from([1, 31, 100, 513])), draw(st.integers(1, 20))
    heads, dim, fp4, _ = draw(SIZES)
    bound = st.integers(0, keys)
    starts, stops = (draw(st.lists(bound | EDGES, min_size=rows, max_size=rows)) for _ in range(2))
    problem = Ragged(starts, stops, keys, heads, dim, fp4, device=device)
    spoil(draw, problem.ks, [0, keys])
    spoil(draw, problem.ke, [0, keys])
    problem.starts, problem.ends = problem.ks.tolist(), problem.ke.tolist()
    with ends():
        run_ragged(problem, draw(st.sampled_from([0, 1, 40, 700])))


# --- arguments, debug mode, the kernels -------------------------------------------------------------------------------

WRONG: list[tuple[Callable, str]] = [
    (lambda maxima: maxima[:, :-1], "[3, 13]"),
    (lambda maxima: maxima[:2], "[3, 13]"),
    (lambda maxima: maxima.bfloat16(), "float32"),
    (lambda maxima: maxima.double(), "float32"),
    (lambda maxima: maxima.T.contiguous().T, "stride 1"),
    (lambda maxima: maxima[:1].expand(3, -1), "do not overlap"),
    (lambda maxima: maxima.to("meta"), "on cpu"),
    (lambda maxima: maxima.requires_grad_(), "requires no grad"),
    (lambda maxima: maxima.tolist(), "a float32 tensor"),
]


def calls() -> list[tuple[Callable, tuple]]:
    """Each function with three rows of 100 columns."""
    paged, ragged = Paged([40, 0, 100], heads=16), Ragged([0, 3, 4], [5, 9, 100], 100, heads=16)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(paged.context_lens, 64, 48)
    return [
        (sm120.fp8_paged_mqa_logits, paged.arguments(schedule)),
        (sm120.fp8_fp4_paged_mqa_logits, paged.arguments(schedule)),
        (sm120.fp8_mqa_logits, ragged.arguments()),
        (sm120.fp8_fp4_mqa_logits, ragged.arguments()),
    ]


@pytest.mark.parametrize("change, word", WRONG)
def test_refused(change: Callable, word: str) -> None:
    for function, arguments in calls():
        out, maxima = poisoned(3, 100), poisoned(3, 13, pad=0)
        with pytest.raises(ArgumentError) as caught:
            function(*arguments, out=out, block_max=change(maxima))
        assert str(caught.value).startswith("block_max: expected") and word in str(caught.value), str(caught.value)
        assert (out == POISON).all() and (maxima == POISON).all()


def test_memory_of_its_own() -> None:
    """Over the logits, over an input, at an odd address; between the rows of the logits it may lie."""
    for function, arguments in calls():
        room = torch.full((3, 120), POISON)
        with pytest.raises(ArgumentError, match="block_max: expected memory of its own; this is out's as well"):
            function(*arguments, out=room[:, :100], block_max=room[:, 99:112])
        assert (room == POISON).all()
        function(*arguments, out=room[:, :100], block_max=room[:, 100:113])
        assert (room[:, 113:] == POISON).all() and (room[:, 100:113] == torch.inf).any()
        weights = torch.zeros(3, 30)
        inside = (*arguments[:2], weights[:, :16], *arguments[3:])
        with pytest.raises(ArgumentError, match="block_max: expected memory of its own; this is weights's as well"):
            function(*inside, block_max=weights[:, 10:23])
        bytes_ = torch.zeros(160, dtype=torch.uint8)
        odd = torch.frombuffer(bytes_.numpy().data[2:158], dtype=torch.float32).view(3, 13)
        with pytest.raises(ArgumentError, match="block_max: expected a tensor that begins at a multiple of 4 bytes"):
            function(*arguments, block_max=odd)


def test_debug_mode_looks_where_compressed_rows_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "ON", True)
    problem, maxima = Ragged([0, 12], [8, 20], 20, heads=16), torch.zeros(2, 3)
    sm120.fp8_mqa_logits(*problem.arguments(), block_max=maxima)
    sm120.fp8_mqa_logits(*problem.arguments(), max_seqlen_k=20)
    with pytest.raises(ArgumentError, match=r"fp8_mqa_logits: cu_seq_len_k_start\[1\], row 1, is 12; expected .* of 8"):
        sm120.fp8_mqa_logits(*problem.arguments(), max_seqlen_k=20, block_max=maxima)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_100a", "sm_121f"])
def test_other_cards(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    run_paged(Paged([[70], [300]], heads=16, fp4=arch == "sm_100a"))
    run_ragged(Ragged([0, 9], [70, 80], 80, heads=16), 80)


@FORMATS
def test_clean_under_the_sanitizers(fp4: bool) -> None:
    with recording(sanitize=True):
        run_paged(Paged([[40], [0], [333]], heads=16, fp4=fp4))
        run_paged(Paged([[40], [0], [333]], heads=16, fp4=fp4, slots=2))
        run_ragged(Ragged([0, 9, 30], [70, 80, 30], 80, heads=16, fp4=fp4), 80)


@FORMATS
@pytest.mark.parametrize(
    "layout", [dict(page=64, few_rows=1), dict(page=64, few_rows=32), dict(page=64), dict(page=0)], ids=str
)
def test_maxima_cost_three_shuffles_a_tile(layout: dict, fp4: bool) -> None:
    """Beside the seven of its logits; with one row a tile of eight keys, which has three, stands in the kernel too. Few
    rows of FP4 load queries by 16 bytes, whose words change places by four shuffles for each of a lane's eight rows."""

    def shuffles(maxima: bool) -> int:
        options = dict(weights=torch.float32, logits=torch.float32, maxima=maxima, **layout)
        kernel = kernels.configure("sm_120f", fp4, 64, 128, **options).kernel
        return compiler.compile_kernel(kernel, "sm_120f", "ptx").count(b"shfl.sync.bfly")

    of_eight = 3 if layout.get("few_rows") == 1 else 0
    of_queries = 4 * 8 if fp4 and "few_rows" in layout else 0
    plain, turns = shuffles(False) - of_queries, (shuffles(False) - of_queries - of_eight) // 7
    assert (plain, shuffles(True) - of_queries) == (7 * turns + of_eight, 10 * turns + 2 * of_eight)
