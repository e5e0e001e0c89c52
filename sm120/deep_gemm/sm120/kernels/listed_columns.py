"""Launcher of listed_columns.cuh."""

import ctypes

import torch

from ..jit import Kernel, launch

_THREADS = 256


class ListedColumnsParams(ctypes.Structure):
    """Field by field as in listed_columns.cuh."""

    _fields_ = [
        ("lists", ctypes.c_void_p),
        ("list_stride", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("width", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("limit", ctypes.c_int32),
    ]


KERNEL = Kernel(
    "sparse_topk_columns", "listed_columns.cuh", f"    count_columns<{_THREADS}>(p);", _THREADS, ListedColumnsParams,
    follows=True,
)  # fmt: skip


def count_columns(
    lists: torch.Tensor, context_lens: torch.Tensor, block: int, limit: int, columns: torch.Tensor
) -> None:
    """Fills `columns`, int32 [rows], on checked arguments."""
    rows, width = lists.shape
    p = ListedColumnsParams(
        lists.data_ptr(), lists.stride()[0], context_lens.data_ptr(), columns.data_ptr(), width, block, limit
    )
    inputs = {"sparse_kv_block_indices": lists, "context_lens": context_lens}
    launch(KERNEL, columns.device, (rows, 1), p, inputs, {"columns": columns})
