"""Ragged logits against float64, full and compressed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Paged, Ragged, check, poisoned

import deep_gemm
from deep_gemm.sm120 import settings

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])


def run(
    problem: Ragged, max_seqlen_k: int = 0, clean: bool = False, dtype=torch.float32, tolerance: float = 0.0
) -> torch.Tensor:
    """Computes on a poisoned output, compares with float64, returns the logits."""
    out = poisoned(len(problem.starts), max_seqlen_k or problem.keys, dtype, problem.device)
    logits = deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), clean, max_seqlen_k, dtype, out=out)
    assert logits is out
    check(logits.cpu(), problem.expected(max_seqlen_k).cpu(), tolerance, cleaned=clean)
    return logits


def causal(rows: int, keys: int) -> dict:
    return {"starts": [0] * rows, "ends": [keys - rows + row + 1 for row in range(rows)], "keys": keys}


@FORMATS
@pytest.mark.parametrize("heads", [8, 24, 32, 64])
def test_causal(heads: int, fp4: bool, device: str) -> None:
    run(Ragged(**causal(50, 300), heads=heads, fp4=fp4, device=device))


@pytest.mark.parametrize("fp4, dim", [(False, 32), (False, 64), (False, 128), (True, 64), (True, 128)])
def test_dims(fp4: bool, dim: int, device: str) -> None:
    run(Ragged(**causal(9, 77), dim=dim, heads=32, fp4=fp4, device=device))


@FORMATS
@pytest.mark.parametrize("clean", [False, True])
def test_compressed(fp4: bool, clean: bool, device: str) -> None:
    starts = [0, 5, 17, 100, 100, 250]
    ends = [33, 5, 300, 101, 260, 300]
    run(Ragged(starts, ends, 300, heads=16, fp4=fp4, device=device), 283, clean)


@FORMATS
@pytest.mark.parametrize("clean", [False, True])
def test_full(fp4: bool, clean: bool, device: str) -> None:
    starts = [0, 5, 17, 100, 100, 250, 299]
    ends = [33, 5, 300, 101, 260, 300, 300]
    run(Ragged(starts, ends, 300, heads=16, fp4=fp4, device=device), 0, clean)


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("rows", [1, 13])
def test_no_padding_is_asked_for(rows: int, keys: int, device: str) -> None:
    few = rows * keys == 1  # and may be a small difference of large numbers
    run(Ragged([0] * rows, [keys] * rows, keys, heads=16, device=device), tolerance=1e-4 if few else 0.0)


def test_every_row_empty(device: str) -> None:
    run(Ragged([3, 9, 0], [3, 9, 0], 20, heads=16, device=device), clean=True)
    run(Ragged([3, 9, 0], [2, 1, 0], 20, heads=16, device=device))


def test_nothing_at_all(device: str) -> None:
    assert run(Ragged([], [], 20, device=device)).shape == (0, 20)
    assert run(Ragged([0, 0], [0, 0], 0, device=device)).shape == (2, 0)


@pytest.mark.parametrize("sms", [1, 188])
def test_one_row_of_many_keys(sms: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts; and, on one SM, in so long ones that a warp goes on from one whole tile to the next."""
    monkeypatch.setattr(settings, "_num_sms", sms)
    run(Ragged([3], [50_000], 50_001, heads=16, dim=32, device=device))


def test_bounds_past_the_keys_are_cut(device: str) -> None:
    problem = Ragged([0, 5], [100, 200], 64, heads=16, device=device)
    out = poisoned(2, 64, device=device)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), out=out)
    problem.ke.clamp_(max=64)
    check(out.cpu(), problem.expected().cpu())


@pytest.mark.parametrize("columns", [0, 40])
def test_bounds_before_the_first_key_are_cut(columns: int, device: str) -> None:
    problem = Ragged([-7, -40, 3], [30, 20, 9], 64, heads=16, device=device)
    out = poisoned(3, columns or 64, device=device)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), max_seqlen_k=columns, out=out)
    problem.ks.clamp_(min=0)
    check(out.cpu(), problem.expected(columns).cpu())


@pytest.mark.parametrize("columns", [0, 40])
def test_a_window_that_ends_before_it_begins_is_empty(columns: int, device: str) -> None:
    """Also where what lies between does not fit in 32 bits."""
    least, most = -(2**31), 2**31 - 1
    problem = Ragged([5, 60, most, 30, 3], [least, least, least, -1, 30], 64, heads=16, device=device)
    out = poisoned(5, columns or 64, device=device)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), True, columns, out=out)
    problem.ks[2], problem.ke[:4] = 0, 0
    check(out.cpu(), problem.expected(columns).cpu(), cleaned=True)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
