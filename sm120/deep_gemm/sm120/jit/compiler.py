"""NVRTC: C++ in, PTX or a cubin out. Needs neither a driver nor a CUDA toolkit; results are kept by `cache`."""

import os
from functools import cache as once
from pathlib import Path

from . import cache
from .kernel import Kernel

HEADERS = Path(__file__).parent.parent / "kernels"


class CompileError(RuntimeError):
    """The compiler refused a kernel; the message carries its log."""


def compile_kernel(kernel: Kernel, arch: str, target: str) -> bytes:
    """Compiles `kernel` for `arch` ("sm_120f", "sm_90a", ...) to `target`, "ptx" (text) or "cubin".

    Raises CompileError with the compiler's log, or saying how to get a compiler that knows `arch`.
    """
    options = [f"--gpu-architecture={arch}", "--std=c++17", f"--include-path={HEADERS}"]
    key = cache.key(kernel.source, _headers_digest(), target, *options[:2], _nvrtc_version())
    binary = cache.get(key)
    if binary is None:
        binary = _nvrtc(kernel.source, kernel.name, options, target)
        cache.put(key, binary)
    if folder := os.environ.get("DG_JIT_DUMP_DIR"):
        _dump(Path(folder), kernel, arch, target, binary)
    return binary


def _headers_digest() -> bytes:
    """Of every header, read again each time a kernel is looked up: an edit while the program runs is seen."""
    return cache.digest(*(part for path in sorted(HEADERS.glob("*.cuh")) for part in (path.name, path.read_bytes())))


@once
def _nvrtc_version() -> str:
    nvrtc = _bindings()
    error, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


@once
def _bindings():
    """cuda.bindings.nvrtc, with the library found, or a CompileError that says what to install."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CompileError(
            f"NVRTC, which compiles the kernels, cannot be loaded ({error}); `pip install nvidia-cuda-nvrtc` brings it"
        ) from error
    return nvrtc


def _nvrtc(source: str, name: str, options: list[str], target: str) -> bytes:
    nvrtc = _bindings()
    error, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().rstrip("\0")
            raise CompileError(f"NVRTC {_nvrtc_version()} with {' '.join(options)}: {error.name}\n{log}\n{source}")
        if target == "ptx":
            return _fetch(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
        return _fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _fetch(size_of, copy_to, program) -> bytes:
    _, size = size_of(program)
    buffer = bytes(size)  # bytes are what these bindings write to
    copy_to(program, buffer)
    return buffer


def _dump(folder: Path, kernel: Kernel, arch: str, target: str, binary: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{kernel.name}.{arch}"
    stem.with_name(stem.name + ".cu").write_text(kernel.source)
    stem.with_name(stem.name + f".{target}").write_bytes(binary.rstrip(b"\0") if target == "ptx" else binary)
