"""Sizes that break 32-bit arithmetic, or plans made for a few hundred rows. Memory is reserved, hardly touched."""

import pytest
import torch
from problems import POISON, Paged, Ragged, check, poisoned

import deep_gemm

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])


def sparse(rows: int, columns: int, stride: int, device: str) -> torch.Tensor:
    """A poisoned bf16 output [rows, columns] whose rows are `stride` elements apart."""
    whole = torch.empty((rows - 1) * stride + columns, dtype=torch.bfloat16, device=device)
    return whole.as_strided((rows, columns), (stride, 1)).fill_(POISON)


def test_more_than_2_to_the_31_logits_paged(device: str) -> None:
    problem = Paged([300, 200], heads=16, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 48)
    out = sparse(2, 300, 2**31 + 2**12, device)
    deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), logits_dtype=torch.bfloat16, out=out)
    check(out.cpu(), problem.expected().cpu())


def test_more_than_2_to_the_31_logits_ragged(device: str) -> None:
    problem = Ragged([0, 7], [300, 9], 300, heads=16, device=device)
    out = sparse(2, 300, 2**31 + 2**12, device)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), True, 0, torch.bfloat16, out=out)
    check(out.cpu(), problem.expected().cpu(), cleaned=True)


@FORMATS
def test_a_cache_of_more_than_4_gb(fp4: bool, device: str) -> None:
    problem = Paged([100, 64], heads=16, fp4=fp4, device=device)
    small, pages = problem.kv_cache, 5 * 2**30 // problem.kv_cache.stride(0)
    large = torch.empty((pages, *small.shape[1:]), dtype=torch.uint8, device=device)
    far = torch.tensor([pages - 1, 3, pages - 7])
    near = torch.cat([problem.block_table[0, :2], problem.block_table[1, :1]]).long()
    for here, there in zip(near.tolist(), far.tolist()):
        large[there] = small[here]
    problem.kv_cache = large
    problem.block_table[0, :2] = far[:2].to(torch.int32)
    problem.block_table[1, :1] = far[2:].to(torch.int32)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 48)
    out = poisoned(2, 100, device=device)
    deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out)
    check(out.cpu(), problem.expected().cpu())


def test_a_row_of_a_million_keys_ragged(device: str) -> None:
    problem = Ragged([1], [1_000_000], 1_000_001, heads=8, dim=32, device=device)
    out = poisoned(1, 1_000_001, device=device)
    check(deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), out=out).cpu(), problem.expected().cpu())


@pytest.mark.parametrize("slots", [188, 3])
def test_a_row_of_a_million_keys_paged(slots: int, device: str) -> None:
    problem = Paged([5, 1_000_000, 0, 77], heads=8, dim=32, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, slots)
    out = poisoned(4, 1_000_000, device=device)
    check(deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out).cpu(), problem.expected().cpu())


def test_a_hundred_thousand_rows_ragged(device: str) -> None:
    rows = 100_000
    starts = torch.randint(0, 20, (rows,)).tolist()
    problem = Ragged(starts, [start + row % 7 for row, start in enumerate(starts)], 26, heads=8, dim=32, device=device)
    out = poisoned(rows, 26, device=device)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), out=out)
    q, (keys, scales), weights, ks, ke = problem.arguments()
    scores = torch.relu(torch.einsum("rhd,nd->rhn", q.double(), keys.double() * scales.double()[:, None]))
    expected = torch.einsum("rhn,rh->rn", scores, weights.double())
    column = torch.arange(26, device=device)
    inside = (column >= ks[:, None]) & (column < ke[:, None])
    check(out.cpu(), torch.where(inside, expected, -torch.inf).cpu())


def test_twelve_thousand_rows_paged(device: str) -> None:
    lengths = torch.randint(0, 40, (12_000,))
    lengths[torch.rand(12_000) < 0.5] = 0
    problem = Paged(lengths.tolist(), heads=8, dim=32, block_kv=16, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 16, 188)
    out = poisoned(12_000, 40, device=device)
    problem.max_context_len = 40
    check(deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out).cpu(), problem.expected().cpu())
