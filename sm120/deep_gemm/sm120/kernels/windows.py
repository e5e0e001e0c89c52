"""The launcher's side of window.cuh."""

import ctypes

import torch

NO_LIMIT = 2**31 - 1


class Windows(ctypes.Structure):
    """Which keys each query token sees; field by field as in window.cuh."""

    _fields_ = [
        ("starts", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("next_n", ctypes.c_int32),
        ("lengths_per_row", ctypes.c_int32),
        ("limit", ctypes.c_int32),
        ("least", ctypes.c_int32),
    ]


def windows_of_lengths(context_lens: torch.Tensor, next_n: int, limit: int = NO_LIMIT, least: int = 0) -> Windows:
    """Token i of row b sees keys [0, context_lens[b, i]); with 1-D lengths [0, context_lens[b] - next_n + i + 1)."""
    per_row = 1 if context_lens.dim() == 1 else next_n
    return Windows(None, context_lens.data_ptr(), context_lens.shape[0], next_n, per_row, limit, least)


def windows_of_bounds(starts: torch.Tensor, ends: torch.Tensor, limit: int, least: int = 0) -> Windows:
    """Token i sees keys [starts[i], ends[i])."""
    return Windows(starts.data_ptr(), ends.data_ptr(), starts.shape[0], 1, 1, limit, least)
