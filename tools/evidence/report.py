"""What the kernels cost, counted in their SASS, with the peer's beside them: tables and a picture in docs/performance/.

    python tools/evidence/report.py [--out docs/performance] [--only ours|peer]

Everything is per unit: 16 keys x 64 heads x 128 values of one query token, which is 32 FP8 or 16 FP4 MMAs of one warp.
A kernel's cost is one turn of its innermost loop with MMAs, divided by the units in it: the turn with the most MMAs,
the next keys' loads included, no wait tried twice.  ALU includes IMAD and the uniform pipe; WARPSYNC, by which a warp
meets itself, is an instruction and no barrier.  Few rows are up to 32, many a prefill's, whose warps take two tokens
where these are small.  The bounds are arithmetic on these counts and the rates below: a model.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import peer
import sass
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
KINDS, HEADS, ARCH = ("fp8", "fp4"), (16, 32, 64), "sm_120f"
UNIT_MACS = 16 * 64 * 128
REGISTERS, MOST_WARPS, SHARED = 65536, 48, 100 << 10  # of an SM

# name: (value, what of, where it comes from)
RATES = {
    "mma": (
        16,
        "clocks of a tensor pipe per m16n8k32 FP8 or m16n8k64 FP4 MMA",
        "RTX PRO 6000: 1007 and 2015 TFLOPS over 188 SMs, 4 pipes, 2.62 GHz; RTX 5050, measured: QMMA.SF 16.1",
    ),
    "plain_mma": (32, "the same for FP8's plain form (QMMA without .SF) on GeForce", "RTX 5050, measured: 32.0"),
    "issue": (1, "clock of a sub-partition per warp instruction", "one scheduler a sub-partition"),
    "fma": (1, "clock per FP32 or IMAD instruction", "128 lanes an SM; RTX 5050, measured: FFMA 1.07"),
    "alu": (2, "clocks per integer, logic, select, min or max instruction", "guess, the safe side: 64 lanes an SM"),
    "memory": (
        4,
        "clocks per 128 bytes of shared memory, of shuffles, of global loads and stores through L1, of TMA's writes",
        "one array of 128 B a clock and SM, for 4 sub-partitions",
    ),
}

# Clocks until a barrier is free that an instruction set, by its class: guesses, but for L2's.
LATENCY = {
    "read": 15,  # of the operands, by any
    "global": 340,  # L2 of an RTX PRO 6000: 130 ns at 2.62 GHz
    "shared": 30,
    "ldsm": 33,
    "shuffle": 25,
    "sync": 30,
    "const": 40,
    "xu": 20,
    "mma": 34,
    "other": 20,
}

LEFT_OUT = """\
Left out: power and clocks under load, L2 and DRAM, bank conflicts, tails and uneven schedules, waiting for data
that comes late, and that pipes get in each other's way. By this arithmetic the peer's FP8 prefill on an RTX PRO 6000
would run at the tensor pipe's rate; 651 TFLOPS, 0.65 of it, were measured by its authors. Compare kernels by it, do not
predict times. The latency bound takes one warp at a time through the loop (stall counts of the control words, and for
each barrier it waits on the guess above) and divides by the warps of a sub-partition that can do so at once."""

PIPES = ("tensor", "issue", "fma", "alu", "memory", "latency")


@dataclass(frozen=True)
class Subject:
    """A kernel to report on."""

    owner: str  # "ours" or "peer"
    group: str  # what it computes, in the same words for ours and the peer's
    variant: str
    binary: peer.Binary
    block_warps: int
    math_warps: int  # of a block
    shared_bytes: int = 0
    copied_bytes: int = 0  # brought into shared memory by other warps (TMA), for each turn


@dataclass(frozen=True)
class Cost:
    """What one unit takes."""

    subject: Subject
    function: sass.Function

    @cached_property
    def loop(self) -> sass.Loop:
        loop = self.function.mma_loop()
        if loop is None:
            raise RuntimeError(
                f"{self.subject.group}, {self.subject.owner}: no loop with an MMA in {self.function.name}"
            )
        return loop

    @property
    def turn(self) -> tuple[sass.Instruction, ...]:
        return self.loop.turn

    @property
    def units(self) -> float:
        return self.loop.macs / UNIT_MACS

    def per_unit(self, *kinds: str) -> float:
        return sum(i.kind in kinds for i in self.turn) / self.units

    @property
    def instructions(self) -> float:
        return len(self.turn) / self.units

    @property
    def mma_form(self) -> str:
        forms = {i.name + (".SF" if "SF" in i.modifiers else "") for i in self.turn if i.kind == "mma"}
        return "+".join(sorted(forms))

    @property
    def accesses(self) -> str:
        """Loads and stores by space and width in bits: 'LDG 4x128'."""
        counts: dict[tuple[str, int], int] = {}
        for i in self.turn:
            if i.kind in ("shared", "global", "local"):
                counts[i.name, i.bits] = counts.get((i.name, i.bits), 0) + 1
            elif i.kind == "ldsm":
                counts["LDSM", 128 * i.wavefronts // 4] = counts.get(("LDSM", 128 * i.wavefronts // 4), 0) + 1
        return ", ".join(f"{name} {n / self.units:g}x{bits}" for (name, bits), n in sorted(counts.items()))

    @property
    def wavefronts(self) -> float:
        """Of shared memory and shuffles, TMA's writes included, without bank conflicts."""
        copied = self.subject.copied_bytes / 128
        return (sum(i.wavefronts for i in self.turn) + copied) / self.units

    @property
    def global_bytes(self) -> float:
        """Moved by a warp between registers and global memory, sectors taken as full."""
        return sum(i.bytes for i in self.turn) / self.units

    @property
    def spills(self) -> int:
        return sum(i.kind == "local" for i in self.function.instructions)

    @property
    def registers(self) -> int:
        """Of a math warp: as launched, or as it asks for with setmaxnreg."""
        asked = [int(i.operands.split(",")[-1], 16) for i in self.function.instructions if i.name == "USETMAXREG"]
        return max([self.function.resources.registers, *asked])

    @property
    def warps(self) -> int:
        """Math warps on an SM."""
        subject, resources = self.subject, self.function.resources
        per_warp = math.ceil(resources.registers / 8) * 8 * 32
        blocks = min(
            REGISTERS // per_warp // subject.block_warps,
            MOST_WARPS // subject.block_warps,
            SHARED // (subject.shared_bytes + resources.shared) if subject.shared_bytes else MOST_WARPS,
        )
        return blocks * subject.math_warps

    def bounds(self, geforce: bool = False) -> dict[str, float]:
        """Clocks of a sub-partition per unit, by pipe."""
        rate = {name: value for name, (value, *_) in RATES.items()}
        plain = geforce and self.mma_form == "QMMA"
        _, alone = sass.turn_latency(self.turn, LATENCY)
        return {
            "tensor": self.per_unit("mma") * rate["plain_mma" if plain else "mma"],
            "issue": self.instructions * rate["issue"],
            "fma": self.per_unit("fp32", "imad") * rate["fma"],
            "alu": self.per_unit("alu") * rate["alu"],
            "memory": (self.wavefronts + self.global_bytes / 128) * rate["memory"],
            "latency": alone / self.units / (self.warps / 4),
        }

    @property
    def limit(self) -> tuple[str, float]:
        """The pipe that bounds it, and the next one's share of that."""
        (name, most), (_, second), *_ = sorted(self.bounds().items(), key=lambda item: -item[1])
        return name, second / most


