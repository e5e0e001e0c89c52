"""The README: its example runs, and its tables say what the sources say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import deep_gemm

README = (ROOT / "README.md").read_text()
SWITCH = re.compile(r"\bDG_[A-Z0-9]+(?:_[A-Z0-9]+)*\b")
CHECK = """
from deep_gemm.sm120 import reference
want = reference.paged_logits(query, kv_cache, weights, lengths, block_table, 320)
assert logits.shape == want.shape == (2, 320)
inside = want != -torch.inf
assert inside.sum() == 337 and (logits[~inside] == -torch.inf).all()
assert (logits[inside] - want[inside]).norm() < 1e-6 * want[inside].norm()
"""


def section(title: str) -> str:
    (text,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    return text


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def sources() -> list[Path]:
    folders = [path for name in ("sm120", "tools", "tests", ".ci") for path in (ROOT / name).rglob("*")]
    text = {".py", ".cuh", ".c", ".sh", ""}
    found = [path for path in folders if path.is_file() and path.suffix in text and "__pycache__" not in path.parts]
    return [*found, ROOT / "setup.py", ROOT / "Makefile"]


def test_the_example_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(deep_gemm.__file__).parent.parent),
        "DG_SM120_FORCE": "1",
    }
    done = subprocess.run([sys.executable, "-c", example + CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([[")


def test_every_switch_is_in_the_table_and_in_the_sources() -> None:
    documented = first_column(section("Switches"))
    assert len(set(documented)) == len(documented)
    text = "\n".join(path.read_text(errors="ignore") for path in sources())
    macros = set(re.findall(r"#define (DG_\w+)", text))  # of the peer's sources
    assert set(SWITCH.findall(text)) - macros == set(documented)
    assert set(SWITCH.findall(README)) == set(documented)


def test_every_target_is_in_the_table_and_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert [f"make {target}" for target in sorted(phony.split())] == sorted(first_column(section("Make")))
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", README):
        assert target in phony.split(), target


def test_every_file_that_is_named_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"`((?:sm120|tools|docs|tests|third_party)/[\w./]+|setup\.py|upstream\.txt)`", README)
    assert len(links) > 8 and len(named) > 15
    for path in [*links, *named]:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "pattern, file",
    [
        (r"SGLang (0\.5\.\d+)", "requirements-clients.txt"),
        (r"sglang:v(0\.5\.\d+)", "tools/Dockerfile"),
        (r"sgl-deep-gemm==([\w.]+\w)", "upstream.txt"),
        (r"vLLM (0\.33\.\d+)", "Makefile"),
    ],
)
def test_versions_are_those_of_the_pins(pattern: str, file: str) -> None:
    versions = set(re.findall(pattern, README))
    assert len(versions) == 1 and versions.pop() in (ROOT / file).read_text()
