"""Who computes it: each function takes Inputs and returns the call to be timed."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from cases import DIM, PAGE
from inputs import Inputs

from deep_gemm import sm120
from deep_gemm.sm120 import upstream

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class Unsupported(Exception):
    """This one does not do this case."""


def only(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def ours(inputs: Inputs) -> Callable[[], torch.Tensor]:
    it = inputs
    if it.kv is not None:
        arguments = (it.q, it.kv, it.weights, it.starts, it.ends)
        return functools.partial(sm120.fp8_fp4_mqa_logits, *arguments, out=it.out)
    slots = sm120.settings.sms_of(it.lengths.device)
    schedule = sm120.get_paged_mqa_logits_metadata(it.lengths, PAGE, slots)
    arguments = (it.q, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, it.case.keys)
    return functools.partial(sm120.fp8_fp4_paged_mqa_logits, *arguments, out=it.out)


def deep_gemm_package(package: Any, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """DeepGEMM's own functions, whichever generation."""
    it, fp8 = inputs, not inputs.case.fp4
    wanted = "mqa_logits" if it.kv is not None else "paged_mqa_logits"
    old, new = getattr(package, f"fp8_{wanted}", None), getattr(package, f"fp8_fp4_{wanted}", None)
    function, query = (old, it.q[0]) if fp8 and old else (new, it.q)
    only(function is not None, "not in this package")
    keywords = {}
    try:
        if "clean_logits" in inspect.signature(function).parameters:
            keywords["clean_logits"] = False
    except ValueError:  # a compiled function that does not say
        pass
    if it.kv is not None:
        return functools.partial(function, query, it.kv, it.weights, it.starts, it.ends, **keywords)
    schedule = package.get_paged_mqa_logits_metadata(it.lengths, PAGE, package.get_num_sms())
    arguments = (query, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, it.case.keys)
    return functools.partial(function, *arguments, **keywords)


def flashinfer(module: Any, inputs: Inputs) -> Callable[[], torch.Tensor]:
    it = inputs
    only(it.kv is None and not it.case.fp4, "FP8 paged only")
    slots = torch.cuda.get_device_properties(it.lengths.device).multi_processor_count
    schedule = module.get_paged_mqa_logits_metadata(it.lengths, PAGE, slots)
    arguments = (it.q[0], it.kv_cache, it.weights, it.lengths, it.block_table, schedule, it.case.keys)
    return functools.partial(module.fp8_paged_mqa_logits, *arguments)


def sglang(function: Callable, inputs: Inputs) -> Callable[[], torch.Tensor]:
    it = inputs
    only(it.kv is None and not it.case.fp4 and it.case.next_n == 1, "FP8 paged, next_n 1 only")
    arguments = (it.q[0], it.kv_cache, it.weights, it.lengths[:, 0].contiguous(), it.block_table, None, it.case.keys)
    return functools.partial(function, *arguments, clean_logits=False)


