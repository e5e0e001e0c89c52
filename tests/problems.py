"""Fresh random problems for the indexer's functions, and the comparison with float64."""

from dataclasses import dataclass, field

import torch

from deep_gemm.sm120 import reference


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


def random_weights(rows: int, heads: int, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((rows, heads), generator=rng).to(dtype)


def make_cache(pages: int, block_kv: int, dim: int, fp4: bool, rng: torch.Generator, padding: int = 0) -> torch.Tensor:
    """uint8 [pages, block_kv, 1, row + 4]: per page all values, then all scales, then `padding` bytes of garbage."""
    row = dim // 2 if fp4 else dim
    if fp4:
        values, scales = random_fp4((pages, block_kv, dim), rng)
    else:
        values = random_fp8((pages, block_kv, dim), rng)
        scales = torch.rand((pages, block_kv), generator=rng) * 3 + 0.01
    size = block_kv * (row + 4)
    flat = torch.randint(0, 256, (pages, size + padding), generator=rng, dtype=torch.uint8)
    flat[:, : block_kv * row] = values.view(torch.uint8).reshape(pages, -1)
    flat[:, block_kv * row : size] = scales.view(torch.uint8).reshape(pages, -1)
    return flat.as_strided((pages, block_kv, 1, row + 4), (size + padding, row + 4, row + 4, 1))


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
        self.kv_cache = make_cache(pages, self.block_kv, self.dim, self.fp4, rng, self.padding).to(device)
        if device != "cpu" and self.padding:  # .to() packs
            self.kv_cache = self._repad(self.kv_cache)
        self.block_table = table.to(device)
        self.context_lens = lens.to(device)
        shape = (batch, self.next_n, self.heads, self.dim)
        if self.fp4:
            self.q = tuple(part.to(device) for part in random_fp4(shape, rng))
        else:
            self.q = random_fp8(shape, rng).to(device)
        self.weights = random_weights(batch * self.next_n, self.heads, rng, self.weights_dtype).to(device)
        self.max_context_len = self.max_context_len or max(longest, default=0)

    def _repad(self, packed: torch.Tensor) -> torch.Tensor:
        pages, block_kv, _, row = packed.shape
        flat = torch.full((pages, block_kv * row + self.padding), 0xFF, dtype=torch.uint8, device=packed.device)
        padded = flat.as_strided(packed.shape, (block_kv * row + self.padding, row, row, 1))
        return padded.copy_(packed)

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


POISON = -123456.75  # bf16 has it too; no logit comes near


def poisoned(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, device: str = "cpu", pad: int = 7
) -> torch.Tensor:
    """An output with rows `columns + pad` apart, all poison: what is written, and what should not be, shows."""
    whole = torch.full((rows, columns + pad), POISON, dtype=dtype, device=device)
    return whole[:, :columns]


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
