"""SGLang's own classes on the installed wheel: DeepSeek-V4's indexer, in the emulator where there is no GPU.

`make test-clients` makes an environment with SGLang and runs this file in it; it is no part of `make test`.
Page selections are compared for equality, so scores are made exact in every precision on the way: integers, eighths and
powers of two that bf16 and fp32 sums hold without rounding.
"""

import os
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers  # noqa: F401  before the stand-in below: it looks for the real one

# SGLang's configurations of other models import torchvision for their pictures; nothing here does.
for module in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io"):
    sys.modules[module] = mock.MagicMock()

os.environ["SGLANG_OPT_USE_TILELANG_INDEXER"] = "0"
os.environ["SGLANG_OPT_USE_JIT_INDEXER_METADATA"] = "0"

from problems import generator  # noqa: E402
from sglang.kernels.ops.attention.dsv4 import index_logits  # noqa: E402
from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend  # noqa: E402
from sglang.srt.layers.attention.dsv4 import indexer  # noqa: E402
from sglang.srt.layers.attention.dsv4.metadata import PagedIndexerMetadata  # noqa: E402
from sglang.srt.layers.deep_gemm_wrapper import configurer  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

import deep_gemm  # noqa: E402
from deep_gemm.sm120 import reference  # noqa: E402

HEADS, DIM, PAGE, TOP = 64, 128, 64, 512
LENGTHS = [0, 37, 600, 1500, 1, 513]  # compressed keys of each query row
FP8_LOGITS_TORCH = "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH"  # SGLang's own path


@pytest.fixture(autouse=True)
def deep_gemm_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FP8_LOGITS_TORCH, "0")


@pytest.fixture
def rng() -> torch.Generator:
    return generator()


