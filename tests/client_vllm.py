"""vLLM's own wrappers of deep_gemm and its sparse attention indexer, out of its wheel, on the installed wheel.

`make test-vllm` fetches vLLM's wheel (0.3 GB, DG_VLLM_WHEEL says where it lies) and runs this file; it is no part of
`make test`. Of vLLM only the files in SOURCES are loaded, as they are on an SM120 card: the whole package needs its
compiled library and a GPU. Calls of the wrappers are made as the indexer and its metadata builder make them; the
indexer itself runs with the plugin, which is loaded as vLLM loads it.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from problems import POISON, Paged, Ragged, Sparse, check

import deep_gemm
from deep_gemm import sm120
from deep_gemm_plugins import vllm as plugin

SOURCES = (
    "_custom_ops",
    "model_executor/kernels/attention/dsa/sparse_mqa_logits",
    "model_executor/layers/indexer_topk",
    "model_executor/layers/sparse_attn_indexer",
    "plugins/__init__",
    "utils/deep_gemm",
    "utils/import_utils",
    "utils/math_utils",
    "v1/attention/backend",
    "v1/attention/backends/mla/indexer",
    "v1/attention/backends/registry",
    "v1/attention/backends/utils",
    "v1/kv_cache_interface",
    "v1/kv_cache_layout",
    "v1/kv_cache_spec_registry",
)
FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
SMS = 188  # vLLM takes the device's, not deep_gemm's


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes up every module of vLLM that is not in SOURCES."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "vllm":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = mock.MagicMock()
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module) -> None:
        pass


class Op:
    """In the place of vLLM's CustomOp."""

    @staticmethod
    def register(name: str):
        return lambda cls: cls


class JitKernel:
    """In the place of the base class of vLLM's Triton kernels, none of which is launched here."""

    def __class_getitem__(cls, key: str) -> type:
        return cls


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """vLLM's modules as they are on an SM120 card, found by their last names."""
    folder = tmp_path_factory.mktemp("vllm")
    with zipfile.ZipFile(os.environ["DG_VLLM_WHEEL"]) as wheel:
        for source in SOURCES:
            wheel.extract(f"vllm/{source}.py", folder)
        wheel.extract("vllm-0.33.0.dist-info/METADATA", folder)

    def is_family(capability: int) -> bool:
        return capability == 120

    platform = mock.MagicMock(
        is_cuda=lambda: True,
        is_xpu=lambda: False,
        is_rocm=lambda: False,
        support_deep_gemm=lambda: True,
        is_arch_support_pdl=lambda: True,
        is_device_capability_family=is_family,
        has_device_capability=lambda capability: capability <= 120,
        fp8_dtype=lambda: torch.float8_e4m3fn,
        simple_compile_backend="eager",
    )
    environment = mock.MagicMock(
        VLLM_USE_DEEP_GEMM=True,
        VLLM_USE_DEEP_GEMM_E8M0=True,
        VLLM_CACHE_ROOT=str(folder / "cache"),
        VLLM_PLUGINS=None,
    )
    replaced = {
        "vllm.envs": environment,
        "vllm.platforms": SimpleNamespace(current_platform=platform),
        "vllm.compilation.breakable_cudagraph": SimpleNamespace(eager_break_during_capture=lambda function: function),
        "vllm.model_executor.custom_op": SimpleNamespace(CustomOp=Op),
        "vllm.utils.torch_utils": SimpleNamespace(
            LayerNameType=str,
            _encode_layer_name=str,
            _resolve_layer_name=str,
            direct_register_custom_op=lambda **_: None,
            PIN_MEMORY=False,
            async_tensor_h2d=None,
            np_to_pinned_tensor=None,
            get_dtype_size=lambda dtype: dtype.itemsize,
        ),
        "vllm.model_executor.warmup.jit_warmup_triton_helper": mock.MagicMock(VllmTritonJitKernel=JitKernel),
        "vllm.utils.platform_utils": SimpleNamespace(num_compute_units=lambda index: SMS),
    }
    if importlib.util.find_spec("regex") is None:  # import_utils imports it
        replaced["regex"] = mock.MagicMock()
    for source in SOURCES:  # their packages, without the packages' own code
        for package in list(Path("vllm", source).parents)[:-1]:
            module = ModuleType(".".join(package.parts))
            module.__path__ = [str(folder / package)]
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
            replaced[module.__name__] = module
    del replaced["vllm.plugins"]
    replaced["vllm"].envs = environment
    absent = Absent()
    with mock.patch.dict(sys.modules, replaced), mock.patch.dict(os.environ):
        sys.path.insert(0, str(folder))
        sys.meta_path.append(absent)
        try:
            modules = {}
            for source in ("plugins", *SOURCES):
                name = "vllm." + source.replace("/", ".").removesuffix(".__init__")
                modules[name.rpartition(".")[2]] = importlib.import_module(name)
                if source == "plugins":  # before anything that the plugin is about
                    modules["plugins"].load_general_plugins()
            modules["deep_gemm"]._lazy_init()
            modules["deep_gemm"].cache_folder = os.environ["DG_JIT_CACHE_DIR"]
            yield SimpleNamespace(**modules)
        finally:
            sys.meta_path.remove(absent)
            sys.path.remove(str(folder))


