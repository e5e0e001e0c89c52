"""Logits against one run of keys, of which each row sees a range."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import arguments, checks, debug, jit
from .checks import refuse
from .kernels import clean, logits
from .kernels.windows import windows_of_bounds
from .settings import sms_to_use


def _bounds_by_either_name(function: Callable) -> Callable:
    """Takes the bounds as `ks`, `ke` or as `cu_seq_len_k_start`, `cu_seq_len_k_end`; `function` has one pair."""
    short, long = ("ks", "ke"), ("cu_seq_len_k_start", "cu_seq_len_k_end")
    aliases = dict(zip(long, short) if "ks" in inspect.signature(function).parameters else zip(short, long))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        for alias, name in aliases.items():
            if alias in kwargs:
                if name in kwargs:
                    refuse(alias, kwargs[alias], f"one of {alias} and {name}, not both")
                kwargs[name] = kwargs.pop(alias)
        return function(*args, **kwargs)

    return call


@_bounds_by_either_name
def fp8_mqa_logits(
    q: torch.Tensor,
    kv: arguments.Pair,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    clean_logits: bool = False,
    max_seqlen_k: int = 0,
    *,
    out: torch.Tensor | None = None,
    block_max: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of FP8 queries against one run of FP8 keys, in fp32.

    As `fp8_fp4_mqa_logits` with an e4m3 `q`; the bounds may be given under the names it has for them.
    """
    clean_logits, max_seqlen_k = arguments.of_either_generation_ragged(clean_logits, max_seqlen_k)
    query = arguments.query(q, 3)
    if query.fp4:
        refuse("q", q, "e4m3; fp8_fp4_mqa_logits takes FP4")
    return ragged_logits(query, kv, weights, ks, ke, clean_logits, max_seqlen_k, torch.float32, out, block_max)


@_bounds_by_either_name
def fp8_fp4_mqa_logits(
    q: torch.Tensor | arguments.Pair,
    kv: arguments.Pair,
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool = False,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
    schedule_meta: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    block_max: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of FP8 or FP4 queries against one run of keys, of which row i sees [start[i], end[i]).

    q                   FP8: e4m3 [seq_len, heads, dim], alone or as (q, None)
                        FP4: (int8 [seq_len, heads, dim / 2], int32 [seq_len, heads])
    kv                  FP8: (e4m3 [seq_len_kv, dim], fp32 [seq_len_kv])
                        FP4: (int8 [seq_len_kv, dim / 2], int32 [seq_len_kv])
    weights             fp32 or bf16 [seq_len, heads]
    cu_seq_len_k_start  int32 [seq_len], also `ks`
    cu_seq_len_k_end    int32 [seq_len], also `ke`; start >= end is an empty row; cut at the keys there are
    clean_logits        -inf outside each row's range; otherwise what lies there is not touched
    max_seqlen_k        0: column n is key n. More: column n is key start[i] + n, and there are so many columns
    logits_dtype        float32 or bfloat16
    schedule_meta       taken for the callers' sake; the grid follows from the shapes
    out                 a tensor of the result's shape and dtype, of any row stride, that is written and returned
    block_max           fp32 [seq_len, ceil(columns / 8)], as in `fp8_fp4_paged_mqa_logits`: column b is keys 8b to
                        8b + 7 of the run; with max_seqlen_k column 0 is the block with the row's first key, start[i]
                        is taken for a multiple of 8, and blocks past the last column are left out

    Returns [seq_len, seq_len_kv], or [seq_len, max_seqlen_k], a view whose rows are a multiple of 1024 bytes apart.
    As the sixth positional argument an int is `max_seqlen_k`, and `schedule_meta` follows (sgl-deep-gemm 0.2.5, vLLM).
    """
    if isinstance(max_seqlen_k, torch.Tensor) or max_seqlen_k is None:
        max_seqlen_k = 0  # the seventh positional argument of 0.2.5 is schedule_meta
    clean_logits, max_seqlen_k = arguments.of_either_generation_ragged(clean_logits, max_seqlen_k)
    query = arguments.query(q, 3)
    return ragged_logits(
        query, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k, logits_dtype, out,
        block_max,
    )  # fmt: skip


def ragged_logits(
    query: arguments.Query, kv, weights, starts, ends, clean_logits, max_seqlen_k, logits_dtype, out, block_max, least=0
) -> torch.Tensor:
    """The same of checked queries; tokens that see no more than `least` keys are left out."""
    fp4, values, scales, device, (rows, _, row_bytes), heads, dim = query

    keys, key_scales = arguments.key_run(kv, fp4, row_bytes, device)
    arguments.weights(weights, rows, heads, device)
    bounds = arguments.bounds(starts, ends, rows, device)
    checks.boolean("clean_logits", clean_logits)
    checks.integer("max_seqlen_k", max_seqlen_k)
    out = arguments.output(out, rows, max_seqlen_k or keys.shape[0], logits_dtype, device)
    arguments.block_max(block_max, out)
    if out.numel() == 0:
        return out

    if debug.ON:
        block = 1 if block_max is None else 8
        debug.ragged(starts, ends, keys=keys.shape[0], columns=max_seqlen_k, block=block)
    config = logits.configure(
        jit.architecture_of(device), fp4, heads, dim, 0, weights.dtype, logits_dtype, 0, 1,
        logits.alignment(values.data_ptr(), keys.data_ptr()), 0, block_max is not None,
    )  # fmt: skip
    windows = windows_of_bounds(starts, ends, keys.shape[0], least)
    logits.ragged(
        config, sms_to_use(device), max_seqlen_k,
        query=values, query_scales=scales, weights=weights, keys=keys, key_scales=key_scales,
        bounds=bounds, windows=windows, out=out, maxima=block_max,
    )  # fmt: skip
    if clean_logits:
        clean.clean(out, windows, bounds, compressed=max_seqlen_k > 0)
    return out
