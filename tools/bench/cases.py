"""What is timed, and what a time means: arithmetic alone."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

DIM, PAGE, PREFILL = 128, 64, 4096
BATCHES, KEYS, NEXT_N = (1, 8, 64, 256, 1024), (1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10), (1, 2, 4)
PREFILL_KEYS, RAGGED_KEYS = (1 << 10, 8 << 10, 32 << 10, 128 << 10), (4 << 10, 8 << 10, 32 << 10, 128 << 10)
METADATA_ROWS = (1, 64, 1024, 4096, 12000)


@dataclass(frozen=True)
class Case:
    """One call. `rows` are requests (decode) or query tokens; `keys` is what the longest row sees."""

    kind: str
    fp4: bool
    rows: int
    keys: int
    next_n: int = 1
    heads: int = 64

    @property
    def tokens(self) -> int:
        return self.rows * self.next_n

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        """int32 [rows, next_n]: the keys that each query token sees."""
        row = torch.arange(self.rows, dtype=torch.int32).unsqueeze(1)
        if self.kind == "decode":
            last = torch.full_like(row, self.keys)
        else:
            last = self.keys - (self.rows - 1 - row) // (4 if self.kind == "prefill" else 1)
        return (last - self.next_n + 1 + torch.arange(self.next_n, dtype=torch.int32)).clamp(min=0)

    @functools.cached_property
    def pairs(self) -> int:
        """Query tokens times the keys they see: so many logits."""
        return int(self.lengths.sum())

    @property
    def distinct_keys(self) -> int:
        return int(self.lengths[:, -1].sum()) if self.kind == "decode" else self.keys

    @property
    def row_bytes(self) -> int:
        return DIM // 2 if self.fp4 else DIM

    @property
    def key_bytes(self) -> int:
        """Every key once, with its scale."""
        return self.distinct_keys * (self.row_bytes + 4)

    @property
    def bytes(self) -> int:
        """The fewest that can move: each input read once, each logit written once."""
        query = self.tokens * self.heads * (self.row_bytes + 4 * self.fp4)
        weights, windows = 4 * self.tokens * self.heads, 4 * self.tokens * (2 if self.kind == "ragged" else 1)
        pages = 0 if self.kind == "ragged" else 4 * self.rows * -(-self.keys // PAGE)
        return self.key_bytes + query + weights + windows + pages + 4 * self.pairs

    @property
    def flops(self) -> int:
        return 2 * self.heads * DIM * self.pairs

    @property
    def footprint(self) -> int:
        """Device memory for one set of inputs and its logits."""
        return self.bytes - 4 * self.pairs + 4 * self.tokens * self.keys

    @property
    def name(self) -> str:
        size = f"{self.rows}" if self.next_n == 1 else f"{self.rows}x{self.next_n}"
        return f"{'fp4' if self.fp4 else 'fp8'} {self.kind} {size} x {short(self.keys)}"


def short(number: int) -> str:
    return f"{number >> 10}K" if number >= 1024 and number % 1024 == 0 else str(number)


def plan(quick: bool = False, heads: int = 64) -> list[Case]:
    """The cases, those of --quick first: if time runs out, the others are missed."""
    first, rest = [], []
    for fp4 in (False, True):
        sizes = [("decode", b, k, n) for n, b, k in itertools.product(NEXT_N, BATCHES, KEYS)]
        sizes += [("prefill", PREFILL, k, 1) for k in PREFILL_KEYS] + [("ragged", PREFILL, k, 1) for k in RAGGED_KEYS]
        important = {("decode", 1, 16 << 10, 1), ("decode", 64, 16 << 10, 1), ("decode", 64, 16 << 10, 4)}
        important |= {("decode", 256, 4 << 10, 1), ("prefill", PREFILL, 8 << 10, 1), ("ragged", PREFILL, 8 << 10, 1)}
        for size in sizes:
            (first if size in important else rest).append(Case(size[0], fp4, *size[1:], heads))
    return first if quick else first + sorted(rest, key=lambda case: (case.next_n, case.flops))


def figures(case: Case, microseconds: float, ceilings: dict) -> dict[str, float]:
    """What a time means. The roof: no version of this call runs faster than `floor_us` on this card."""
    seconds = microseconds * 1e-6
    peak = peak_for(case.fp4, ceilings["mma_tflops"])
    floor = max(case.bytes / (ceilings["copy_tbps"] * 1e12), case.flops / (peak * 1e12))
    return {
        "tbps": case.bytes / seconds * 1e-12,
        "tflops": case.flops / seconds * 1e-12,
        "of_copy": case.bytes / seconds * 1e-12 / ceilings["copy_tbps"],
        "of_mma": case.flops / seconds * 1e-12 / peak,
        "floor_us": floor * 1e6,
        "of_roof": floor / seconds,
    }


def peak_for(fp4: bool, mma: dict[str, float]) -> float:
    """The best MMA there is for a format, of those measured; cards without an FP4 unit widen FP4 to FP8."""
    return mma["fp4"] if fp4 and "fp4" in mma else max(rate for name, rate in mma.items() if name != "fp4")
