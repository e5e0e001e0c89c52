"""Kernels made ready before they are needed: at run time by `warmup`, when the wheel is built by `ship`."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checks
from .arguments import DIMS, LARGEST_K
from .jit import Kernel, architecture_of, load, shipped
from .kernels import carry, clean, listed_columns, logits, metadata, sparse, topk
from .settings import EMULATED_SMS, sms_to_use

_DTYPES = (torch.float32, torch.bfloat16)
_SHIPPED_ARCHITECTURE = "sm_120f"
_COLUMNS = [n << shift for shift in range(8, 20) for n in (2, 3)]  # 512 to 1.5M: top-k's forms change with them


def warmup(
    heads: int = 64,
    dim: int = 128,
    block_kv: int = 64,
    fp4: bool = False,
    *,
    next_n: int = 1,
    paged: bool = True,
    ragged: bool = True,
    sparse_block_kv: int = 0,
    block_max: bool = False,
    topk: int = 0,
    weights_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype = torch.float32,
    alignment: int = 32,
    device: torch.device | str | int | None = None,
) -> list[str]:
    """Compiles and loads what a model needs, so that serving compiles nothing and CUDA graphs can be captured at once.
    The defaults are DeepSeek-V4's.

    heads, dim, block_kv, fp4    as in the functions' arguments
    next_n                       the most query tokens of a request
    paged, ragged                for which of the functions
    sparse_block_kv              for the sparse functions too, with blocks of so many keys, and weights in bf16 as well
                                 as in weights_dtype; 0: not for them. DeepSeek-V4.1: heads=32, fp4=True,
                                 sparse_block_kv=8, block_max=True, topk=512
    block_max                    for the dense functions with maxima of blocks too
    topk                         for the functions that choose so many keys of each row, too; 0: not for them. With
                                 sparse_block_kv also for those that make candidates and choose among them
    weights_dtype, logits_dtype  float32 or bfloat16
    alignment                    bytes, 4 to 32: where q, keys and pages begin. PyTorch's allocations have 32; less if
                                 yours are carved out of a larger one
    device                       the current GPU; without one, the CPU

    Returns the kernels' names.
    """
    _among("heads", heads, range(8, 65, 8))
    _among("dim", dim, DIMS[checks.boolean("fp4", fp4)])
    _among("block_kv", block_kv, range(16, 2**16 + 1, 16))
    _among("weights_dtype", weights_dtype, _DTYPES)
    _among("logits_dtype", logits_dtype, _DTYPES)
    _among("alignment", alignment, (4, 8, 16, 32))
    checks.integer("next_n", next_n, 1)
    _among("sparse_block_kv", sparse_block_kv, range(0, 65, 8))
    checks.boolean("block_max", block_max)
    checks.integer("topk", topk, 0, LARGEST_K)
    place = _device(device)
    arch, kernels = architecture_of(place), []
    for maxima in (False, True) if block_max else (False,):
        kernels += _kernels(
            arch, heads, dim, block_kv, fp4, next_n, paged, ragged, weights_dtype, logits_dtype, alignment, maxima
        )
    if topk:
        sms = sms_to_use(place)
        kernels += _topk_kernels(topk, logits_dtype, sms, sparse_block_kv > 0)
        if paged and any(logits.leaves_fronts(1, columns, topk, sms) for columns in _COLUMNS):
            kernels += _front_kernels(arch, heads, dim, block_kv, fp4, sms, weights_dtype, alignment)
    if sparse_block_kv:
        if dim != 128 or block_kv % sparse_block_kv:
            checks.refuse("sparse_block_kv", sparse_block_kv, "dim = 128, and pages of a multiple of the block")
        pages = (block_kv,) * paged + (0,) * ragged
        for weights in (torch.bfloat16, weights_dtype):
            kernels += _sparse_kernels(arch, heads, pages, fp4, sparse_block_kv, alignment, weights)
    kernels = _distinct(kernels)
    for kernel in kernels:
        load(kernel, place)
    return [kernel.name for kernel in kernels]


def _kernels(
    arch, heads, dim, block_kv, fp4, next_n, paged, ragged, weights_dtype, logits_dtype, alignment, maxima=False
) -> list[Kernel]:
    config = functools.partial(
        logits.configure, arch, fp4, heads, dim, weights=weights_dtype, logits=logits_dtype, alignment=alignment,
        maxima=maxima,
    )  # fmt: skip
    kernels = [clean.kernel(logits_dtype)]
    if paged:
        together = range(1, min(next_n, 2) + 1)
        sizes = [*itertools.product(logits.FEW_ROWS, together), (0, 1), (0, 2)]
        paged_kernels = {config(page=block_kv, few_rows=rows, next_n=n).kernel: None for rows, n in sizes}
        kernels += [*metadata.KERNELS, *paged_kernels]
    if ragged:
        kernels += [config(page=0).kernel]
    return kernels


def _front_kernels(arch, heads, dim, block_kv, fp4, num_sms, weights_dtype, alignment) -> list[Kernel]:
    """What scores and chooses the keys of one token."""
    config = logits.configure(
        arch, fp4, heads, dim, block_kv, weights_dtype, torch.float32, few_rows=1, alignment=alignment, fronts=True
    )
    return [config.kernel, topk.fronts(num_sms).kernel]


def _sparse_kernels(
    arch: str,
    heads: int,
    pages: tuple[int, ...],
    fp4: bool,
    block: int,
    alignment: int,
    weights: torch.dtype = torch.bfloat16,
) -> list[Kernel]:
    """`pages` are keys of a page each, or 0: ragged."""
    config = functools.partial(
        logits.configure, arch, fp4, heads, 128, weights=weights, logits=torch.bfloat16, alignment=alignment
    )
    rows = ({"eights": True}, *({"few_rows": most} for most in logits.FEW_ROWS), {})
    return [
        *(sparse.metadata_kernel(page, block) for page in pages),
        *(config(page=page, block=block, **which).kernel for page in pages for which in rows),
    ]


def _topk_kernels(k: int, dtype: torch.dtype, num_sms: int, sparse: bool) -> list[Kernel]:
    """What chooses `k` keys out of logits of `dtype`, and, of fp32, what carries them from piece to piece (fp32 is what
    the functions that score and choose have). `sparse`: what makes candidates and chooses among theirs."""
    few = [1 << shift for shift in range(10)] + [n * num_sms // 2 + more for n in (1, 2, 4) for more in (0, 1)]
    many = [2 * num_sms, 4096]
    kernels = _forms(dtype, k, few + many, num_sms)
    if dtype == torch.float32:
        kernels += [*_forms(dtype, k, many, num_sms, ascending=True), carry.KERNEL]
    if sparse:
        kernels += _forms(torch.float32, LARGEST_K, few + many, num_sms, ascending=True)
        kernels += [*_forms(torch.bfloat16, k, few + many, num_sms), listed_columns.KERNEL]
    return kernels


def _forms(dtype: torch.dtype, k: int, rows: list[int], num_sms: int, ascending: bool = False) -> list[Kernel]:
    """The kernels that a choice among so many rows, of any number of columns, is made by."""
    kernels = []
    for count, columns in itertools.product(rows, _COLUMNS):
        config, parts = topk.configure(dtype, k, count, columns, num_sms, ascending)
        kernels += [config.choose] if parts == 1 else [config.choose, config.merge]
    return kernels


def _distinct(kernels: list[Kernel]) -> list[Kernel]:
    """One of each name: those that differ in anything have names that differ."""
    return list({kernel.name: kernel for kernel in kernels}.values())


def _among(argument: str, value: Any, choices: Sequence) -> None:
    if value not in choices:
        checks.refuse(argument, value, f"one of {', '.join(map(str, choices[:4]))}{', ...' if choices[4:] else ''}")


def _device(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place


def ship(folder: Path) -> None:
    """Compiles the models' common sizes into `folder`, in a wheel that is being built: pages of 64, fp32 weights; for
    DeepSeek-V4.1 (32 heads) pages of 128 as well, maxima of blocks, and sparse logits of blocks of 8, by bf16 weights
    and, of FP4 in pages, by fp32 ones; top-k of 512, 1,024 and 2,048 keys."""
    arch = _SHIPPED_ARCHITECTURE
    kernels = [
        kernel
        for heads, fp4, page in itertools.chain(
            itertools.product((64, 32, 16), (False, True), (64,)), ((32, False, 128), (32, True, 128))
        )
        for dtype in _DTYPES
        for kernel in _kernels(arch, heads, 128, page, fp4, 4, True, True, torch.float32, dtype, 32)
    ]
    for page in (64, 128):
        kernels += _kernels(arch, 32, 128, page, True, 4, True, True, torch.float32, torch.float32, 32, maxima=True)
    kernels += [kernel for fp4 in (False, True) for kernel in _sparse_kernels(arch, 32, (64, 128, 0), fp4, 8, 32)]
    kernels += _sparse_kernels(arch, 32, (64, 128), True, 8, 32, torch.float32)
    for k in (512, 1024, 2048):
        kernels += _topk_kernels(k, torch.float32, EMULATED_SMS, sparse=k == 512)
    for heads in (64, 32):  # of FP8 they spill two registers around the loop
        kernels += _front_kernels(arch, heads, 128, 64, True, EMULATED_SMS, torch.float32, 32)
    distinct = _distinct(kernels)
    size = shipped.write(folder, distinct, arch)
    print(f"{len(distinct)} kernels for {arch}, {size >> 10} KiB")