def cost(subject: Subject) -> Cost:
    return Cost(subject, sass.disassemble(subject.binary.cubin)[subject.binary.name])


def peer_subjects() -> list[Subject]:
    cases = [
        *((kind, h, f"next_n {n}", peer.paged(kind, h, n)) for kind in KINDS for h in HEADS for n in range(1, 7)),
        *((kind, h, "", peer.ragged(kind, h)) for kind in KINDS for h in HEADS),
    ]
    return [
        Subject(
            "peer",
            f"{kind} {'paged' if variant else 'ragged'}, {heads} heads",
            variant,
            kernel.compile(),
            kernel.threads // 32,
            kernel.math_warps,
            kernel.shared_bytes,
            kernel.copied_bytes,
        )
        for kind, heads, variant, kernel in cases
    ]


def our_subjects() -> list[Subject]:
    from deep_gemm.sm120.jit import compile_kernel
    from deep_gemm.sm120.kernels.logits import Config

    subjects = []
    for kind, form in (("fp8", "block_scaled"), ("fp8", "plain"), ("fp4", "")):
        os.environ["DG_SM120_FP8_MMA"] = form or "block_scaled"
        for heads in HEADS:
            for name, page, rows in (("paged", 64, "few rows"), ("paged", 64, "many rows"), ("ragged", 0, "")):
                few = 32 * (rows == "few rows")
                config = Config(  # many rows: a prefill, whose neighbours are taken together where there is room
                    ARCH, kind == "fp4", heads, 128, page, torch.float32, torch.float32, few, next_n=1 if few else 2
                )
                binary = peer.Binary(config.kernel.name, "", compile_kernel(config.kernel, ARCH, "cubin"))
                variant = ", ".join(filter(None, [form.replace("_", "-"), rows]))
                subjects.append(
                    Subject("ours", f"{kind} {name}, {heads} heads", variant, binary, config.warps, config.warps)
                )
    return subjects


