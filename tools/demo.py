"""One step of DeepSeek-V4-Flash's Lightning Indexer through deep_gemm's public functions, compared with float64.

    python tools/demo.py                      decode: 4 requests with 0, 37, 4,096 and 16,384 compressed keys
    python tools/demo.py --prefill            384 neighbouring tokens of one prompt, paged and ragged
    python tools/demo.py --topk               and the 512 keys that each token attends to, logits and choice in one call
    python tools/demo.py --sparse             DeepSeek-V4.1-Flash: candidates, and the logits of candidates alone
    python tools/demo.py --fp4 --save fp4.png

Runs on the GPU; without one, or with --arch, in the PTX emulator. Shows what compiling took, how evenly the keys are
shared out, what each step cost (bytes are those that lanes asked global memory for), and how far the logits and their
top 512 are from the reference's. Exits with 1 if an error exceeds 1e-6, a top 512 differs by more than ties,
paged and ragged logits differ at all, or a choice is not exactly the stable top 512 of the logits. Inputs are
random; what fails says with which --seed.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import demo_sparse
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import deep_gemm
from deep_gemm.sm120 import reference
from deep_gemm.sm120.emulator import Counters, recording
from deep_gemm.sm120.kernels.logits import few_rows

DIM, PAGE, TILE = 128, 64, 32  # values of a key; keys of a page, and of what a warp multiplies at a time
TOKENS_PER_KEY = 4  # V4 compresses so many tokens into one key
PROMPT = 4096  # --prefill: tokens of the prompt that came before
TOP, TOLERANCE = 512, 1e-6


# ---- inputs ---------------------------------------------------------------------------------------------------------


def quantize(numbers: torch.Tensor, fp4: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8: e4m3 [..., dim] and one fp32 scale [...]. FP4: e2m1, two to a byte, [..., dim / 2], and for every 32 of them
    a power of two, its exponent + 127 one byte of a word [...]."""
    if not fp4:
        scales = numbers.abs().amax(dim=-1) / 448
        return (numbers / scales.unsqueeze(-1)).to(torch.float8_e4m3fn), scales
    groups = numbers.unflatten(-1, (-1, 32))
    exponents = torch.ceil(torch.log2(groups.abs().amax(dim=-1) / 6))
    scaled = (groups / torch.exp2(exponents).unsqueeze(-1)).flatten(-2)
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # between 0, 0.5, 1, 1.5, 2, 3, 4, 6
    codes = (torch.bucketize(scaled.abs(), halfway) + 8 * (scaled < 0)).to(torch.uint8)
    words = (exponents + 127).to(torch.uint8).view(torch.int32).squeeze(-1)
    return (codes[..., ::2] | codes[..., 1::2] << 4).view(torch.int8), words


@dataclass(frozen=True)
class Step:
    """What the indexer is asked for: `next_n` query tokens for each of `batch` rows, over pages of keys."""

    query: tuple[torch.Tensor, torch.Tensor | None]  # [batch, next_n, heads, dim], FP4: and its scales
    weights: torch.Tensor  # [batch * next_n, heads]
    context_lens: torch.Tensor  # [batch, next_n]
    kv_cache: torch.Tensor  # [pages, PAGE, 1, bytes of a key + 4]
    block_table: torch.Tensor  # [batch, columns]
    keys: tuple[torch.Tensor, torch.Tensor]  # the same keys in order, all sequences in one run
    starts: torch.Tensor  # [batch * next_n]: where in `keys` the token's sequence begins

    @property
    def columns(self) -> int:
        return self.block_table.shape[1] * PAGE

    def plan(self, num_sms: int) -> torch.Tensor:
        return deep_gemm.get_paged_mqa_logits_metadata(self.context_lens, PAGE, num_sms)

    def paged(self, schedule: torch.Tensor) -> torch.Tensor:
        rest = (self.kv_cache, self.weights, self.context_lens, self.block_table, schedule, self.columns)
        if self.query[1] is None:
            return deep_gemm.fp8_paged_mqa_logits(self.query[0], *rest)
        return deep_gemm.fp8_fp4_paged_mqa_logits(self.query, *rest)

    def choose(self, schedule: torch.Tensor) -> torch.Tensor:
        query = self.query[0] if self.query[1] is None else self.query
        rest = (self.kv_cache, self.weights, self.context_lens, self.block_table, schedule, self.columns)
        return deep_gemm.sm120.fp8_fp4_paged_mqa_topk(query, *rest, TOP)

    def ragged(self, function: Callable = deep_gemm.fp8_fp4_mqa_logits) -> torch.Tensor:
        """The same logits, without pages: from the ragged function, or from the reference."""
        query = tuple(None if part is None else part.flatten(0, 1) for part in self.query)
        ends = self.starts + self.context_lens.flatten()
        return function(query, self.keys, self.weights, self.starts, ends, max_seqlen_k=self.columns)


