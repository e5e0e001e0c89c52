"""Launches a kernel where its tensors are: through the driver on a GPU, in the emulator on the CPU.

A call that has been made before costs a dictionary look-up, the packing of one struct and the driver's launch: no
synchronisation, no allocation, no compilation; it may be captured into a CUDA graph.
"""

import atexit
import ctypes
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache as once
from types import MappingProxyType
from typing import Any

import torch

from .. import checks, settings
from . import shipped
from .compiler import compile_kernel
from .kernel import MOST, Kernel

_EMULATED_ARCHITECTURE = "sm_120f"

# (kernel, index of the GPU or emulated architecture) -> the driver's function or the emulator's module. The emulator's
# take megabytes: the oldest goes. A GPU's take 0.1 MB and stay, since a captured graph may launch any of them.
_loaded: dict[tuple[Kernel, int | str], Any] = {}
_MOST_EMULATED, _MOST_ON_GPUS = 64, MOST
_loading = threading.Lock()


def _renew_lock() -> None:
    """In a forked child nobody is left to release a lock that another thread of the parent held."""
    global _loading
    _loading = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _let_compilation_end() -> None:
    """The interpreter ends: a compiler still at work in another thread would crash when its library is torn down.
    Nothing is compiled from here on."""
    _loading.acquire(timeout=60)


atexit.register(_let_compilation_end)


def architecture_of(device: torch.device) -> str:
    """What to compile for. The family's cubins, `sm_120f`, run on SM120 and SM121; the CPU emulates `DG_SM120_ARCH`."""
    if _is_cpu(device):
        return os.environ.get("DG_SM120_ARCH", _EMULATED_ARCHITECTURE)
    return _architecture_of_gpu(device.index)


