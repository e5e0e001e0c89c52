"""Launcher of metadata.cuh."""

import ctypes

import torch

from ..jit import Kernel, launch
from .windows import NO_LIMIT, Windows, windows_of_lengths


class MetadataParams(ctypes.Structure):
    """Field by field as in metadata.cuh."""

    _fields_ = [("schedule", ctypes.c_void_p), ("slots", ctypes.c_int32), ("windows", Windows)]


def _kernel(threads: int) -> Kernel:
    return Kernel(
        f"paged_mqa_logits_metadata_{threads}", "metadata.cuh", f"    plan<{threads}>(p);", threads, MetadataParams
    )


KERNELS = FEW, MANY = _kernel(128), _kernel(1024)  # a block of 128 is there sooner


def plan(context_lens: torch.Tensor, schedule: torch.Tensor) -> None:
    """Fills `schedule`, int32 [slots + 1, 2]: where in the list of all 256-key splits each slot starts."""
    # Garbage of any length is cut, so that neither a row's keys nor all rows' splits overflow when they are counted.
    limit = min(NO_LIMIT - 255, NO_LIMIT // max(context_lens.shape[0], 1) * 256)
    windows = windows_of_lengths(context_lens, context_lens.shape[-1] if context_lens.dim() == 2 else 1, limit)
    parameters = MetadataParams(schedule.data_ptr(), schedule.shape[0] - 1, windows)
    kernel = FEW if windows.rows <= FEW.threads else MANY
    launch(kernel, schedule.device, (1, 1), parameters, {"context_lens": context_lens}, {"schedule": schedule})