def make_step(args: argparse.Namespace, device: torch.device) -> Step:
    """Random queries and keys. Decode: a sequence for each request. Prefill: every row is a token of one sequence."""
    if args.prefill:
        tokens = PROMPT + 1 + torch.arange(args.prefill)
        context_lens = (tokens // TOKENS_PER_KEY).unsqueeze(1)
        sequences, sequence_of = [int(context_lens.max())], torch.zeros(args.prefill, dtype=torch.long)
    else:
        context_lens = (torch.tensor(args.keys).unsqueeze(1) + torch.arange(args.next_n) - args.next_n + 1).clamp(min=0)
        sequences, sequence_of = args.keys, torch.arange(len(args.keys))

    pages = [range(0)]
    for keys in sequences:
        pages.append(range(pages[-1].stop, pages[-1].stop - keys // -PAGE))
    shuffled = torch.randperm(pages[-1].stop + 1)  # one page is nobody's
    tables = torch.full((len(sequences), max(1, *map(len, pages))), -1)
    for table, mine in zip(tables, pages[1:]):
        table[: len(mine)] = shuffled[mine.start : mine.stop]

    keys = quantize(torch.randn(len(shuffled) * PAGE, DIM), args.fp4)
    in_order = torch.cat([part.view(torch.uint8).view(len(shuffled), -1) for part in keys], dim=1)
    kv_cache = torch.empty_like(in_order)
    kv_cache[shuffled] = in_order  # a page: its values, then its scales

    query, scales = quantize(torch.randn(*context_lens.shape, args.heads, DIM), args.fp4)
    weights = torch.randn(*context_lens.shape, args.heads) * (args.heads * DIM) ** -0.5
    if not args.fp4:
        weights, scales = weights * scales, None  # one scale for a head of a token: its weight takes it

    starts = torch.tensor([mine.start * PAGE for mine in pages[1:]])[sequence_of].repeat_interleave(args.next_n)
    return Step(
        query=(query.to(device), None if scales is None else scales.to(device)),
        weights=weights.flatten(0, 1).to(device),
        context_lens=context_lens.to(device, torch.int32),
        kv_cache=kv_cache.view(len(shuffled), PAGE, 1, -1).to(device),
        block_table=tables[sequence_of].to(device, torch.int32),
        keys=tuple(part.to(device) for part in keys),
        starts=starts.to(device, torch.int32),
    )


# ---- running --------------------------------------------------------------------------------------------------------


class Bench:
    """Runs one thing after the other under a progress bar and notes what each one cost."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.bar = progress, progress.add_task("", total=total)
        self.costs: dict[str, tuple[float, Counters]] = {}  # milliseconds, and what the emulator counted

    def run(self, name: str, function: Callable, *args: Any) -> Any:
        self.progress.update(self.bar, description=name)
        start = time.perf_counter()
        with recording() as launches:
            result = function(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.costs[name] = 1000 * (time.perf_counter() - start), sum(launches, Counters())
        self.progress.advance(self.bar)
        return result


def first_call(step: Step, ragged: bool) -> None:
    """Calls every function on rows without keys: what remains is compiling."""
    empty = replace(step, context_lens=torch.zeros_like(step.context_lens))
    empty.paged(empty.plan(deep_gemm.get_num_sms()))
    if ragged:
        empty.ragged()


# ---- comparing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Some rows of logits beside the reference's."""

    name: str
    keys: str
    error: float  # relative, of the norm
    shared: int  # of the top 512 of each row
    wanted: int
    ties: int  # of those not shared, so many are as good as the reference's choice but for fp32's rounding

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE and self.shared + self.ties == self.wanted

    @property
    def overlap(self) -> str:
        return f"{self.shared / self.wanted:.2%}" + (f" + {self.ties} ties" if self.ties else "")


def compare(name: str, logits: torch.Tensor, expected: torch.Tensor, lens: torch.Tensor) -> Comparison:
    shared = wanted = ties = 0
    for got, want, length in zip(logits, expected, lens.tolist()):
        k = min(TOP, length)
        if k == 0:
            continue
        ours, theirs = got[:length].topk(k).indices, want[:length].topk(k)
        others = want[ours[~torch.isin(ours, theirs.indices)]]
        rounding = TOLERANCE * want[:length].abs().max()
        shared, wanted = shared + k - len(others), wanted + k
        ties += int((others >= theirs.values[-1] - rounding).sum())
    inside = expected != -torch.inf
    got, want = logits[inside].double(), expected[inside]
    error = ((got - want).norm() / want.norm()).item() if wanted else 0.0
    low, high = int(lens.min()), int(lens.max())
    return Comparison(name, f"{high:,}" if low == high else f"{low:,} to {high:,}", error, shared, wanted, ties)


def tiles_of_few(tiles: torch.Tensor, slots: int, warps: int = 12) -> torch.Tensor:
    """The same of few rows: one row's tiles go round all SMs; more rows are cut into runs, as short as leaves one run
    to a warp, and these go round."""
    if len(tiles) == 1:
        return torch.bincount(torch.arange(int(tiles)) % slots, minlength=slots)
    run = next(n for n in range(1, int(tiles.sum()) + 1) if (-(tiles // -n)).sum() <= warps * slots)
    runs = [min(run, int(row) - first) for row in tiles for first in range(0, int(row), run)]
    return torch.bincount(torch.arange(len(runs)) % slots, torch.tensor(runs), slots).long()


def tiles_per_sm(context_lens: torch.Tensor, schedule: torch.Tensor) -> torch.Tensor:
    """Tiles of 32 keys that each SM takes: few rows are shared out evenly; many go by the schedule, from each of its
    entries (row, split of 256 keys) to the next."""
    tiles, slots = -(context_lens.amax(dim=1) // -TILE), len(schedule) - 1
    if few_rows(*context_lens.shape, slots):
        return tiles_of_few(tiles, slots)
    before = torch.cat([tiles.new_zeros(1), tiles.cumsum(0)])
    return (before[schedule[:, 0].long()] + 256 // TILE * schedule[:, 1]).diff()


# ---- showing --------------------------------------------------------------------------------------------------------


def show(console: Console, headings: list[str], rows: list[list[str]]) -> None:
    table = Table(headings[0], show_header=any(headings))
    for heading in headings[1:]:
        table.add_column(heading, justify="right" if any(headings) else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def cost_row(name: str, milliseconds: float, did: Counters) -> list[str]:
    counts = (did.instructions.total(), did.classes["mma"], did.bytes_read.total(), did.bytes_written.total())
    return [name, f"{milliseconds:,.2f}", *(f"{count:,}" if did.blocks else "-" for count in counts)]


def comparison_row(it: Comparison) -> list[str]:
    return [it.name, it.keys, *((f"{it.error:.2e}", it.overlap) if it.wanted else ("-", "-"))]


def draw(path: str, title: str, tiles: torch.Tensor, logits: torch.Tensor, expected: torch.Tensor) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    panels = figure.subplot_mosaic([["work", "work"], ["logits", "difference"]])

    work, mean = panels["work"], tiles.double().mean().item()
    work.bar(range(len(tiles)), tiles.tolist(), width=1, edgecolor="white", linewidth=0.3)
    work.axhline(mean, color="tab:orange", label=f"mean: {mean:.1f}")
    work.set(title="Work of each SM", xlabel="SM", ylabel=f"tiles of {TILE} keys")
    work.margins(x=0)

    inside = expected != -torch.inf
    every = int(inside.sum()) // 50_000 + 1
    want, got = expected[inside][::every], logits[inside][::every].double()
    panels["logits"].axline((0, 0), slope=1, color="tab:orange", linewidth=1, label="equal")
    panels["logits"].plot(want, got, ".", markersize=2, zorder=3, label="one key's logit")
    panels["logits"].set(title="Logits against the reference", xlabel="float64 reference", ylabel="deep_gemm, fp32")
    panels["difference"].plot(want, got - want, ".", markersize=2)
    panels["difference"].set(title="Their difference", xlabel="float64 reference", ylabel="deep_gemm - reference")
    for panel in panels.values():
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    work.legend()
    panels["logits"].legend(markerscale=4)
    figure.savefig(path, dpi=120)


# ---- the program ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fp4", action="store_true", help="FP4 queries and keys instead of FP8")
    parser.add_argument("--prefill", type=int, nargs="?", const=384, metavar="TOKENS", help="a piece of a prompt (384)")
    parser.add_argument("--topk", action="store_true", help=f"choose each token's {TOP} keys as well")
    parser.add_argument("--sparse", action="store_true", help="candidates' logits: FP4, 32 heads, two layers of V4.1")
    parser.add_argument("--keys", type=int, nargs="+", default=[0, 37, 4096, 16384], help="of each decoding request")
    parser.add_argument("--next-n", type=int, default=1, metavar="N", help="query tokens of each decoding request (1)")
    parser.add_argument("--heads", type=int, choices=range(8, 65, 8), default=64, help="(64)")
    parser.add_argument(
        "--arch", help="emulate the code for sm_120f, sm_100a, sm_90a, sm_89, ... even if there is a GPU"
    )
    parser.add_argument("--seed", type=int, help="of the random inputs (another one each time)")
    parser.add_argument("--save", metavar="FILE.png", help="draw each SM's work, and the logits against the reference")
    args = parser.parse_args(arguments)
    if args.next_n < 1 or min(args.keys) < 0 or (args.prefill is not None and args.prefill < 1):
        parser.error("--next-n and --prefill are positive, and --keys are not negative")
    if args.prefill and args.next_n > 1:
        parser.error("--next-n is for decode: in a prefill every row is a token")
    if args.sparse:
        if args.prefill or args.save or args.topk or args.next_n > 1:
            parser.error("--sparse is a decode step of one token each, without --save and --topk")
        args.fp4, args.heads = True, 32
        args.keys = [0, 137, 12_000, 20_000] if args.keys == parser.get_default("keys") else args.keys
    return args


def show_sparse(
    console: Console, choices: list[demo_sparse.Choice], bench: "Bench", where: str, gpu: bool
) -> list[str]:
    """Prints what came of it; returns what failed."""
    console.print(
        f"DeepSeek-V4.1-Flash, decode step: FP4, 32 heads of {DIM}, pages of {PAGE}, "
        f"{demo_sparse.CANDIDATES:,} blocks of {demo_sparse.BLOCK} keys",
        style="bold",
    )
    show(console, ["", ""], [["where", where], ["compile time", f"{bench.costs['compile'][0] / 1000:.2f} s"]])
    costs = [cost_row(name, *cost) for name, cost in bench.costs.items() if name not in ("inputs", "compile")]
    headings = ["step", "ms"] if gpu else ["step", "ms", "warp instr.", "MMA", "bytes read", "written"]
    show(console, headings, [row[: len(headings)] for row in costs])
    against = ["candidates", "keys", "blocks", "relative error", f"top {TOP} of dense + mask"]
    show(console, against, [[f"request {number}", *choice.cells] for number, choice in enumerate(choices)])
    return [f"request {number}: {choice}" for number, choice in enumerate(choices) if not choice.passed]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    gpu = torch.cuda.is_available() and not args.arch
    os.environ.setdefault("DG_SM120_FORCE", "1")  # ours on SM90 and SM100 too
    seed = torch.seed() if args.seed is None else torch.manual_seed(args.seed).initial_seed()
    if args.arch:
        os.environ["DG_SM120_ARCH"] = args.arch
    where = (
        torch.cuda.get_device_name() if gpu else f"PTX emulator, {os.environ.get('DG_SM120_ARCH', 'sm_120f')}, numpy"
    )

    console = Console()
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        tempfile.TemporaryDirectory() as empty_cache,
    ):
        os.environ.setdefault("DG_JIT_CACHE_DIR", empty_cache)
        bench = Bench(progress, total=9 if args.sparse else 5 + bool(args.prefill) + args.topk)
        if args.sparse:
            choices = demo_sparse.run(args, bench, make_step, TOP, torch.device("cuda" if gpu else "cpu"))
            failures = show_sparse(console, choices, bench, where, gpu)
            for failure in failures:
                console.print(f"FAILED (--seed {seed})  {failure}", style="bold red")
            return 1 if failures else 0
        step = bench.run("inputs", make_step, args, torch.device("cuda" if gpu else "cpu"))
        bench.run("compile", first_call, step, bool(args.prefill))
        schedule = bench.run("plan", step.plan, deep_gemm.get_num_sms())
        logits = bench.run("paged logits", step.paged, schedule).cpu()
        chosen = bench.run(f"logits and top {TOP}", step.choose, schedule).cpu() if args.topk else None
        ragged = bench.run("ragged logits", step.ragged).cpu() if args.prefill else None
        expected = bench.run("reference", step.ragged, reference.ragged_logits).cpu()

    failures = []
    tiles = tiles_per_sm(step.context_lens, schedule).cpu()
    balance = f"fewest {tiles.min()}, mean {tiles.double().mean():.1f}, most {tiles.max()}"
    facts = [
        ["where", where],
        ["compile time", f"{bench.costs['compile'][0] / 1000:.2f} s"],
        ["work", f"{len(tiles)} SMs, {TILE}-key tiles: {balance}"],
    ]
    if ragged is not None:
        inside = expected != -torch.inf
        facts.append(["paged, ragged", f"{(logits != ragged)[inside].sum():,} of {inside.sum():,} logits differ"])
        failures += [] if torch.equal(logits[inside], ragged[inside]) else [": ".join(facts[-1])]

    comparisons, lens = [], step.context_lens.flatten().cpu()
    if chosen is not None:
        exact = reference.topk(logits, lens.tolist(), TOP)
        wrong = sum(sorted(row[row >= 0].tolist()) != want for row, want in zip(chosen, exact))
        facts.append([f"top {TOP}", f"{len(exact) - wrong:,} of {len(exact):,} tokens choose exactly"])
        failures += [": ".join(facts[-1])] if wrong else []
    size = -(len(lens) // -4) if args.prefill else args.next_n  # rows compared together: a quarter, or a request
    for first in range(0, len(lens), size):
        rows = slice(first, min(first + size, len(lens)))
        name = f"tokens {first} to {rows.stop - 1}" if args.prefill else f"request {first // size}"
        comparisons.append(compare(name, logits[rows], expected[rows], lens[rows]))
    failures += [f"{it.name}: error {it.error:.2e}, overlap {it.overlap}" for it in comparisons if not it.passed]

    what = (
        "prefill" if args.prefill else f"decode step, {args.next_n} tokens each" if args.next_n > 1 else "decode step"
    )
    title = f"DeepSeek-V4-Flash, {what}: {'FP4' if args.fp4 else 'FP8'}, {args.heads} heads of {DIM}, pages of {PAGE}"
    console.print(title, style="bold")
    show(console, ["", ""], facts)
    costs = [cost_row(name, *cost) for name, cost in bench.costs.items() if name not in ("inputs", "compile")]
    headings = ["step", "ms"] if gpu else ["step", "ms", "warp instr.", "MMA", "bytes read", "written"]
    show(console, headings, [row[: len(headings)] for row in costs])
    against = ["against float64", "keys", "relative error", f"top {TOP} shared"]
    show(console, against, [comparison_row(it) for it in comparisons])
    for failure in failures:
        console.print(f"FAILED (--seed {seed})  {failure}", style="bold red")
    if args.save:
        draw(args.save, f"{title}\n{where}", tiles, logits, expected)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
