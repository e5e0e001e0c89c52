"""Launcher of carry.cuh: parameters, grid."""

import ctypes
from collections.abc import Mapping

import torch

from ..jit import Kernel, launch
from .windows import Windows

_THREADS = 512


class CarryParams(ctypes.Structure):
    """Field by field as in carry.cuh."""

    _fields_ = [
        ("buffer", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("front", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("windows", Windows),
        ("least", ctypes.c_int32),
        ("at", ctypes.c_int32),
        ("until", ctypes.c_int32),
        ("next", ctypes.c_int32),
        ("chosen", ctypes.c_void_p),
        ("carried", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("firsts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("tokens", ctypes.c_int32),
        ("page", ctypes.c_int32),
        ("table_columns", ctypes.c_int32),
        ("table", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("positions_stride", ctypes.c_int64),
        ("scores_stride", ctypes.c_int64),
    ]


KERNEL = Kernel("topk_carry", "carry.cuh", f"    carry<{_THREADS}>(p);", _THREADS, CarryParams)


def carry(
    at: int,
    until: int,
    next: int,
    *,
    buffer: torch.Tensor,
    front: int,
    k: int,
    windows: Windows,
    bounds: Mapping[str, torch.Tensor],
    chosen: torch.Tensor,
    carried: torch.Tensor,
    pieces: Mapping[str, torch.Tensor],
    least: int,
    page: int,
    block_table: torch.Tensor | None,
    offset: torch.Tensor | None,
    out: torch.Tensor,
    positions: torch.Tensor | None,
    scores: torch.Tensor | None,
) -> None:
    """Starts the kernel on checked arguments: keys [at, until) have been chosen from, those up to `next` come.
    `bounds`: what `windows` points into; `pieces`: starts, ends, firsts, lengths, int32 [rows] each."""
    p = CarryParams()
    p.buffer, p.stride, p.front, p.k = buffer.data_ptr(), buffer.stride()[0], front, k
    p.windows, p.least, p.tokens = windows, least, windows.next_n
    p.at, p.until, p.next = at, until, next
    p.chosen, p.carried = chosen.data_ptr(), carried.data_ptr()
    for name, tensor in pieces.items():
        setattr(p, name, tensor.data_ptr())
    p.page = page
    inputs = {"chosen": chosen, **bounds}
    updated = {"buffer": buffer, "carried": carried}
    if next > until:
        launch(KERNEL, out.device, (len(buffer), 1), p, inputs, pieces, updated=updated)
        return
    outputs = {"out": out}
    p.out, p.out_stride = out.data_ptr(), out.stride()[0]
    if positions is not None:
        outputs["positions"] = positions
        p.positions, p.positions_stride = positions.data_ptr(), positions.stride()[0]
    if scores is not None:
        outputs["scores"] = scores
        p.scores, p.scores_stride = scores.data_ptr(), scores.stride()[0]
    if block_table is not None:
        p.table, p.table_stride, p.table_columns = block_table.data_ptr(), block_table.stride()[0], block_table.shape[1]
    if offset is not None:
        p.offset = offset.data_ptr()
    inputs |= {"block_table": block_table, "offset": offset, **updated}
    launch(KERNEL, out.device, (len(buffer), 1), p, inputs, outputs)
