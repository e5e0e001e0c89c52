"""Launcher of topk.cuh and fronts.cuh: configuration, workspace, parameters, grids."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from ..jit import Kernel, launch
from .logits import places_of_fronts
from .windows import Windows

_MOST_PARTS = 64


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
        ("gates", ctypes.c_void_p),
        ("fronts", ctypes.c_void_p),
        ("parts", ctypes.c_int32),
        ("compressed", ctypes.c_int32),
    ]


@dataclass(frozen=True, eq=False)
class Fronts:
    """How the largest keys of a row are chosen out of the fronts that so many blocks of its logits have left.

    threads  of a block: so many that no SM that is left early gets two of them, and others none
    own      fronts whose entries a block puts
    """

    blocks: int
    threads: int = 768
    own: int = 2

    @cached_property
    def kernel(self) -> Kernel:
        columns = -(-self.blocks // 32)
        name = f"topk_fronts_t{self.threads}_o{self.own}_c{columns}"
        body = f"    Fronts<{self.threads}, {self.own}, {columns}>::run(p);"
        return Kernel(name, "fronts.cuh", body, self.threads, TopkParams, follows=True)

    @property
    def grid(self) -> tuple[int, int]:
        return 1, -(-self.blocks // self.own) + 1


fronts = cache(Fronts)


@dataclass(frozen=True)
class Config:
    """What the kernels are compiled for.

    dtype      of the logits
    most       the largest k: 512, 1,024 or 2,048
    ascending  results are in the order of positions
    parted     rows may have several parts
    ahead      a piece is loaded while the one before it is listed, whose listed keys are looked up again
    walked     a lane goes through its chosen keys: less work, and more latency, than to look at all of them again
    groups     of a lane's keys in a piece, whose maxima make the first gate; 0: all keys are in registers and counted
    digit      the logarithm of the histogram's bins
    blocks     of an SM, that registers are left for
    merging    threads that merge a row's parts
    """

    dtype: torch.dtype
    most: int
    ascending: bool = False
    threads: int = 512
    vectors: int = 2  # of 16 bytes, of a piece in a lane
    parted: bool = False
    ahead: bool = False
    walked: bool = False
    groups: int = 0
    digit: int = 11
    blocks: int = 2
    merging: int = 512

    @cached_property
    def share(self) -> int:
        """Keys of a piece: with fewer a row has no second part."""
        return self.threads * self.vectors * 16 // self.dtype.itemsize

    @cached_property
    def unit(self) -> int:
        """Neighbouring keys that are of one group: so few that a row with fewer groups than k fits the list."""
        return 4 if self.most == 512 else 2

    @cached_property
    def capacity(self) -> int:
        """Entries of the list: twice k at least, so that there is room for some of each piece."""
        if not self.groups:
            return self.most // 2 if self.ascending else 1
        return 2048 if self.most == 512 else 3072 if self.most == 1024 else 4096

    @cached_property
    def fronts(self) -> int:
        """Entries of all fronts of a row: several times k, so that fronts of equal size hardly ever lack one."""
        return 2048 if self.most == 512 else 3 * self.most

    @cached_property
    def choose(self) -> Kernel:
        tag, logit = _LOGITS[self.dtype]
        flags = ", ".join(str(flag).lower() for flag in (self.parted, self.ahead, self.walked))
        body = f"    choose<{logit}, {self.threads}, {self.vectors}, {flags}, {self.groups}, {self.unit}"
        name = f"topk_{tag}_k{self.most}_t{self.threads}x{self.vectors}_g{self.groups}_d{self.digit}_b{self.blocks}"
        name += "_parted" * self.parted + "_ahead" * self.ahead + "_walked" * self.walked
        return self._kernel(name, f"{body}, {self.digit}, {self.capacity}", self.threads, self.blocks)

    @cached_property
    def merge(self) -> Kernel:
        tag, logit = _LOGITS[self.dtype]
        body = f"    merge<{logit}, {self.merging}, {self.fronts}, {self.share}, 11"
        name = f"topk_merge_{tag}_k{self.most}_t{self.merging}_s{self.share}"
        return self._kernel(name, body, self.merging, follows=True)

    def _kernel(self, name: str, body: str, threads: int, blocks: int = 1, follows: bool = False) -> Kernel:
        ascending = ("_ascending", "true") if self.ascending else ("", "false")
        body = f"{body}, {self.most}, {ascending[1]}>(p);"
        return Kernel(name + ascending[0], "topk.cuh", body, threads, TopkParams, blocks, follows)


_LOGITS = {torch.float32: ("fp32", "float"), torch.bfloat16: ("bf16", "ptx::bf16")}
_config = cache(Config)


def configure(
    dtype: torch.dtype, k: int, rows: int, columns: int, num_sms: int, ascending: bool = False
) -> tuple[Config, int]:
    """The configuration for the `k` largest of each row of logits [rows, columns], and in how many parts a row is split
    at most, so that few rows fill the chip. Chosen by times on an H200, 29 Nov 2026: docs/performance.md."""
    most = next(most for most in (512, 1024, 2048) if k <= most)
    many, very_many = rows > 2 * num_sms, rows > 16 * num_sms

    def form(threads: int, keys: int, parts: int, blocks: int, sifted: bool = False, digit: int = 11):
        """`keys` of a lane in a piece, or 8 at least in bf16."""
        vectors = max(1, keys * dtype.itemsize // 16)
        groups = 0
        if sifted:  # half again as many as k and more in all, a power of two to a lane
            groups = 1 << (-(-3 * most // (2 * threads)) - 1).bit_length()
            digit -= ascending and most == 2048  # there is no memory for more
        parted = parts > 1
        ahead = sifted and rows <= num_sms and (keys < 32 or not parted)
        busy = keys == 32 or keys == 16 and (threads == 1024 or threads > 64 and rows > num_sms)
        walked = busy and not sifted and not parted
        # small blocks wait beside parts; where these leave no room for them, large ones are faster
        merging = 1024 if parted and most > 512 and rows * parts > num_sms else 512
        flags = parted, ahead, walked
        return _config(dtype, most, ascending, threads, vectors, *flags, groups, digit, blocks, merging), parts

    def pieces(keys: int) -> int:
        """Of a row, for 512 lanes of so many keys each."""
        return -(-columns // (512 * max(keys, 16 // dtype.itemsize)))

    # in registers: a block a row
    if columns <= 1024:
        if very_many and most == 512:
            return form(64, 16, 1, 16, digit=8)
        return form(128, 8, 1, 12, digit=9) if many and most == 512 else form(256, 4, 1, 4, digit=9)
    if columns <= 2048:
        if very_many:
            return form(128, 16, 1, 10, digit=9)
        return form(512, 4, 1, 3) if rows <= num_sms else form(256, 8, 1, 4, digit=10)
    if columns <= 4096:
        if very_many:
            return form(128, 32, 1, 8, digit=10)
        return form(256, 16, 1, 5, digit=10) if many else form(512, 8, 1, 2, digit=10 if most == 2048 else 11)
    if columns <= 8192 and rows <= (16 if most == 2048 else 4) * num_sms:
        return form(512, 16, 1, 2)
    if columns <= 16384 and rows <= num_sms and (most > 512 or rows * columns > 1024 * num_sms):
        return form(1024, 16, 1, 1, digit=12)
    if columns <= 16384 and num_sms < rows <= (3 if most == 2048 else 2) * num_sms:
        return form(512, 32, 1, 2, digit=12)
    if columns <= 32768 and num_sms // 8 < rows <= num_sms:
        return form(1024, 32, 1, 1, digit=12)
    # in the registers of several blocks, one of them on an SM: then those of the merge wait beside them
    slots = num_sms if most < 2048 or 16 * rows <= num_sms else 2 * num_sms
    for keys in (4, 8, 16):
        if pieces(keys) <= _MOST_PARTS and rows * pieces(keys) <= slots:
            return form(512, keys, pieces(keys), 2)
    # sifted: by small blocks; by large ones; in parts, two of them on an SM
    if very_many and columns <= 32768 and most == 512:
        return form(128, 32, 1, 7, True, digit=9)
    if many:
        return form(256, 32, 1, 4, True, digit=10)
    if rows > num_sms:
        return form(512, 32, 1, 2, True)
    if 2 * rows > num_sms or 4 * rows > num_sms and columns <= 65536 and most < 2048:
        return form(1024, 16, 1, 1, True)
    keys = 16 if 8 * rows <= num_sms and columns > 131072 else 32
    return form(512, keys, min(pieces(keys), _MOST_PARTS, 2 * num_sms // rows), 2, True)


def workspace_bytes(config: Config, rows: int, parts: int) -> int:
    """What parts leave for the merge; 0 where rows have one part."""
    return 0 if parts == 1 else rows * parts * 8 * (1 + config.fronts // parts)


def topk(config: Config, parts: int, *, workspace: torch.Tensor | None, **given) -> None:
    """Starts the kernels on checked arguments: those of `_parameters`."""
    p, inputs, outputs = _parameters(parts, **given)
    out, rows = given["out"], given["logits"].shape[0]
    if parts == 1:
        launch(config.choose, out.device, (rows, 1), p, inputs, outputs)
        return
    p.front = config.fronts // parts
    p.gates = workspace.data_ptr()
    p.fronts = p.gates + 8 * rows * parts
    launch(config.choose, out.device, (rows, parts), p, inputs, {**outputs, "workspace": workspace})
    launch(config.merge, out.device, (rows, 1), p, {**inputs, "workspace": workspace}, outputs)


def choose_of_fronts(form: Fronts, workspace: torch.Tensor, **given) -> None:
    """The choice of one row, out of the fronts that its logits' blocks have left in `workspace` (`logits.paged`)."""
    p, inputs, outputs = _parameters(form.blocks, **given)
    p.fronts, _, _, p.gates = places_of_fronts(workspace.data_ptr(), form.blocks)
    launch(form.kernel, given["out"].device, form.grid, p, {**inputs, "workspace": workspace}, outputs)


def _parameters(
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
    out: torch.Tensor,
    positions: torch.Tensor | None,
    scores: torch.Tensor | None,
    tokens: int = 1,
    unit: int = 0,
    compressed: bool = False,
    nowhere: int = -1,
) -> tuple[TopkParams, dict, dict]:
    """What all kernels take, without what is left for a second one; their inputs and outputs. Shapes as in `topk.topk`.
    `bounds`: what `windows` points into. With `unit` a logit stands for a block of so many of what they count, and
    results are blocks of the run; `compressed`: column 0 is the row's first one. `tokens` rows share one of the table;
    `nowhere` stands past a row's end."""
    p = TopkParams()
    p.logits = logits.data_ptr()
    p.logits_stride = logits.stride()[0]
    p.columns = logits.shape[1]
    p.windows = windows
    p.ends_are_lengths = ends_are_lengths
    p.tokens, p.unit, p.compressed, p.nowhere = tokens, unit, compressed, nowhere
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
    return p, inputs, outputs
