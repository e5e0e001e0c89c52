"""The schedule against a plan that writes out the list of all splits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deep_gemm
from deep_gemm.sm120 import reference


def plan(lengths: torch.Tensor, slots: int, block_kv: int = 64) -> None:
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, block_kv, slots)
    assert schedule.dtype == torch.int32 and schedule.device == lengths.device
    torch.testing.assert_close(schedule.cpu(), reference.schedule(lengths.cpu(), slots), rtol=0, atol=0)


@pytest.mark.parametrize("slots", [48, 170, 188])
@pytest.mark.parametrize("rows", [1, 33, 1024, 1025, 12_000, 30_000])
def test_any_batch_size(rows: int, slots: int, device: str) -> None:
    plan(torch.randint(0, 5000, (rows, 1), dtype=torch.int32, device=device), slots)


@pytest.mark.parametrize("rows", [1, 7, 2000])
def test_no_keys_at_all(rows: int, device: str) -> None:
    plan(torch.zeros(rows, 1, dtype=torch.int32, device=device), 188)


def test_no_rows(device: str) -> None:
    plan(torch.zeros(0, 1, dtype=torch.int32, device=device), 188)


@pytest.mark.parametrize("rows", [3, 64, 3000])
def test_zeros_between(rows: int, device: str) -> None:
    lengths = torch.randint(1, 3000, (rows, 1), dtype=torch.int32, device=device)
    lengths[torch.rand(rows, device=device) < 0.7] = 0
    plan(lengths, 170)


def test_a_million_keys_among_short_rows(device: str) -> None:
    lengths = torch.randint(0, 64, (500, 1), dtype=torch.int32, device=device)
    lengths[321] = 1_000_000
    plan(lengths, 188)


def test_one_dimensional_lengths(device: str) -> None:
    plan(torch.randint(0, 9000, (77,), dtype=torch.int32, device=device), 48)


def test_a_row_is_as_long_as_its_longest_token(device: str) -> None:
    plan(torch.randint(0, 9000, (40, 5), dtype=torch.int32, device=device), 48)


def test_rows_of_several_sequences(device: str) -> None:
    """Rows are planned one by one, whichever sequence they belong to."""
    lengths = torch.randint(0, 900, (50,), dtype=torch.int32, device=device)
    indices = torch.arange(50, dtype=torch.int32, device=device) // 7
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths.view(-1, 1), 64, 48, indices)
    assert torch.equal(schedule.cpu(), reference.schedule(lengths.cpu(), 48))


@given(lengths=st.lists(st.integers(0, 2000), max_size=40), slots=st.integers(1, 300))
def test_any_lengths(lengths: list[int], slots: int, device: str) -> None:
    plan(torch.tensor(lengths, dtype=torch.int32, device=device).view(-1, 1), slots)
