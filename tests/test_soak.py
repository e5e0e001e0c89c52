"""Long runs: nothing grows but with the configurations met, and that has a bound. `make soak` makes 100,000 calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Paged, check
from standin import driver
from test_launch import VECTORS

import deep_gemm
from deep_gemm.sm120.jit import runtime


def test_nothing_grows(device: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """On the CPU in the driver's stand-in, where launches end: from there on, nothing is ours."""
    paths = [str(Path(deep_gemm.__file__).parent.parent), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DG_JIT_CACHE_DIR": str(tmp_path / "cache")}
    if device == "cpu":
        environment["LD_LIBRARY_PATH"] = str(driver.build())
    else:
        environment["DG_SM120_FORCE"] = "1"
    calls = request.config.getoption("--soak")
    command = [sys.executable, Path(__file__).with_name("soak.py"), str(calls), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    before, after = found["before"], found["after"]
    for name in ("loaded", "configurations", "files", "modules", "streams", "tensors"):
        assert after.get(name) == before.get(name), name
    assert after["blocks"] - before["blocks"] < calls // 100  # Python's; an object a call would be a hundred times that
    assert after["resident"] - before["resident"] < (8 << 20) + 40 * calls
    if device == "cpu":
        assert after["launches"] - before["launches"] > 1.5 * calls
        assert after["modules"] == after["loaded"] >= after["configurations"] + 2
    else:
        assert after["device"] - before["device"] < 64 << 20


def test_modules_are_those_of_the_configurations_met(tmp_path: Path) -> None:
    """Each is loaded once, whoever asks, and past the bound none is: a graph may hold any of them, so all stay."""
    code = """
        import dataclasses
        from deep_gemm.sm120.jit import runtime
        runtime._MOST_ON_GPUS = 40
        standin.take_over()
        kernels = [dataclasses.replace(kernel) for _ in range(45)]  # another object is another configuration
        refused = 0
        for _ in range(3):
            for made in kernels:
                try:
                    assert adds(made)
                except RuntimeError as error:
                    refused += 1
                    assert "this process has loaded 40 kernels" in str(error)
        calls = standin.calls()
        print(len(runtime._loaded), calls.count("cuLibraryLoadData"), calls.count("cuLibraryUnload"), refused)"""
    prelude = " " * 8 + VECTORS.format(headers=str(tmp_path / "headers"))
    printed = driver.run(prelude + code, driver.build(), DG_JIT_CACHE_DIR=str(tmp_path / "cache"))
    assert printed == "40 40 0 15"


def test_the_emulator_keeps_its_newest_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_loaded", {})
    monkeypatch.setattr(runtime, "_MOST_EMULATED", 3)
    made, compiled = [], runtime.compile_kernel
    monkeypatch.setattr(runtime, "compile_kernel", lambda kernel, *args: made.append(kernel) or compiled(kernel, *args))
    problems = [Paged([20], heads=8, dim=32, block_kv=page) for page in (16, 32, 48, 64)]
    for problem in [*problems, *problems]:
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, 1)
        out = torch.zeros(1, 20)
        deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule), out=out)
        check(out, problem.expected(), 1e-5)
        assert [kernel for kernel, _ in runtime._loaded] == made[-3:]
    assert "p64" in list(runtime._loaded)[-1][0].name