@pytest.fixture
def wrappers(loaded: SimpleNamespace) -> ModuleType:
    return loaded.deep_gemm


def inside(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """What lies outside the windows is not vLLM's to read."""
    expected = expected.cpu()
    return check(torch.where(expected != -torch.inf, logits.cpu(), POISON), expected)


def pair(q) -> tuple:
    """vLLM's q is always (values, scales or None)."""
    return q if isinstance(q, tuple) else (q, None)


def test_the_installed_package_is_found_before_vllm_s_own(wrappers: ModuleType) -> None:
    assert wrappers.has_deep_gemm() and wrappers.is_deep_gemm_supported()
    assert wrappers._import_deep_gemm() is deep_gemm
    for name in ("fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", "get_paged_mqa_logits_metadata"):
        assert getattr(wrappers, f"_{name}_impl") is getattr(deep_gemm, name)


def test_the_kernels_of_vllm_are_cached_in_its_folder(wrappers: ModuleType) -> None:
    default = Path(wrappers.envs.VLLM_CACHE_ROOT) / "deep_gemm"
    assert wrappers.cache_folder == os.environ.get("DG_JIT_CACHE_DIR", str(default))


@pytest.mark.skipif(torch.cuda.is_available(), reason="upstream may load here")
def test_what_cannot_be_loaded_is_absent_for_vllm(wrappers: ModuleType) -> None:
    assert wrappers._fp8_gemm_nt_impl is None and wrappers._tf32_hc_prenorm_gemm_impl is None
    assert wrappers.has_deep_gemm_sparse_mqa()
    with pytest.raises(RuntimeError, match="unavailable in the current vLLM environment"):
        wrappers.fp8_gemm_nt()


def test_settings(wrappers: ModuleType) -> None:
    before = wrappers.get_num_sms()
    wrappers.set_num_sms(before - 2)
    assert wrappers.get_num_sms() == deep_gemm.get_num_sms() == before - 2
    wrappers.set_num_sms(before)


@FORMATS
@pytest.mark.parametrize("next_n", [1, 2])
def test_decode(wrappers: ModuleType, fp4: bool, next_n: int, device: str) -> None:
    lengths = [[length + token if length else 0 for token in range(next_n)] for length in (40, 0, 700)]
    problem = Paged(lengths, next_n=next_n, fp4=fp4, max_context_len=1024, device=device)
    buffer = torch.zeros((SMS + 1, 2), dtype=torch.int32, device=device)
    metadata = wrappers.get_paged_mqa_logits_metadata(problem.context_lens, 64, SMS, indices=None)
    schedule = buffer[: metadata.shape[0]]
    schedule[:] = metadata
    logits = wrappers.fp8_fp4_paged_mqa_logits(
        pair(problem.q),
        problem.kv_cache,
        problem.weights,
        problem.context_lens,
        problem.block_table,
        schedule,
        max_model_len=1024,
        indices=None,
    )
    assert logits.shape == (3 * next_n, 1024) and logits.dtype == torch.float32
    inside(logits, problem.expected())


def test_rows_of_one_request(wrappers: ModuleType, device: str) -> None:
    problem = Paged([[40], [41], [100]], device=device)
    indices = torch.tensor([0, 0, 1], dtype=torch.int32, device=device)
    schedule = wrappers.get_paged_mqa_logits_metadata(problem.context_lens, 64, SMS, indices=indices)
    q, *rest = problem.arguments(schedule)
    inside(wrappers.fp8_fp4_paged_mqa_logits(pair(q), *rest, indices=indices), problem.expected())


def test_a_block_table_of_one_column(wrappers: ModuleType, device: str) -> None:
    problem = Paged([[40], [64]], device=device)
    schedule = wrappers.get_paged_mqa_logits_metadata(problem.context_lens, 64, SMS)
    q, cache, weights, lens, table, schedule, columns = problem.arguments(schedule)
    table = table[:, :1]  # a view with other rows' strides
    inside(
        wrappers.fp8_fp4_paged_mqa_logits(pair(q), cache, weights, lens, table, schedule, columns), problem.expected()
    )


@FORMATS
def test_prefill(wrappers: ModuleType, fp4: bool, device: str) -> None:
    problem = Ragged([0, 0, 7, 9], [5, 20, 7, 30], 30, fp4=fp4, device=device)
    q, *rest = problem.arguments()
    logits = wrappers.fp8_fp4_mqa_logits(pair(q), *rest, 24)
    assert logits.shape == (4, 24)
    inside(logits, problem.expected(24))


# The plugin: vLLM's indexer from the query to the chosen positions.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors here lie on SM12x as far as the plugin asks; what it calls is written down."""
    made = []
    function = sm120.topk

    @functools.wraps(function)
    def topk(*args, **kwargs):
        result = function(*args, **kwargs)
        made.append("topk")
        return result

    monkeypatch.setattr(sm120, "topk", topk)
    monkeypatch.setattr(plugin, "serves", lambda device: True)
    return made


def planned(loaded, rows: int, **parts):
    """The indexer's metadata of a step of so many rows."""
    counts = dict.fromkeys(("num_decodes", "num_decode_tokens", "num_prefills", "num_prefill_tokens"), 0)
    plan = {"seq_lens": None, "max_seq_len": 0, "slot_mapping": torch.empty(rows), **counts, **parts}
    return loaded.indexer.DeepseekV32IndexerMetadata(**plan)


def index(loaded, monkeypatch, metadata, problem, top: int, rows: int, **options) -> torch.Tensor:
    """What `sparse_attn_indexer` chooses, [rows, top]; the buffer is wider, as vLLM's."""
    module = loaded.sparse_attn_indexer
    context = SimpleNamespace(attn_metadata={"k": metadata}, cudagraph_runtime_mode=None)
    monkeypatch.setattr(module, "get_forward_context", lambda: context)
    values, scales = pair(problem.q)
    flat = values.view(rows, *values.shape[-2:])
    buffer = torch.full((rows, top + 8), -7, dtype=torch.int32)
    options = {"topk_backend": "auto", "max_model_len": 1024, "total_seq_lens": 1024, **options}
    module.sparse_attn_indexer(
        torch.empty(rows, 1),
        "k",
        options.pop("kv_cache", None),
        flat.view(torch.uint8) if scales is not None else flat,
        None if scales is None else scales.reshape(rows, -1),
        None,
        problem.weights,
        quant_block_size=128,
        scale_fmt=None,
        topk_tokens=top,
        head_dim=128,
        topk_indices_buffer=buffer,
        skip_k_cache_insert=True,
        use_pcp=False,
        pcp_shard_decode_requests=False,
        dense_mha_metadata_layer_name="",
        use_fp4_cache=scales is not None,
        **options,
    )
    return buffer[:, :top]


def check_choice(chosen: torch.Tensor, scores: torch.Tensor) -> None:
    """As many different positions of each row as there can be, with the highest scores."""
    for row, scored in zip(chosen, scores):
        scored = scored[scored != -torch.inf]
        picked = row[row >= 0].long()
        assert len(set(picked.tolist())) == len(picked) == min(len(scored), len(row))
        want = scored.sort(descending=True).values[: len(picked)]
        torch.testing.assert_close(scored[picked].sort(descending=True).values, want, rtol=1e-5, atol=1e-5)


def test_every_hook_is_taken(loaded: SimpleNamespace) -> None:
    report = plugin.PLUGIN.report()
    assert report[0].startswith("vllm 0.33.0")
    assert len(report) == 2 + len(plugin.PLUGIN.hooks) and all(line.endswith(": taken") for line in report[2:])


@pytest.mark.parametrize(
    ("fp4", "next_n", "heads", "page"),
    [(False, 1, 64, 64), (False, 2, 64, 64), (True, 1, 64, 64), (True, 2, 64, 64), (True, 2, 32, 128)],
    ids=["fp8", "fp8-2", "fp4", "fp4-2", "v4.1"],
)
def test_the_indexer_decodes(loaded, monkeypatch, calls, fp4: bool, next_n: int, heads: int, page: int) -> None:
    lengths = [[length + token if length else 0 for token in range(next_n)] for length in (40, 0, 700)]
    problem = Paged(
        lengths, next_n=next_n, heads=heads, fp4=fp4, block_kv=page, padding=page * 12, max_context_len=1024
    )
    rows, top = 3 * next_n, 64
    schedule = loaded.deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, page, SMS, indices=None)
    decode = SimpleNamespace(
        block_table=problem.block_table,
        seq_lens=problem.context_lens,
        decode_lens=torch.full((3,), next_n, dtype=torch.int32),
        requires_padding=False,
        schedule_metadata=schedule,
        global_seq_lens=None,
        indices=None,
    )
    metadata = planned(loaded, rows, num_decodes=3, num_decode_tokens=rows, max_seq_len=702, decode=decode)
    kv_cache = problem.kv_cache.squeeze(2)
    chosen = index(loaded, monkeypatch, metadata, problem, top, rows, kv_cache=kv_cache)
    assert calls == ["topk"]
    check_choice(chosen, problem.expected())


