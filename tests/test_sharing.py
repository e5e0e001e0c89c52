"""Keys are read once: how often they leave L2, by the emulator's count of the bytes that each block asks for and of the
distinct 32-byte sectors among them (what its L1 must fetch)."""

import pytest
import torch
from problems import Paged, Ragged, check, poisoned, prefill_from

import deep_gemm
from deep_gemm.sm120.emulator import Counters, recording

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
BYTES = {False: 132, True: 68}  # of a key with its scale
TOKENS = 2  # that a warp scores at once with few heads; one look at a key serves them


def paged(problem: Paged) -> Counters:
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, problem.slots)
    out = poisoned(len(problem.lengths) * problem.next_n, problem.max_context_len)
    with recording(trace=True) as launches:
        deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out)
    check(out, problem.expected())
    return launches[0]


@pytest.mark.parametrize("fp4, heads, warps", [(False, 16, 12), (True, 16, 16), (True, 32, 12)])
@pytest.mark.parametrize("rows, slots", [(96, 4), (256, 20), (240, 48)])
def test_paged_rows_of_one_sequence(
    fp4: bool, heads: int, warps: int, rows: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefill as SGLang makes it: rows of one sequence, lengths that grow by one every four rows. So many rows as no
    decode step has; a smaller number stands for that here."""
    prefill_from(monkeypatch, 64)
    keys = 1024 + rows // 4
    problem = Paged([1024 + row // 4 for row in range(rows)], heads=heads, fp4=fp4, slots=slots)
    problem.block_table[:] = problem.block_table[rows - 1].clone()
    counters = paged(problem)
    asked, fetched = counters.bytes_read["kv_cache"], counters.block_bytes["kv_cache"]
    each = sum(problem.lengths) * BYTES[fp4] / TOKENS
    assert each <= asked < 1.05 * each
    assert asked > 8 * fetched
    groups = -(-rows // (TOKENS * warps))
    assert fetched < groups * keys * BYTES[fp4] * 1.1


@FORMATS
def test_ragged_neighbours(fp4: bool) -> None:
    problem = Ragged([0] * 96, [900 + row for row in range(96)], 1000, heads=16, fp4=fp4)
    out = poisoned(96, 1000)
    with recording(trace=True) as launches:
        deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), out=out)
    check(out, problem.expected())
    counters = launches[0]
    assert counters.bytes_read["kv"] > 8 * counters.block_bytes["kv"]


@FORMATS
@pytest.mark.parametrize("next_n", range(1, 9))
def test_tokens_of_a_request(next_n: int, fp4: bool) -> None:
    """One pass over the cache whatever next_n: 132 bytes a key (FP8), 68 (FP4)."""
    problem = Paged([[2048] * next_n, [1024] * next_n, [4096] * next_n], next_n=next_n, heads=16, fp4=fp4, slots=5)
    counters = paged(problem)
    keys = 2048 + 1024 + 4096
    assert counters.block_bytes["kv_cache"] == keys * BYTES[fp4]
    assert counters.bytes_read["kv_cache"] == keys * BYTES[fp4] * -(-next_n // TOKENS)


@FORMATS
@pytest.mark.parametrize("slots", [2, 1])
def test_more_tokens_than_warps(slots: int, fp4: bool) -> None:
    """They take turns on pieces of the keys: the later turns find them in L1."""
    problem = Paged([[1024] * 24], next_n=24, heads=16, fp4=fp4, slots=slots)
    assert paged(problem).block_bytes["kv_cache"] == 1024 * BYTES[fp4]


def test_no_warp_is_idle_over_the_last_rows() -> None:
    """12 warps, 296 rows: the last 8 are taken as 6, by two each, and 2, by six. Each time a warp loads a query."""
    problem = Paged([256] * 296, heads=64, slots=1)
    assert paged(problem).bytes_read["q"] == 12 * (24 + 2) * 64 * 128


def test_requests_of_a_decode_step_are_spread_over_the_warps() -> None:
    """Few rows: no key is asked for twice but those that stand in for keys past a row's end."""
    problem = Paged([3000, 500, 0, 2000], heads=64, slots=20)
    counters = paged(problem)
    assert counters.block_bytes["kv_cache"] < sum(problem.lengths) * 132 * 1.02
    assert counters.bytes_read["kv_cache"] < sum(problem.lengths) * 144 * 1.02


def test_one_row_of_many_keys_fills_the_chip() -> None:
    problem = Ragged([0], [200_000], 200_000, heads=8, dim=32)
    with recording() as launches:
        deep_gemm.fp8_fp4_mqa_logits(*problem.arguments())
    assert launches[0].blocks == deep_gemm.get_num_sms()


def test_few_splits_reach_all_slots() -> None:
    """One row's splits each go to a slot of their own."""
    schedule = deep_gemm.get_paged_mqa_logits_metadata(torch.tensor([[16384]], dtype=torch.int32), 64, 188)
    begin, end = schedule[:-1, 1], torch.cat([schedule[1:-1, 1], torch.tensor([64], dtype=torch.int32)])
    assert (end - begin).max() == 1 and (end - begin).sum() == 64
