"""What `silicon.py` times: the cases, their inputs, and what the results have to be."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from substitute import COUNTS, NATIVE, number_pairs

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import cases as bench
from cases import DIM, PAGE, short

KINDS = ("decode", "prefill", "ragged", "metadata")


# ---- cases: arithmetic ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(bench.Case):
    """One call, of the benchmark's kinds or metadata, whose `rows` are requests."""

    style: str = ""  # decode: mixed lengths; prefill: varlen, rows named as one sequence's; ragged: compressed

    @property
    def name(self) -> str:
        words = ["" if self.kind == "metadata" else "fp4" if self.fp4 else "fp8"]
        words += ["" if self.kind == "decode" else self.kind, f"{self.rows} x {short(self.keys)}"]
        words += [
            f"n{self.next_n}" if self.next_n > 1 else "",
            f"h{self.heads}" if self.heads != 64 else "",
            self.style,
        ]
        return " ".join(word for word in words if word)

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        if self.style != "mixed" and self.kind != "metadata":
            return super().lengths
        rng = torch.Generator().manual_seed(self.rows)
        exponents = torch.rand((self.rows, 1), generator=rng, dtype=torch.float64)
        lengths = (64 * (self.keys / 64) ** exponents).int()
        lengths[0] = self.keys
        return lengths

    @functools.cached_property
    def pages(self) -> torch.Tensor:
        """Pages of each row."""
        return (self.lengths[:, -1].long() + PAGE - 1) // PAGE

    @functools.cached_property
    def distinct_pages(self) -> int:
        return int(self.pages.sum()) if self.kind == "decode" else int(self.pages.max())

    @property
    def key_bytes(self) -> int:
        return 0 if self.kind == "metadata" else super().key_bytes

    @property
    def footprint(self) -> int:
        """Without logits."""
        return self.key_bytes + self.tokens * self.heads * (self.row_bytes + 8)

    @property
    def mmas(self) -> int:
        """Of 16 x 8 x 32 (FP8) or 64 (FP4)."""
        return 0 if self.kind == "metadata" else self.pairs * self.heads * DIM // (16 * 8 * (64 if self.fp4 else 32))

    @property
    def launches(self) -> int:
        """In a graph: many where a launch is short."""
        return 24 if self.mmas < 1 << 19 else 12 if self.mmas < 1 << 26 else 4

    @property
    def sets(self) -> int:
        """Of inputs that take turns: as many as launches, or enough to fill L2 several times."""
        return min(self.launches, max(4, -(-(192 << 20) // max(1, self.footprint))))


def plan() -> list[Case]:
    """All cases."""
    k = 1 << 10
    decode = [
        *((b, n, 1, 64, "") for b, n in [(1, 64), (1, k), (1, 4 * k), (1, 16 * k), (1, 64 * k), (1, 256 * k)]),
        *((1, 16 * k, n, 64, "") for n in (2, 4)),
        *((b, n, 1, 64, "") for b, n in [(2, 16 * k), (4, 16 * k), (8, 4 * k), (8, 16 * k), (16, 16 * k)]),
        *((8, 16 * k, n, 64, "") for n in (2, 3, 4, 6)),
        *((b, n, 1, 64, "") for b, n in [(64, 4 * k), (64, 16 * k), (256, 4 * k), (1024, 4 * k)]),
        *((64, 16 * k, n, 64, "") for n in (2, 4)),
        *((b, n, 1, 64, "mixed") for b, n in [(4, 64 * k), (16, 64 * k), (64, 32 * k), (256, 16 * k)]),
        *((b, n, 1, 32, "") for b, n in [(1, 64), (1, 16 * k), (8, 16 * k), (64, 16 * k), (1024, 4 * k)]),
        *((b, 16 * k, 4, 32, "") for b in (1, 64)),
        *((b, n, 1, 16, "") for b, n in [(1, 16 * k), (8, 16 * k), (64, 16 * k)]),
    ]
    prefill = [(512, 8 * k, 64, ""), (2048, 8 * k, 64, ""), (2048, 8 * k, 64, "varlen"), (4096, 16 * k, 64, "")]
    prefill += [(4096, 16 * k, 64, "varlen"), (2048, 8 * k, 32, ""), (2048, 8 * k, 32, "varlen")]
    ragged = [(r, n, h, "") for r, n in [(2048, 8 * k), (4096, 32 * k)] for h in (64, 32)]
    ragged += [(2048, 8 * k, 16, ""), (2048, 8 * k, 64, "compressed"), (2048, 8 * k, 32, "compressed")]
    cases = []
    for fp4 in (False, True):
        cases += [Case("decode", fp4, *sizes) for sizes in decode]
        cases += [Case("prefill", fp4, rows, keys, 1, heads, style) for rows, keys, heads, style in prefill]
        cases += [Case("ragged", fp4, rows, keys, 1, heads, style) for rows, keys, heads, style in ragged]
    return cases + [Case("metadata", False, rows, 64 * k) for rows in (1, 64, 1024, 4096)]


# ---- inputs ---------------------------------------------------------------------------------------------------------


def random_bytes(rows: int, width: int, device: torch.device) -> torch.Tensor:
    """uint8 [rows, width]: as pairs finite fp16 from 1/8 to 2, as e4m3 no NaN, as e2m1 anything."""
    words = torch.randint(-(2**31), 2**31 - 1, (rows, width // 4), dtype=torch.int32, device=device)
    return words.bitwise_and_(0x8F778F77 - 2**32).bitwise_or_(0x30003000).view(torch.uint8)


def random_scales(count: int, fp4: bool, device: torch.device) -> torch.Tensor:
    """fp32, or words of UE8M0."""
    if not fp4:
        return torch.rand(count, device=device) + 0.5
    return torch.randint(122, 132, (count, 4), dtype=torch.uint8, device=device).view(torch.int32)[:, 0]


@dataclass
class Inputs:
    """Arguments of one call, and where its logits go."""

    case: Case
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    weights: torch.Tensor
    lengths: torch.Tensor
    logits: torch.Tensor  # as large as the peer wants it
    kv_cache: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    kv: tuple[torch.Tensor, torch.Tensor] | None = None
    starts: torch.Tensor | None = None
    made: dict = field(default_factory=dict)

    @property
    def out(self) -> torch.Tensor:
        return self.logits[: self.case.tokens, : self.case.keys]


class Pool:
    """Pages of random keys: every paged case takes some of them, each of its sets others."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.fp4, self.cache = device, None, None

    def pages(self, fp4: bool, count: int) -> torch.Tensor:
        if self.fp4 is not fp4 or len(self.cache) < count:
            self.cache = None
            row = DIM // 2 if fp4 else DIM
            flat = torch.empty((count, PAGE * (row + 4)), dtype=torch.uint8, device=self.device)
            for piece in flat.split(1 << 15):
                piece[:, : PAGE * row] = random_bytes(len(piece), PAGE * row, self.device)
                scales = random_scales(len(piece) * PAGE, fp4, self.device).contiguous()
                piece[:, PAGE * row :] = scales.view(torch.uint8).view(len(piece), -1)
            self.fp4, self.cache = fp4, flat.view(count, PAGE, 1, row + 4)
        return self.cache

    def inputs(self, case: Case) -> list[Inputs]:
        """`case.sets` of them, and one more to begin with."""
        made, device, count = [], self.device, case.sets + 1
        lengths = case.lengths.to(device)
        if case.kind == "metadata":
            nothing = torch.empty(0, device=device)
            return [Inputs(case, nothing, nothing, lengths.clone(), nothing) for _ in range(count)]
        if case.kind != "ragged":
            cache = self.pages(case.fp4, case.distinct_pages * count)
            order = torch.randperm(len(cache), device=device).int()
            columns = int(case.pages.max())
            if case.kind == "decode":
                place = torch.arange(columns).expand(case.rows, -1) + (case.pages.cumsum(0) - case.pages).unsqueeze(1)
                place = place.clamp(max=case.distinct_pages - 1).to(device)
        for index in range(count):
            shape = (case.rows,) if case.kind == "ragged" else (case.rows, case.next_n)
            values = random_bytes(case.tokens * case.heads, case.row_bytes, device).view(*shape, case.heads, -1)
            if case.fp4:
                scales = random_scales(case.tokens * case.heads, True, device).view(*shape, case.heads).contiguous()
                q = (values.view(torch.int8), scales)
            else:
                q = values.view(torch.float8_e4m3fn)
            weights = torch.randn((case.tokens, case.heads), device=device)
            one = Inputs(case, q, weights, lengths.clone(), torch.empty(0))
            if case.kind == "ragged":
                compressed = case.keys if case.style == "compressed" else 0
                rows = -(-case.rows // (128 // case.heads)) * (128 // case.heads)
                width = -(-case.keys // 256) * 256 if compressed else -(-(case.keys + 256) // 64) * 64
                one.logits = torch.empty((rows, width), device=device)
                keys = random_bytes(case.keys, case.row_bytes, device)
                keys = keys.view(torch.int8 if case.fp4 else torch.float8_e4m3fn)
                one.kv = (keys, random_scales(case.keys, case.fp4, device).contiguous())
                one.lengths = one.lengths.flatten()
                one.starts = torch.zeros_like(one.lengths)
            else:
                one.logits = torch.empty((case.tokens, -(-case.keys // 256) * 256), device=device)
                mine = order[index * case.distinct_pages : (index + 1) * case.distinct_pages]
                one.kv_cache = cache
                one.block_table = mine[place] if case.kind == "decode" else mine.expand(case.rows, -1).contiguous()
                if case.style == "varlen":
                    one.indices = torch.zeros(case.rows, dtype=torch.int32, device=device)
            made.append(one)
        return made


# ---- are they right -------------------------------------------------------------------------------------------------


def keys_of(it: Inputs, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, uint8 [keys, row bytes], and scales, uint8 [keys, 4], that a token sees."""
    case, count = it.case, int(it.lengths.flatten()[token])
    if case.kind == "ragged":
        return it.kv[0][:count].view(torch.uint8), it.kv[1][:count].view(torch.uint8).view(count, 4)
    pages = it.block_table[token // case.next_n, : -(-count // PAGE)].long()
    found = it.kv_cache.view(len(it.kv_cache), -1)[pages]
    split = PAGE * case.row_bytes
    return found[:, :split].reshape(-1, case.row_bytes)[:count], found[:, split:].reshape(-1, 4)[:count]


def expected(it: Inputs, form: str, token: int, dequantize: Callable) -> torch.Tensor:
    """Float64 logits of one token, by the definition of the form's MMA."""
    fp4 = it.case.fp4
    values, scales = it.q if fp4 else (it.q, None)
    query = values.flatten(0, -3)[token].contiguous()
    keys, key_scales = keys_of(it, token)
    if form == NATIVE:
        query = dequantize(query, scales.flatten(0, -2)[token] if fp4 else None)
        words = key_scales.contiguous().view(torch.int32 if fp4 else torch.float32)[:, 0]
        keys = dequantize(keys.contiguous().view(torch.int8 if fp4 else torch.float8_e4m3fn), words)
    else:
        query, keys = number_pairs(query), number_pairs(keys.contiguous())
        if not fp4:
            keys = keys * key_scales.contiguous().view(torch.float32).double()  # [keys, 1]
    return torch.relu(keys @ query.T) @ it.weights[token].double() * COUNTS[form]


def error_against_float64(it: Inputs, form: str, logits: torch.Tensor, dequantize: Callable) -> float:
    """Relative norm over the first, the last and a row between; infinite if not finite."""
    apart = length = 0.0
    for token in sorted({0, it.case.tokens // 2, it.case.tokens - 1}):
        want = expected(it, form, token, dequantize)
        apart += float((logits[token, : len(want)].double() - want).square().sum())
        length += float(want.square().sum())
    return math.sqrt(apart / length) if math.isfinite(apart) else math.inf


def distance(it: Inputs, a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative norm between two results, over every logit that is seen."""
    lengths, apart, length = it.lengths.flatten(), 0.0, 0.0
    step = max(1, (1 << 25) // it.case.keys)
    column = torch.arange(it.case.keys, device=a.device)
    for first in range(0, it.case.tokens, step):
        rows = slice(first, first + step)
        seen = column < lengths[rows].unsqueeze(1)
        x, y = a[rows].where(seen, 0), b[rows].where(seen, 0)
        apart += (
            float((x - y).double().square().sum()) if len(x) * len(column) < 1 << 20 else float((x - y).square().sum())
        )
        length += float(y.square().sum())
    return math.sqrt(apart / length) if math.isfinite(apart) else math.inf
