"""The stand-in for libcuda: built and put in the way by tests, worn by the processes that they start.

    folder = build()                        # in the test: compiles libcuda.c
    run("...", folder)                      # a process that finds it; `standin` is a Standin there

In that process cuda.bindings is the real one. A launch arrives here with the kernel's name, grid, block and parameter
block, as the driver got them, and runs in the emulator, with the PTX of the same kernel.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
STREAM, SECOND_DEVICE_STREAM = 0x5150, 0x10007


@functools.cache
def build() -> Path:
    """The folder where the library lies, under the name that cuda.bindings looks for."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("the stand-in for libcuda needs a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="standin-"))
    options = ["-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([compiler, *options, "-o", folder / "libcuda.so.1", HERE / "libcuda.c"], check=True)
    return folder


def run(code: str, folder: Path, **environment: str) -> str:
    """What `code` prints in a process that finds the library in `folder`."""
    import deep_gemm

    prelude = "import json, torch; from standin.driver import *; standin = Standin()\n"
    path = os.pathsep.join([str(Path(deep_gemm.__file__).parent.parent), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(folder), **environment}
    command = [sys.executable, "-c", prelude + textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("overlapping", ctypes.c_uint32),
    ]


class Standin:
    """What a process does with the library besides calling it through cuda.bindings.

    launches   what arrived, oldest first
    buffers    memory that kernels may touch (emulator.Buffer)
    kernels    by name: those whose PTX is compiled when they arrive
    problem    the emulator's error of the last launch that failed
    ptx        a folder with the PTX of kernels, as DG_JIT_DUMP_DIR leaves it; else it is compiled
    stream, device  what stands for PyTorch's current ones
    """

    def __init__(self) -> None:
        from deep_gemm.sm120.jit import runtime

        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.standin_calls.restype = ctypes.c_char_p
        self.launches: list[SimpleNamespace] = []
        self.buffers: list[Any] = []
        self.kernels: dict[str, Any] = {}
        self.problem: Exception | None = None
        self.ptx: Path | None = None
        self.stream, self.device = STREAM, 0
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))(self._arrived)
        self.library.standin_on_launch(self._callback)
        runtime._current_stream = lambda index: self.stream
        runtime._current_device = lambda: self.device

    def fail(self, call: str, code: int, sticky: bool = False) -> None:
        """The next `call` returns `code`; if `sticky`, every later one of any function does too."""
        self.library.standin_fail(call.encode(), code, sticky)

    def recover(self) -> None:
        self.library.standin_recover()

    def capturing(self, status: int) -> None:
        self.library.standin_set_capturing(status)

    def sm(self, number: int, device: int = 0) -> None:
        self.library.standin_set_sm(device, number)

    def calls(self) -> list[str]:
        """Names of the calls since the last time; launches are not among them."""
        return self.library.standin_calls().decode().split()

    def without_emulator(self) -> None:
        """Launches end here, and do nothing: for timing what comes before. As for a card's tensors, the architecture is
        the card's, not the environment's."""
        from deep_gemm.sm120 import jit
        from deep_gemm.sm120.jit import runtime

        jit.architecture_of = lambda device: runtime._is_cpu(device) and runtime._architecture_of_gpu(0)
        self.library.standin_on_launch(None)
        runtime._emulate = lambda kernel, grid, parameters, *_: runtime._launch_on_gpu(
            kernel, 0, self.stream, grid, parameters
        )

    def take_over(self) -> None:
        """What would be emulated goes through the driver instead: tensors on the CPU are this card's."""
        from deep_gemm.sm120.emulator import Buffer
        from deep_gemm.sm120.jit import runtime

        def launch(kernel, grid, parameters, inputs, outputs, updated) -> None:
            tensors = [(name, tensor, False) for name, tensor in inputs.items() if tensor is not None]
            tensors += [(name, tensor, True) for name, tensor in (*outputs.items(), *updated.items())]
            self.buffers = [Buffer.of(tensor, name, writable) for name, tensor, writable in tensors]
            self.kernels[kernel.name] = kernel
            runtime._launch_on_gpu(kernel, 0, self.stream, grid, parameters)

        runtime._emulate = launch

    def _arrived(self, pointer: Any) -> int:
        launch = pointer.contents
        name = launch.kernel.decode()
        parameters = ctypes.string_at(launch.parameters, launch.parameter_bytes)
        self.launches.append(
            SimpleNamespace(
                kernel=name,
                parameters=parameters,
                grid=list(launch.grid),
                block=list(launch.block),
                stream=launch.stream,
                device=launch.device,
                overlapping=launch.overlapping,
            )
        )
        try:
            self._module(name).launch(
                name, tuple(launch.grid), tuple(launch.block), parameters, self.buffers, launch.shared_bytes
            )
        except Exception as problem:
            self.problem = problem
            return 700  # CUDA_ERROR_ILLEGAL_ADDRESS, as a card would say
        return 0

    @functools.cache  # noqa: B019  (one object a process)
    def _module(self, name: str) -> Any:
        from deep_gemm.sm120.emulator import Module
        from deep_gemm.sm120.jit import compile_kernel

        if self.ptx is not None:
            return Module((self.ptx / f"{name}.sm_120f.ptx").read_text())
        return Module(compile_kernel(self.kernels[name], "sm_120f", "ptx").rstrip(b"\0").decode())
