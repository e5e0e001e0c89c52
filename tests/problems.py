"""Fresh random problems for the indexer's functions, and the comparison with float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import deep_gemm
from deep_gemm.sm120 import checks, paged, reference
from deep_gemm.sm120.emulator import recording
from deep_gemm.sm120.kernels import logits


def generator() -> torch.Generator:
    """Seeded anew by the system each time; the seed stands in the message of a failed comparison."""
    made = torch.Generator()
    made.seed()
    return made


def random_fp8(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """e4m3 over many magnitudes, with zeros and subnormals."""
    numbers = torch.randn(shape, generator=rng) * torch.exp2(torch.randint(-4, 4, shape, generator=rng).float())
    return numbers.to(torch.float8_e4m3fn)


def random_fp4(shape: tuple[int, ...], rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed e2m1 [..., dim / 2] and UE8M0 words [...] for a shape [..., dim]."""
    values = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=rng, dtype=torch.uint8).view(torch.int8)
    scales = torch.randint(120, 134, (*shape[:-1], 4), generator=rng, dtype=torch.uint8)
    return values, scales.view(torch.int32).squeeze(-1)


def random_mxfp8(shape: tuple[int, ...], rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [..., dim] and UE8M0 words [...]."""
    scales = torch.randint(120, 134, (*shape[:-1], 4), generator=rng, dtype=torch.uint8)
    return random_fp8(shape, rng), scales.view(torch.int32).squeeze(-1)


def random_weights(rows: int, heads: int, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((rows, heads), generator=rng).to(dtype)


def make_cache(
    pages: int, block_kv: int, dim: int, fp4: bool, rng: torch.Generator, padding: int = 0, mx: bool = False
) -> torch.Tensor:
    """uint8 [pages, block_kv, 1, row + 4]: per page all values, then all scales, then `padding` bytes of garbage."""
    row = dim // 2 if fp4 else dim
    if fp4:
        values, scales = random_fp4((pages, block_kv, dim), rng)
    elif mx:
        values, scales = random_mxfp8((pages, block_kv, dim), rng)
    else:
        values = random_fp8((pages, block_kv, dim), rng)
        scales = torch.rand((pages, block_kv), generator=rng) * 3 + 0.01
    size = block_kv * (row + 4)
    flat = torch.randint(0, 256, (pages, size + padding), generator=rng, dtype=torch.uint8)
    flat[:, : block_kv * row] = values.view(torch.uint8).reshape(pages, -1)
    flat[:, block_kv * row : size] = scales.view(torch.uint8).reshape(pages, -1)
    return flat.as_strided((pages, block_kv, 1, row + 4), (size + padding, row + 4, row + 4, 1))


def to_device(kv_cache: torch.Tensor, device: str) -> torch.Tensor:
    """The cache with its padding, which `.to()` would leave out."""
    if device == "cpu":
        return kv_cache
    pages, block_kv, _, row = kv_cache.shape
    stride = max(kv_cache.stride(0), block_kv * row)
    flat = torch.full((pages, stride), 0xFF, dtype=torch.uint8, device=device)
    return flat.as_strided(kv_cache.shape, (stride, row, row, 1)).copy_(kv_cache)


@dataclass
class Paged:
    """Arguments of the paged functions. `lengths` is [batch][next_n], or [batch] for 1-D lengths."""

    lengths: list
    next_n: int = 1
    heads: int = 64
    dim: int = 128
    block_kv: int = 64
    fp4: bool = False
    padding: int = 0
    slots: int = 188
    max_context_len: int = 0
    weights_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rng: torch.Generator = field(default_factory=generator)

    def __post_init__(self) -> None:
        rng, device = self.rng, self.device
        lens = torch.tensor(self.lengths, dtype=torch.int32)
        batch = len(self.lengths)
        longest = lens.reshape(batch, -1).amax(dim=1).tolist() if batch else []
        needed = [-(-length // self.block_kv) for length in longest]
        pages = sum(needed) + 3
        order = torch.randperm(pages, generator=rng).tolist()
        # What lies past a row's pages must never be followed.
        table = torch.randint(
            -(2**31), 2**31 - 1, (batch, max(needed, default=0) + 2), generator=rng, dtype=torch.int32
        )
        for row, count in enumerate(needed):
            table[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        self.kv_cache = to_device(make_cache(pages, self.block_kv, self.dim, self.fp4, rng, self.padding), device)
        self.block_table = table.to(device)
        self.context_lens = lens.to(device)
        shape = (batch, self.next_n, self.heads, self.dim)
        if self.fp4:
            self.q = tuple(part.to(device) for part in random_fp4(shape, rng))
        else:
            self.q = random_fp8(shape, rng).to(device)
        self.weights = random_weights(batch * self.next_n, self.heads, rng, self.weights_dtype).to(device)
        self.max_context_len = self.max_context_len or max(longest, default=0)

    def arguments(self, schedule: torch.Tensor) -> tuple:
        """The seven that every generation of callers hands in."""
        return self.q, self.kv_cache, self.weights, self.context_lens, self.block_table, schedule, self.max_context_len

    def expected(self) -> torch.Tensor:
        arguments = (self.q, self.kv_cache, self.weights, self.context_lens, self.block_table, self.max_context_len)
        return reference.paged_logits(*arguments)


@dataclass
class Ragged:
    """Arguments of the ragged functions."""

    starts: list[int]
    ends: list[int]
    keys: int
    heads: int = 64
    dim: int = 128
    fp4: bool = False
    weights_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rng: torch.Generator = field(default_factory=generator)

    def __post_init__(self) -> None:
        rng, device, rows = self.rng, self.device, len(self.starts)
        if self.fp4:
            self.q = tuple(part.to(device) for part in random_fp4((rows, self.heads, self.dim), rng))
            self.kv = tuple(part.to(device) for part in random_fp4((self.keys, self.dim), rng))
        else:
            self.q = random_fp8((rows, self.heads, self.dim), rng).to(device)
            scales = torch.rand(self.keys, generator=rng) * 3 + 0.01
            self.kv = (random_fp8((self.keys, self.dim), rng).to(device), scales.to(device))
        self.weights = random_weights(rows, self.heads, rng, self.weights_dtype).to(device)
        self.ks = torch.tensor(self.starts, dtype=torch.int32, device=device)
        self.ke = torch.tensor(self.ends, dtype=torch.int32, device=device)

    def arguments(self) -> tuple:
        return self.q, self.kv, self.weights, self.ks, self.ke

    def expected(self, max_seqlen_k: int = 0) -> torch.Tensor:
        return reference.ragged_logits(*self.arguments(), max_seqlen_k)


def random_lists(
    lengths: list[int], width: int, block: int, kind: str, rng: torch.Generator, tail: str = "largest"
) -> torch.Tensor:
    """int32 [rows, width] of block ids. `kind`: "ascending" as frameworks make them, "any" order with repeats. After
    the entries that count comes `tail`: SGLang's 2^31 - 1 ("largest"), vLLM's last id ("last") or "garbage"."""
    lists = torch.full((len(lengths), width), 2**31 - 1, dtype=torch.int32)
    if tail == "garbage":
        lists = torch.randint(-(2**31), 2**31 - 1, lists.shape, generator=rng, dtype=torch.int32)
    for row, length in enumerate(lengths):
        blocks = -(-length // block)
        count = min(width, blocks)
        if kind == "ascending":
            chosen = torch.randperm(blocks, generator=rng)[:count].sort().values
        else:
            chosen = torch.randint(0, max(blocks, 1), (count,), generator=rng)
        lists[row, :count] = chosen.to(torch.int32)
        if tail == "last" and count:
            lists[row, count:] = lists[row, count - 1]
    return lists


def shared_lists(rows: int, width: int, blocks: int, kept: float) -> torch.Tensor:
    """Lists as a prefill makes them: from row to row `kept` of the blocks stay, ascending."""
    lists, chosen = [], torch.randperm(blocks)[:width]
    for _ in range(rows):
        lists.append(chosen.sort().values)
        leaving = torch.randperm(width)[: round(width * (1 - kept))]
        free = torch.ones(blocks, dtype=torch.bool)
        free[chosen] = False
        coming = free.nonzero().flatten()
        chosen[leaving] = coming[torch.randperm(len(coming))[: len(leaving)]]
    return torch.stack(lists).to(torch.int32)


@dataclass
class Sparse:
    """Arguments of the sparse functions: of a paged cache, or, with `block_kv` 0, of a run of keys, of which each row
    sees `lengths` from `starts` on. `shared`: all rows have the block table's first row, stride 0."""

    lengths: list[int]
    width: int = 16
    block: int = 8
    block_kv: int = 64
    heads: int = 32
    fp4: bool = True
    starts: list[int] | None = None
    unaligned: bool = False
    keys: int = 0
    kind: str = "ascending"
    tail: str = "largest"
    shared: bool = False
    padding: int = 0
    weights_dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    rng: torch.Generator = field(default_factory=generator)

    def __post_init__(self) -> None:
        rng, device, rows = self.rng, self.device, len(self.lengths)
        draw = random_fp4 if self.fp4 else random_mxfp8
        shape = (rows, 1, self.heads, 128) if self.block_kv else (rows, self.heads, 128)
        self.q = tuple(part.to(device) for part in draw(shape, rng))
        self.weights = random_weights(rows, self.heads, rng, self.weights_dtype).to(device)
        self.lists = random_lists(self.lengths, self.width, self.block, self.kind, rng, self.tail).to(device)
        if self.block_kv:
            self._make_pages(rng, device)
        else:
            starts = torch.tensor(self.starts or [0] * rows, dtype=torch.int32)
            ends = starts + torch.tensor(self.lengths, dtype=torch.int32)
            self.keys = self.keys or max(ends.tolist(), default=0) + 3
            self.kv = tuple(part.to(device) for part in draw((self.keys, 128), rng))
            self.lists += (starts // self.block)[:, None].to(device) * (self.lists < 2**30)
            self.ks, self.ke = starts.to(device), ends.to(device)

    def _make_pages(self, rng: torch.Generator, device: str) -> None:
        needed = [-(-length // self.block_kv) for length in self.lengths]
        rows = 1 if self.shared else len(needed)
        pages = (max(needed, default=0) if self.shared else sum(needed)) + 3
        order = torch.randperm(pages, generator=rng).tolist()
        shape = (rows, max(needed, default=0) + 2)
        table = torch.randint(-(2**31), 2**31 - 1, shape, generator=rng, dtype=torch.int32)
        for row in range(min(rows, len(needed))):
            count = max(needed) if self.shared else needed[row]
            table[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        self.kv_cache = to_device(make_cache(pages, self.block_kv, 128, self.fp4, rng, self.padding, mx=True), device)
        self.block_table = table.to(device).expand(len(needed), -1)
        self.context_lens = torch.tensor(self.lengths, dtype=torch.int32, device=device)

    @property
    def qk_dtype(self) -> torch.dtype:
        return torch.int8 if self.fp4 else torch.float8_e4m3fn

    def metadata(self) -> torch.Tensor:
        last = (self.lists, self.qk_dtype, self.block)
        if self.block_kv:
            ids = torch.arange(len(self.lengths), dtype=torch.int32, device=self.device)
            return deep_gemm.get_paged_sparse_mqa_logits_metadata(
                self.context_lens, self.block_table, ids, self.block_kv, *last
            )
        return deep_gemm.get_sparse_mqa_logits_metadata(self.ks, self.ke, self.keys, *last, self.unaligned)

    def logits(self, metadata: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        last = (self.weights, metadata, self.width, self.block)
        if self.block_kv:
            return deep_gemm.fp8_fp4_paged_sparse_mqa_logits(self.q, self.kv_cache, *last, out=out)
        return deep_gemm.fp8_fp4_sparse_mqa_logits(self.q, self.kv, *last, self.unaligned, out=out)

    def expected(self, **options) -> torch.Tensor:
        q, weights, lists, block = self.q, self.weights, self.lists, self.block
        if self.block_kv:
            seen = (self.context_lens, self.block_table)
            return reference.paged_sparse_logits(q, self.kv_cache, weights, *seen, lists, block, **options)
        seen = (self.ks, self.ke)
        return reference.ragged_sparse_logits(q, self.kv, weights, *seen, lists, block, self.unaligned, **options)


POISON = -123392.0  # bf16 and int32 have it too; no logit comes near


def poisoned(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, device: str = "cpu", pad: int = 7
) -> torch.Tensor:
    """An output with rows `columns + pad` apart, all poison: what is written, and what should not be, shows."""
    whole = torch.full((rows, columns + pad), POISON, dtype=dtype, device=device)
    return whole[:, :columns]


def keys_read(call: Callable[..., torch.Tensor], argument: str, each: int, **options) -> float:
    """How many keys' bytes, `each` so many, all launches of a call ask for."""
    with recording() as launches:
        call(**options)
    return sum(launch.bytes_read.get(argument, 0) for launch in launches) / each


def prefill_from(monkeypatch: Any, rows: int) -> None:
    """Lets more than `rows` rows, not 1,024, be a prefill, of which neighbours look whether they share keys."""
    monkeypatch.setattr(logits, "_MOST_REQUESTS", rows)
    monkeypatch.setattr(paged, "_known", checks.Known())


def assert_rows_apart(*outs: torch.Tensor) -> None:
    """Nothing was written between the rows of what was `poisoned`."""
    for out in outs:
        room = out.as_strided((len(out), out.stride(0)), out.stride())
        assert (room[:, out.shape[1] :] == POISON).all(), "written between the rows"


def check(logits: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0, cleaned: bool = False) -> float:
    """Compares logits with float64 inside the windows (where `expected` is not -inf); outside they must still be
    poison, or -inf if they were cleaned. Returns the relative norm error. bf16 logits may be off by rounding."""
    assert logits.shape == expected.shape, (logits.shape, expected.shape)
    inside = expected != -torch.inf
    outside = logits[~inside]
    untouched = outside == (-torch.inf if cleaned else POISON)
    if not untouched.all():
        where = (~inside).nonzero()[~untouched][0].tolist()
        raise AssertionError(f"logits{where} = {logits[tuple(where)].item()} outside the window")
    got, want = logits[inside].double(), expected[inside]
    if got.numel() == 0:
        return 0.0
    assert torch.equal(got.isnan(), want.isnan()), "NaNs in other places"
    finite = want.isfinite()
    got, want = got[finite], want[finite]
    error = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
    tolerance = tolerance or (1e-6 if logits.dtype == torch.float32 else 2**-8)
    if not error < tolerance:
        worst = (got - want).abs().argmax()
        row, column = inside.nonzero()[finite][worst].tolist()
        worst_got, worst_want = got[worst].item(), want[worst].item()
        raise AssertionError(
            f"relative norm error {error:.3g} (allowed {tolerance:.3g}); the worst is logits[{row}, {column}]: "
            f"{worst_got} ({worst_got.hex()}), expected {worst_want} ({worst_want.hex()})"
        )
    return error
