"""The wheel: what is in it, what it asks for, and what it leaves alone."""

import configparser
import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sass
from conftest import ROOT

PIN = re.search(r"^([\w.-]+)==([\w.]+)", (ROOT / "upstream.txt").read_text(), re.MULTILINE)
SHIPPED = "/jit/shipped/"
SOURCE_SUFFIXES = (".py", ".cuh")


def sources() -> set[str]:
    package = ROOT / "sm120"
    found = {path.relative_to(package) for path in package.rglob("*") if path.suffix in SOURCE_SUFFIXES}
    return {path.as_posix() for path in found}


def copied_tree(target: Path) -> Path:
    """This tree without version control, as a source archive would be."""
    shutil.copytree(ROOT / "sm120", target / "sm120", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "upstream.txt", "LICENSE", "NOTICE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    return target


def build(target: Path, **environment: str) -> Path:
    """The path of a wheel, lean unless `environment` says otherwise."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "DG_UPSTREAM": "none", **environment}
    command = [*pip, "--wheel-dir", target, copied_tree(target / "tree")]
    subprocess.run(command, env=environment, check=True)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("lean"))


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_lean_wheel_holds_every_source_file_and_nothing_else(lean: Path) -> None:
    with zipfile.ZipFile(lean) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name for name in names if SHIPPED not in name} == sources() | {"deep_gemm/VERSION"}
    assert lean.name.endswith("-py3-none-any.whl")


def shipped(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name).name: archive.read(name) for name in archive.namelist() if SHIPPED in name}


def test_both_frameworks_find_their_plugins(lean: Path) -> None:
    with zipfile.ZipFile(lean) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        found = configparser.ConfigParser()
        found.read_string(archive.read(name).decode())
    assert {group: dict(found[group]) for group in found.sections()} == {
        "sglang.srt.plugins": {"deep_gemm_sm120": "deep_gemm_plugins.sglang:register"},
        "vllm.general_plugins": {"deep_gemm_sm120": "deep_gemm_plugins.vllm:register"},
    }


def test_the_common_kernels_are_compiled_ahead(lean: Path) -> None:
    files = shipped(lean)
    index = json.loads(files.pop("index.json"))
    assert sorted(index.values()) == sorted(files)
    topk = [name for name in files if "topk" in name]
    assert all(any(f"fp32_k{k}_" in name for name in topk) for k in (512, 1024, 2048))
    assert sum("_maxima" in name for name in files) == 17  # of pages of 64 and 128: few and many rows; ragged
    # Logits, those of pages of 128, with maxima, sparse ones (FP4 in pages by either weights), with fronts, cleaning,
    # metadata.
    assert len(files) - len(topk) == 102 + 31 + 17 + 40 + 2 + 2 + 2 + 2
    assert all(cubin[:4] == b"\x7fELF" for cubin in files.values())
    assert sum(map(len, files.values())) < 16 << 20 and lean.stat().st_size < 8 << 20


def test_no_kernel_of_logits_that_is_shipped_spills(lean: Path) -> None:
    files = {name: cubin for name, cubin in shipped(lean).items() if "topk" not in name}
    used = {name: sass.resources(cubin) for name, cubin in files.items() if name.endswith(".cubin")}
    assert len(used) > 40
    for kernels in used.values():
        for name, resources in kernels.items():
            assert 0 < resources.registers < 255 and resources.stack == 0, f"{name} spills: {resources}"


def test_the_wheel_satisfies_the_pin_on_upstream_s_and_replaces_it(lean: Path) -> None:
    from packaging.requirements import Requirement

    fields = metadata(lean)
    assert fields["Name"] == PIN[1]
    assert Requirement(f"{PIN[1]}=={PIN[2]}").specifier.contains(fields["Version"])
    assert re.fullmatch(re.escape(PIN[2]) + r"\+sm120\.\d+", fields["Version"])


def test_the_wheel_leaves_the_user_s_torch_alone(lean: Path) -> None:
    required = " ".join(metadata(lean).get_all("Requires-Dist"))
    assert "torch" not in required
    for package in ("cuda-bindings", "nvidia-cuda-nvrtc", "numpy"):
        assert package in required


def test_the_wheel_keeps_the_licences(lean: Path) -> None:
    with zipfile.ZipFile(lean) as archive:
        licences = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_name_can_be_chosen(tmp_path: Path) -> None:
    assert metadata(build(tmp_path, DG_NAME="deep_gemm"))["Name"] == "deep_gemm"


@pytest.fixture
def upstream_like(tmp_path: Path) -> Path:
    """A wheel laid out as upstream's is, to look at the overlay alone."""
    wheel = tmp_path / "some_gemm-7.8-py3-none-manylinux2014_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("deep_gemm/__init__.py", "theirs = 1\n")
        archive.writestr("deep_gemm/VERSION", "7.8")
        archive.writestr("deep_gemm/_C.so", b"\x7fELF")
        archive.writestr("deep_gemm/utils/layout.py", "from .. import _C\n")
        archive.writestr("deep_gemm/include/cutlass/cutlass.h", "// header\n")
        archive.writestr("some_gemm-7.8.dist-info/licenses/LICENSE", "their licence\n")
        archive.writestr("some_gemm-7.8.dist-info/METADATA", "Name: some-gemm\n")
    return wheel


def test_the_full_wheel_is_upstream_s_with_ours_over_it(tmp_path: Path, upstream_like: Path) -> None:
    wheel = build(tmp_path / "full", DG_UPSTREAM=str(upstream_like))
    assert wheel.name == "some_gemm-7.8+sm120.1-py3-none-manylinux2014_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and SHIPPED not in name}
        theirs = {"_C.so", "upstream.py", "utils/layout.py", "include/cutlass/cutlass.h"}
        assert names == sources() | {f"deep_gemm/{name}" for name in theirs} | {"deep_gemm/VERSION"}
        assert archive.read("deep_gemm/upstream.py") == b"theirs = 1\n"
        assert archive.read("deep_gemm/__init__.py") == (ROOT / "sm120/deep_gemm/__init__.py").read_bytes()
        assert archive.read("deep_gemm/VERSION") == b"7.8+sm120.1"
        licence = "some_gemm-7.8+sm120.1.dist-info/licenses/LICENSE.upstream"
        assert archive.read(licence) == b"their licence\n"


def test_a_build_that_cannot_fetch_upstream_names_the_way_out(tmp_path: Path) -> None:
    pin = tmp_path / "pin.txt"
    pin.write_text(f"sgl-deep-gemm==0.2.3.post2 --hash=sha256:{'0' * 64}\n")  # no file has this hash
    command = [sys.executable, "setup.py", "--quiet", "build_py"]
    environment = {**os.environ, "DG_UPSTREAM": str(pin)}
    done = subprocess.run(command, cwd=copied_tree(tmp_path / "tree"), env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "DG_UPSTREAM=none" in done.stderr


def test_the_gitlink_and_gitmodules_name_the_same_place() -> None:
    modules = (ROOT / ".gitmodules").read_text()
    assert "path = third_party/DeepGEMM" in modules and "url = https://github.com/deepseek-ai/DeepGEMM" in modules
    if (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT), "ls-tree", "HEAD", "third_party/DeepGEMM"]
        tree = subprocess.run(git, capture_output=True, text=True, check=True).stdout
        assert tree.split()[:3] == ["160000", "commit", "54e22612409371d6364144b69086735beb54e98b"]


def test_the_installed_wheel_is_the_one_under_test() -> None:
    import deep_gemm

    if ROOT in Path(deep_gemm.__file__).parents and ".venv" not in deep_gemm.__file__:
        pytest.skip("the source tree is under test")
    assert importlib.metadata.version(PIN[1]) == deep_gemm.__version__
    installed = Path(deep_gemm.__file__).parent.parent
    for name in sources():
        assert (installed / name).read_bytes() == (ROOT / "sm120" / name).read_bytes(), name