@FORMATS
def test_dtypes(weights: torch.dtype, logits: torch.dtype, fp4: bool, device: str) -> None:
    run(Ragged(**causal(5, 90), heads=32, weights_dtype=weights, fp4=fp4, device=device), dtype=logits)


def test_result_is_a_view_with_rows_of_1024_bytes(device: str) -> None:
    problem = Ragged(**causal(5, 300), heads=16, device=device)
    logits = deep_gemm.fp8_mqa_logits(*problem.arguments())
    assert logits.shape == (5, 300) and logits.stride(1) == 1 and logits.stride(0) % 256 == 0
    assert deep_gemm.fp8_mqa_logits(*problem.arguments(), max_seqlen_k=512).shape == (5, 512)


def test_nan_outside_the_window(device: str) -> None:
    problem = Ragged([5, 40], [30, 90], 100, heads=16, device=device)
    for key in (0, 4, 30, 35, 39, 90, 99):
        problem.kv[0].view(torch.uint8)[key] = 0x7F
        problem.kv[1][key] = torch.nan
    logits = run(problem)
    assert not logits[0, 5:30].isnan().any() and not logits[1, 40:90].isnan().any()


def test_two_runs_and_rows_over_two_calls(device: str) -> None:
    problem = Ragged(**causal(40, 500), heads=32, device=device)
    whole = run(problem)
    assert torch.equal(run(problem), whole)
    out = poisoned(40, 500, device=device)
    for rows in (slice(0, 17), slice(17, 40)):
        q, kv, weights, ks, ke = problem.arguments()
        deep_gemm.fp8_fp4_mqa_logits(q[rows], kv, weights[rows], ks[rows], ke[rows], out=out[rows])
    assert torch.equal(out, whole)


@pytest.mark.parametrize("sms", [1, 2, 7])
@pytest.mark.parametrize("columns", [0, 400])
def test_blocks_that_take_pieces_of_several_groups(
    sms: int, columns: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few SMs: a block has pieces of several stripes, which end within groups, and groups end within them."""
    starts = [0] * 30 + torch.randint(400, (25,)).tolist() + [700] * 20
    ends = [300 + row for row in range(30)] + [start + 399 for start in starts[30:55]] + [699] * 10 + [900] * 10
    problem = Ragged(starts, ends, 900, heads=16, dim=32, device=device)
    monkeypatch.setattr(settings, "_num_sms", sms)
    run(problem, columns)


@FORMATS
def test_paged_and_ragged_agree(fp4: bool, device: str) -> None:
    """The same keys, in pages and in one run: the same logits, bit for bit."""
    paged = Paged([900], heads=64, fp4=fp4, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(paged.context_lens, 64, 48)
    out = deep_gemm.fp8_fp4_paged_mqa_logits(*paged.arguments(schedule))
    row = 64 if fp4 else 128
    pages = paged.kv_cache[paged.block_table[0, :15].long()].reshape(15, -1)
    values = pages[:, : 64 * row].reshape(-1, row)[:900].contiguous()
    scales = (
        pages[:, 64 * row :].contiguous().view(torch.int32 if fp4 else torch.float32).reshape(-1)[:900].contiguous()
    )
    kv = (values.view(torch.int8) if fp4 else values.view(torch.float8_e4m3fn), scales)
    q = tuple(part[0] for part in paged.q) if fp4 else paged.q[0]
    bounds = torch.tensor([0], dtype=torch.int32, device=device), torch.tensor([900], dtype=torch.int32, device=device)
    assert torch.equal(deep_gemm.fp8_fp4_mqa_logits(q, kv, paged.weights, *bounds), out)


@given(
    windows=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=40),
    heads=st.sampled_from([8, 16, 40, 64]),
    format=st.sampled_from([(False, 32), (False, 64), (False, 128), (True, 64), (True, 128)]),
    compressed=st.booleans(),
    clean=st.booleans(),
)
def test_any_problem(windows: list, heads: int, format: tuple, compressed: bool, clean: bool, device: str) -> None:
    starts, ends = [begin for begin, _ in windows], [end for _, end in windows]
    longest = max((end - begin for begin, end in windows), default=0)
    problem = Ragged(starts, ends, 300, heads=heads, fp4=format[0], dim=format[1], device=device)
    run(problem, max(longest, 1) if compressed else 0, clean)