@once  # a device takes longer to tell its type than a dictionary to find it
def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def launch(
    kernel: Kernel,
    device: torch.device,
    grid: tuple[int, int],
    parameters: ctypes.Structure,
    inputs: Mapping[str, torch.Tensor | None],
    outputs: Mapping[str, torch.Tensor],
    checked: bool = False,
    updated: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Starts `kernel` on the current stream of `device`.

    `inputs` and `outputs` are the tensors that the pointers in `parameters` point into, and `updated` those that are
    read and written; in the emulator every access is checked against them, and their names stand in its errors.
    Refuses (ArgumentError) misaligned tensors, and outputs that share memory with an input, unless a launch of the same
    call has `checked` these.
    """
    if not checked:
        checks.memory(inputs, {**outputs, **updated} if updated else outputs)
    if _is_cpu(device):
        _emulate(kernel, grid, parameters, inputs, outputs, updated)
    else:
        _launch_on_gpu(kernel, device.index, _current_stream(device.index), grid, parameters)


def load(kernel: Kernel, device: torch.device) -> None:
    """Makes `kernel` ready, so that its first launch on `device` compiles nothing."""
    if _is_cpu(device):
        _emulated(kernel)
    else:
        _function(kernel, device.index, _current_stream(device.index))


# ---- the CPU --------------------------------------------------------------------------------------------------------


def _emulate(kernel, grid, parameters, inputs, outputs, updated) -> None:
    from ..emulator import Buffer

    buffers = [Buffer.of(tensor, name, writable=False) for name, tensor in inputs.items() if tensor is not None]
    buffers += [Buffer.of(tensor, name, unwritten=True) for name, tensor in outputs.items()]
    buffers += [Buffer.of(tensor, name) for name, tensor in updated.items()]
    _emulated(kernel).launch(kernel.name, (*grid, 1), (kernel.threads, 1, 1), bytes(parameters), buffers)


def _emulated(kernel: Kernel) -> Any:
    from ..emulator import Module

    arch = architecture_of(torch.device("cpu"))
    module = _loaded.get((kernel, arch))
    if module is None:
        with _loading:
            module = _loaded.get((kernel, arch))
            if module is None:
                module = Module(compile_kernel(kernel, arch, "ptx").rstrip(b"\0").decode())
                emulated = [key for key in _loaded if isinstance(key[1], str)]
                if len(emulated) >= _MOST_EMULATED:
                    del _loaded[emulated[0]]
                _loaded[kernel, arch] = module
    return module


# ---- a GPU: what PyTorch knows --------------------------------------------------------------------------------------


def _current_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)


def _current_device() -> int:
    return torch._C._cuda_getDevice()


# ---- a GPU: what the driver does ------------------------------------------------------------------------------------


class DriverError(RuntimeError):
    """What the driver refused, and its words; `code` is its CUresult."""

    def __init__(self, what: str, code: Any) -> None:
        from cuda.bindings import driver

        _, words = driver.cuGetErrorString(code)
        super().__init__(f"{what}: {code.name}{f' ({words.decode()})' if words else ''}")
        self.code = code


def _launch_on_gpu(kernel: Kernel, index: int, stream: int, grid: tuple[int, int], parameters: Any) -> None:
    function = _loaded.get((kernel, index)) or _function(kernel, index, stream)
    if _current_device() == index:
        error = _start(kernel, function, index, stream, grid, parameters)
    else:
        with _context(index):
            error = _start(kernel, function, index, stream, grid, parameters)
    if error and error == _driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used the GPU yet
        _driver().cuCtxSetCurrent(_primary_context(index))
        error = _start(kernel, function, index, stream, grid, parameters)
    if error:
        raise DriverError(f"{kernel.name} cannot be launched on cuda:{index}", error)


def _start(kernel: Kernel, function: Any, index: int, stream: int, grid: tuple[int, int], parameters: Any) -> Any:
    """The launch itself; returns the driver's CUresult."""
    driver = _driver()
    pointer = ctypes.c_void_p(ctypes.addressof(parameters))  # an array of one pointer, to the one argument
    pointers = ctypes.addressof(pointer)
    if (kernel.follows or settings.get_pdl()) and _capability(index) >= (9, 0):
        return driver.cuLaunchKernelEx(_overlapping(grid, kernel.threads, stream), function, pointers, 0)[0]
    return driver.cuLaunchKernel(function, *grid, 1, kernel.threads, 1, 1, 0, stream, pointers, 0)[0]


def _overlapping(grid: tuple[int, int], threads: int, stream: int) -> Any:
    """The configuration of a launch whose blocks may be set up while the kernel before it still runs."""
    driver = _driver()
    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.hStream = stream
    config.attrs, config.numAttrs = [overlap], 1
    return config


def _function(kernel: Kernel, index: int, stream: int) -> Any:
    """The kernel loaded on GPU `index`, a CUfunction. `stream` is where it is about to be launched."""
    with _loading:
        if (kernel, index) not in _loaded:
            if len(_loaded) >= _MOST_ON_GPUS:
                raise RuntimeError(
                    f"{kernel.name} is not loaded on cuda:{index}: this process has loaded {_MOST_ON_GPUS} kernels, "
                    "each for another configuration (heads, dim, page, types, alignment), and unloads none of them"
                )
            try:
                with _context(index):
                    if _is_capturing(stream):
                        raise RuntimeError(
                            f"{kernel.name} is not ready on cuda:{index}, and a CUDA graph is being captured; "
                            "before the capture, call deep_gemm.sm120.warmup() or the function itself once"
                        )
                    _loaded[kernel, index] = _shipped_or_compiled(kernel, index)
            except DriverError as error:
                raise RuntimeError(f"{kernel.name} cannot be made ready on cuda:{index}: {error}") from error
    return _loaded[kernel, index]


def _is_capturing(stream: int) -> bool:
    driver = _driver()
    error, status = driver.cuStreamIsCapturing(stream)
    if error == driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:  # the default stream, while another one is captured
        return True
    _checked("asking the stream for a capture", (error,))
    return status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


def _shipped_or_compiled(kernel: Kernel, index: int) -> Any:
    arch = _architecture_of_gpu(index)
    cubin = shipped.find(kernel, arch)
    if cubin is not None:
        try:
            return _load_cubin(kernel, index, cubin)
        except DriverError as error:
            codes = _driver().CUresult
            if error.code not in (codes.CUDA_ERROR_NO_BINARY_FOR_GPU, codes.CUDA_ERROR_INVALID_IMAGE):
                raise
            _warn_of_shipped(f"{kernel.name} on cuda:{index}: {error}")
    return _load_cubin(kernel, index, compile_kernel(kernel, arch, "cubin"))


def _load_cubin(kernel: Kernel, index: int, cubin: bytes) -> Any:
    driver = _driver()
    major, minor = _capability(index)
    what = f"loading a cubin for {_architecture_of_gpu(index)} on SM{major}{minor}, driver for CUDA {_driver_version()}"
    library = _checked(what, driver.cuLibraryLoadData(cubin, None, None, 0, None, None, 0))
    try:
        function = _checked("finding the kernel", driver.cuLibraryGetKernel(library, kernel.name.encode()))
    except DriverError:
        driver.cuLibraryUnload(library)
        raise
    return driver.CUfunction(int(function))  # a CUkernel may stand where a CUfunction does


_warned_of_shipped = False


def _warn_of_shipped(reason: str) -> None:
    """Once: what is wrong with one of them is wrong with all."""
    global _warned_of_shipped
    if not _warned_of_shipped:
        _warned_of_shipped = True
        message = f"The kernels that came with deep_gemm do not load and are compiled instead ({reason})"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@once
def _driver():
    """cuda.bindings.driver, initialised."""
    from cuda.bindings import driver

    (error,) = driver.cuInit(0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DriverError("initialising the driver", error)
    return driver


def _checked(what: str, result: tuple) -> Any:
    """The value that a driver's call returned, or its error raised."""
    error, *values = result
    if error != _driver().CUresult.CUDA_SUCCESS:
        raise DriverError(what, error)
    return values[0] if values else None


@contextmanager
def _context(index: int) -> Iterator[None]:
    """The context that PyTorch and the CUDA runtime use on GPU `index`, current for a while."""
    driver = _driver()
    before = _checked("asking for the context", driver.cuCtxGetCurrent())
    _checked(f"taking the context of cuda:{index}", driver.cuCtxSetCurrent(_primary_context(index)))
    try:
        yield
    finally:
        driver.cuCtxSetCurrent(before)


@once
def _primary_context(index: int) -> Any:
    driver = _driver()
    device = _checked(f"asking for cuda:{index}", driver.cuDeviceGet(index))
    return _checked(f"taking the context of cuda:{index}", driver.cuDevicePrimaryCtxRetain(device))


@once
def _capability(index: int) -> tuple[int, int]:
    driver = _driver()
    names = driver.CUdevice_attribute
    device = _checked(f"asking for cuda:{index}", driver.cuDeviceGet(index))
    return tuple(
        _checked(f"asking for cuda:{index}", driver.cuDeviceGetAttribute(name, device))
        for name in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )


@once
def _architecture_of_gpu(index: int) -> str:
    major, minor = _capability(index)
    if major == 12:
        return "sm_120f"
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def _driver_version() -> str:
    version = _checked("asking for the driver's version", _driver().cuDriverGetVersion())
    return f"{version // 1000}.{version % 1000 // 10}"
