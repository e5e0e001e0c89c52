"""NVRTC: C++ in, PTX or a cubin out. Needs neither a driver nor a CUDA toolkit; results are kept by `cache`."""

import os
from functools import cache as once
from pathlib import Path

from . import cache
from .kernel import Kernel

HEADERS = Path(__file__).parent.parent / "kernels"


class CompileError(RuntimeError):
    """The compiler refused a kernel, or there is none; the message carries its log."""


def compile_kernel(kernel: Kernel, arch: str, target: str) -> bytes:
    """Compiles `kernel` for `arch` ("sm_120f", "sm_90a", ...) to `target`, "ptx" (text) or "cubin".

    Raises CompileError with the compiler's log, or saying how to get a compiler that knows `arch`.
    """
    binary = _compile(kernel, arch, target)
    if folder := os.environ.get("DG_JIT_DUMP_DIR"):
        _dump(Path(folder), kernel, arch)
    return binary


def identity(kernel: Kernel, arch: str, target: str) -> str:
    """A digest of all that a binary depends on but the compiler's version. Headers are read again each time: an edit
    while the program runs is seen by the kernels that are first used after it."""
    headers = (part for path in sorted(HEADERS.glob("*.cuh")) for part in (path.name, path.read_bytes()))
    return cache.key(kernel.source, target, *_options(arch), *headers)


@once
def nvrtc_version() -> str:
    """As in "13.0"."""
    _, major, minor = _bindings().nvrtcVersion()
    return f"{major}.{minor}"


def _options(arch: str) -> list[str]:
    return [f"--gpu-architecture={arch}", "--std=c++17"]


def _compile(kernel: Kernel, arch: str, target: str) -> bytes:
    key = cache.key(identity(kernel, arch, target), nvrtc_version())
    binary = cache.get(key)
    if binary is None:
        binary = _nvrtc(kernel, arch, target)
        cache.put(key, binary)
    return binary


@once
def _bindings():
    """cuda.bindings.nvrtc, with the library found, or a CompileError that says what to install."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CompileError(
            f"NVRTC, which compiles the kernels, cannot be loaded; `pip install nvidia-cuda-nvrtc` brings it ({reason})"
        ) from error
    return nvrtc


def _nvrtc(kernel: Kernel, arch: str, target: str) -> bytes:
    nvrtc = _bindings()
    options = [*_options(arch), f"--include-path={HEADERS}"]
    _, program = nvrtc.nvrtcCreateProgram(kernel.source.encode(), f"{kernel.name}.cu".encode(), 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().strip("\0\n")
            if error == nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_OPTION:
                raise CompileError(
                    f"NVRTC {nvrtc_version()} does not know {arch}; `pip install -U nvidia-cuda-nvrtc` ({log})"
                )
            raise CompileError(
                f"NVRTC {nvrtc_version()} refuses {kernel.name}: {error.name}, {' '.join(options)}\n"
                f"{log}\n\n{kernel.source}"
            )
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


def _dump(folder: Path, kernel: Kernel, arch: str) -> None:
    """All three forms of the kernel, whichever was asked for."""
    forms = {
        "cu": kernel.source.encode(),
        "ptx": _compile(kernel, arch, "ptx").rstrip(b"\0"),
        "cubin": _compile(kernel, arch, "cubin"),
    }
    try:
        with cache.opened(folder, make=True) as place:
            for suffix, content in forms.items():
                cache.write(place, f"{kernel.name}.{arch}.{suffix}", content)
    except OSError as error:
        cache.say_once(f"DG_JIT_DUMP_DIR: {kernel.name} cannot be written there", folder, error)