def bars(costs: Iterable[Cost]) -> list[list[str]]:
    """What is asked of ours at 64 heads, and found."""
    rows = [["kernel", "bar", "asked", "found", ""]]
    for c in costs:
        if c.subject.owner != "ours" or "64 heads" not in c.subject.group:
            continue
        fp4 = c.subject.group.startswith("fp4")
        bounds = c.bounds()
        rest = max(value for pipe, value in bounds.items() if pipe != "tensor") / bounds["tensor"]
        share = 0.85 if fp4 else 0.6
        most, fewest = (165, 16) if fp4 else (180, 12)
        shared, barriers = c.per_unit("shared", "ldsm"), c.per_unit("sync")
        limits = [
            ("instructions a unit", f"<= {most}", c.instructions, c.instructions <= most),
            ("shared-memory accesses in the loop", "0", shared, shared == 0),
            ("barriers in the loop", "0", barriers, barriers == 0),
            ("spills", "0", c.spills, c.spills == 0),
            ("warps an SM", f">= {fewest}", c.warps, c.warps >= fewest),
            ("largest other bound over the tensor pipe's", f"< {share}", rest, rest < share),
        ]
        if "paged" in c.subject.group:
            trips = len(sass.awaited_loads(c.function.first_mma()))
            most = 4 if "many rows" in c.subject.variant else 3  # length, page, keys; many rows: first the schedule
            limits.append(("loads that wait for each other before the first MMA", f"<= {most}", trips, trips <= most))
        rows += [[name(c), bar, asked, f"{found:.4g}", "met" if met else "MISSED"] for bar, asked, found, met in limits]
    return rows


def behind(costs: list[Cost]) -> list[list[str]]:
    """Where a bound of ours lies above the peer's for the same work: beside its best variant. It matters where it comes
    near ours' largest."""
    rows = [["kernel", "bound", "ours", "peer's best", "our largest bound"]]
    for ours in (c for c in costs if c.subject.owner == "ours"):
        same = [c.bounds() for c in costs if (c.subject.group, c.subject.owner) == (ours.subject.group, "peer")]
        for pipe, clocks in ours.bounds().items():
            best = min((bounds[pipe] for bounds in same), default=clocks)
            if clocks > best:
                rows.append([name(ours), pipe, f"{clocks:.0f}", f"{best:.0f}", f"{max(ours.bounds().values()):.0f}"])
    return rows


def name(c: Cost) -> str:
    return ", ".join(filter(None, [c.subject.group, c.subject.variant]))


