"""Launcher of clean.cuh."""

import ctypes
from collections.abc import Mapping
from functools import cache

import torch

from ..jit import Kernel, launch
from .windows import Windows

_THREADS = 256


class CleanParams(ctypes.Structure):
    """Field by field as in clean.cuh."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("compressed", ctypes.c_int32),
        ("windows", Windows),
    ]


@cache
def kernel(dtype: torch.dtype) -> Kernel:
    """The kernel for logits of `dtype`."""
    name, logit = {torch.float32: ("fp32", "float"), torch.bfloat16: ("bf16", "ptx::bf16")}[dtype]
    return Kernel(f"clean_logits_{name}", "clean.cuh", f"    clean<{logit}>(p);", _THREADS, CleanParams)


def clean(logits: torch.Tensor, windows: Windows, bounds: Mapping[str, torch.Tensor], compressed: bool = False) -> None:
    """Sets the logits outside each row's window to -inf, in the call that wrote them. `bounds` are the tensors that
    `windows` points into."""
    tokens, columns = logits.shape
    parameters = CleanParams(logits.data_ptr(), logits.stride(0), tokens, columns, compressed, windows)
    grid = (min(tokens, 65535), min(-(-columns // (8 * _THREADS)), 65535))
    launch(kernel(logits.dtype), logits.device, grid, parameters, bounds, {"logits": logits}, checked=True)