def plain_torch(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Operators of torch alone: dequantise to fp32, multiply in TF32 (exact for these numbers), relu, weigh, sum."""
    it, case = inputs, inputs.case
    rows = 1 if it.kv is not None else case.rows
    needed = 4 * (rows * case.keys * 2 * DIM + 2 * case.tokens * case.heads * case.keys)
    only(needed < 8 << 30, "more than 8 GiB of temporaries")

    def run() -> torch.Tensor:
        values, scales = (part.flatten(0, -2) if part.dim() > 1 else part for part in keys_of())
        keys = to_float(values, scales).view(rows, -1, DIM)[:, : case.keys]
        scale_of_query = None if it.q[1] is None else it.q[1]
        query = to_float(it.q[0], scale_of_query).view(rows, -1, DIM)
        scores = torch.baddbmm(query.new_zeros(1), query, keys.transpose(1, 2), beta=0).relu_()
        scores = scores.view(case.tokens, case.heads, -1)
        return torch.bmm(it.weights.unsqueeze(1), scores).squeeze(1)

    def keys_of() -> tuple[torch.Tensor, torch.Tensor]:
        if it.kv is not None:
            return it.kv
        split = PAGE * case.row_bytes
        found = it.kv_cache.view(len(it.kv_cache), -1)[it.block_table.long()].flatten(0, 1)
        values, scales = found[:, :split].reshape(-1, case.row_bytes), found[:, split:].reshape(-1, 4)
        if case.fp4:
            return values.view(torch.int8), scales.view(torch.int32)[:, 0]
        return values.view(torch.float8_e4m3fn), scales.view(torch.float32)[:, 0]

    def to_float(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        if not case.fp4:
            return values.float() if scales is None else values.float() * scales.unsqueeze(-1)
        code = values.view(torch.uint8).int()
        numbers = e2m1[torch.stack([code & 15, code >> 4], dim=-1).flatten(-2)]
        exponents = scales.contiguous().view(torch.uint8).view(*scales.shape, 4).float() - 127
        return (numbers.unflatten(-1, (4, 32)) * exponents.exp2().unsqueeze(-1)).flatten(-2)

    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=it.weights.device)
    e2m1 = torch.cat([e2m1, -e2m1])
    return run


if triton is not None:

    @triton.jit
    def _triton_logits(
        q, values, scales, table, ends, weights, logits, table_stride, value_stride, scale_stride, logits_stride,
        NEXT_N: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
    ):  # fmt: skip
        """One program: one query token and one page of keys."""
        token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        end = tl.load(ends + token)
        if block * PAGE < end:
            page = block.to(tl.int64)
            if PAGED:
                page = tl.load(table + token // NEXT_N * table_stride + block).to(tl.int64)
            key, head, dim = tl.arange(0, PAGE), tl.arange(0, HEADS), tl.arange(0, DIM)
            inside = block * PAGE + key < end
            query = tl.load(q + token * HEADS * DIM + head[:, None] * DIM + dim[None, :])
            keys = tl.load(values + page * value_stride + key[None, :] * DIM + dim[:, None], inside[None, :], 0.0)
            scores = tl.maximum(tl.dot(query, keys), 0.0) * tl.load(weights + token * HEADS + head)[:, None]
            result = tl.sum(scores, 0) * tl.load(scales + page * scale_stride + key, inside, 0.0)
            tl.store(logits + token * logits_stride + block * PAGE + key, result, inside)


def triton_kernel(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A plain Triton kernel: what an afternoon gives."""
    it, case = inputs, inputs.case
    only(not case.fp4, "FP8 only")
    only(case.heads >= 16, "16 heads or more")
    if it.kv is not None:
        values, scales, strides = *it.kv, (PAGE * DIM, PAGE)
    else:
        flat = it.kv_cache.view(-1)
        values, scales = flat.view(torch.float8_e4m3fn), flat.view(torch.float32)[PAGE * DIM // 4 :]
        strides = PAGE * (DIM + 4), PAGE * (DIM + 4) // 4
    table = it.block_table if it.kv is None else it.lengths
    grid = (case.tokens, -(-case.keys // PAGE))

    def run() -> torch.Tensor:
        _triton_logits[grid](
            it.q[0], values, scales, table, it.lengths, it.weights, it.out, table.stride(0), *strides,
            it.out.stride(0), case.next_n, case.heads, DIM, PAGE, it.kv is None,
        )  # fmt: skip
        return it.out

    return run


Prepare = Callable[[Inputs], Callable[[], torch.Tensor]]


def find_peers() -> tuple[dict[str, Prepare], dict[str, str]]:
    """Who is installed: {name: prepare}, and of the others {name: why not}."""
    found: dict[str, Prepare] = {"ours": ours}
    missing: dict[str, str] = {}

    def look(name: str, load: Callable[[], Prepare]) -> None:
        try:
            found[name] = load()
        except Exception as error:  # whatever the import of someone else's package raises
            missing[name] = f"{type(error).__name__}: {error}".partition("\n")[0]

    def package(name: str) -> Prepare:
        upstream.module()  # loads through the face, which upstream's own imports go through
        if name in upstream.failures:
            raise RuntimeError(upstream.failures[name])
        return functools.partial(deep_gemm_package, importlib.import_module(name))

    def from_module(prepare: Callable, module: str, attribute: str = "") -> Prepare:
        loaded = importlib.import_module(module)
        return functools.partial(prepare, getattr(loaded, attribute) if attribute else loaded)

    for name in upstream.CANDIDATES:
        look(name, functools.partial(package, name))
    look("flashinfer", lambda: from_module(flashinfer, "flashinfer.sm120_paged_mqa_logits"))
    tilelang = ("sglang.kernels.ops.attention.dsa.tilelang_kernel", "tilelang_fp8_paged_mqa_logits")
    look("sglang tilelang", lambda: from_module(sglang, *tilelang))
    in_torch = ("sglang.srt.layers.attention.dsv4.indexer", "fp8_paged_mqa_logits_torch_sm120")
    look("sglang torch", lambda: from_module(sglang, *in_torch))
    if triton is None:
        missing["triton"] = "triton is not installed"
    else:
        found["triton"] = triton_kernel
    found["torch"] = plain_torch
    return found, missing
