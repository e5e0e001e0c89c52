"""SGLang's own classes on the installed wheel: the indexers of DeepSeek-V4, V4.1 and V3.2, in the emulator where there
is no GPU.

`make test-clients` makes an environment with SGLang and runs this file in it; it is no part of `make test`. The plugin
is loaded as SGLang loads it; tests that ask for `sm120` let it take the tensors' device for SM12x.
Page selections are compared for equality, so scores are made exact in every precision on the way: integers, eighths and
powers of two that bf16 and fp32 sums hold without rounding.
"""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers  # noqa: F401  before the stand-in below: it looks for the real one

# SGLang's configurations of other models import torchvision for their pictures; nothing here does.
for module in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io"):
    sys.modules[module] = mock.MagicMock()

os.environ["TRITON_INTERPRET"] = "1"
os.environ["SGLANG_OPT_USE_TILELANG_INDEXER"] = "0"
os.environ["SGLANG_OPT_USE_JIT_INDEXER_METADATA"] = "0"

from problems import generator  # noqa: E402
from sglang.kernels.ops.attention.dsv4 import candidate_blocks, candidate_table, index_logits  # noqa: E402
from sglang.kernels.ops.attention.dsv4 import topk as topk_module  # noqa: E402
from sglang.srt import runtime_context  # noqa: E402
from sglang.srt.arg_groups import deepseek_v4_hook, model_hook  # noqa: E402
from sglang.srt.layers.attention.dsa import dsa_indexer  # noqa: E402
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer  # noqa: E402
from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata  # noqa: E402
from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend, TopkTransformMethod  # noqa: E402
from sglang.srt.layers.attention.dsa.paged_mqa_logits_backend import DSAPagedMQALogitsBackend  # noqa: E402
from sglang.srt.layers.attention.dsv4 import indexer, v41_indexer  # noqa: E402
from sglang.srt.layers.attention.dsv4 import metadata as metadata_module  # noqa: E402
from sglang.srt.layers.attention.dsv4.metadata import PagedIndexerMetadata  # noqa: E402
from sglang.srt.layers.attention.dsv4.v41_indexer import full_topk, scoring, sparse_table  # noqa: E402
from sglang.srt.layers.deep_gemm_wrapper import configurer  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.runtime_context import override_platform  # noqa: E402

import deep_gemm  # noqa: E402
from deep_gemm import sm120  # noqa: E402
from deep_gemm.sm120 import reference  # noqa: E402
from deep_gemm.sm120.jit import runtime  # noqa: E402
from deep_gemm_plugins import sglang as plugin  # noqa: E402

