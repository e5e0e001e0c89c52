"""Few rows and many, alone and in a batch, in pages and in one run: a key's logit is the same, bit for bit."""

import pytest
import torch
from problems import POISON, Paged, check, poisoned

import deep_gemm
from deep_gemm.sm120.kernels import logits

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])


def compute(problem: Paged, slots: int, rows: slice = slice(None), few: bool | None = None) -> torch.Tensor:
    """Logits of some of the rows, on a poisoned output; `few` says which kernel it has to be."""
    lengths, n = problem.context_lens[rows], problem.next_n
    tokens = slice(rows.start * n, rows.stop * n) if rows.start is not None else rows
    q = tuple(part[rows] for part in problem.q) if problem.fp4 else problem.q[rows]
    assert few in (None, logits.few_rows(len(lengths), n, slots) > 0)
    return deep_gemm.fp8_fp4_paged_mqa_logits(
        q, problem.kv_cache, problem.weights[tokens], lengths, problem.block_table[rows],
        deep_gemm.get_paged_mqa_logits_metadata(lengths, problem.block_kv, slots), problem.max_context_len,
        out=poisoned(len(lengths) * n, problem.max_context_len, device=problem.device),
    )  # fmt: skip


def run_of_keys(problem: Paged, row: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first keys of a row as ragged logits take them."""
    width, pages = problem.dim // 2 if problem.fp4 else problem.dim, -(-keys // problem.block_kv)
    held = problem.kv_cache[problem.block_table[row, :pages].long()].reshape(pages, -1)
    values, scales = held[:, : problem.block_kv * width], held[:, problem.block_kv * width :]
    values = values.reshape(-1, width)[:keys].view(torch.int8 if problem.fp4 else torch.float8_e4m3fn)
    return values, scales.reshape(-1, 4).view(torch.int32 if problem.fp4 else torch.float32).flatten()[:keys]


def different(rows: int, next_n: int, longest: int) -> list[list[int]]:
    """Lengths of which some are zero, and one is the longest."""
    lengths = torch.randint(0, longest, (rows, next_n))
    lengths[torch.rand(rows, next_n) < 0.2] = 0
    lengths[torch.randint(rows, ()), torch.randint(next_n, ())] = longest
    return lengths.tolist()


@FORMATS
@pytest.mark.parametrize(
    "heads, next_n, block_kv", [(8, 1, 64), (8, 4, 16), (16, 3, 48), (16, 2, 128), (64, 2, 32), (64, 1, 64)]
)
def test_few_many_alone_and_ragged(heads: int, next_n: int, block_kv: int, fp4: bool, device: str) -> None:
    problem = Paged(different(6, next_n, 900), next_n, heads, 64, block_kv, fp4, device=device)
    few, many = compute(problem, 7, few=True), compute(problem, 3, few=False)
    check(few.cpu(), problem.expected().cpu())
    assert torch.equal(few, many)
    for row in range(6):
        mine = slice(row * next_n, (row + 1) * next_n)
        assert torch.equal(compute(problem, 7, slice(row, row + 1), few=True), few[mine])
        assert torch.equal(compute(problem, 1, slice(row, row + 1), few=False), few[mine])
        ends = problem.context_lens[row]
        q = tuple(part[row] for part in problem.q) if fp4 else problem.q[row]
        if (keys := int(ends.max())) > 0:
            out = poisoned(next_n, keys, device=device)
            kv, weights = run_of_keys(problem, row, keys), problem.weights[mine].contiguous()
            deep_gemm.fp8_fp4_mqa_logits(q, kv, weights, torch.zeros_like(ends), ends, out=out)
            assert torch.equal(out, few[mine, :keys])


def test_every_run_finds_a_warp(device: str) -> None:
    """Rows whose last run is short: as many of them as the shortest runs would be too many for the warps there are."""
    problem = Paged([32 * 55] * 33, heads=64, dim=128, device=device)
    check(compute(problem, 19, few=True).cpu(), problem.expected().cpu())


@pytest.mark.parametrize("fp4, next_n", [(False, 1), (True, 1), (False, 2), (True, 3), (False, 13)])
def test_one_row_of_small_lengths(fp4: bool, next_n: int, device: str) -> None:
    """First a warp takes eight keys, where there is less than a tile for every fourth of an SM, then it takes tiles."""
    longest = 600
    problem = Paged([longest], next_n, heads=8, dim=64, fp4=fp4, device=device)
    whole = compute(problem, 4, few=next_n <= logits.FEW_TOKENS)
    check(whole.cpu(), problem.expected().cpu())
    token = torch.arange(next_n, device=device).unsqueeze(1) - next_n + 1
    columns = torch.arange(longest, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 4)
    drawn = torch.randperm(longest - 1)[:40] + 1
    for length in sorted({*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, *drawn.tolist()}):
        problem.context_lens.fill_(length)
        out = poisoned(next_n, longest, device=device)
        deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out)
        assert torch.equal(out, torch.where(columns < length + token, whole, POISON)), f"{length} keys"


@pytest.mark.parametrize("rows", [2, 31, 32, 33, 64, 129, 255, 256, 257])
@pytest.mark.parametrize("next_n", [1, 2])
def test_empty_rows_among_them(rows: int, next_n: int, device: str) -> None:
    """Up to 32 rows, one a lane, and up to 256, eight a lane; one more is too many for that."""
    lengths = torch.randint(1, 200, (rows, next_n))
    lengths[torch.rand(rows) < 0.7] = 0
    lengths[torch.randint(rows, ())] = 700
    problem = Paged(lengths.tolist(), next_n, heads=8, dim=64, device=device)
    out = compute(problem, 130, few=rows <= 256)
    check(out.cpu(), problem.expected().cpu())
    if rows <= 256:
        assert torch.equal(compute(problem, 2, few=rows <= 2 and None), out)


@FORMATS
@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("lengths", [[[0, 3000]], [[3000, 0]], [[1, 2000], [0, 0], [3000, 31], [0, 33], [2000, 2000]]])
def test_tokens_of_a_row_that_see_very_different_lengths(lengths: list, heads: int, fp4: bool, device: str) -> None:
    problem = Paged(lengths, 2, heads, dim=64, fp4=fp4, device=device)
    few, many = compute(problem, 9, few=True), compute(problem, 1, few=False)
    check(few.cpu(), problem.expected().cpu())
    assert torch.equal(few, many)
