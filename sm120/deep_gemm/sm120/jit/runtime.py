"""Launches a kernel where its tensors are: through the driver on a GPU, in the emulator on the CPU.

A call that has been made before costs a dictionary look-up, the packing of one struct and the driver's launch: no
synchronisation, no allocation, no compilation; it may be captured into a CUDA graph.
"""

import ctypes
import os
from collections.abc import Mapping
from functools import cache as once
from typing import Any

import torch

from .compiler import compile_kernel
from .kernel import Kernel

_EMULATED_ARCHITECTURE = "sm_120f"
_loaded: dict[tuple[Kernel, torch.device | str], Any] = {}


def architecture_of(device: torch.device) -> str:
    """What to compile for. The family's cubins, `sm_120f`, run on SM120 and SM121; the CPU emulates `DG_SM120_ARCH`."""
    if device.type == "cpu":
        return os.environ.get("DG_SM120_ARCH", _EMULATED_ARCHITECTURE)
    return _architecture_of_gpu(device)


@once
def _architecture_of_gpu(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:
        return "sm_120f"
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def launch(
    kernel: Kernel,
    device: torch.device,
    grid: tuple[int, int],
    parameters: ctypes.Structure,
    inputs: Mapping[str, torch.Tensor | None],
    outputs: Mapping[str, torch.Tensor],
) -> None:
    """Starts `kernel` on the current stream of `device`.

    `inputs` and `outputs` are the tensors that the pointers in `parameters` point into; in the emulator every access is
    checked against them, and their names stand in its errors.
    """
    if device.type == "cpu":
        _emulate(kernel, grid, parameters, inputs, outputs)
    else:
        _launch_on_gpu(kernel, device, grid, parameters)


def load(kernel: Kernel, device: torch.device) -> Any:
    """The compiled kernel, ready for `device`: a driver's function, or an emulator's module."""
    place = architecture_of(device) if device.type == "cpu" else device
    loaded = _loaded.get((kernel, place))
    if loaded is None:
        loaded = _loaded[kernel, place] = (_load_emulated if device.type == "cpu" else _load_on_gpu)(kernel, device)
    return loaded


# ---- the CPU --------------------------------------------------------------------------------------------------------


def _load_emulated(kernel: Kernel, device: torch.device) -> Any:
    from ..emulator import Module

    return Module(compile_kernel(kernel, architecture_of(device), "ptx").rstrip(b"\0").decode())


def _emulate(kernel, grid, parameters, inputs, outputs) -> None:
    from ..emulator import Buffer

    buffers = [Buffer.of(tensor, name, writable=False) for name, tensor in inputs.items() if tensor is not None]
    buffers += [Buffer.of(tensor, name, writable=True) for name, tensor in outputs.items()]
    module = load(kernel, torch.device("cpu"))
    module.launch(kernel.name, (*grid, 1), (kernel.threads, 1, 1), bytes(parameters), buffers)


# ---- a GPU ----------------------------------------------------------------------------------------------------------


def _load_on_gpu(kernel: Kernel, device: torch.device) -> Any:
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{kernel.name} is not compiled yet, and a CUDA graph is being captured; "
                "call it once before the capture, or deep_gemm.sm120.warmup()"
            )
        torch.cuda.current_stream().synchronize()  # the context exists from here on
        code = ObjectCode.from_cubin(compile_kernel(kernel, architecture_of(device), "cubin"), name=kernel.name)
        function = code.get_kernel(kernel.name)
    return driver.CUfunction(int(function.handle)), function  # the second keeps the first alive


def _launch_on_gpu(kernel: Kernel, device: torch.device, grid: tuple[int, int], parameters: ctypes.Structure) -> None:
    from cuda.bindings import driver

    function, _ = load(kernel, device)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    pointers = ctypes.c_void_p(ctypes.addressof(parameters))  # an array of one pointer, to the one argument
    arguments = (*grid, 1, kernel.threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0)
    if torch._C._cuda_getDevice() == device.index:
        (error,) = driver.cuLaunchKernel(function, *arguments)
    else:
        with torch.cuda.device(device):
            (error,) = driver.cuLaunchKernel(function, *arguments)
    if error == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used the GPU yet
        torch.cuda.set_device(torch.cuda.current_device())
        (error,) = driver.cuLaunchKernel(function, *arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(error)
        raise RuntimeError(f"{kernel.name} on {device}: {error.name}: {text.decode()}")
