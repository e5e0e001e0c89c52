"""The sparse peer: DeepGEMM pull request 447's SM120 kernel, from the headers of vLLM's wheel, where nothing calls it.

    launch_metadata(context_lens, block_table, ..., metadata, workspace, num_sms)     what is launched, and how
    launch_logits(q, kv_cache, weights, metadata, width, block, logits, num_sms)

The wheel is fetched by pip, pinned by hash, into the peer's folder (peer.py), and of it the headers alone are kept; the
CUDA headers and the compiler are the peer's. Template arguments, geometry and sizes are those of the pull request's
host code for a paged cache: 64 keys a turn of a block of 128 threads, gathered synchronously; 8 blocks share an entry
of the schedule where there are at most 16 rows, else one takes it; metadata merge the lists of two neighbouring rows of
one request into splits of 640 keys (MXFP4) or 512 (MXFP8).
"""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import peer
import torch

WHEEL = "vllm==0.33.0 --hash=sha256:4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa"
INCLUDE = "vllm/third_party/deep_gemm/include/"
# What a failed assertion prints is left out; it still stops the kernel.
TRAPS = '#define DG_DEVICE_ASSERT(cond) do { if (not (cond)) asm("trap;"); } while (0)\n'
METADATA_THREADS, SPLITS_PER_ENTRY = 256, 8
HEADER_BYTES, WORKSPACE_STATE = 16, 384


@dataclass(frozen=True)
class Kernel(peer.Kernel):
    """One instantiation out of vLLM's headers."""

    def compile(self, arch: str = "sm_120f", headers: dict[str, str] | None = None) -> peer.Binary:
        root = fetch()
        source = peer.PRELUDE + TRAPS + f"#include <deep_gemm/{self.header}>\n"
        return peer.kept(root, [WHEEL, peer.PINS], root, source, self.instance, arch, headers)


@functools.cache
def fetch() -> Path:
    """The folder with the wheel's headers."""

    def fill(folder: Path) -> None:
        peer.pip("download", f"--dest={folder}", "--platform=manylinux_2_28_x86_64", pins=WHEEL)
        wheel = next(folder.glob("vllm*.whl"))
        unpack(wheel, folder)
        wheel.unlink()

    return peer.filled(WHEEL, fill)


