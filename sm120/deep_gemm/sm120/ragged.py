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
    if arguments.pair(q)[1] is not None:
        refuse("q", q, "e4m3; fp8_fp4_mqa_logits takes FP4")
    return ragged_logits(q, kv, weights, ks, ke, clean_logits, max_seqlen_k, torch.float32, out, block_max)


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
    return ragged_logits(
        q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k, logits_dtype, out,
        block_max,
    )  # fmt: skip


_known = checks.Known()


def ragged_logits(
    q, kv, weights, starts, ends, clean_logits, max_seqlen_k, logits_dtype, out, block_max, least=0
) -> torch.Tensor:
    """The same without defaults; tokens that see no more than `least` keys are left out."""
    checks.integer("max_seqlen_k", max_seqlen_k)
    arguments.logits_dtype(logits_dtype)
    values, scales = arguments.pair(q)
    keys, key_scales = arguments.pair(kv)
    inputs = {
        "q": values,
        "weights": weights,
        "kv": keys,
        "kv scales": key_scales,
        "cu_seq_len_k_start": starts,
        "cu_seq_len_k_end": ends,
        "q scales": scales,
    }
    tensors = *inputs.values(), out, block_max
    asked = q, kv, inputs, max_seqlen_k, logits_dtype, out, block_max, least
    try:
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        layouts, arch = checks.layouts(tensors), jit.architecture_of(values.device)
        num_sms = sms_to_use(values.device)
        call = layouts, (addresses[0] | addresses[2]) & 31, max_seqlen_k, logits_dtype, least, arch, num_sms
    except (AttributeError, IndexError, RuntimeError):
        _check(*asked)  # says what is wrong
        raise
    shape, sizes, plan = _known.get(call) or _known.keep(call, _check(*asked))
    if plan is not None:
        checks.memory_at(addresses, sizes, inputs, {"logits": out, "block_max": block_max})
        if debug.ON:
            block = 1 if block_max is None else 8
            debug.ragged(starts, ends, keys=keys.shape[0], columns=max_seqlen_k, block=block)
    if out is None:
        out = arguments.new_output(*shape, logits_dtype, values.device)
    if plan is not None:
        windows = logits.ragged(plan, inputs, addresses, out, block_max)
        if clean_logits:
            bounds = {"cu_seq_len_k_start": starts, "cu_seq_len_k_end": ends}
            clean.clean(out, windows, bounds, compressed=max_seqlen_k > 0)
    return out


def _check(
    q, kv, inputs, max_seqlen_k, dtype, out, block_max, least
) -> tuple[tuple[int, int], list[int], logits.Plan | None]:
    """Refuses what a call cannot be made with. Returns the result's shape, all tensors' sizes in bytes, and, unless
    nothing is to be done, how the call is made."""
    query = arguments.query(q, 3)
    fp4, _, _, device, (rows, _, row_bytes), heads, _ = query
    _, weights, _, _, starts, ends, _ = inputs.values()
    keys, _ = arguments.key_run(kv, fp4, row_bytes, device)
    arguments.weights(weights, rows, heads, device)
    arguments.bounds(starts, ends, rows, device)
    shape = rows, max_seqlen_k or keys.shape[0]
    arguments.output(out, *shape, dtype, device)
    arguments.block_max(block_max, *shape, device)
    sizes = checks.sizes(*inputs.values(), out, block_max)
    if 0 in shape:
        return shape, sizes, None
    windows = windows_of_bounds(starts, ends, keys.shape[0], least)
    plan = logits.plan_ragged(
        jit.architecture_of(device), query, weights, keys, max_seqlen_k, sms_to_use(device), windows, dtype, block_max
    )
    return shape, sizes, plan
