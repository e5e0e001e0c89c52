"""Many problems for few kernels: rows, tokens, lengths, slots and bounds of all kinds, with little to compile. What a
kernel takes for granted shows here soonest, so mutations meet these tests first."""

import random

import pytest
import torch
from problems import Paged, Ragged, check, poisoned

import deep_gemm

LENGTHS = [0, 0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 300, 384, 515]
KERNELS = pytest.mark.parametrize("heads, dim, fp4, block_kv", [(8, 32, False, 64), (24, 64, True, 16)])
TOLERANCE = 1e-5  # a row may have one key, and its logit be a small difference


def lengths(rows: int, next_n: int, rng: random.Random, kinds: int) -> list:
    """One for each token, or one for a row; all equal, of so many kinds, or one long row among short ones."""
    kind = rng.choice(["any", "any", "equal", "one"])
    if next_n > 1 and rng.random() < 0.3:
        return [rng.choice(LENGTHS[:kinds]) for _ in range(rows)]
    if kind == "equal":
        return [[rng.choice(LENGTHS[:kinds])] * next_n] * rows
    made = [[rng.choice(LENGTHS[: 8 if kind == "one" else kinds]) for _ in range(next_n)] for _ in range(rows)]
    made[rng.randrange(rows)][rng.randrange(next_n)] = 700
    return made


def with_a_stride(weights: torch.Tensor) -> torch.Tensor:
    wide = torch.full((weights.shape[0], weights.shape[1] + 5), torch.nan, device=weights.device)
    wide[:, : weights.shape[1]] = weights
    return wide[:, : weights.shape[1]]


@KERNELS
@pytest.mark.parametrize("time", range(5))
def test_paged(time: int, heads: int, dim: int, fp4: bool, block_kv: int, device: str) -> None:
    rng = random.Random()
    for rows in (1, 2, rng.randint(3, 32), rng.randint(33, 140)):
        next_n = rng.choice([1, 1, 2, 3, 4, 5, 9] if rows < 33 else [1, 1, 2])
        problem = Paged(
            lengths(rows, next_n, rng, 22 if rows < 33 else 12), next_n, heads, dim, block_kv, fp4, device=device
        )
        if rng.random() < 0.4:  # of one request
            longest = problem.context_lens.view(rows, -1).amax(dim=1).argmax()
            problem.block_table = problem.block_table[longest].expand(rows, -1).clone()
        if rng.random() < 0.5:
            problem.weights = with_a_stride(problem.weights)
        expected = problem.expected().cpu()
        for slots in (rng.choice([1, 2, 3, 5, 12]), rng.choice([48, 100, 188, 300])):
            clean, out = rng.random() < 0.3, poisoned(rows * next_n, problem.max_context_len, device=device)
            schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, block_kv, slots)
            deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), clean, out=out)
            check(out.cpu(), expected, TOLERANCE, cleaned=clean)


@KERNELS
@pytest.mark.parametrize("time", range(4))
def test_ragged(time: int, heads: int, dim: int, fp4: bool, block_kv: int, device: str) -> None:
    rng = random.Random()
    for rows in (1, rng.randint(2, 20), rng.randint(21, 90)):
        keys = rng.choice([1, 33, 64, 500, 900])
        starts = [rng.choice([0, 0, rng.randint(0, keys)]) for _ in range(rows)]
        if rng.random() < 0.4:  # causal
            starts, ends = [0] * rows, [max(0, keys - rows + row + 1) for row in range(rows)]
        else:
            ends = [min(keys, start + rng.choice(LENGTHS)) for start in starts]
        problem = Ragged(starts, ends, keys, heads, dim, fp4, device=device)
        if rng.random() < 0.5:
            problem.weights = with_a_stride(problem.weights)
        longest = max(end - start for start, end in zip(starts, ends))
        columns, clean = rng.choice([0, max(longest, 1), longest + 40]), rng.random() < 0.3
        out = poisoned(rows, columns or keys, device=device)
        deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), clean, columns, out=out)
        check(out.cpu(), problem.expected(columns).cpu(), TOLERANCE, cleaned=clean)