def unpack(wheel: Path, folder: Path) -> None:
    """The wheel's headers into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(INCLUDE) and not name.endswith("/"):
                target = folder / name.removeprefix(INCLUDE)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


# ---- sizes ----------------------------------------------------------------------------------------------------------


def _split(fp4: bool) -> int:
    return 640 if fp4 else 512


def metadata_kernel(fp4: bool, width: int, block: int, page: int, num_sms: int, unaligned: bool = False) -> Kernel:
    """Plans; shared memory holds both rows' lists and what they merge to. `page` 0: ragged."""
    per_split, warps = _split(fp4) // block, METADATA_THREADS // 32
    words = 4 * width + -(-2 * width // per_split) + warps + 1 + warps * (SPLITS_PER_ENTRY + 1)
    shared = -(-(-(-4 * words // 16) * 16 + 32 + 4) // 128) * 128
    paged = str(page > 0).lower()
    name = "sched::sparse_mqa_logits::sm100_sparse_mqa_logits_metadata"
    numbers = (2, _split(fp4), block, width, page or 1, SPLITS_PER_ENTRY, num_sms, METADATA_THREADS)
    return Kernel(
        label="sparse metadata",
        header="scheduler/sm100_sparse_mqa_logits_metadata.cuh",
        instance=f"deep_gemm::{name}<{paged}, {str(unaligned).lower()}, {', '.join(map(str, numbers))}>",
        threads=METADATA_THREADS,
        shared_bytes=shared,
        math_warps=0,
    )


def logits_kernel(fp4: bool, rows: int, block: int, page: int, num_sms: int) -> Kernel:
    """Scores; shared memory holds two rows' queries and 64 keys."""
    row, parts = (64 if fp4 else 128), partitions(rows)
    shared = -(-(64 * 2 * row + 64 * 2 * 4 + 64 * 2 + 64 // block * 8) // 1024) * 1024
    arguments = f"{str(fp4).lower()}, true, {block}, {page}, {num_sms}, false, {parts}"
    return Kernel(
        label="sparse logits",
        header="impls/sm120_fp8_fp4_sparse_mqa_logits.cuh",
        instance=f"deep_gemm::sm120_fp8_fp4_sparse_mqa_logits_kernel<{arguments}>",
        threads=128,
        shared_bytes=shared,
        math_warps=4,
    )


def ragged_logits_kernel(rows: int, num_sms: int, unaligned: bool = False) -> Kernel:
    """MXFP4, 2,048 blocks of 8 keys of one run: 128 threads gather, 128 score; 4 blocks an SM, 2 stages of 64 keys."""
    tile = -(-(64 * 3 * 64 + 64 * 3 * 4 + 64 * 2 + 2 * 8 * 8) // 1024) * 1024
    arguments = (
        f"true, false, 8, 0, {num_sms}, {str(unaligned).lower()}, 4, true, true, true, {str(rows >= 64).lower()}"
    )
    return Kernel(
        label="sparse logits, ragged",
        header="impls/sm120_fp8_fp4_sparse_mqa_logits.cuh",
        instance=f"deep_gemm::sm120_fp8_fp4_sparse_mqa_logits_kernel<{arguments}>",
        threads=256,
        shared_bytes=-(-(tile + 6 * 8) // 1024) * 1024,
        math_warps=4,
    )


def partitions(rows: int) -> int:
    return 8 if rows <= 16 else 1


def metadata_buffer(rows: int, width: int, fp4: bool, block: int, num_sms: int, device: str = "cpu") -> torch.Tensor:
    """As large as the peer makes it: splits of all rows, and entries of 16 bytes for each."""
    per_split = _split(fp4) // block
    splits = rows * -(-width // per_split)
    entries = -(-splits // num_sms) * num_sms
    size = HEADER_BYTES + splits * (16 + 8 * per_split) + 16 * entries
    return torch.zeros(size, dtype=torch.uint8, device=device)


def workspace(rows: int, device: str = "cpu") -> torch.Tensor:
    """Counters, zero before the first launch, and 8 bytes a row."""
    return torch.zeros(WORKSPACE_STATE + 8 * rows, dtype=torch.uint8, device=device)


# ---- launches -------------------------------------------------------------------------------------------------------


def launch_metadata(
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    indices: torch.Tensor,
    page: int,
    lists: torch.Tensor,
    fp4: bool,
    block: int,
    metadata: torch.Tensor,
    workspace: torch.Tensor,
    num_sms: int,
) -> peer.Launch:
    """Fills `metadata`. Rows with the same `indices` stand next to each other and have the same pages."""
    rows, width = lists.shape
    arguments = (
        ("I", rows),
        ("I", 0),
        ("Q", 0),
        ("Q", 0),
        ("Q", context_lens.data_ptr()),
        ("Q", block_table.data_ptr()),
        ("I", block_table.stride(0)),
        ("Q", indices.data_ptr()),
        ("Q", lists.data_ptr()),
        ("Q", metadata.data_ptr()),
        ("Q", workspace.data_ptr()),
    )
    kernel = metadata_kernel(fp4, width, block, page, num_sms)
    return peer.Launch(kernel, (min(rows, 4 * num_sms), 1, 1), arguments)


def launch_ragged_metadata(
    starts: torch.Tensor,
    ends: torch.Tensor,
    keys: int,
    lists: torch.Tensor,
    metadata: torch.Tensor,
    workspace: torch.Tensor,
    num_sms: int,
    unaligned: bool = False,
) -> peer.Launch:
    """Fills `metadata` for blocks of 8 keys of one run, MXFP4."""
    rows, width = lists.shape
    arguments = (
        ("I", rows),
        ("I", keys),
        ("Q", starts.data_ptr()),
        ("Q", ends.data_ptr()),
        ("Q", 0),
        ("Q", 0),
        ("I", 0),
        ("Q", 0),
        ("Q", lists.data_ptr()),
        ("Q", metadata.data_ptr()),
        ("Q", workspace.data_ptr()),
    )
    kernel = metadata_kernel(True, width, 8, 0, num_sms, unaligned)
    return peer.Launch(kernel, (min(-(-rows // 2), 4 * num_sms), 1, 1), arguments)


def launch_ragged_logits(
    q: tuple[torch.Tensor, torch.Tensor],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    metadata: torch.Tensor,
    logits: torch.Tensor,
    num_sms: int,
    unaligned: bool = False,
) -> peer.Launch:
    """MXFP4, 2,048 blocks of 8 keys."""
    rows = len(q[0])
    pointers = (*q, *kv, weights, metadata, logits)
    sizes = (rows, len(kv[0]), 0, metadata.numel(), weights.stride(0), logits.stride(0))
    arguments = (*(("Q", tensor.data_ptr()) for tensor in pointers), *(("Q", size) for size in sizes), ("I", 2048 * 8))
    return peer.Launch(ragged_logits_kernel(rows, num_sms, unaligned), (4 * num_sms, 1, 1), arguments)


def launch_logits(
    q: tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    metadata: torch.Tensor,
    width: int,
    block: int,
    logits: torch.Tensor,
    num_sms: int,
) -> peer.Launch:
    """`logits` bf16 [rows, width * block], rows a multiple of 512 apart."""
    values, scales = q
    rows, pages, page = len(values), *kv_cache.shape[:2]
    kernel = logits_kernel(values.shape[-1] == 64, rows, block, page, num_sms)
    arguments = (
        ("Q", values.data_ptr()),
        ("Q", scales.data_ptr()),
        ("Q", kv_cache.data_ptr()),
        ("Q", 0),
        ("Q", weights.data_ptr()),
        ("Q", metadata.data_ptr()),
        ("Q", logits.data_ptr()),
        ("Q", rows),
        ("Q", pages),
        ("Q", kv_cache.stride(0)),
        ("Q", metadata.numel()),
        ("Q", weights.stride(0)),
        ("Q", logits.stride(0)),
        ("I", width * block),
    )
    return peer.Launch(kernel, (num_sms * partitions(rows), 1, 1), arguments)
