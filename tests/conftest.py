"""The tests run the installed wheel; where none is installed, the source tree."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
DEVICES = os.environ.get("DG_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu").split(",")

# A compilation may fall into any example.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "fuzz", deadline=None, max_examples=500, suppress_health_check=list(hypothesis.HealthCheck), print_blob=True
)
hypothesis.settings.load_profile("default")

if importlib.util.find_spec("deep_gemm") is None:
    sys.path.insert(0, str(ROOT / "sm120"))
sys.path[:0] = [str(ROOT / folder) for folder in ("tools", "tools/bench", "tools/evidence")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=int, default=10_000, help="calls of test_soak.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `device` run in the emulator and, where there is a GPU, on it too."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)
