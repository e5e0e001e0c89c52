"""tools/run_upstream_tests.py on a small file of our own that is built like DeepGEMM's, and on DeepGEMM's where the
submodule is checked out."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import deep_gemm

RUNNER = ROOT / "tools" / "run_upstream_tests.py"
REAL = ROOT / "third_party" / "DeepGEMM" / "tests" / "test_attention.py"
HAS_REAL = pytest.mark.skipif(not REAL.exists(), reason="the submodule is not checked out")

HELPERS = {
    "deep_gemm/testing/__init__.py": "from .bench import *\nfrom .utils import *\n",
    "deep_gemm/testing/bench.py": "def bench_kineto(function, names): raise RuntimeError('nothing to time here')\n",
    "deep_gemm/testing/utils.py": """
import torch
def get_arch_major(): return torch.cuda.get_device_capability()[0]
""",
    "deep_gemm/utils/__init__.py": "from . import layout\n",
    "deep_gemm/utils/layout.py": "from .. import _C\n",
    "deep_gemm/utils/math.py": "def ceil_div(x, y): return (x + y - 1) // y\n",
}
TESTS = """
import torch
import deep_gemm
from deep_gemm.testing import bench_kineto, get_arch_major
from deep_gemm.utils import ceil_div
from generators import generate_normal, get_arch_major

def sample_mqa_cases(name, cases):
    return cases

def test_gemms():
    generate_normal()

def test_mqa_logits():
    def enumerate_mqa_logits():
        for fmt in (("mxfp4", "mxfp8", "fp8") if get_arch_major() == 10 else ("fp8",)):
            for num_heads in (12, 16):
                for seq_len in (2048, 4096):
                    yield fmt, num_heads, seq_len, 8192

    for fmt, num_heads, seq_len, seq_len_kv in {listing}:
        assert get_arch_major() == 12 and num_heads == 16 and seq_len <= 64 and seq_len_kv <= 256
        assert 128 % seq_len == 0
        if fmt == "mxfp4":
            q = (torch.zeros((seq_len, num_heads, 64), dtype=torch.int8, device="cuda"),
                 torch.full((seq_len, num_heads), 0x7F7F7F7F, dtype=torch.int, device=torch.device("cuda", 0)))
            kv = q[0][0, 0].repeat(seq_len_kv, 1), q[1][0, :1].repeat(seq_len_kv)
        else:
            q = torch.randn(seq_len, num_heads, 128, device="cuda").to(torch.float8_e4m3fn), None
            kv = torch.randn(seq_len_kv, 128).cuda().to(torch.float8_e4m3fn), torch.ones(seq_len_kv).to("cuda")
        weights = torch.randn(seq_len, num_heads, device="cuda")
        ks = torch.zeros(seq_len, dtype=torch.int, device="cuda")
        ke = torch.arange(seq_len, dtype=torch.int, device="cuda") + (seq_len_kv - seq_len)
        for _ in range(20):
            logits = deep_gemm.fp8_fp4_mqa_logits(q=q, kv=kv, weights=weights, cu_seq_len_k_start=ks,
                                                  cu_seq_len_k_end=ke, clean_logits=True)
        assert (logits == float("-inf")).sum() == seq_len * seq_len_kv - ke.sum()
        if fmt == "fp8":
            score = torch.einsum("mhd,nd->hmn", q[0].float(), kv[0].float()).relu()
            reference = (score * weights.T.unsqueeze(-1)).sum(dim=0)
            assert (logits[0, 0] - reference[0, 0]).abs() < {tolerance} * reference.abs().max()
        t, clean_t = bench_kineto(lambda: None, ("mqa_logits", "clean_logits"))
        torch.cuda.synchronize()
        print(f"{{seq_len / t}} a second")

