"""Kernels made ready before they are needed: at run time by `warmup`, when the wheel is built by `ship`."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checks
from .arguments import DIMS
from .jit import Kernel, architecture_of, load, shipped
from .kernels import clean, logits, metadata

_DTYPES = (torch.float32, torch.bfloat16)
_SHIPPED_ARCHITECTURE = "sm_120f"


def warmup(
    heads: int = 64,
    dim: int = 128,
    block_kv: int = 64,
    fp4: bool = False,
    *,
    next_n: int = 1,
    paged: bool = True,
    ragged: bool = True,
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
    place = _device(device)
    kernels = _kernels(
        architecture_of(place), heads, dim, block_kv, fp4, next_n, paged, ragged, weights_dtype, logits_dtype, alignment
    )
    for kernel in kernels:
        load(kernel, place)
    return [kernel.name for kernel in kernels]


def _kernels(
    arch, heads, dim, block_kv, fp4, next_n, paged, ragged, weights_dtype, logits_dtype, alignment
) -> list[Kernel]:
    config = functools.partial(
        logits.configure, arch, fp4, heads, dim, weights=weights_dtype, logits=logits_dtype, alignment=alignment
    )
    kernels = [clean.kernel(logits_dtype)]
    if paged:
        together = {logits.together(n) for n in range(1, min(next_n, 4) + 1)}
        few = {config(page=block_kv, few_rows=True, next_n=n).kernel: None for n in sorted(together)}
        kernels += [*metadata.KERNELS, *few, config(page=block_kv).kernel]
    if ragged:
        kernels += [config(page=0).kernel]
    return kernels


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
    """Compiles the models' common sizes into `folder`, in a wheel that is being built: pages of 64, fp32 weights."""
    kernels = itertools.chain.from_iterable(
        _kernels(_SHIPPED_ARCHITECTURE, heads, 128, 64, fp4, 4, True, True, torch.float32, dtype, 32)
        for heads in (64, 32, 16)
        for fp4 in (False, True)
        for dtype in _DTYPES
    )
    distinct = list(dict.fromkeys(kernels))
    size = shipped.write(folder, distinct, _SHIPPED_ARCHITECTURE)
    print(f"{len(distinct)} kernels for {_SHIPPED_ARCHITECTURE}, {size >> 10} KiB")