COUNTS = {
    "instructions": lambda c: f"{c.instructions:.0f}",
    "MMA": lambda c: f"{c.per_unit('mma'):.0f} {c.mma_form}",
    "FP32": lambda c: f"{c.per_unit('fp32'):.0f}",
    "ALU": lambda c: f"{c.per_unit('alu', 'imad', 'uniform'):.0f}",
    "shuffles": lambda c: f"{c.per_unit('shuffle'):.0f}",
    "barriers, fences": lambda c: f"{c.per_unit('sync'):.1f}",
    "shared wavefronts": lambda c: f"{c.wavefronts:.0f}",
    "global bytes": lambda c: f"{c.global_bytes:.0f}",
    "loads, stores": lambda c: c.accesses,
    "registers": lambda c: str(c.registers),
    "spills": lambda c: str(c.spills),
    "math warps an SM": lambda c: str(c.warps),
}


def counts_table(costs: Iterable[Cost]) -> list[list[str]]:
    rows = [["kernel", "whose", *COUNTS]]
    return rows + [[name(c), c.subject.owner, *(show(c) for show in COUNTS.values())] for c in costs]


def bounds_table(costs: Iterable[Cost]) -> list[list[str]]:
    rows = [["kernel", "whose", *PIPES, "tensor on GeForce", "bound by", "next / bound"]]
    for c in costs:
        pipe, share = c.limit
        values = [f"{clocks:.0f}" for clocks in c.bounds().values()]
        geforce = f"{c.bounds(geforce=True)['tensor']:.0f}"
        rows.append([name(c), c.subject.owner, *values, geforce, pipe, f"{share:.2f}"])
    return rows


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def show(console: Console, title: str, rows: list[list[str]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def picture(costs: list[Cost], path: Path) -> None:
    """Each pipe's clocks over the tensor pipe's: below 1 it does not matter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    pipes = [pipe for pipe in PIPES if pipe != "tensor"]
    clocks = [[c.bounds()[pipe] for pipe in pipes] for c in costs]
    shares = [[value / c.bounds()["tensor"] for value in row] for c, row in zip(costs, clocks, strict=True)]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(costs)), layout="constrained")
    image = axes.imshow(shares, aspect="auto", cmap="RdYlGn_r", norm=TwoSlopeNorm(0.6, 0, 1.2))
    for y, row in enumerate(clocks):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(pipes)), pipes)
    axes.set_yticks(range(len(costs)), [f"{name(c)}, {c.subject.owner}" for c in costs], fontsize=8)
    axes.set_title("Clocks per unit and sub-partition; colour: over the tensor pipe's (512 FP8, 256 FP4)", fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance")
    parser.add_argument("--only", choices=("ours", "peer"))
    arguments = parser.parse_args()

    if importlib.util.find_spec("deep_gemm") is None:
        sys.path.insert(0, str(ROOT / "sm120"))
    subjects = [] if arguments.only == "peer" else our_subjects()
    subjects += [] if arguments.only == "ours" else peer_subjects()
    costs = sorted(map(cost, subjects), key=lambda c: (c.subject.group, c.subject.owner))
    sections = {
        "Bars": bars(costs),
        "Behind the peer": behind(costs),
        "Counts": counts_table(costs),
        "Bounds": bounds_table(costs),
        "Rates": [["rate", "value", "of", "from"]] + [[n, str(v), of, source] for n, (v, of, source) in RATES.items()],
        "Guesses": [["latency of", "clocks"]] + [[kind, str(clocks)] for kind, clocks in LATENCY.items()],
    }
    sections = {title: rows for title, rows in sections.items() if len(rows) > 1}

    console = Console()
    for title, rows in sections.items():
        show(console, title, rows)
    console.print(LEFT_OUT)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = f"`python tools/evidence/report.py`, {datetime.date.today()}."
    text = [f"# The kernels in SASS\n\n{command}\n\n{__doc__.split(chr(10), 4)[4]}"]
    text += [f"## {title}\n\n{markdown(rows)}\n" for title, rows in sections.items()]
    text += ["![bounds](sass.png)\n", LEFT_OUT + "\n"]
    (arguments.out / "sass.md").write_text("\n".join(text))
    picture(costs, arguments.out / "sass.png")


if __name__ == "__main__":
    main()