def v41_builder(loaded, next_n: int, columns: int):
    """vLLM's own builder of an indexer's metadata, for DeepSeek-V4.1 as it is configured on an SM120 card."""
    backend = loaded.indexer.DeepseekV41IndexerBackend
    (page,) = backend.get_supported_kernel_block_sizes()
    drafts = SimpleNamespace(num_speculative_tokens=next_n - 1, enable_adaptive_verification=False)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            tensor_parallel_size=1,
            prefill_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
        ),
        attention_config=SimpleNamespace(
            resolve_indexer_kv_dtype=lambda default: default, sparse_mla_prefill_workspace_factor=5
        ),
        model_config=SimpleNamespace(max_model_len=1024),
        speculative_config=drafts if next_n > 1 else None,
        num_speculative_tokens=next_n - 1,
    )
    spec = loaded.kv_cache_interface.MLAAttentionSpec(
        block_size=page, num_kv_heads=1, head_size=132, dtype=torch.uint8, tokens_per_state=1, alignment=512
    )
    builder = backend.get_builder_cls()(spec, ["k"], config, torch.device("cpu"), block_table_width=columns)
    assert builder.kv_cache_spec.num_states == page == 128 and not builder.supports_varlen
    return builder


@pytest.mark.parametrize(
    ("next_n", "tokens"),
    [(1, [1, 1, 1, 1]), (2, [2, 2, 2, 2]), (3, [3, 1, 2, 1])],
    ids=["1", "2", "flattened"],
)
def test_v41_s_own_builder_plans_a_decode_step(loaded, monkeypatch, calls, next_n: int, tokens: list[int]) -> None:
    """DeepSeek-V4.1 in vLLM's default way, dense logits: pages of 128 keys, 32 heads. What it hands to the indexer is
    all its builder's, the schedule included."""
    requests, rows, lengths = len(tokens), sum(tokens), [700, 40, 129, 256]
    rows_lengths = [[length - count + 1 + i] for length, count in zip(lengths, tokens) for i in range(count)]
    problem = Paged(rows_lengths, heads=32, block_kv=128, padding=128 * 12, max_context_len=1024)
    of_request = torch.repeat_interleave(torch.arange(requests), torch.tensor(tokens))
    table = torch.zeros((requests, problem.block_table.shape[1]), dtype=torch.int32)
    table[of_request] = problem.block_table  # rows of a request share the pages of the last
    problem.block_table = table[of_request]
    common = loaded.backend.CommonAttentionMetadata(
        query_start_loc=(starts := torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0).int()),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=requests,
        num_actual_tokens=rows,
        max_query_len=max(tokens),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.empty(rows, dtype=torch.int64),
    )
    metadata = v41_builder(loaded, next_n, table.shape[1]).build(0, common)
    assert metadata.num_decode_tokens == rows and metadata.decode.schedule_metadata.shape[1] == 2
    chosen = index(loaded, monkeypatch, metadata, problem, 64, rows, kv_cache=problem.kv_cache.squeeze(2))
    assert calls == ["topk"]
    check_choice(chosen, problem.expected())


