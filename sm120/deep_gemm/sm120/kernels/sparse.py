"""Launchers of sparse.cuh and sparse_metadata.cuh: format of the metadata, parameters, grids."""

import ctypes
from collections.abc import Mapping
from functools import lru_cache

import torch

from ..jit import MOST, Kernel, launch
from .logits import Config, Lists, SparseParams, plan_of_few, rows_per_group
from .windows import Windows

# lists.cuh
FIRST_ROW, MAGIC = 192, 0x31534744
_ROW_HEAD = 16

_FEW_ROWS = 64
_BLOCKS = 1024  # groups of rows
_HEADS = 32  # threads of a row that write no places


class SparseMetadataParams(ctypes.Structure):
    """Field by field as in sparse_metadata.cuh."""

    _fields_ = [
        ("metadata", ctypes.c_void_p),
        ("seal", ctypes.c_uint32),
        ("pitch", ctypes.c_uint32),
        ("windows", Windows),
        ("lists", ctypes.c_void_p),
        ("list_stride", ctypes.c_int64),
        ("block_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int32),
        ("pages_per_row", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("unaligned", ctypes.c_int32),
        ("rows_per_block", ctypes.c_int32),
    ]


@lru_cache(MOST)
def metadata_kernel(page: int, block: int) -> Kernel:
    """`page` keys of a page, or 0: ragged; blocks of `block` keys."""
    layout = f"paged_sparse_mqa_logits_metadata_p{page}" if page else "sparse_mqa_logits_metadata"
    call = f"    SparseMetadata<{page}, {block}>::list(p);"
    return Kernel(f"{layout}_s{block}", "sparse_metadata.cuh", call, 256, SparseMetadataParams)


def pitch(width: int) -> int:
    """Bytes of a row of metadata, for a list of `width` blocks."""
    return _ROW_HEAD + 4 * (-(-width // 4) * 4)


def size(rows: int, width: int) -> int:
    """Bytes of metadata."""
    return FIRST_ROW + rows * pitch(width)


def places(metadata: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """int32 [rows, width]: where each block of a row lies in the cache, in blocks; rows may have fewer."""
    words = metadata[: size(rows, width)].view(torch.int32)
    first = words.storage_offset() + (FIRST_ROW + _ROW_HEAD) // 4
    return words.as_strided((rows, width), (pitch(width) // 4, 1), first)


def seal(width: int, block: int, page: int, unaligned: bool) -> int:
    """What the rows of metadata were made for, in 32 bits: equal for other sizes once in four billion."""
    digest = 0x811C9DC5  # FNV-1a, a word at a time; the first word is the format's version
    for word in (1, width, block, page, unaligned):
        digest = (digest ^ word) * 0x01000193 % 2**32
    return digest


def sizes(rows: int, width: int, block: int, page: int, unaligned: bool) -> dict[str, int]:
    """What metadata say of themselves, for the debug mode."""
    made_for = seal(width, block, page, unaligned)
    return {"rows": rows, "width": width, "block": block, "pitch": pitch(width), "seal": made_for}


def list_blocks(
    metadata: torch.Tensor,
    windows: Windows,
    bounds: Mapping[str, torch.Tensor],
    lists: torch.Tensor,
    block: int,
    *,
    page: int = 0,
    block_table: torch.Tensor | None = None,
    unaligned: bool = False,
) -> None:
    """Fills `metadata` on checked arguments; `bounds` are the tensors that `windows` points into."""
    rows, width = lists.shape
    p = SparseMetadataParams()
    p.metadata = metadata.data_ptr()
    p.seal = seal(width, block, page, unaligned)
    p.pitch = pitch(width)
    p.windows = windows
    p.lists = lists.data_ptr()
    p.list_stride = lists.stride()[0]
    p.width, p.unaligned = width, unaligned
    if block_table is not None:
        p.block_table = block_table.data_ptr()
        p.table_stride, p.pages_per_row = block_table.stride()[0], block_table.shape[1]
    p.rows_per_block = max(1, -(-rows // _BLOCKS))
    shares = -(-(width + _HEADS) // 256) if rows <= _FEW_ROWS else -(-width // 1024)
    grid = (max(1, -(-rows // p.rows_per_block)), min(shares, 65535))
    inputs = {"sparse_kv_block_indices": lists, "block_table": block_table, **bounds}
    launch(metadata_kernel(page, block), metadata.device, grid, p, inputs, {"metadata": metadata})


def sparse(
    config: Config,
    slots: int,
    *,
    query: torch.Tensor,
    query_scales: torch.Tensor,
    weights: torch.Tensor,
    keys: Mapping[str, torch.Tensor],
    page_stride: int,
    places: int,
    metadata: torch.Tensor,
    width: int,
    unaligned: bool,
    out: torch.Tensor,
    least: int,
) -> None:
    """Starts the kernel on checked arguments. `keys` is the cache alone, or a run of keys and their scales."""
    values, *scales = keys.values()
    p = SparseParams()
    p.metadata, p.pitch = metadata.data_ptr(), pitch(width)
    made_for = seal(width, config.block, config.page, unaligned)
    p.windows = Lists(p.metadata, made_for, p.pitch, out.shape[0], width * config.block, least)
    p.query, p.query_scales, p.keys = query.data_ptr(), query_scales.data_ptr(), values.data_ptr()
    p.key_scales = scales[0].data_ptr() if scales else None
    p.weights, p.weights_stride = weights.data_ptr(), weights.stride()[0]
    p.logits, p.logits_stride = out.data_ptr(), out.stride()[0]
    p.page_stride, p.places = page_stride, places
    p.rows_per_group = rows_per_group(config, 1)
    p.few = plan_of_few(config, slots, out.shape[0], 1)
    inputs = {"q": query, "q scales": query_scales, "weights": weights, **keys, "metadata": metadata}
    launch(config.kernel, out.device, (slots, 1), p, inputs, {"logits": out})
