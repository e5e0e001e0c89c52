"""Builds the wheel: upstream's published package with ours laid over it.

Switches, all from the environment:
  DG_UPSTREAM  none             only our own package (no network needed)
               FILE.txt         a pip requirement with hashes, like upstream.txt, which is the default
               FILE.whl         a wheel of upstream that is already here
  DG_NAME      the distribution's name; upstream's by default, so that pip replaces it and pins on it stay satisfied
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PIN = ROOT / "upstream.txt"
OUR_BUILD = 1  # the N of +sm120.N: counts our releases on top of one upstream version

UPSTREAM = os.environ.get("DG_UPSTREAM") or str(PIN)
LEAN = UPSTREAM == "none"


def pinned() -> tuple[str, str]:
    """Name and version of the upstream release that this wheel stands for."""
    if UPSTREAM.endswith(".whl"):
        name, version = Path(UPSTREAM).name.split("-")[:2]
        return name.replace("_", "-"), version
    text = (PIN if LEAN else Path(UPSTREAM)).read_text()
    return re.search(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE).groups()


NAME = os.environ.get("DG_NAME") or pinned()[0]
VERSION = f"{pinned()[1]}+sm120.{OUR_BUILD}"


@functools.cache
def upstream_wheel() -> Path:
    """Path of upstream's wheel; pip fetches it and checks its hash."""
    if UPSTREAM.endswith(".whl"):
        return Path(UPSTREAM)
    folder = ROOT / "build" / "upstream"
    folder.mkdir(parents=True, exist_ok=True)
    name, version = (part.replace("-", "_") for part in pinned())
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    if subprocess.run([*pip, "--dest", folder, "--requirement", UPSTREAM]).returncode:
        raise SystemExit(f"Could not fetch {name} {version}; DG_UPSTREAM=none builds the wheel without it.")
    return next(folder.glob(f"{name}-{version}-*.whl"))


def compile_ahead(target: Path) -> None:
    """Compiles the common kernels into the package under `target`, with what it holds; without PyTorch or NVRTC (an
    isolated build) the wheel goes without them, and compiles each at its first call."""
    code = """
import pathlib, sys
try:
    import torch, cuda.bindings.nvrtc
except ImportError as missing:
    sys.exit(print(f"No kernels are compiled ahead: {missing}"))
from deep_gemm.sm120.prepare import ship
ship(pathlib.Path(sys.argv[1]))
"""
    folder = target / "deep_gemm" / "sm120" / "jit" / "shipped"
    environment = {**os.environ, "PYTHONPATH": str(target.resolve())}
    subprocess.run([sys.executable, "-B", "-c", code, folder], env=environment, check=True)


class Overlay(build_py):
    """Upstream's package first, then ours over it. Upstream's `__init__` stays beside our face as `upstream.py`."""

    def run(self) -> None:
        target = Path(self.build_lib)
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left would end up in this wheel
        if not LEAN:
            with zipfile.ZipFile(upstream_wheel()) as wheel:
                for entry in wheel.infolist():
                    if entry.filename.startswith("deep_gemm/") and not entry.is_dir():
                        if entry.filename == "deep_gemm/__init__.py":
                            entry.filename = "deep_gemm/upstream.py"
                        wheel.extract(entry, target)
        self.force = True
        super().run()
        (target / "deep_gemm" / "VERSION").write_text(VERSION)
        compile_ahead(target)


class OverlayWheel(bdist_wheel):
    """Tagged as upstream's wheel is (it carries a compiled library, without CPython's ABI), with upstream's licence."""

    def get_tag(self) -> tuple[str, str, str]:
        if LEAN:
            return "py3", "none", "any"
        return tuple(upstream_wheel().stem.split("-")[-3:])

    def write_wheelfile(self, wheelfile_base: str, *args, **kwargs) -> None:
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        if not LEAN:
            with zipfile.ZipFile(upstream_wheel()) as wheel:
                licence = next(name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
                (Path(wheelfile_base) / "licenses" / "LICENSE.upstream").write_bytes(wheel.read(licence))


setup(
    name=NAME,
    version=VERSION,
    description="DeepGEMM with the Lightning Indexer's kernels for SM120 and SM121 (RTX Blackwell, GB10)",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license_expression="MIT" if LEAN else "MIT AND Apache-2.0 AND BSD-3-Clause",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    # No torch here: the user's build of it must stay, and every caller of deep_gemm has one.
    install_requires=["cuda-bindings>=13,<14", "nvidia-cuda-nvrtc>=13,<14", "numpy"],
    package_dir={"": "sm120"},
    packages=[
        ".".join(folder.relative_to(ROOT / "sm120").parts)
        for folder in sorted({source.parent for source in (ROOT / "sm120").rglob("*.py")})
    ],
    package_data={"": ["**/*.cuh"]},
    entry_points={
        "sglang.srt.plugins": ["deep_gemm_sm120 = deep_gemm_plugins.sglang:register"],
        "vllm.general_plugins": ["deep_gemm_sm120 = deep_gemm_plugins.vllm:register"],
    },
    cmdclass={"build_py": Overlay, "bdist_wheel": OverlayWheel},
)