load_plugins()  # after the imports above: names that they hold already have to be replaced as well

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

    def __init__(
        self,
        query,
        weights: torch.Tensor,
        pool: Pool,
        table: torch.Tensor,
        lengths: torch.Tensor,
        topk: DSATopKBackend = DSATopKBackend.TORCH,
    ) -> None:
        super().__init__()
        self.dsa_topk_backend = topk
        self.hisparse_coordinator = None
        self.prepared = query, weights
        self.token_to_kv_pool = pool
        rows = len(lengths)
        core = SimpleNamespace(
            positions=torch.zeros(rows, dtype=torch.int64),
            c4_sparse_page_indices=torch.full((rows, TOP), -7, dtype=torch.int32),
            c4_sparse_raw_indices=torch.full((rows, TOP), -7, dtype=torch.int32),
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


# The plugin: the same classes with SGLang's own top-k backend, whose kernels ours stand in for.


ONE_CALL = "fp8_fp4_paged_sparse_mqa_topk"


class Calls(list):
    """What was called of ours: the functions' names, each of which ran and returned."""

    def spied(self, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            self.append(function.__name__)
            return result

        return call


@pytest.fixture
def sm120_device(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Tensors here lie on SM12x, as far as plugin and SGLang ask; what the plugin calls is written down."""
    calls = Calls()

    for name in ("topk", "candidate_blocks", plugin.FUSED, ONE_CALL):
        if hasattr(sm120, name):
            monkeypatch.setattr(sm120, name, calls.spied(getattr(sm120, name)))
    monkeypatch.setattr(plugin, "serves", lambda device: True)
    monkeypatch.setenv("SGLANG_OPT_USE_TOPK_V2", "0")  # as SGLang sets it on SM120 for V4
    with override_platform(is_sm120=True):
        yield calls


def check_choice(ours: torch.Tensor, theirs: torch.Tensor, scores: torch.Tensor) -> None:
    """The same positions in every row, in any order; but of equal scores either may have been taken."""
    for row, (mine, other) in enumerate(zip(ours, theirs)):
        mine, other = mine[mine >= 0].long(), other[other >= 0].long()
        assert len(set(mine.tolist())) == len(mine) == len(other)
        assert scores[row, mine].sort().values.tolist() == scores[row, other].sort().values.tolist()


def through(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Slots of `positions`, by each row's pages."""
    pages = table.gather(1, (positions.clamp_min(0) // PAGE).long())
    return torch.where(positions >= 0, pages * PAGE + positions % PAGE, -1)


def check_v4(ours: Backend, theirs: Backend, fp4: bool) -> None:
    """Both have chosen: the same positions, and ours lie on the slots that the page table says."""
    query, weights = ours.prepared
    pool, plan = ours.token_to_kv_pool, ours.forward_metadata.indexer_metadata
    query = tuple(part[:, None] for part in query) if fp4 else query[:, None]
    cache = pool.pages.view(len(pool.pages), PAGE, 1, -1)
    lengths, table = plan.compressed_seq_lens, plan.page_table
    scores = reference.paged_logits(query, cache, weights[..., 0], lengths[:, None], table, table.shape[1] * PAGE)
    mine, other = (backend.forward_metadata.core_metadata for backend in (ours, theirs))
    check_choice(mine.c4_sparse_raw_indices, other.c4_sparse_raw_indices, scores)
    assert torch.equal(mine.c4_sparse_page_indices, through(table, mine.c4_sparse_raw_indices))


def test_every_hook_is_taken() -> None:
    report = plugin.PLUGIN.report()
    assert report[0].startswith("sglang 0.5.23")
    assert len(report) == 2 + len(plugin.PLUGIN.hooks) and all(line.endswith(": taken") for line in report[2:])


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks as they are: one that refuses serves again in the next test."""
    for hook in plugin.PLUGIN.hooks:
        for name in ("active", "state"):
            monkeypatch.setattr(hook, name, getattr(hook, name))


@pytest.fixture(params=["fused", "one by one", "fused fails"])
def ways(request, monkeypatch: pytest.MonkeyPatch, kept, sm120_device: Calls) -> set[str]:
    """How decode goes: logits and top-k in one; without that function; and with one that raises. The names called."""
    if request.param == "fused":
        return {plugin.FUSED}
    if request.param == "one by one":
        monkeypatch.delattr(sm120, plugin.FUSED, raising=False)
    else:
        monkeypatch.setattr(sm120, plugin.FUSED, mock.MagicMock(side_effect=RuntimeError("no memory")))
    return {"topk"}


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_v4_decode(rng: torch.Generator, monkeypatch, sm120_device: Calls, ways, fp4: bool, chunk: int | None) -> None:
    """`chunk`: SGLang's limit on rows in a call on SM120, made small."""
    monkeypatch.setattr(metadata_module, "_IS_SM120", chunk is not None)
    monkeypatch.setattr(metadata_module, "_SM120_INDEXER_M_CHUNK", chunk)
    rows, lengths = len(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)
    query = (small_fp4 if fp4 else small)((rows, HEADS, DIM), rng)
    given = query, eighths((rows, HEADS, 1), rng), Pool(30, fp4, rng), shuffled_table(rows, 24, 30, rng), lengths
    ours, theirs = Backend(*given, topk=DSATopKBackend.SGL_KERNEL), Backend(*given)
    ours.select(fp4=fp4)
    assert ways <= set(sm120_device) and (plugin.FUSED in sm120_device) is (ways == {plugin.FUSED})
    sm120_device.clear()
    theirs.select(fp4=fp4)
    assert not sm120_device
    check_v4(ours, theirs, fp4)


def test_v4_decode_with_sglang_s_second_top_k(rng: torch.Generator, monkeypatch, sm120_device: Calls, ways) -> None:
    """Whose plan ours does not need."""
    monkeypatch.setenv("SGLANG_OPT_USE_TOPK_V2", "1")
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    query, weights = small((len(LENGTHS), HEADS, DIM), rng), eighths((len(LENGTHS), HEADS, 1), rng)
    given = query, weights, Pool(30, False, rng), shuffled_table(len(LENGTHS), 24, 30, rng), lengths
    ours, theirs = Backend(*given, topk=DSATopKBackend.SGL_KERNEL), Backend(*given)
    ours.select(fp4=False)
    assert ways <= set(sm120_device)
    theirs.select(fp4=False)
    check_v4(ours, theirs, fp4=False)


@pytest.mark.parametrize("topk", [DSATopKBackend.TORCH, DSATopKBackend.FLASHINFER])
def test_v4_s_logits_are_made_where_another_top_k_reads_them(rng, monkeypatch, sm120_device: Calls, topk) -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    rows, seen = len(LENGTHS), []
    query, weights = small((rows, HEADS, DIM), rng), eighths((rows, HEADS, 1), rng)
    backend = Backend(query, weights, Pool(30, False, rng), shuffled_table(rows, 24, 30, rng), lengths, topk=topk)
    monkeypatch.setattr(indexer, "topk_transform_pytorch_vectorized", lambda logits, *_: seen.append(logits))
    backend.flashinfer_topk_transform = lambda logits, *_: seen.append(logits)
    backend.select(fp4=False)
    assert isinstance(seen[0], torch.Tensor) and not sm120_device


def test_v4_prefill_without_pages(rng: torch.Generator, monkeypatch, sm120_device: Calls) -> None:
    monkeypatch.setenv("SGLANG_OPT_DSV4_NONPAGED_INDEXER_MIN_QUERY_TOKENS", "1")
    rows, end = 12, 2900
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
    ours, theirs = Backend(*given, topk=DSATopKBackend.SGL_KERNEL), Backend(*given)
    ours.select(fp4=False, **batch)
    assert ours.forward_metadata.indexer_metadata.nonpaged_plan is not None and sm120_device == ["topk"]
    monkeypatch.setenv(FP8_LOGITS_TORCH, "1")
    theirs.select(fp4=False, **batch)
    check_v4(ours, theirs, fp4=False)


class Query:
    """A query of V3.2's indexer that says to lie on an indexed device, as SGLang demands in a prefill."""

    device = torch.device("cpu", 0)

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.shape = values, values.shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.values[rows]


class V32:
    """SGLang's indexer of V3.2 and GLM-5 over a pool of ours: two requests, whose `rows` newest tokens each select."""

    top = 128

    def __init__(self, lengths: list[int], rows: int, rng: torch.Generator) -> None:
        total = rows * len(lengths)
        self.rows, self.lengths = rows, torch.tensor(lengths, dtype=torch.int32)
        self.pool = Pool(30, False, rng)
        self.pool.index_page_size = PAGE
        self.pool.get_index_k_scale_buffer = self.gather
        self.query, self.weights = small((total, HEADS, DIM), rng), eighths((total, HEADS, 1), rng)
        self.table = torch.randperm(30, generator=rng).to(torch.int32).view(len(lengths), -1)
        slots = self.table[:, :, None] * PAGE + torch.arange(PAGE, dtype=torch.int32)
        self.seen = torch.cat([torch.arange(n - rows + 1, n + 1) for n in lengths]).to(torch.int32)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).to(torch.int32).repeat_interleave(rows)
        self.attention = SimpleNamespace(
            cache_seqlens_int32=self.lengths,
            real_page_table=self.table,
            indexer_logical_page_table=None,
            page_table_1=slots.flatten(1),
            page_size=PAGE,
            dsa_seqlens_expanded=self.seen,
            indexer_k_start_end=(starts, starts + self.seen),
            indexer_seq_lens=self.lengths,
            indexer_seq_lens_cpu=torch.tensor(lengths),
            dsa_extend_seq_lens_list=[rows] * len(lengths),
            token_to_batch_idx=torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(rows),
            cu_seqlens_q=torch.arange(0, total + 1, rows, dtype=torch.int32),
            topk_indices_offset=starts,
            topk_v2_plan=None,
        )
        self.indexer = Indexer.__new__(Indexer)
        for name, value in {
            "index_topk": self.top,
            "sm_count": 188,
            "n_heads": HEADS,
            "num_init_tokens": 0,
            "num_local_tokens": 0,
            "logits_with_pp_recv": False,
            "paged_mqa_logits_backend": DSAPagedMQALogitsBackend.DEEPGEMM,
        }.items():
            object.__setattr__(self.indexer, name, value)

    def gather(self, layer_id, seq_len_tensor, page_indices, seq_len_sum, max_seq_len):
        """Keys of all requests in a row."""
        parts = [
            torch.cat([part[row.long()].flatten(0, 1)[:length] for row, length in zip(self.table, self.lengths)])
            for part in (self.pool.values, self.pool.scales[..., None])
        ]
        return tuple(part.contiguous().view(torch.uint8) for part in parts)

    def metadata(self, method: TopkTransformMethod, unfused: bool = False) -> DSAIndexerMetadata:
        lengths = self.seen[:, None]
        return DSAIndexerMetadata(
            attn_metadata=self.attention,
            topk_transform_method=method,
            force_unfused_topk=unfused,
            paged_mqa_schedule_metadata=deep_gemm.get_paged_mqa_logits_metadata(lengths, PAGE, 188),
            paged_mqa_ctx_lens_2d=lengths,
        )

    def check(self, positions: torch.Tensor) -> None:
        """Against PyTorch's choice, through SGLang's own backend for it."""
        keys = self.gather(0, None, None, None, None)
        kv = keys[0].view(torch.float8_e4m3fn), keys[1].view(torch.float32).squeeze(-1)
        starts, ends = self.attention.indexer_k_start_end
        scores = reference.ragged_logits(self.query, kv, self.weights[..., 0], starts, ends, max(self.lengths.tolist()))
        want = DSATopKBackend.TORCH.topk_func(scores.float(), self.seen, self.top)
        check_choice(positions, want, scores)

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """Each row's positions whose slots these are."""
        tables = self.attention.page_table_1[self.attention.token_to_batch_idx.long()]
        found = (tables[:, None] == slots[:, :, None]).int().argmax(dim=2)
        assert torch.equal(torch.where(slots >= 0, tables.gather(1, found), -1), slots)
        return torch.where(slots >= 0, found, -1)


@pytest.fixture
def v32_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsa_indexer, "_is_cuda", True)


@pytest.mark.parametrize("tokens", [1, 2], ids=["decode", "verify"])
def test_v3_2_decode(rng: torch.Generator, monkeypatch, sm120_device: Calls, ways, v32_on_cuda, tokens: int) -> None:
    """Two rows of padding at the end, as a graph's batch has them."""
    monkeypatch.setenv("SGLANG_OPT_USE_TOPK_V2", "1")  # SGLang's default for these models
    given = V32([700, 90], tokens, rng)
    given.attention.real_page_table = given.table.repeat_interleave(tokens, dim=0)
    monkeypatch.setattr(dsa_indexer, "get_token_to_kv_pool", lambda: given.pool)
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE if tokens == 1 else ForwardMode.TARGET_VERIFY)
    given.attention.topk_v2_plan = torch.empty(2 * tokens + 1, 2)
    padded = torch.cat([given.query, given.query[:2]]), torch.cat([given.weights, given.weights[:2]])
    for unfused in (False, True):
        sm120_device.clear()
        metadata = given.metadata(TopkTransformMethod.PAGED, unfused)
        chosen = given.indexer._get_topk_paged(batch, 0, *padded, metadata)
        assert (chosen[2 * tokens :] == -1).all()
        chosen = chosen[: 2 * tokens]
        given.check(chosen if unfused else given.positions(chosen))
        called = {"topk"} if unfused else ways
        assert called <= set(sm120_device) and (plugin.FUSED in sm120_device) is (called == {plugin.FUSED})


def test_v3_2_s_lengths_on_sm100_are_not_taken_for_ours(rng, monkeypatch, sm120_device: Calls, v32_on_cuda) -> None:
    """There they are a request's, the same for each of its tokens; top-k has to know each token's own."""
    given = V32([700, 90], 2, rng)
    given.attention.real_page_table = given.table.repeat_interleave(2, dim=0)
    monkeypatch.setattr(dsa_indexer, "get_token_to_kv_pool", lambda: given.pool)
    metadata = given.metadata(TopkTransformMethod.PAGED)
    object.__setattr__(metadata, "paged_mqa_ctx_lens_2d", given.lengths[:, None].expand(-1, 2).contiguous())
    batch = SimpleNamespace(forward_mode=ForwardMode.TARGET_VERIFY)
    chosen = given.indexer._get_topk_paged(batch, 0, given.query, given.weights, metadata)
    assert plugin.FUSED not in sm120_device
    given.check(given.positions(chosen))


@pytest.mark.parametrize("budget", [1 << 30, 3000], ids=["whole", "chunks"])
@pytest.mark.parametrize("method", list(TopkTransformMethod), ids=["paged", "ragged"])
def test_v3_2_prefill(rng: torch.Generator, monkeypatch, sm120_device: Calls, v32_on_cuda, method, budget) -> None:
    given = V32([700, 90], 3, rng)
    if method == TopkTransformMethod.PAGED:
        given.attention.topk_indices_offset = None
    monkeypatch.setattr(dsa_indexer, "get_token_to_kv_pool", lambda: given.pool)
    monkeypatch.setattr(dsa_indexer, "mqa_logits_should_chunk", lambda **_: (budget < 1 << 20, budget))
    object.__setattr__(given.indexer, "_MQA_LOGITS_BYTES_PER_ELEM", 4)
    chosen = given.indexer._get_topk_ragged(
        False,
        SimpleNamespace(forward_mode=ForwardMode.EXTEND, seq_lens_cpu=given.lengths, extend_seq_lens_cpu=[3, 3]),
        0,
        Query(given.query),
        given.weights,
        given.metadata(method),
    )
    if method == TopkTransformMethod.PAGED:
        given.check(given.positions(chosen))
    else:
        given.check(chosen.where(chosen < 0, chosen - given.attention.topk_indices_offset[:, None]))
    assert len(sm120_device) == (1 if budget == 1 << 30 else 6)


# DeepSeek-V4.1. What SGLang runs on a GPU alone is written out, or runs in Triton's interpreter; there are no streams.


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our kernels that run, in order."""
    emulate, names = runtime._emulate, []

    def run(kernel, *arguments) -> None:
        names.append(kernel.name)
        emulate(kernel, *arguments)

    monkeypatch.setattr(runtime, "_emulate", run)
    return names


def kinds(names: list[str]) -> list[str]:
    """What kernels do, by their names."""
    known = {
        "sparse_mqa_logits_metadata": "places",
        "sparse_topk_columns": "columns",
        "sparse_mqa_logits": "sparse logits",
        "maxima": "logits and maxima",
        "mqa_logits": "logits",
        "ascending": "lists",
        "topk": "top-k",
    }
    return [next(kind for part, kind in known.items() if part in name) for name in names]


def amax8_varlen(scores: torch.Tensor, seq_lens: torch.Tensor, topk: int = 0, *, out: torch.Tensor) -> torch.Tensor:
    for row, length in enumerate(seq_lens.tolist()):
        for block in range(-(-length // 8)):
            out[row, block] = scores[row, block * 8 : min(block * 8 + 8, length)].max()
        if length:
            out[row, (length - 1) // 8] = torch.inf
    return out


def sort_blocks(blocks, seq_lens, page_table, out_pages, page_size: int) -> None:
    out_pages.fill_(2**31 - 1)
    most, per_page = blocks.shape[1], page_size // 8
    for row, length in enumerate(seq_lens.tolist()):
        count = -(-length // 8)
        ids = blocks[row][blocks[row] >= 0].sort().values if count > most else torch.arange(count)
        blocks[row] = 2**31 - 1
        blocks[row, : len(ids)] = ids
        out_pages[row, : len(ids)] = page_table[row, ids // per_page] * per_page + ids % per_page


@pytest.fixture
def v41(monkeypatch: pytest.MonkeyPatch, sm120_device: Calls) -> Calls:
    """What V4.1's indexer asks of the machine; and what it calls of `deep_gemm`, written down beside the plugin's."""
    for name in plugin.SPARSE:
        monkeypatch.setattr(deep_gemm, name, sm120_device.spied(getattr(deep_gemm, name)))
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(v41_indexer, "is_sm100_or_newer", lambda: True)
    monkeypatch.setattr(v41_indexer, "_use_deep_gemm_prefill", lambda: True)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(attn_cp_size=1))
    monkeypatch.setattr(candidate_blocks, "is_arch_support_pdl", lambda: False)
    monkeypatch.setattr(candidate_blocks, "plan_topk_v2", mock.MagicMock())
    for module in (candidate_blocks, sparse_table):
        monkeypatch.setattr(module, "amax8_varlen", sm120_device.spied(amax8_varlen))
    sorting = SimpleNamespace(transform=sm120_device.spied(sort_blocks))
    monkeypatch.setattr(candidate_table, "_jit_candidate_block_table_module", lambda: sorting)
    return sm120_device


class V41:
    """V4.1's candidate indexer over a pool of ours, made as SGLang's attention backend makes it."""

    heads, blocks, top = 32, 16, 48  # candidates of a row, and keys that a consumer selects

    def __init__(self, lengths: list[int], rng: torch.Generator) -> None:
        rows, pages = len(lengths), 20
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        values, scales = small_fp4((pages, PAGE, DIM), rng)
        self.keys = values.flatten(0, 1), scales.flatten()
        self.cache = torch.cat([values.view(torch.uint8).flatten(1), scales.view(torch.uint8).flatten(1)], dim=1)
        self.table = shuffled_table(rows, 10, pages, rng)
        self.prefill, self.decode = v41_indexer.make_candidate_indexer(
            token_to_kv_pool=self,
            req_to_token=torch.empty(0),
            page_size=256,
            candidate_topk_blocks=self.blocks,
            candidate_block_size=8,
        )
        self.layers = [self.projections(rows, rng) for _ in range(2)]  # the source and a consumer

    def projections(self, rows: int, rng: torch.Generator):
        """Scores of six bits: one head counts, with two elements of 1 or 2."""
        _, scales = small_fp4((rows, self.heads, DIM), rng)
        nibbles = torch.tensor([2, 4, 10, 12], dtype=torch.uint8)[
            torch.randint(4, (2, rows, self.heads), generator=rng)
        ]
        query = torch.zeros(rows, self.heads, DIM // 2, dtype=torch.uint8)
        query[:, :, 0] = nibbles[0] | nibbles[1] << 4
        weights = torch.zeros(rows, self.heads)
        weights[:, 0] = torch.exp2(torch.randint(-2, 2, (rows,), generator=rng))
        query = query.view(torch.int8)
        return query, scales, weights

    def get_index_k_page_size(self, ratio: int) -> int:
        return PAGE

    def get_index_k_with_scale_buffer(self, layer_id: int) -> torch.Tensor:
        return self.cache

    def get_low_ratio_index_k_fp4(self, layer_id: int, slots: torch.Tensor):
        return tuple(part[slots].contiguous() for part in self.keys)

    def scores(self, layer: int, row: int) -> torch.Tensor:
        """float64 [length]."""
        query, scales, weights = (part[row : row + 1] for part in self.layers[layer])
        length = self.lengths[row : row + 1, None]
        shape = query[:, None], scales[:, None]
        cache = self.cache.view(len(self.cache), PAGE, 1, DIM // 2 + 4)
        return reference.paged_logits(*[shape], cache, weights, length, self.table[row : row + 1], int(length))[0]

    def slots(self, row: int) -> torch.Tensor:
        position = torch.arange(int(self.lengths[row]))
        return self.table[row, position // PAGE] * PAGE + position % PAGE

    def decode_inputs(self, plan: PagedIndexerMetadata, out: torch.Tensor, verify: bool) -> v41_indexer.DecodeInputs:
        rows = len(self.lengths)
        return v41_indexer.DecodeInputs(
            indexer=SimpleNamespace(index_topk=self.top),
            layer_id=0,
            compress_ratio=1,
            freqs_cis=None,
            x=None,
            q_lora=None,
            positions=None,
            req_rows=torch.arange(rows),
            paged_metadata=plan,
            is_verify=verify,
            out_page_indices=out,
        )


def best(scores: torch.Tensor, count: int) -> list[float]:
    return scores.sort(descending=True).values[:count].tolist()


def check_row(given: V41, row: int, chosen: torch.Tensor, layer: int, allowed: torch.Tensor) -> None:
    """`chosen` are as many different slots of `allowed` positions as there can be, with the highest scores."""
    scores, slots = given.scores(layer, row), given.slots(row).tolist()
    picked = chosen[chosen >= 0].tolist()
    positions = [slots.index(slot) for slot in picked]
    assert len(set(picked)) == len(picked) == min(given.top, int(allowed.sum()))
    assert allowed[positions].all()
    assert best(scores[positions], given.top) == best(scores[allowed], given.top)


def candidates(given: V41, row: int, blocks: list[int]) -> torch.Tensor:
    """Which positions the source's blocks hold; the blocks are the right ones."""
    length = int(given.lengths[row])
    count = -(-length // 8)
    padded = torch.nn.functional.pad(given.scores(0, row), (0, -length % 8), value=-torch.inf)
    keys = padded.view(-1, 8).amax(dim=1)
    if count:
        keys[-1] = torch.inf
    assert len(set(blocks)) == len(blocks) == min(count, given.blocks) and blocks == sorted(blocks)
    assert best(keys[blocks], given.blocks) == best(keys, given.blocks)
    return torch.isin(torch.arange(length) // 8, torch.tensor(blocks, dtype=torch.int64))


def check_with_torch(given: V41, row: int, blocks: torch.Tensor, positions: torch.Tensor) -> None:
    """SGLang's own torch functions find blocks with the same maxima, and among them keys with the same scores."""
    length, source, scores = int(given.lengths[row]), given.scores(0, row), given.scores(1, row)
    if not length:
        assert not len(positions)
        return
    theirs = candidate_blocks.select_candidate_block_ids(source[None], length, given.blocks, 8)
    blocks = blocks[blocks < 2**31 - 1][None]
    ids = [torch.isin(torch.arange(length) // 8, found.long()) for found in (blocks, theirs)]
    largest = [
        [source[mask & (torch.arange(length) // 8 == block)].max().item() for block in found[0].tolist()]
        for mask, found in zip(ids, (blocks, theirs))
    ]
    assert sorted(largest[0]) == sorted(largest[1]) and (length - 1) // 8 in blocks and (length - 1) // 8 in theirs
    lens = given.lengths[row : row + 1]
    best_ = candidate_blocks.topk_among_blocks(scores[None], lens, blocks, given.top, 8)[0]
    assert best(scores[best_[best_ >= 0]], given.top) == best(scores[positions.long()], given.top)


V41_LENGTHS = [600, 0, 37, 8, 128, 129, 513]


@pytest.mark.parametrize("lists", [True, False], ids=["", "sorted by SGLang"])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("verify", [False, True], ids=["decode", "verify"])
def test_v4_1_decode(
    rng: torch.Generator, monkeypatch, kept, v41: Calls, kernels, verify: bool, chunk: int | None, lists: bool
) -> None:
    """Without `lists` our function for them raises an error."""
    if not lists:
        monkeypatch.setattr(sm120, "candidate_blocks", mock.MagicMock(side_effect=RuntimeError("no memory")))
    monkeypatch.setattr(metadata_module, "_IS_SM120", chunk is not None)
    monkeypatch.setattr(metadata_module, "_SM120_INDEXER_M_CHUNK", chunk)
    given = V41(V41_LENGTHS, rng)
    assert isinstance(given.decode, sparse_table.SparseTableBackend)
    plan = PagedIndexerMetadata(
        page_size=256,
        compressed_page_size=PAGE,
        page_table=given.table,
        compressed_seq_lens=given.lengths,
        use_topk_v2=False,
        compress_ratio=1,
    )
    outs, launched = [], []
    kernels.clear()
    for layer, (query, scales, weights) in enumerate(given.layers):
        data = scoring.DeepGEMMDecodeData(
            query[:, None], scales[:, None], weights, given.cache.view(-1, PAGE, 1, DIM // 2 + 4)
        )
        monkeypatch.setattr(sparse_table, "get_deep_gemm_decode_data", lambda *_, data=data: data)
        outs.append(torch.full((len(V41_LENGTHS), given.top), -7, dtype=torch.int32))
        inputs = given.decode_inputs(plan, outs[-1], verify)
        if layer == 0:
            published = given.decode.publish_decode(inputs)
        else:
            given.decode.consume_decode(inputs, published)
        launched.append(kinds(kernels))
        kernels.clear()
    source, consumer = launched
    chunks = -(-len(V41_LENGTHS) // (chunk or len(V41_LENGTHS)))
    if lists:
        assert source == ["logits and maxima", "top-k", "lists"] * chunks + ["places"]
        assert not {"amax8_varlen", "sort_blocks"} & set(v41)
    else:  # of the first chunk the maxima are there already
        assert source[:3] == ["logits and maxima", "top-k", "top-k"] and "lists" not in source
        assert v41.count("amax8_varlen") == chunks - 1 and v41.count("sort_blocks") == chunks
    assert consumer == ["sparse logits", "columns", "top-k"] and v41[-1] == ONE_CALL
    for row, length in enumerate(V41_LENGTHS):
        blocks = [block for block in published.blocks[row].tolist() if block < 2**31 - 1]
        check_row(given, row, outs[0][row], 0, torch.ones(length, dtype=torch.bool))
        check_row(given, row, outs[1][row], 1, candidates(given, row, blocks))
        slots = given.slots(row).tolist()
        positions = [slots.index(slot) for slot in outs[1][row].tolist() if slot >= 0]
        check_with_torch(given, row, published.blocks[row], torch.tensor(positions, dtype=torch.int64))


@pytest.mark.parametrize("name", ["consume_decode", "select_prefill_table", "publish_prefill_table"])
def test_v4_1_one_by_one(rng: torch.Generator, monkeypatch, kept, v41: Calls, kernels, caplog, name: str) -> None:
    """After an error of ours SGLang's own functions do the same, and what they call is ours."""
    broken = "candidate_blocks" if name == "publish_prefill_table" else ONE_CALL
    monkeypatch.setattr(sm120, broken, mock.MagicMock(side_effect=RuntimeError("no memory")))
    given = V41Prefill(monkeypatch, rng)
    source = given.inputs(0)
    published = given.prefill.publish_prefill(source)
    consumer = given.inputs(1)
    kernels.clear()
    if name == "consume_decode":
        query, scales, weights = given.layers[1]
        data = scoring.DeepGEMMDecodeData(
            query[:, None], scales[:, None], weights, given.cache.view(-1, PAGE, 1, DIM // 2 + 4)
        )
        monkeypatch.setattr(sparse_table, "get_deep_gemm_decode_data", lambda *_: data)
        plan = SimpleNamespace(compressed_seq_lens=given.lengths)
        given.decode.consume_decode(given.decode_inputs(plan, consumer.out_page_indices, False), published)
        for row in range(len(given.seen)):
            blocks = [block for block in published.blocks[row].tolist() if block < 2**31 - 1]
            check_row(given, row, consumer.out_page_indices[row], 1, candidates(given, row, blocks))
    else:
        given.prefill.consume_prefill(consumer, published)
        given.check_all(source, consumer, published)
    one = ["sparse logits", "columns", "top-k"] if name == "publish_prefill_table" else ["sparse logits", "top-k"]
    assert kinds(kernels) == one
    assert f"{name}: not on deep_gemm's SM120 kernels: RuntimeError: no memory" in caplog.text


@pytest.mark.parametrize("tokens", [1, 2])
def test_v4_1_s_other_layers(rng: torch.Generator, monkeypatch, v41: Calls, ways, tokens: int) -> None:
    """Those that choose among all keys; `tokens` rows a request, which share a page table."""
    lengths = [length for length in (600, 38, 130) for _ in range(tokens)]
    given = V41(lengths, rng)
    given.table = given.table[::tokens].repeat_interleave(tokens, dim=0)
    plan = PagedIndexerMetadata(
        page_size=256,
        compressed_page_size=PAGE,
        page_table=given.table,
        compressed_seq_lens=given.lengths,
        use_topk_v2=False,
        compress_ratio=1,
        rows_per_request=tokens,
    )
    indexer = v41_indexer.make_full_topk_indexer(token_to_kv_pool=given, req_to_token=torch.empty(0))
    query, scales, weights = given.layers[0]
    data = scoring.DeepGEMMDecodeData(
        query[:, None], scales[:, None], weights, given.cache.view(-1, PAGE, 1, DIM // 2 + 4)
    )
    monkeypatch.setattr(full_topk, "get_deep_gemm_decode_data", lambda *_: data)
    out = torch.full((len(lengths), given.top), -7, dtype=torch.int32)
    v41.clear()
    indexer.topk_decode(given.decode_inputs(plan, out, tokens > 1))
    assert ways <= set(v41) and (plugin.FUSED in v41) is (ways == {plugin.FUSED})
    for row, length in enumerate(lengths):
        check_row(given, row, out[row], 0, torch.ones(length, dtype=torch.bool))


class V41Prefill(V41):
    """Two requests, whose newest tokens select among the tokens before them. The second one's keys come behind those of
    the first one."""

    rows = [3, 2]

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator, first: int = 400) -> None:
        self.ends = [first, 90]
        self.seen = [end - count + 1 + row for end, count in zip(self.ends, self.rows) for row in range(count)]
        super().__init__(self.seen, rng)
        self.table = self.table[torch.tensor([0, 0, 0, 1, 1])]  # of the index's pages, not of SGLang's of 256 tokens
        monkeypatch.setattr(sparse_table, "expand_index_page_table", lambda table, **_: table)
        self.k_slots = torch.cat([self.slots(2), self.slots(4)]).long()
        self.monkeypatch = monkeypatch

    def inputs(self, layer: int) -> v41_indexer.PrefillInputs:
        query, scales, weights = self.layers[layer]
        data = scoring.DeepGEMMPrefillData(
            k_slots=self.k_slots,
            request_starts=torch.tensor([0, 0, 0, self.ends[0], self.ends[0]], dtype=torch.int32),
            lens_per_request=self.ends,
            rows_per_request=self.rows,
            compress_lens=self.lengths,
            q_fp4=query,
            q_sf=scales,
            weights=weights,
        )
        self.monkeypatch.setattr(sparse_table, "get_deep_gemm_prefill_data", lambda _: data)
        raw, pages = (torch.full((len(self.seen), self.top), -7, dtype=torch.int32) for _ in range(2))
        return v41_indexer.PrefillInputs(
            indexer=SimpleNamespace(index_topk=self.top),
            layer_id=0,
            compress_ratio=1,
            freqs_cis=None,
            x=None,
            q_lora=None,
            positions=None,
            req_rows=None,
            req_pool_indices=None,
            k_slots=self.k_slots,
            index_plans=None,
            kv_page_table=self.table,
            seq_lens_cpu=self.ends,
            rows_per_request=self.rows,
            rows_per_request_device=torch.tensor(self.rows),
            out_raw_indices=raw,
            out_page_indices=pages,
        )

    def check(self, layer: int, row: int, raw: torch.Tensor, pages: torch.Tensor, blocks: torch.Tensor) -> None:
        """The choice of one row, among the candidates unless it is the source's."""
        positions = raw[raw >= 0].long()
        assert self.slots(row)[positions].tolist() == pages[pages >= 0].tolist()
        allowed = candidates(self, row, [block for block in blocks.tolist() if block < 2**31 - 1])
        check_row(self, row, pages, layer, allowed if layer else torch.ones_like(allowed))
        if layer:
            check_with_torch(self, row, blocks, positions)

    def check_all(self, source, consumer, published) -> None:
        for row in range(len(self.seen)):
            for layer, inputs in enumerate((source, consumer)):
                self.check(layer, row, inputs.out_raw_indices[row], inputs.out_page_indices[row], published.blocks[row])


@pytest.mark.parametrize("first", [400, 397])
@pytest.mark.parametrize("budget", [1 << 30, 1 << 13], ids=["whole", "tiles"])
def test_v4_1_prefill(rng: torch.Generator, monkeypatch, v41: Calls, kernels, budget: int, first: int) -> None:
    """The blocks of the second request are those of the run of all keys if it begins at a multiple of 8."""
    monkeypatch.setattr(scoring, "_DEEP_GEMM_SCORE_BUDGET_BYTES", budget)
    given = V41Prefill(monkeypatch, rng, first)
    source = given.inputs(0)
    v41.clear()
    published = given.prefill.publish_prefill(source)
    tiles = v41.count("topk")
    assert (tiles > 1) is (budget == 1 << 13)
    logits = "logits" if first % 8 else "logits and maxima"
    assert kinds(kernels) == [logits, "top-k", "lists"] * tiles + ["places"]
    assert v41.count("amax8_varlen") == (tiles if first % 8 else 0) and "sort_blocks" not in v41
    kernels.clear()
    consumer = given.inputs(1)
    given.prefill.consume_prefill(consumer, published)
    assert kinds(kernels) == ["sparse logits", "columns", "top-k"] and v41[-1] == ONE_CALL
    given.check_all(source, consumer, published)


def test_v4_1_prefill_in_a_graph(rng: torch.Generator, monkeypatch, v41: Calls) -> None:
    """The source's table goes into buffers of more rows, by copies of bytes; consumers read those."""
    given = V41Prefill(monkeypatch, rng)
    backend, rows = given.prefill, 8
    for _ in range(2):  # allocates the buffers, then writes them anew
        table = backend.prefill_graph_table(0, rows)
        backend.publish_prefill_graph(given.inputs(0), rows, table)
    published = backend.bind_prefill_graph_table(backend.prefill_graph_table(0, rows))
    last = torch.arange(rows).clamp_max(len(given.seen) - 1)  # rows of padding repeat the last
    query, scales, weights = (part[last] for part in given.layers[1])
    monkeypatch.setattr(sparse_table, "quantize_index_q", lambda _: (query, scales))
    raw, pages = (torch.full((rows, given.top), -7, dtype=torch.int32) for _ in range(2))
    backend.consume_prefill_captured(
        v41_indexer.CapturedPrefillInputs(
            indexer=SimpleNamespace(index_topk=given.top),
            layer_id=0,
            q=None,
            weights=weights,
            index_page_size=PAGE,
            out_page_indices=pages,
            out_raw_indices=raw,
        ),
        published,
    )
    for row, same in enumerate(last.tolist()):
        given.check(1, same, raw[row], pages[row], published.blocks[row])


def test_v4_1_s_last_rows(rng: torch.Generator, monkeypatch, v41: Calls) -> None:
    """Later layers go on with the newest rows of each request, over a table cut to them."""
    given = V41Prefill(monkeypatch, rng)
    table = given.prefill.publish_prefill(given.inputs(0))
    tail, rows = table.tail([1, 2]), [2, 3, 4]
    query, scales, weights = (part[rows] for part in given.layers[1])
    data = SimpleNamespace(q_fp4=query, q_sf=scales, weights=weights)
    raw = torch.full((3, given.top), -7, dtype=torch.int32)
    cache = given.cache.view(-1, PAGE, 1, DIM // 2 + 4)
    sparse_table.select_prefill_table(table=tail, data=data, k_cache=cache, out_positions=raw)
    for index, row in enumerate(rows):
        pages = torch.where(raw[index] >= 0, given.slots(row)[raw[index].clamp_min(0).long()], -1)
        given.check(1, row, raw[index], pages, table.blocks[row])


def test_v4_1_without_the_plugin_is_sglang_s_error(monkeypatch, kept, v41: Calls) -> None:
    (gate,) = [hook for hook in plugin.PLUGIN.hooks if hook.path == "make_candidate_indexer"]
    monkeypatch.setattr(gate, "active", False)
    with pytest.raises(RuntimeError, match="needs DeepGEMM's paged sparse MQA logits"):
        V41([5], generator())
    assert not configurer.DEEPGEMM_PAGED_SPARSE_MQA_LOGITS


@pytest.mark.parametrize("missing", ["hook", "switch"])
def test_v4_1_is_sglang_s_error_where_a_part_is_missing(monkeypatch, kept, v41: Calls, caplog, missing: str) -> None:
    if missing == "hook":
        monkeypatch.setattr(plugin.CANDIDATES[0], "active", False)
    else:
        monkeypatch.setenv("SGLANG_ENABLE_JIT_DEEPGEMM", "0")
    with pytest.raises(RuntimeError, match="needs DeepGEMM's paged sparse MQA logits"):
        V41([5], generator())
    assert "make_candidate_indexer: not on deep_gemm's SM120 kernels" in caplog.text
    assert ("topk_transform_paged" if missing == "hook" else "SGLANG_ENABLE_JIT_DEEPGEMM=0") in caplog.text


# What chooses V4's logits, and what happens where ours cannot serve.


class Arguments:
    """A launch's arguments: a model, and nothing else that is set."""

    model_path = "DeepSeek-V4"

    def __getattr__(self, name: str) -> None:
        return None


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch):
    """SGLang's own resolution of a DeepSeek-V4 launch on the given machine: what it leaves in the environment."""
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepseekV4ForCausalLM"]), decision_config=None)
    monkeypatch.setattr(model_hook, "model_config_of", lambda _: model)
    monkeypatch.setattr(model_hook, "get_linear_attn_spec", lambda _: None)
    monkeypatch.setattr(model_hook, "resolving_view", lambda _: Arguments())
    for name in ("declare_resolution", "collect_model_override_declarations"):
        monkeypatch.setattr(model_hook, name, mock.MagicMock())
    for name in ("apply_deepseek_v4_defaults", "validate_deepseek_v4_cp", "validate_deepseek_v41_features"):
        monkeypatch.setattr(deepseek_v4_hook, name, mock.MagicMock())
    monkeypatch.setattr(model_hook, "validate_declarations", mock.MagicMock())

    def resolve(sm120: bool, **given: str) -> dict[str, str | None]:
        with mock.patch.dict(os.environ), override_platform(is_sm120=sm120, is_hip=False):
            for name in plugin.VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(given)
            with contextlib.suppress(ValueError):  # of what follows V4's part, which a launch without arguments lacks
                model_hook.handle_model_specific_adjustments(mock.MagicMock())
            return {name: os.environ.get(name) for name in plugin.VARIABLES}

    return resolve


def test_v4_s_logits_are_ours_unless_the_user_chose(resolve, monkeypatch) -> None:
    torch_logits, tilelang = plugin.VARIABLES
    assert resolve(sm120=True) == {torch_logits: "False", tilelang: "False"}
    assert resolve(sm120=True, **{torch_logits: "1"}) == {torch_logits: "1", tilelang: "True"}
    assert resolve(sm120=True, **{tilelang: "1"}) == {torch_logits: "True", tilelang: "1"}
    assert resolve(sm120=False) == {torch_logits: None, tilelang: None}
    monkeypatch.setattr(plugin.PLUGIN.hooks[0], "active", False)
    assert resolve(sm120=True) == {torch_logits: "True", tilelang: "True"}  # what SGLang does by itself


def test_an_error_of_ours_is_sglang_s_own_kernel_from_then_on(monkeypatch, kept, sm120_device, caplog) -> None:
    theirs = mock.MagicMock()
    monkeypatch.setattr(topk_module, "_jit_topk_v1_module", lambda: theirs)
    monkeypatch.setattr(sm120, "topk", mock.MagicMock(side_effect=RuntimeError("no memory")))
    lengths, table = torch.tensor([3, 70], dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32)
    arguments = torch.randn(2, 256), lengths, table, torch.empty(2, 64, dtype=torch.int32), PAGE
    for count in (1, 2):
        indexer.topk_transform_paged(*arguments)
        assert theirs.topk_transform.call_count == count and sm120.topk.call_count == 1
    (line,) = [record.getMessage() for record in caplog.records if record.name == "sglang.deep_gemm_sm120"]
    assert line.endswith("topk_transform_paged: not on deep_gemm's SM120 kernels: RuntimeError: no memory")


def test_other_devices_are_sglang_s(monkeypatch) -> None:
    theirs = mock.MagicMock()
    monkeypatch.setattr(topk_module, "_jit_topk_v1_module", lambda: theirs)
    indexer.topk_transform_paged(*(torch.empty(1, 1) for _ in range(4)), PAGE)
    assert theirs.topk_transform.call_count == 1


def test_sizes_beyond_ours_are_sglang_s(monkeypatch, sm120_device) -> None:
    theirs = mock.MagicMock()
    monkeypatch.setattr(topk_module, "_jit_topk_v1_module", lambda: theirs)
    lengths, table = torch.tensor([3], dtype=torch.int32), torch.zeros(1, 80, dtype=torch.int32)
    indexer.topk_transform_paged(torch.randn(1, 5120), lengths, table, torch.empty(1, 4096, dtype=torch.int32), PAGE)
    assert theirs.topk_transform.call_count == 1 and not sm120_device


def calls_of(work: Callable[[], object]) -> int:
    """How many functions the interpreter calls, of Python and of C, once `work` has been done before."""
    calls = 0

    def count(_, event: str, __) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    work()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def test_what_the_plugin_adds_to_top_k(monkeypatch, sm120_device) -> None:
    """To our function, which does nothing here, on the way through SGLang's: at 0.1 us a call some microseconds."""
    monkeypatch.setattr(sm120, "topk", lambda *args, **kwargs: None)
    arguments = torch.randn(2, 256), *(torch.zeros(2, 4, dtype=torch.int32) for _ in range(3)), PAGE
    added = calls_of(lambda: indexer.topk_transform_paged(*arguments))
    print(f"{added} calls")
    assert added <= 12


def test_what_the_plugin_adds_to_logits_and_top_k(monkeypatch, sm120_device) -> None:
    """The same for a layer's whole way: the context around it, the logits that wait, the choice."""
    monkeypatch.setattr(sm120, plugin.FUSED, lambda *args, **kwargs: None)
    (around,) = [hook for hook in plugin.PLUGIN.hooks if hook.path.endswith("forward_c4_indexer")]
    lens, table, out = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 4), torch.zeros(2, 4)
    cache, backend = torch.zeros(1, PAGE), SimpleNamespace(dsa_topk_backend=DSATopKBackend.SGL_KERNEL)

    def layer(self, x) -> None:
        logits = deep_gemm.fp8_paged_mqa_logits(None, cache, None, lens, table, None, 256, False)
        indexer.topk_transform_paged(logits, lens[:, 0], table, out, PAGE)

    added = calls_of(lambda: around(layer, backend, lens))
    print(f"{added} calls")
    assert added <= 64 and around.active


def test_a_process_without_a_model_imports_nothing() -> None:
    code = """
import sys
from sglang.srt.plugins import load_plugins
before = set(sys.modules)
load_plugins()
print(*(set(sys.modules) - before))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = run.stdout.split()
    assert "deep_gemm_plugins.sglang" in names
    assert not {name for name in names if name.partition(".")[0] in ("deep_gemm", "sglang", "torch", "triton", "cuda")}