@pytest.mark.parametrize("rows", [1, 5, 190])
@pytest.mark.parametrize("paged", [True, False], ids=["decode", "prefill"])
def test_v41_s_sparse_way(loaded, monkeypatch, paged: bool, rows: int) -> None:
    """vLLM's own two functions of its sparse way, which is closed to SM120, but for their Triton kernels before and
    after the logits. Two layers: the second is handed the first one's metadata."""
    module, given = loaded.sparse_mqa_logits, []
    lengths, starts = ([700, 0, 64, 33, 255] * 38)[:rows], ([3, 17, 5, 70, 8] * 38)[:rows]
    layout = {"block_kv": 128, "padding": 256 - 128 * 68 % 256} if paged else {"block_kv": 0, "starts": starts}
    problem = Sparse(lengths, width=32, tail="last", unaligned=not paged, **layout)
    expand = mock.MagicMock(side_effect=lambda *_, out: out[0].copy_(problem.lists))
    monkeypatch.setattr(module, "candidate_blocks_to_sparse_indices", expand)
    monkeypatch.setattr(module, "sparse_topk_remap", lambda logits, *_, **__: given.append(logits))
    ids = torch.arange(rows, dtype=torch.int32)
    own = {"sparse_indices": torch.zeros_like(problem.lists), "end": torch.zeros_like(ids), "col_indices": None}
    seen = (torch.empty(0), 8, 8, 16, torch.empty(0))  # candidates, which are the lists already, their sizes, top-k
    metadata = None
    for _ in range(2):
        if paged:
            where = (problem.kv_cache, problem.weights, problem.context_lens, problem.block_table, ids)
            function, more = module.sparse_mqa_logits_paged_decode, {"row_ks": torch.zeros_like(ids)}
        else:
            where = (*problem.kv, problem.weights, problem.ks, problem.ke)
            function, more = module.sparse_mqa_logits_prefill_chunk, {}
        metadata = function(*problem.q, *where, *seen, **own, **more, kernel_metadata=metadata)
    assert expand.call_count == 1 and len(given) == 2
    for logits in given:
        inside(logits, problem.expected())


