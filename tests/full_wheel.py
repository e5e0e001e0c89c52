"""The full wheel in an environment where upstream's library loads: PyTorch's CUDA build, a CUDA_HOME, no card needed.

`make test-wheel` makes that environment and runs this file in it; it is no part of `make test`. The tests install and
remove packages in the environment that runs them, in the order in which they stand here.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

SITE = Path(sysconfig.get_path("purelib"))
ORIGINAL = next((ROOT / "build" / "upstream").glob("*.whl"), None)
OURS = next((ROOT / "dist").glob("*.whl"), None)
# Any folder will do to load upstream's library; what it compiles later needs the real toolkit.
TOOLKIT = {"CUDA_HOME": str(SITE / "nvidia" / "cu13")}

INDEXER = {
    "get_paged_mqa_logits_metadata",
    "fp8_paged_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_fp4_mqa_logits",
}
SETTINGS = {"get_num_sms", "set_num_sms", "get_pdl", "set_pdl"}
# What SGLang probes and calls, besides the indexer.
SGLANG = {
    "fp8_einsum",
    "fp8_gemm_nt",
    "get_mk_alignment_for_contiguous_layout",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked",
    "tf32_hc_prenorm_gemm",
    "transform_sf_into_required_layout",
}

DESCRIBE = """
import inspect, json, types
import deep_gemm

def describe(name):
    value = getattr(deep_gemm, name)
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    try:
        signature = str(inspect.signature(value)) if callable(value) else type(value).__name__
    except ValueError:  # an operator of torch's
        signature = str(value)
    return [str(getattr(value, "__module__", "")), signature]

print(json.dumps({name: describe(name) for name in dir(deep_gemm) if not name.startswith("__")}))
"""


def pip(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, toolkit: dict[str, str] = TOOLKIT) -> str:
    """What `code` prints in a fresh interpreter of this environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")} | toolkit
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def original() -> dict[str, list[str]]:
    """Every public name of upstream's own wheel: module and signature. Afterwards ours is installed over it."""
    pip("install", "--no-deps", "--force-reinstall", ORIGINAL)
    names = json.loads(python(DESCRIBE))
    assert len(names) > 80 and INDEXER | SETTINGS | SGLANG <= set(names)
    pip("install", OURS)
    return names


@pytest.fixture(scope="module")
def ours(original: dict[str, list[str]]) -> dict[str, list[str]]:
    return json.loads(python(DESCRIBE))


def test_one_distribution_took_the_other_s_place(original: dict[str, list[str]]) -> None:
    installed = {entry["name"]: entry["version"] for entry in json.loads(pip("list", "--format=json"))}
    assert "+sm120." in installed["sgl-deep-gemm"]
    assert [path.name for path in SITE.glob("*deep_gemm*.dist-info")] == [
        f"sgl_deep_gemm-{installed['sgl-deep-gemm']}.dist-info"
    ]


def test_pip_and_sglang_s_pin_are_content(original: dict[str, list[str]]) -> None:
    assert "No broken requirements found" in pip("check")
    assert "Would install" not in pip("install", "--dry-run", "sgl-deep-gemm==0.2.3.post2")


def test_torch_is_still_the_one_that_was_there(original: dict[str, list[str]]) -> None:
    assert python("import torch; print(torch.__version__, torch.version.cuda)").startswith("2.14.1+cu13")


def test_every_name_of_upstream_s_is_there_with_its_signature(original: dict, ours: dict) -> None:
    renamed = {  # upstream's __init__ under its new name
        name: ["deep_gemm.upstream" if module == "deep_gemm" else module, signature]
        for name, (module, signature) in original.items()
    }
    assert renamed.keys() <= ours.keys()
    changed = {name for name in renamed if ours[name] != renamed[name]}
    assert changed <= INDEXER | SETTINGS, {name: (renamed[name], ours[name]) for name in changed}


def test_what_is_ours_is_ours(ours: dict) -> None:
    present = (INDEXER | SETTINGS) & set(
        json.loads(python("import json; from deep_gemm import sm120; print(json.dumps(dir(sm120)))"))
    )
    assert {"get_paged_mqa_logits_metadata", "fp8_paged_mqa_logits"} <= present
    for name in present:
        assert ours[name][0].startswith("deep_gemm.sm120"), name