def small(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """e4m3 integers from -2 to 2."""
    return torch.randint(-2, 3, shape, generator=rng).to(torch.float8_e4m3fn)


def eighths(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    return torch.randint(-16, 17, shape, generator=rng) / 8.0


def small_fp4(shape: tuple[int, ...], rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Any e2m1 values [..., dim / 2], two to a byte, and scale words [...] of ones and twos."""
    values = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=rng, dtype=torch.uint8).view(torch.int8)
    scales = torch.randint(127, 129, (*shape[:-1], 4), generator=rng, dtype=torch.uint8)
    return values, scales.view(torch.int32).squeeze(-1)


class Pool:
    """The part of SGLang's KV pool that the indexer reads: pages of all values, then all scales."""

    def __init__(self, pages: int, fp4: bool, rng: torch.Generator) -> None:
        if fp4:
            values, scales = small_fp4((pages, PAGE, DIM), rng)
        else:
            values, scales = (
                small((pages, PAGE, DIM), rng),
                torch.exp2(torch.randint(-2, 3, (pages, PAGE), generator=rng)),
            )
        parts = [values.view(torch.uint8).flatten(1), scales.view(torch.uint8).flatten(1)]
        self.values, self.scales, self.pages = values, scales, torch.cat(parts, dim=1)

    def get_index_k_with_scale_buffer(self, layer_id: int) -> torch.Tensor:
        return self.pages

    def get_index_k_scale_buffer(self, layer_id, seq_len_tensor, page_indices, seq_len_sum, max_seq_len):
        rows = page_indices[0].long()
        keys = self.values[rows].flatten(0, 1)[:seq_len_sum], self.scales[rows].flatten(0, 1)[:seq_len_sum, None]
        return tuple(part.contiguous().view(torch.uint8) for part in keys)


class Backend(indexer.C4IndexerBackendMixin):
    """SGLang's backend with its projections replaced by given queries and weights."""

    def __init__(self, query, weights: torch.Tensor, pool: Pool, table: torch.Tensor, lengths: torch.Tensor) -> None:
        super().__init__()
        self.dsa_topk_backend = DSATopKBackend.TORCH
        self.hisparse_coordinator = None
        self.prepared = query, weights
        self.token_to_kv_pool = pool
        rows = len(lengths)
        core = SimpleNamespace(
            positions=torch.zeros(rows, dtype=torch.int64),
            c4_sparse_page_indices=torch.full((rows, TOP), -7, dtype=torch.int32),
            c4_sparse_raw_indices=None,
        )
        plan = PagedIndexerMetadata(
            page_size=256, compressed_page_size=PAGE, page_table=table, compressed_seq_lens=lengths, use_topk_v2=False
        )
        self.forward_metadata = SimpleNamespace(indexer_metadata=plan, core_metadata=core)

    def _forward_prepare_normal(self, **_):
        return self.prepared

    def _can_use_nonpaged_indexer(self, *, forward_batch, **_) -> bool:
        """Without its questions about the platform."""
        return forward_batch.forward_mode == ForwardMode.EXTEND and os.environ[FP8_LOGITS_TORCH] == "0"

    def select(self, fp4: bool, **batch) -> torch.Tensor:
        """The pages and offsets that SGLang would attend to."""
        rows = len(self.forward_metadata.core_metadata.positions)
        layer = SimpleNamespace(layer_id=0, use_fp4_indexer=fp4, index_topk=TOP)
        self.forward_c4_indexer(
            x=torch.zeros(rows, 1),
            q_lora=torch.zeros(rows, 1),
            c4_indexer=layer,
            forward_batch=SimpleNamespace(**{"forward_mode": ForwardMode.DECODE, **batch}),
        )
        return self.forward_metadata.core_metadata.c4_sparse_page_indices


def shuffled_table(rows: int, width: int, pages: int, rng: torch.Generator) -> torch.Tensor:
    return torch.stack([torch.randperm(pages, generator=rng)[:width] for _ in range(rows)]).to(torch.int32)


def test_metadata_is_planned_as_the_contract_says(rng: torch.Generator) -> None:
    lengths = torch.randint(0, 5000, (70,), generator=rng, dtype=torch.int32)
    plan = PagedIndexerMetadata(
        page_size=256,
        compressed_page_size=PAGE,
        page_table=torch.zeros(70, 80, dtype=torch.int32),
        compressed_seq_lens=lengths,
        use_topk_v2=False,
    )
    assert torch.equal(plan.deep_gemm_metadata, reference.schedule(lengths[:, None], deep_gemm.get_num_sms()))


def test_decode_fp8_selects_what_sglang_s_own_path_selects(rng: torch.Generator, monkeypatch) -> None:
    rows, lengths = len(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)
    query, weights = small((rows, HEADS, DIM), rng), eighths((rows, HEADS, 1), rng)
    given = query, weights, Pool(30, False, rng), shuffled_table(rows, 24, 30, rng), lengths
    ours = Backend(*given).select(fp4=False)
    monkeypatch.setenv(FP8_LOGITS_TORCH, "1")
    theirs = Backend(*given).select(fp4=False)
    assert torch.equal(ours, theirs)
    assert [(row >= 0).sum().item() for row in ours] == [min(length, TOP) for length in LENGTHS]


def test_decode_fp4_selects_the_highest_scores(rng: torch.Generator) -> None:
    rows, lengths = len(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)
    query, weights = small_fp4((rows, HEADS, DIM), rng), eighths((rows, HEADS, 1), rng)
    pool, table = Pool(30, True, rng), shuffled_table(rows, 24, 30, rng)
    ours = Backend(query, weights, pool, table, lengths).select(fp4=True)

    paged = tuple(part[:, None] for part in query), pool.pages.view(30, PAGE, 1, DIM // 2 + 4)
    scores = reference.paged_logits(*paged, weights[..., 0], lengths[:, None], table, 24 * PAGE)
    want = torch.empty_like(ours)
    indexer.topk_transform_pytorch_vectorized(scores.float(), lengths, table, want, PAGE)
    assert torch.equal(ours, want)


def test_prefill_without_pages_selects_what_sglang_s_own_path_selects(rng: torch.Generator, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_OPT_DSV4_NONPAGED_INDEXER_MIN_QUERY_TOKENS", "1")
    rows, end = 12, 2900  # the last tokens of a request
    lengths = (torch.arange(end - rows, end) + 1).to(torch.int32) // 4
    query, weights = small((rows, HEADS, DIM), rng), eighths((rows, HEADS, 1), rng)
    table = shuffled_table(1, 12, 30, rng).expand(rows, -1).contiguous()
    given = query, weights, Pool(30, False, rng), table, lengths
    batch = {
        "forward_mode": ForwardMode.EXTEND,
        "seq_lens": torch.tensor([end]),
        "seq_lens_cpu": torch.tensor([end]),
        "extend_seq_lens": torch.tensor([rows]),
        "extend_seq_lens_cpu": [rows],
        "extend_start_loc": torch.tensor([0]),
        "extend_num_tokens": rows,
    }
    backend = Backend(*given)
    ours = backend.select(fp4=False, **batch)
    assert backend.forward_metadata.indexer_metadata.nonpaged_plan is not None
    monkeypatch.setenv(FP8_LOGITS_TORCH, "1")
    assert torch.equal(ours, Backend(*given).select(fp4=False, **batch))


def test_flat_tiles_of_a_prefill_chunk(rng: torch.Generator) -> None:
    """DeepSeek-V4.1's FP4 prefill: two requests behind one another, in tiles of a memory budget."""
    lengths, starts = torch.tensor([5, 90, 130, 1, 70]), torch.tensor([0, 0, 0, 130, 130])
    query, keys = small_fp4((5, HEADS, DIM), rng), small_fp4((200, DIM), rng)
    weights = eighths((5, HEADS), rng)
    starts, lengths = starts.to(torch.int32), lengths.to(torch.int32)
    tiles = list(
        index_logits.flat_index_logits_tiles(
            q=query,
            kv=keys,
            weights=weights,
            starts=starts,
            lengths=lengths,
            context_lengths=[130, 70],
            budget_bytes=2 * 1024,
        )
    )
    assert len(tiles) > 1 and sum(tile.stop - tile.start for tile, _ in tiles) == 5
    for tile, logits in tiles:
        want = reference.ragged_logits(
            (query[0][tile], query[1][tile]),
            keys,
            weights[tile],
            starts[tile],
            (starts + lengths)[tile],
            logits.shape[1],
        )
        inside = want != -torch.inf
        assert torch.equal(logits[inside].double(), want[inside])


def test_paged_fp4_of_v4_1(rng: torch.Generator) -> None:
    lengths, table = torch.tensor([0, 37, 300]), shuffled_table(3, 6, 8, rng)
    query, weights, pool = small_fp4((3, 1, HEADS, DIM), rng), eighths((3, HEADS), rng), Pool(8, True, rng)
    cache = pool.pages.view(8, PAGE, 1, DIM // 2 + 4)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths.to(torch.int32)[:, None], PAGE, 5)
    logits = index_logits.deep_gemm_fp4_paged_mqa_logits(query, cache, weights, lengths, table, schedule, 6 * PAGE)
    want = reference.paged_logits(query, cache, weights, lengths[:, None], table, 6 * PAGE)
    inside = want != -torch.inf
    assert torch.equal(logits[inside].double(), want[inside])


def test_the_gate_of_deep_gemm_s_dense_kernels_tells_the_truth() -> None:
    probed = ("fp8_einsum", "m_grouped_fp8_fp4_gemm_nt_contiguous", "transform_sf_into_required_layout")
    assert configurer._sm120_deep_gemm_apis_available() is all(hasattr(deep_gemm, name) for name in probed)
    if not torch.cuda.is_available():  # upstream's library cannot load beside PyTorch's CPU build
        assert not configurer._sm120_deep_gemm_apis_available()