@FORMATS
def test_the_indexer_prefills(loaded, monkeypatch, calls, fp4: bool) -> None:
    """Two chunks of rows over keys that are gathered already."""
    problem = Ragged([0, 0, 7, 9, 9], [5, 90, 7, 95, 93], 100, fp4=fp4)
    values, scales = (part.view(torch.uint8).view(100, -1) for part in problem.kv)
    if not fp4:
        values = values.view(torch.float8_e4m3fn)
    workspace = SimpleNamespace(get_simultaneous=lambda *_: (values, scales))
    monkeypatch.setattr(loaded.sparse_attn_indexer, "current_workspace_manager", lambda: workspace)
    chunks = [
        SimpleNamespace(
            token_start=start,
            token_end=end,
            cu_seqlen_ks=problem.ks[start:end],
            cu_seqlen_ke=problem.ke[start:end],
            local_cu_seq_lens=torch.tensor([0, 100]),
            max_local_total_seq_lens=100,
            local_total_seq_lens=100,
            skip_kv_gather=True,
            max_seqlen_k=90,
            pcp_deinterleave_idx=None,
        )
        for start, end in ((0, 2), (2, 5))
    ]
    prefill = SimpleNamespace(chunks=chunks, row_shard_sizes=None)
    metadata = planned(loaded, 5, num_prefills=2, prefill=prefill)
    chosen = index(loaded, monkeypatch, metadata, problem, 16, 5)
    assert calls == ["topk", "topk"]
    check_choice(chosen, problem.expected(90))


