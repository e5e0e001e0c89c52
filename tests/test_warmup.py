"""What `warmup` makes ready is all that serving launches, whatever the rows and columns."""

import pytest
import torch
from problems import Paged, Ragged, Sparse

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import ArgumentError, prepare
from deep_gemm.sm120.jit import runtime

ROWS = [1, 2, 5, 16, 47, 64, 94, 95, 100, 188, 189, 250, 376, 377, 1000, 4096]
COLUMNS = [1, 500, 1100, 2000, 4096, 5000, 9000, 16_384, 20_000, 40_000, 65_536, 100_000, 262_144, 300_000, 1_000_000]


class Launches:
    """Of all kernels that are launched the names, and nothing runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        monkeypatch.setattr(runtime, "_emulate", lambda kernel, *_: self.names.add(kernel.name))
        monkeypatch.setattr(prepare, "load", lambda kernel, place: None)

    def all_in(self, warm: list[str]) -> None:
        assert len(set(warm)) == len(warm)
        assert self.names and self.names <= set(warm), sorted(self.names - set(warm))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


@pytest.mark.parametrize("k", [512, 700, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk(launches: Launches, k: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        lengths = torch.zeros(rows, dtype=torch.int32)
        for columns in COLUMNS:
            sm120.topk(torch.empty(columns, dtype=dtype).expand(rows, -1), lengths, k)
    launches.all_in(sm120.warmup(heads=16, topk=k, logits_dtype=dtype, device="cpu"))


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
def test_logits_and_choice(launches: Launches, fp4: bool) -> None:
    for rows in ROWS:
        paged = Paged([[1]] * rows, heads=8, fp4=fp4)
        ragged = Ragged([0] * rows, [1] * rows, 64, heads=8, fp4=fp4)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(paged.context_lens, 64, 188)
        for columns in COLUMNS:
            paged.max_context_len = columns
            paged.block_table = torch.zeros((1, -(-columns // 64)), dtype=torch.int32).expand(rows, -1)
            sm120.fp8_fp4_paged_mqa_topk(*paged.arguments(schedule), 512)
            if columns <= 300_000:
                ragged.kv = tuple(torch.empty((columns, *part.shape[1:]), dtype=part.dtype) for part in ragged.kv)
                sm120.fp8_fp4_mqa_topk(*ragged.arguments(), 512)
    launches.all_in(sm120.warmup(heads=8, fp4=fp4, topk=512, device="cpu"))


@pytest.mark.parametrize("page", [64, 128])
def test_a_step_of_v41(launches: Launches, page: int) -> None:
    """The source: logits, maxima, candidates. The consumers: metadata, sparse logits, choice."""
    for rows in ROWS:
        paged = Paged([[1]] * rows, heads=32, block_kv=page, fp4=True)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(paged.context_lens, page, 188)
        for columns in COLUMNS:
            if rows * columns > 1 << 26:
                continue
            maxima, paged.max_context_len = torch.empty((rows, -(-columns // 8))), columns
            sm120.fp8_fp4_paged_mqa_logits(*paged.arguments(schedule), block_max=maxima)
            sm120.candidate_blocks(maxima, paged.context_lens, 2048)
        sparse = Sparse([1] * rows, width=2048, block_kv=page)
        metadata = sparse.metadata()
        last = (2048, 8, sparse.lists, sparse.context_lens, 512)
        for weights in (sparse.weights, sparse.weights.float()):
            sm120.fp8_fp4_paged_sparse_mqa_topk(sparse.q, sparse.kv_cache, weights, metadata, *last)
    launches.all_in(
        sm120.warmup(32, block_kv=page, fp4=True, sparse_block_kv=8, block_max=True, topk=512, device="cpu")
    )


def test_maxima_of_ragged_keys(launches: Launches) -> None:
    problem = Ragged([0, 8], [9, 30], 30, heads=16)
    sm120.fp8_mqa_logits(*problem.arguments(), block_max=torch.empty(2, 4))
    launches.all_in(sm120.warmup(16, block_max=True, paged=False, device="cpu"))


def test_without_them_nothing_more_is_made_ready(launches: Launches) -> None:
    names = sm120.warmup(device="cpu")
    assert not any("topk" in name or "maxima" in name or "carry" in name for name in names)


@pytest.mark.parametrize("argument, value", [("topk", -1), ("topk", 2049), ("topk", True), ("block_max", 1)])
def test_refused(argument: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: expected"):
        sm120.warmup(**{argument: value}, device="cpu")
