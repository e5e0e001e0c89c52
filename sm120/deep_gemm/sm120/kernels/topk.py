"""Launcher of topk.cuh: configuration, workspace, parameters, grids."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from ..jit import Kernel, launch
from .windows import Windows

_MOST_PARTS = 64
_MERGE_THREADS = 512


class TopkParams(ctypes.Structure):
    """Field by field as in topk.cuh."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("columns", ctypes.c_int32),
        ("windows", Windows),
        ("ends_are_lengths", ctypes.c_int32),
        ("unit", ctypes.c_int32),
        ("nowhere", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("front", ctypes.c_int32),
        ("page", ctypes.c_int32),
        ("page_shift", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
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
        ("heads", ctypes.c_void_p),
        ("fronts", ctypes.c_void_p),
        ("rests", ctypes.c_void_p),
        ("parts", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Config:
    """What the kernels are compiled for.

    dtype      of the logits
    most       the largest k: 512, 1,024 or 2,048
    ascending  results are in the order of positions
    """

    dtype: torch.dtype
    most: int
    ascending: bool = False
    threads: int = 512
    vectors: int = 2  # of 16 bytes, of a piece in a lane
    blocks: int = 2  # of an SM

    @cached_property
    def share(self) -> int:
        """Keys of a piece: with fewer a row has no second part."""
        return self.threads * self.vectors * 16 // self.dtype.itemsize

    @cached_property
    def capacity(self) -> int:
        """Keys that a block can keep between two pieces, and that a part can leave for the merge beside its front."""
        return max(2048, self.most + 1024)

    @cached_property
    def fronts(self) -> int:
        """Entries of all fronts of a row: several times k, so that fronts of equal size hardly ever lack one."""
        return 2048 if self.most == 512 else 4096

    @cached_property
    def choose(self) -> Kernel:
        tag, logit = {torch.float32: ("fp32", "float"), torch.bfloat16: ("bf16", "ptx::bf16")}[self.dtype]
        body = f"    choose<{logit}, {self.threads}, {self.vectors}, {self.capacity}, {self.share}"
        name = f"topk_{tag}_k{self.most}_t{self.threads}x{self.vectors}"
        return self._kernel(name, body, self.threads, self.blocks)

    @cached_property
    def merge(self) -> Kernel:
        body = f"    merge<{_MERGE_THREADS}, {self.fronts}, {self.capacity}, {self.share}"
        return self._kernel(f"topk_merge_k{self.most}_s{self.share}", body, _MERGE_THREADS, follows=True)

    def _kernel(self, name: str, body: str, threads: int, blocks: int = 1, follows: bool = False) -> Kernel:
        ascending = ("_ascending", "true") if self.ascending else ("", "false")
        body = f"{body}, {ascending[1]}>(p);"
        return Kernel(name + ascending[0], "topk.cuh", body, threads, TopkParams, blocks, follows)


_config = cache(Config)


def configure(
    dtype: torch.dtype, k: int, rows: int, columns: int, num_sms: int, ascending: bool = False
) -> tuple[Config, int]:
    """The configuration for the `k` largest of each row of logits [rows, columns], and in how many parts a row is split
    at most, so that few rows fill the chip. Chosen by times on an H100, 25 Nov 2026: docs/performance.md."""
    most = next(most for most in (512, 1024, 2048) if k <= most)

    def form(threads: int, vectors: int, blocks: int) -> tuple[Config, int]:
        config = _config(dtype, most, ascending, threads, vectors, blocks)
        return config, -(-columns // config.share)

    if rows >= 2 * num_sms:
        config, pieces = form(256, 1, 6)
        return (config if pieces <= 1 else form(256, 2, 4)[0]), 1
    small, pieces = form(512, 1, 2)  # 2,048 keys a piece in fp32
    if pieces <= 1:
        return small, 1
    if pieces <= 2:
        return form(512, 2, 2)[0], 1
    if pieces <= 4 and rows <= num_sms:
        return form(1024, 2, 1)[0], 1
    if pieces <= _MOST_PARTS and rows * pieces <= 2 * num_sms:
        return small, pieces
    middle, pieces = form(512, 2, 2)
    if pieces <= _MOST_PARTS and rows * pieces <= 2 * num_sms or 2 * rows > num_sms:
        return middle, min(pieces, _MOST_PARTS, max(1, 2 * num_sms // rows))
    large, pieces = form(1024, 2, 1)
    return large, min(pieces, _MOST_PARTS, num_sms // rows)


def workspace_bytes(config: Config, rows: int, parts: int) -> int:
    """What parts leave for the merge; 0 where rows have one part."""
    return 0 if parts == 1 else rows * parts * 8 * (1 + config.fronts // parts + config.capacity)


def topk(
    config: Config,
    parts: int,
    *,
    logits: torch.Tensor,
    windows: Windows,
    ends_are_lengths: bool,
    bounds: Mapping[str, torch.Tensor],
    k: int,
    page: int,
    block_table: torch.Tensor | None,
    offset: torch.Tensor | None,
    workspace: torch.Tensor | None,
    out: torch.Tensor,
    positions: torch.Tensor | None,
    scores: torch.Tensor | None,
    tokens: int = 1,
    unit: int = 1,
    nowhere: int = -1,
) -> None:
    """Starts the kernels on checked arguments; shapes as in `topk.topk`. `bounds`: what `windows` points into. A logit
    stands for `unit` of what they count; `tokens` rows share one of the table; `nowhere` stands past a row's end."""
    p = TopkParams()
    p.logits = logits.data_ptr()
    p.logits_stride = logits.stride()[0]
    p.columns = logits.shape[1]
    p.windows = windows
    p.ends_are_lengths = ends_are_lengths
    p.tokens, p.unit, p.nowhere = tokens, unit, nowhere
    p.k = k
    p.page, p.page_shift = page, -1 if page & (page - 1) else page.bit_length() - 1
    p.parts = parts
    outputs = {"out": out}
    p.out, p.out_stride = out.data_ptr(), out.stride()[0]
    if block_table is not None:
        p.table, p.table_stride, p.table_columns = block_table.data_ptr(), block_table.stride()[0], block_table.shape[1]
    if offset is not None:
        p.offset = offset.data_ptr()
    if positions is not None:
        outputs["positions"] = positions
        p.positions, p.positions_stride = positions.data_ptr(), positions.stride()[0]
    if scores is not None:
        outputs["scores"] = scores
        p.scores, p.scores_stride = scores.data_ptr(), scores.stride()[0]
    inputs = {"logits": logits, "block_table": block_table, "offset": offset, **bounds}
    rows = logits.shape[0]
    if parts == 1:
        launch(config.choose, out.device, (rows, 1), p, inputs, outputs)
        return
    p.front = config.fronts // parts
    p.heads = workspace.data_ptr()
    p.fronts = p.heads + 8 * rows * parts
    p.rests = p.fronts + 8 * rows * parts * p.front
    launch(config.choose, out.device, (rows, parts), p, inputs, {**outputs, "workspace": workspace})
    launch(config.merge, out.device, (rows, 1), p, {**inputs, "workspace": workspace}, outputs)
