"""Arguments of a call, and whether what it returns is right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from cases import DIM, PAGE, Case

from deep_gemm.sm120 import reference


def random_rows(count: int, fp4: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [count, row bytes] and scales [count] of as many keys or heads. Random: zeros would run cooler."""
    if fp4:
        values = torch.randint(-128, 128, (count, DIM // 2), dtype=torch.int8, device=device)
        return values, torch.randint(122, 132, (count, 4), dtype=torch.uint8, device=device).view(torch.int32)[:, 0]
    values = torch.empty((count, DIM), dtype=torch.float8_e4m3fn, device=device)
    for piece in values.split(1 << 22):
        piece.copy_(torch.randn(piece.shape, device=device))
    return values, torch.rand(count, device=device) + 0.5


@dataclass
class Inputs:
    """Arguments of one call, and where its logits go."""

    case: Case
    q: tuple[torch.Tensor, torch.Tensor | None]
    weights: torch.Tensor
    lengths: torch.Tensor
    out: torch.Tensor
    kv_cache: torch.Tensor | None = None  # decode, prefill
    block_table: torch.Tensor | None = None
    kv: tuple[torch.Tensor, torch.Tensor] | None = None  # ragged
    starts: torch.Tensor | None = None
    ends: torch.Tensor | None = None


class Cache:
    """Pages of random keys, made once for each format: every decode and prefill case takes some of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pages: dict[bool, torch.Tensor] = {}

    def reserve(self, fp4: bool, pages: int) -> None:
        self.pages.clear()  # one format at a time
        row = DIM // 2 if fp4 else DIM
        cache = torch.empty((pages, PAGE * (row + 4)), dtype=torch.uint8, device=self.device)
        for piece in cache.split(1 << 16):
            values, scales = random_rows(len(piece) * PAGE, fp4, self.device)
            piece[:, : PAGE * row] = values.view(torch.uint8).view(len(piece), -1)
            piece[:, PAGE * row :] = scales.contiguous().view(torch.uint8).view(len(piece), -1)
        self.pages[fp4] = cache.view(pages, PAGE, 1, row + 4)

    def inputs(self, case: Case, sets: int) -> list[Inputs]:
        """Sets with different queries, pages and outputs; of pages as different as there are enough of."""
        made = []
        if case.kind != "ragged":
            if case.fp4 not in self.pages:
                self.reserve(case.fp4, case.distinct_keys // PAGE * sets)
            cache = self.pages[case.fp4]
            each = case.distinct_keys // PAGE
            order = torch.randperm(len(cache), device=self.device).to(torch.int32)
        for index in range(sets):
            query, scales = random_rows(case.tokens * case.heads, case.fp4, self.device)
            shape = (case.tokens,) if case.kind == "ragged" else (case.rows, case.next_n)
            made.append(
                Inputs(
                    case,
                    (query.view(*shape, case.heads, -1), scales.reshape(*shape, case.heads) if case.fp4 else None),
                    torch.randn((case.tokens, case.heads), device=self.device),
                    case.lengths.to(self.device),
                    torch.empty((case.tokens, -(-case.keys // 256) * 256), device=self.device)[:, : case.keys],
                )
            )
            if case.kind == "ragged":
                made[-1].kv = tuple(part.contiguous() for part in random_rows(case.keys, case.fp4, self.device))
                made[-1].starts = torch.zeros(case.tokens, dtype=torch.int32, device=self.device)
                made[-1].ends = made[-1].lengths.flatten()
            else:
                mine = order.roll(-index * each)[:each]
                table = mine.view(case.rows, -1) if case.kind == "decode" else mine.expand(case.rows, -1).contiguous()
                made[-1].kv_cache, made[-1].block_table = cache, table
        return made


def relative_error(inputs: Inputs, logits: torch.Tensor, samples: int = 4) -> float:
    """Distance from float64 in relative norm, over the first, the last and some other rows; infinite if not finite."""
    case = inputs.case
    tokens = {0, case.tokens - 1, *torch.randint(case.tokens, (max(0, samples - 2),)).tolist()}
    apart = length = 0.0
    for token in sorted(tokens):
        row, count = token // case.next_n, int(inputs.lengths.flatten()[token])
        values, scales = inputs.q
        flat = values.flatten(0, -3)[token], None if scales is None else scales.flatten(0, -2)[token]
        if inputs.kv is None:
            pages = inputs.block_table[row, : -(-count // PAGE)]
            found = inputs.kv_cache.view(len(inputs.kv_cache), -1)[pages.long()]
            split = PAGE * case.row_bytes
            keys = found[:, :split].reshape(-1, case.row_bytes)[:count]
            key_scales = found[:, split:].reshape(-1, 4)[:count]
        else:
            keys, key_scales = (part[:count] for part in inputs.kv)
        if case.fp4:
            keys = reference.dequantize(keys.view(torch.int8), key_scales.view(torch.int32).reshape(-1))
        else:
            keys = reference.dequantize(keys.view(torch.float8_e4m3fn), key_scales.view(torch.float32).reshape(-1))
        query = reference.dequantize(*flat)
        want = reference.logits_of(query.unsqueeze(0), keys, inputs.weights[token : token + 1])[0]
        got = logits[token, :count].double()
        apart += float((got - want).square().sum())
        length += float(want.square().sum())
    error = math.sqrt(apart / length) if length and math.isfinite(apart) else math.inf
    return error if length else 0.0


def poison(inputs: Inputs) -> None:
    """NaN where the logits will be: into our output, and into the memory that a peer's would be allocated from."""
    inputs.out.fill_(math.nan)
    torch.full((inputs.case.tokens, -(-inputs.case.keys // 256) * 256), math.nan, device=inputs.out.device)
