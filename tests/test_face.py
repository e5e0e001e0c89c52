"""The face: what is ours, what is upstream's, what is absent, and which device goes where."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deep_gemm
from deep_gemm.sm120 import upstream

PACKAGE_ROOT = Path(deep_gemm.__file__).parent.parent
INDEXER = [name for name in deep_gemm._OURS if name.endswith(("_logits", "_metadata")) and hasattr(deep_gemm, name)]

# A stand-in for the package that vLLM carries, for processes of their own: it keeps what it was called with.
VLLM_PACKAGE = """
calls = {}
def set_num_sms(value): calls["set_num_sms"] = value
def set_pdl(value): calls["set_pdl"] = value
def fp8_gemm_nt(*args): return "theirs"
def fp8_paged_mqa_logits(*args, **kwargs): return args, kwargs
"""


def run(code: str, *folders: Path, **environment: str) -> str:
    """What `code` prints in a fresh interpreter that sees our package, `folders`, and no home directory."""
    path = os.pathsep.join(map(str, [*folders, PACKAGE_ROOT]))
    homeless = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment = {**homeless, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    package = tmp_path / "vllm" / "third_party" / "deep_gemm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VLLM_PACKAGE)
    return tmp_path


def test_the_import_loads_nothing_of_cuda_or_of_upstream() -> None:
    code = """if True:
        import json, sys
        import torch, numpy  # both have to be there in any case, and torch takes cuda.bindings where it finds it
        before = set(sys.modules)
        import deep_gemm
        print(json.dumps(sorted(set(sys.modules) - before)))
        assert not torch.cuda.is_initialized()"""
    loaded = json.loads(run(code))
    assert "deep_gemm.sm120" in loaded
    assert [name for name in loaded if name.partition(".")[0] in ("cuda", "vllm", "triton")] == []
    assert "deep_gemm.upstream" not in loaded and "deep_gemm.sm120.emulator" not in loaded


def test_the_import_is_fast() -> None:
    code = "import time, torch; start = time.process_time(); import deep_gemm; print(time.process_time() - start)"
    assert min(float(run(code)) for _ in range(3)) < 0.5


def test_the_import_needs_no_writable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code = f"import os; os.chdir({str(tmp_path)!r}); import deep_gemm; print(deep_gemm.get_num_sms() > 0)"
    assert run(code, HOME="/nonexistent", TMPDIR="/nonexistent") == "True"


@pytest.mark.skipif(torch.cuda.is_available(), reason="upstream may load here")
def test_names_that_cannot_be_loaded_are_absent_and_say_why() -> None:
    for name in ("fp8_einsum", "m_grouped_fp8_fp4_gemm_nt_contiguous", "transform_sf_into_required_layout", "_C"):
        assert not hasattr(deep_gemm, name)
    with pytest.raises(AttributeError, match="(?s)fp8_einsum.*deep_gemm.upstream: .*vllm.third_party"):
        deep_gemm.fp8_einsum  # noqa: B018
    with pytest.raises(ImportError, match="'utils' cannot be loaded"):
        importlib.import_module("deep_gemm.utils")
    with pytest.raises(ImportError):
        from deep_gemm import fp8_gemm_nt  # noqa: F401


def test_python_s_own_probes_do_not_load_upstream(vllm: Path) -> None:
    code = "import sys, deep_gemm; print(hasattr(deep_gemm, '__wrapped__'), 'vllm' in sys.modules)"
    assert run(code, vllm) == "False False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="upstream's own package, where it loads, comes before vLLM's")
def test_vllm_s_package_is_the_second_choice(vllm: Path) -> None:
    code = """if True:
        import deep_gemm
        assert deep_gemm.fp8_gemm_nt(1) == "theirs"
        assert "fp8_gemm_nt" in dir(deep_gemm) and "fp8_gemm_nt" in vars(deep_gemm)
        assert not hasattr(deep_gemm, "fp8_einsum")
        try:
            deep_gemm.fp8_einsum
        except AttributeError as error:
            print(error)
        import deep_gemm.fp8_gemm_nt as as_module
        assert as_module is deep_gemm.fp8_gemm_nt
        from deep_gemm import *
        assert fp8_gemm_nt is deep_gemm.fp8_gemm_nt and get_num_sms is deep_gemm.get_num_sms"""
    assert run(code, vllm) == "deep_gemm has no 'fp8_einsum': neither ours nor in vllm.third_party.deep_gemm"


@pytest.mark.skipif(torch.cuda.is_available(), reason="upstream's own package, where it loads, comes before vLLM's")
@pytest.mark.parametrize("loaded_before", [True, False])
def test_settings_stay_in_step(vllm: Path, loaded_before: bool) -> None:
    code = f"""if True:
        from types import SimpleNamespace
        import torch, deep_gemm
        torch.cuda.is_available = lambda: True  # a card of 188 SMs
        torch.cuda.current_device = lambda: 0
        torch.cuda.get_device_properties = lambda *device: SimpleNamespace(multi_processor_count=188)
        load = lambda: deep_gemm.fp8_gemm_nt
        {loaded_before} and load()
        deep_gemm.set_num_sms(42)
        deep_gemm.set_pdl(True)
        {loaded_before} or load()
        print(deep_gemm.get_num_sms(), deep_gemm.get_pdl(), deep_gemm.calls)"""
    assert run(code, vllm) == "42 True {'set_num_sms': 42, 'set_pdl': True}"


def test_public_functions_can_be_imported_as_modules() -> None:
    assert importlib.import_module("deep_gemm.get_num_sms") is deep_gemm.get_num_sms


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    "capability, ours",
    [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((10, 3), False)]
    + [((11, 0), True), ((12, 0), True), ((12, 1), True)],
)
def test_the_device_decides(monkeypatch: pytest.MonkeyPatch, capability: tuple, ours: bool, forced: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("DG_SM120_FORCE", "1" if forced else "0")
    decide = deep_gemm._is_ours.__wrapped__  # without its cache
    assert decide(torch.device("cuda", 0)) is (ours or forced)
    assert decide(torch.device("cpu"))


@pytest.mark.parametrize("name", INDEXER)
def test_a_call_for_upstream_s_device_reaches_upstream_unchanged(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    first, rest = torch.zeros(1), object()
    monkeypatch.setattr(deep_gemm, "_is_ours", lambda device: False)
    monkeypatch.setattr(upstream, "lookup", lambda asked: lambda *args, **kwargs: (asked, args, kwargs))
    assert getattr(deep_gemm, name)((first, None), rest, indices=rest) == (
        name,
        ((first, None), rest),
        {"indices": rest},
    )
    keyword = "context_lens" if name.endswith("metadata") else "q"
    assert getattr(deep_gemm, name)(**{keyword: first}) == (name, (), {keyword: first})


@pytest.mark.skipif(torch.cuda.is_available(), reason="upstream may load here")
@pytest.mark.parametrize("name", INDEXER)
def test_a_call_for_upstream_s_device_without_upstream_says_why(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(deep_gemm, "_is_ours", lambda device: False)
    with pytest.raises(RuntimeError, match=f"(?s)device that upstream serves.*{name}.*cannot be loaded"):
        getattr(deep_gemm, name)(torch.zeros(1))
