"""vLLM's own wrappers of deep_gemm, `vllm/utils/deep_gemm.py` out of its wheel, on the installed wheel.

`make test-vllm` fetches vLLM's wheel (0.3 GB, DG_VLLM_WHEEL says where it lies) and runs this file; it is no part of
`make test`. Of vLLM only that file and two that it imports are loaded: the whole package needs its compiled library and
a GPU. Calls are made as `sparse_attn_indexer.py` and the indexer's metadata builder make them.
"""

import importlib.machinery
import importlib.util
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from problems import POISON, Paged, Ragged, check

import deep_gemm

SOURCES = ("vllm/utils/deep_gemm.py", "vllm/utils/import_utils.py", "vllm/utils/math_utils.py")
FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
SMS = 188  # vLLM takes the device's, not deep_gemm's


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """vLLM's wrappers as they are on an SM120 card; what they import of the rest of vLLM is replaced."""
    folder = tmp_path_factory.mktemp("vllm")
    with zipfile.ZipFile(os.environ["DG_VLLM_WHEEL"]) as wheel:
        for source in SOURCES:
            wheel.extract(source, folder)

    def is_family(capability: int) -> bool:
        return capability == 120

    platform = mock.MagicMock(
        is_cuda=lambda: True,
        support_deep_gemm=lambda: True,
        is_arch_support_pdl=lambda: True,
        is_device_capability_family=is_family,
        simple_compile_backend="eager",
    )
    environment = SimpleNamespace(
        VLLM_USE_DEEP_GEMM=True, VLLM_USE_DEEP_GEMM_E8M0=True, VLLM_CACHE_ROOT=str(folder / "cache")
    )
    replaced = {
        "vllm.envs": environment,
        "vllm.logger": mock.MagicMock(),
        "vllm.platforms": SimpleNamespace(current_platform=platform),
        "vllm.model_executor.layers.quantization.utils.quant_utils": mock.MagicMock(),
    }
    if importlib.util.find_spec("regex") is None:  # import_utils imports it
        replaced["regex"] = mock.MagicMock()
    for package in ("vllm", "vllm.utils"):
        module = ModuleType(package)
        module.__path__ = [str(folder / package.replace(".", "/"))]
        module.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
        replaced[package] = module
    replaced["vllm"].envs = environment
    with mock.patch.dict(sys.modules, replaced), mock.patch.dict(os.environ):
        module = importlib.import_module("vllm.utils.deep_gemm")
        module._lazy_init()
        module.cache_folder = os.environ["DG_JIT_CACHE_DIR"]
        yield module


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
    assert not wrappers.has_deep_gemm_sparse_mqa()
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