@pytest.mark.parametrize(
    "first",
    [
        "import deep_gemm.utils.layout",
        "from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor",
        "import deep_gemm.utils",
        "from deep_gemm.utils.math import align",
        "import deep_gemm.testing",
        "from deep_gemm.testing import calc_diff",
        "import deep_gemm.mega",
        "from deep_gemm.mega import SymmBuffer",
        "import deep_gemm.legacy",
        "import deep_gemm.fp8_gemm_nt",
        "import deep_gemm.fp8_paged_mqa_logits",
        "from deep_gemm import fp8_einsum, get_num_sms, utils",
        "from deep_gemm import *",
        "import deep_gemm.upstream",
        "import deep_gemm; deep_gemm._C.get_pdl",
    ],
)
def test_whatever_is_imported_first_everything_is_there(original: dict, first: str) -> None:
    code = f"{first}\nimport deep_gemm\nprint([n for n in {sorted(original)} if not hasattr(deep_gemm, n)])"
    assert python(code).strip() == "[]"


def test_star_import_brings_upstream_s_names(original: dict) -> None:
    public = sorted(name for name in original if not name.startswith("_"))
    assert (
        python(f"from deep_gemm import *\nprint([name for name in {public} if name not in globals()])").strip() == "[]"
    )


def test_the_headers_are_where_sglang_reads_them(original: dict) -> None:
    for header in ("cutlass/cutlass.h", "cute/tensor.hpp", "deep_gemm"):
        assert (SITE / "deep_gemm" / "include" / header).exists()


def test_without_a_toolkit_upstream_s_names_are_absent_and_ours_work(original: dict) -> None:
    code = """if True:
        import os.path
        real = os.path.exists
        os.path.exists = lambda path: False if str(path) == "/usr/local/cuda" else real(path)
        import torch, deep_gemm
        assert not hasattr(deep_gemm, "fp8_einsum") and not hasattr(deep_gemm, "fp8_gemm_nt")
        try:
            deep_gemm.fp8_einsum
        except AttributeError as error:
            assert "no CUDA toolkit found; set CUDA_HOME" in str(error), error
        lengths = torch.tensor([[300]], dtype=torch.int32)
        print(deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 2).tolist())"""
    assert python(code, {"PATH": ""}) == "[[0, 0], [0, 1], [1, 0]]\n"


def test_cpu_tensors_run_in_the_emulator_beside_upstream(original: dict) -> None:
    code = """if True:
        import torch, deep_gemm
        deep_gemm.fp8_einsum
        heads, dim, length = 8, 32, 300
        q = torch.randn(1, 1, heads, dim).to(torch.float8_e4m3fn)
        keys = torch.randn(5, 64, dim).to(torch.float8_e4m3fn)
        scales = torch.rand(5, 64) + 0.5
        pages = torch.cat([keys.view(torch.uint8).flatten(1), scales.view(torch.uint8).flatten(1)], 1)
        weights = torch.randn(1, heads)
        lengths = torch.tensor([[length]], dtype=torch.int32)
        table = torch.randperm(5, dtype=torch.int32)[None]
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 2)
        pages = pages.view(5, 64, 1, dim + 4)
        got = deep_gemm.fp8_paged_mqa_logits(q, pages, weights, lengths, table, schedule, length)
        k = (keys.double() * scales.double()[..., None])[table[0].long()].flatten(0, 1)[:length]
        want = (weights[0].double()[:, None] * (q[0, 0].double() @ k.T).relu()).sum(0)
        assert (got[0] - want).norm() / want.norm() < 1e-6
        deep_gemm.set_num_sms(6)
        print(deep_gemm.get_num_sms())"""
    assert python(code) == "6\n"


def test_the_original_comes_back_and_ours_goes_without_a_trace(original: dict) -> None:
    pip("install", "--no-deps", "--force-reinstall", ORIGINAL)
    assert json.loads(python(DESCRIBE)) == original
    assert not (SITE / "deep_gemm" / "upstream.py").exists() and not (SITE / "deep_gemm" / "sm120").exists()
    pip("install", "--no-deps", "--force-reinstall", OURS)
    python("import deep_gemm.utils.layout, deep_gemm.sm120")
    pip("uninstall", "--yes", "sgl-deep-gemm")
    assert list(SITE.glob("*deep_gemm*")) == []
