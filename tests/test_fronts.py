"""The decode step of one token: logits whose blocks leave fronts, and the choice out of these."""

import pytest
import torch
from problems import Paged
from test_topk import FILLS, Fill, chosen_of_paged

import deep_gemm

TILE = 32
SLOTS = 188


def with_logits(values: torch.Tensor, device: str, slots: int = SLOTS) -> Paged:
    """A problem whose logits are `values`: the key's scale, times 1."""
    keys, page = len(values), 64
    problem = Paged([keys], heads=8, dim=32, slots=slots, device=device)
    one = torch.tensor(1.0).to(torch.float8_e4m3fn).view(torch.uint8).item()
    q = torch.zeros_like(problem.q, dtype=torch.uint8)
    q[0, 0, 0, 0] = one
    problem.q = q.view(torch.float8_e4m3fn)
    problem.weights.zero_()[0, 0] = 1
    pages = -(-keys // page)
    words = torch.zeros(pages * page)
    words[:keys] = values
    flat = problem.kv_cache.view(len(problem.kv_cache), -1)
    flat[:, : page * 32] = 0
    flat[:, : page * 32 : 32] = one
    rows = problem.block_table[0, :pages].long()
    flat[rows, page * 32 :] = words.view(pages, page).view(torch.uint8).to(device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, page, slots)
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule))[0].cpu()
    torch.testing.assert_close(logits, values, rtol=0, atol=0, equal_nan=True)
    return problem


def in_tiles(which) -> Fill:
    """The largest lie in those tiles of which `which` says so."""

    def fill(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) + 50.0 * which(torch.arange(columns) // TILE)

    return fill


def equal_at_the_gate(rows: int, columns: int) -> torch.Tensor:
    """In each block many keys are equal, and more than are chosen."""
    return torch.where(torch.rand(rows, columns) < 0.1, 2.0, torch.rand(rows, columns))


OF_FRONTS: dict[str, Fill] = {
    **FILLS,
    "one block has them all": in_tiles(lambda tile: tile % SLOTS == 7),
    "a few blocks have them all": in_tiles(lambda tile: tile % SLOTS < 9),
    "whole tiles": in_tiles(lambda tile: (tile >= 100) & (tile < 116)),
    "more than a front holds": in_tiles(lambda tile: tile % SLOTS < 100),
    "equal at the gate": equal_at_the_gate,
}


@pytest.mark.parametrize("columns, k", [(3000, 512), (13000, 512), (13000, 1000), (23000, 2048), (50_000, 512)])
@pytest.mark.parametrize("fill", OF_FRONTS)
def test_any_values(fill: str, columns: int, k: int, device: str) -> None:
    chosen_of_paged(with_logits(OF_FRONTS[fill](1, columns)[0], device), k, device)


@pytest.mark.parametrize("fill", ["normal", "rising", "nearly all NaN", "one block has them all"])
def test_warps_of_several_tiles(fill: str, device: str) -> None:
    problem = with_logits(OF_FRONTS[fill](1, 120_000)[0], device, 96)
    for k in (512, 2048):
        chosen_of_paged(problem, k, device)
