"""The decode step of one token: logits whose blocks leave fronts, and the choice out of these."""

import pytest
import torch
from problems import Paged
from test_topk import FILLS, Fill, chosen_of_paged

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import settings
from deep_gemm.sm120.emulator import recording
from deep_gemm.sm120.jit import runtime

TILE = 32


def with_logits(values: torch.Tensor, device: str, slots: int = 0) -> Paged:
    """A problem whose logits are `values`: the key's scale, times 1."""
    slots = slots or settings.sms_to_use(torch.device(device))
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


BLOCKS = 132 if torch.cuda.is_available() else 188  # an H200's, or what is emulated


def in_tiles(which) -> Fill:
    """The largest lie in those tiles of which `which` says so."""

    def fill(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) + 50.0 * which(torch.arange(columns) // TILE)

    return fill


def equal_at_the_gate(rows: int, columns: int) -> torch.Tensor:
    """In each block many keys are equal, and more than are chosen."""
    return torch.where(torch.rand(rows, columns) < 0.1, 2.0, torch.rand(rows, columns))


def pairs(rows: int, columns: int) -> torch.Tensor:
    """Neighbours are equal, and so in one front."""
    return torch.randn(rows, (columns + 1) // 2).repeat_interleave(2, dim=1)[:, :columns]


OF_FRONTS: dict[str, Fill] = {
    **FILLS,
    "pairs": pairs,
    "one block has them all": in_tiles(lambda tile: tile % BLOCKS == 7),
    "a few blocks have them all": in_tiles(lambda tile: tile % BLOCKS < 9),
    "whole tiles": in_tiles(lambda tile: (tile >= 100) & (tile < 116)),
    "more than a front holds": in_tiles(lambda tile: tile % BLOCKS < 100),
    "equal at the gate": equal_at_the_gate,
}


@pytest.mark.parametrize("fill", OF_FRONTS)
def test_any_values(fill: str, device: str) -> None:
    chosen_of_paged(with_logits(OF_FRONTS[fill](1, 13_000)[0], device), 512, device)


@pytest.mark.parametrize("columns, k", [(9000, 512), (23_000, 100), (50_000, 300)])
@pytest.mark.parametrize(
    "fill", ["normal", "neighbouring floats", "infinities, NaNs, zeros", "whole tiles", "equal at the gate", "pairs"]
)
def test_any_size(fill: str, columns: int, k: int, device: str) -> None:
    chosen_of_paged(with_logits(OF_FRONTS[fill](1, columns)[0], device), k, device)


@pytest.mark.parametrize("fill", ["normal", "rising", "nearly all NaN", "one block has them all"])
def test_warps_of_several_tiles(fill: str, device: str) -> None:
    chosen_of_paged(with_logits(OF_FRONTS[fill](1, 120_000)[0], device, 96), 512, device)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 544, 4500])
def test_lengths_in_a_wide_row(length: int, device: str) -> None:
    """Where a row has no more than k keys, fronts are empty. What the workspace holds is never taken for one."""
    slots = settings.sms_to_use(torch.device(device))
    problem = Paged([length], heads=16, fp4=True, slots=slots, max_context_len=50_000, device=device)
    size = sm120.mqa_topk_workspace_bytes(1, 50_000, 512, device=device)
    chosen_of_paged(problem, 512, device, workspace=torch.full((size,), 0x7F, dtype=torch.uint8, device=device))


def launched(problem: Paged, k: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels choose."""
    names, emulate = [], runtime._emulate
    monkeypatch.setattr(runtime, "_emulate", lambda kernel, *rest: (names.append(kernel.name), emulate(kernel, *rest)))
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, problem.slots)
    sm120.fp8_fp4_paged_mqa_topk(*problem.arguments(schedule), k)
    return [name for name in names if name.startswith("topk")]


@pytest.mark.parametrize(
    "rows, k, slots, columns",
    [
        (2, 512, 188, 9000),
        (1, 513, 188, 9000),
        (1, 512, 95, 9000),
        (1, 512, 189, 9000),
        (1, 512, 188, 8192),
        (1, 512, 96, 560_000),
    ],
)
def test_other_shapes_go_the_other_way(rows, k, slots, columns, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Paged([1000] * rows, heads=8, dim=32, slots=slots, max_context_len=columns)
    names = launched(problem, k, monkeypatch)
    assert names and not any("fronts" in name for name in names)
    one = launched(Paged([1000], heads=8, dim=32, max_context_len=9000), 512, monkeypatch)
    assert len(one) == 1 and "fronts" in one[0]


def test_logits_are_read_again_only_where_fronts_lack_keys() -> None:
    """By the second launch: of random rows none; where one block has the largest, all of them."""
    for fill, least, most in ((torch.randn, 0, 0), (OF_FRONTS["one block has them all"], 4 * 13_000, 1 << 30)):
        problem = with_logits(fill(1, 13_000)[0], "cpu")
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, problem.slots)
        with recording() as launches:
            sm120.fp8_fp4_paged_mqa_topk(*problem.arguments(schedule), 512)
        assert len(launches) == 2 and least <= launches[1].bytes_read["logits"] <= most


@pytest.mark.parametrize("page, weights", [(16, torch.float32), (128, torch.bfloat16)])
def test_pages_and_weights(page: int, weights: torch.dtype, device: str) -> None:
    problem = Paged([9001], heads=24, block_kv=page, weights_dtype=weights, slots=97, device=device)
    chosen_of_paged(problem, 512, device)


def test_two_runs_are_bitwise_equal(device: str) -> None:
    problem = with_logits(equal_at_the_gate(1, 9000)[0], device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, problem.slots)
    runs = [sm120.fp8_fp4_paged_mqa_topk(*problem.arguments(schedule), 512) for _ in range(2)]
    assert torch.equal(*runs)