def test_a_backend_that_the_user_named_is_left_alone(loaded, monkeypatch, calls) -> None:
    backend = loaded.indexer_topk.SparseIndexerTopk("torch")
    logits, out = torch.randn(2, 64), torch.empty(2, 8, dtype=torch.int32)
    lengths = torch.tensor([[40], [64]], dtype=torch.int32)
    backend(logits, lengths, 1, out, 8, 64)
    assert not calls
    ours = torch.empty_like(out)
    loaded.indexer_topk.get_indexer_topk("auto")(logits, lengths, 1, ours, 8, 64)
    assert calls == ["topk"] and torch.equal(ours.sort().values, out.sort().values)


def test_one_length_for_each_request_s_tokens(loaded, calls) -> None:
    """vLLM derives the lengths of next_n tokens from their request's."""
    logits, out = torch.randn(4, 64), torch.empty(4, 8, dtype=torch.int32)
    lengths = torch.tensor([[40], [1]], dtype=torch.int32)
    loaded.indexer_topk.get_indexer_topk("auto")(logits, lengths, 2, out, 8, 64)
    for row, length in enumerate([39, 40, 0, 1]):
        want = logits[row, :length].topk(min(length, 8)).indices
        assert sorted(out[row][out[row] >= 0].tolist()) == sorted(want.tolist())


def test_an_error_of_ours_is_vllm_s_own_path_from_then_on(loaded, monkeypatch, calls, caplog) -> None:
    (hook,) = [hook for hook in plugin.PLUGIN.hooks if hook.path == "top_k_per_row_prefill"]
    for name in ("active", "state"):
        monkeypatch.setattr(hook, name, getattr(hook, name))  # restored afterwards
    theirs = mock.MagicMock()
    monkeypatch.setattr(loaded._custom_ops.torch.ops, "_C", theirs)
    monkeypatch.setattr(sm120, "topk", mock.MagicMock(side_effect=RuntimeError("no memory")))
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    arguments = torch.randn(2, 64), bounds, bounds + 9, torch.empty(2, 8, dtype=torch.int32), 2, 64, 1, 8
    for count in (1, 2):
        loaded._custom_ops.top_k_per_row_prefill(*arguments)
        assert theirs.top_k_per_row_prefill.call_count == count and sm120.topk.call_count == 1
    lines = [record.getMessage() for record in caplog.records if record.name == "vllm.deep_gemm_sm120"]
    assert lines == [
        "vllm._custom_ops:top_k_per_row_prefill: not on deep_gemm's SM120 kernels: RuntimeError: no memory"
    ]