def test_paged_mqa_logits():
    def enumerate_paged_mqa_logits():
        for next_n in ((1, 6) if get_arch_major() == 10 else (1,)):
            yield next_n, 256, 8192

    max_model_len = 111 * 1024
    for next_n, batch_size, avg_kv in enumerate_paged_mqa_logits():
        assert (batch_size, avg_kv, max_model_len) == (32, 64, 444)
        lens = torch.full((batch_size, next_n), avg_kv, dtype=torch.int, device="cuda")
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, deep_gemm.get_num_sms())
        assert schedule.shape == (deep_gemm.get_num_sms() + 1, 2)
        assert bench_kineto(lambda: None, "metadata") == 1 and ceil_div(3, 2) == 2
"""


@pytest.fixture(params=["enumerate_mqa_logits()", "sample_mqa_cases('prefill', list(enumerate_mqa_logits()))"])
def listing(request: pytest.FixtureRequest) -> str:
    return request.param


def checkout(
    folder: Path, listing: str = "enumerate_mqa_logits()", tolerance: str = "1e-5", tests: str = TESTS
) -> Path:
    files = HELPERS | {"tests/test_attention.py": tests.format(listing=listing, tolerance=tolerance)}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(deep_gemm.__file__).parent.parent),
        "CUDA_VISIBLE_DEVICES": "",  # the emulator, wherever this runs
    }
    command = [sys.executable, RUNNER, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_without_a_checkout_it_says_how_to_get_one(tmp_path: Path) -> None:
    done = run("--checkout", tmp_path)
    assert done.returncode == 2 and "git submodule update --init third_party/DeepGEMM" in done.stdout


def test_the_tests_of_the_indexer_run_cut_down_on_the_cpu(tmp_path: Path, listing: str) -> None:
    done = run("--checkout", checkout(tmp_path, listing), "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on CPU, in the emulator; seed 3" in done.stdout
    assert "test_mqa_logits: passed, 4 of 12 cases run" in done.stdout
    assert "test_paged_mqa_logits: passed, 2 of 2 cases run" in done.stdout
    assert done.stderr.count("passed in") == 6 and "fmt=mxfp4, num_heads=16, seq_len=32" in done.stderr
    assert "a second" not in done.stdout  # figures of no time at all


def test_the_number_of_cases_is_the_user_s(tmp_path: Path) -> None:
    done = run("--checkout", checkout(tmp_path), "--cases", "2")
    assert "test_mqa_logits: passed, 2 of 12 cases run" in done.stdout, done.stdout + done.stderr
    assert "fmt=mxfp4" in done.stderr and "fmt=fp8" in done.stderr  # what the first has not, the second has


def test_a_failed_assertion_is_shown_with_its_case_and_the_rest_still_runs(tmp_path: Path) -> None:
    done = run("--checkout", checkout(tmp_path, tolerance="-1"))
    assert done.returncode == 1
    assert "test_mqa_logits: FAILED" in done.stdout and "test_paged_mqa_logits: passed" in done.stdout
    assert "FAILED: fmt=fp8" in done.stderr and "< -1 * reference" in done.stderr


@pytest.mark.parametrize(
    "tests", ["def test_mqa_logits(): pass\ndef test_paged_mqa_logits(): pass\n", "def test_gemms(): pass\n"]
)
def test_a_file_of_another_form_is_not_called_passed(tmp_path: Path, tests: str) -> None:
    done = run("--checkout", checkout(tmp_path, tests=tests))
    assert done.returncode == 2 and " passed" not in done.stdout


def assertions(tree: ast.AST) -> list[str]:
    return [ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", [None, pytest.param(REAL, marks=HAS_REAL)])
def test_assertions_are_not_touched(path: Path | None) -> None:
    spec = importlib.util.spec_from_file_location("run_upstream_tests", RUNNER)
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    source = path.read_text() if path else TESTS.format(listing="enumerate_mqa_logits()", tolerance="1e-5")
    instrumented = runner.Instrumented().visit(ast.parse(source))
    assert assertions(instrumented) == assertions(ast.parse(source)) != []
    assert ast.dump(instrumented) != ast.dump(ast.parse(source))


@HAS_REAL
def test_upstream_s_own_file() -> None:
    done = run("--cases", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": passed, 3 of ") == 2
