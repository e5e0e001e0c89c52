"""What silicon.json says: tables, the bars that ours is held to, a picture."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from silicon_cases import KINDS

TOLERANCE = 1e-5  # relative norm
FORM_COLOURS = {"x1": "tab:blue", "x2": "tab:orange", "x2s": "tab:green", "native": "tab:blue"}


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One case in one form. Of several source trees of ours the last one's."""

    report: dict
    case: dict
    form: str

    @property
    def entry(self) -> dict:
        return self.case["forms"][self.form]

    @property
    def name(self) -> str:
        return self.case["name"]

    @property
    def ours(self) -> float:
        return self.entry["ours"][self.report["trees"][-1]]

    @property
    def peer(self) -> float:
        return self.entry["peer"]

    @property
    def ratio(self) -> float:
        """The peer's time over ours."""
        return self.peer / self.ours

    @property
    def above_empty(self) -> float:
        return self.ours - self.report["empty_us"]

    @property
    def of_copy(self) -> float | None:
        """The time in which a copy moves the bytes of all keys, over ours."""
        return copy_us(self.report, self.case["key_bytes"]) / self.ours if self.case["kind"] == "decode" else None

    def of_mma(self, us: float) -> float | None:
        """MMAs a second, over those of a loop of nothing else."""
        rate = self.case["mmas"] / (us * 1e-6)
        return rate / self.report["mma"][self.form]["rate"] if self.case["mmas"] else None

    @property
    def off(self) -> float:
        """The largest distance between any two of ours, the peer's and float64."""
        return max([*self.entry["off"].values(), *self.entry["apart"].values()], default=0.0)


def copy_us(report: dict, size: int) -> float:
    """Of a copy that reads and writes `size` bytes in all, between those measured."""
    sizes = [(int(bytes_), us) for bytes_, us in report["copy_us"].items()]
    (x0, y0), (x1, y1) = next((pair for pair in itertools.pairwise(sizes) if size <= pair[1][0]), sizes[-2:])
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


def results(report: dict, form: str, *kinds: str) -> list[Result]:
    cases = (case for case in report["cases"] if form in case["forms"] and (not kinds or case["kind"] in kinds))
    return [Result(report, case, form) for case in cases]


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def bandwidth(report: dict) -> float:
    """TB/s of the largest copy."""
    size, us = [*report["copy_us"].items()][-1]
    return int(size) / us * 1e-6


def summary(report: dict) -> list[str]:
    lines = [
        f"{report['device']}, {report['sms']} SMs, {report['date']}: an empty kernel {report['empty_us']:.2f} us, "
        f"a copy {bandwidth(report):.2f} TB/s"
    ]
    for form, mma in report["mma"].items():
        lines.append(
            f"{form}: an MMA every {mma['interval']:.1f} clocks of a sub-partition, latency {mma['latency']:.1f}, "
            f"{mma['rate'] * 1e-9:.1f} G/s"
        )
    for form, label in itertools.product(report["mma"], report["trees"]):
        means = []
        for kind in KINDS:
            entries = [result.entry for result in results(report, form, kind)]
            ratios = [entry["peer"] / entry["ours"][label] for entry in entries]
            if ratios:
                means.append(f"{kind} {geometric_mean(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"{form}, {label}: the peer's time over ours, geometric mean (and range): {', '.join(means)}")
    if report["missed"]:
        lines.append(f"{len(report['missed'])} cases were not timed: {', '.join(report['missed'])}")
    return lines


# ---- bars -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """Every one of `values` is to be at least (or, `at_most`, at most) `limit`."""

    what: str
    form: str
    limit: float
    values: dict[str, float]  # by the case's name
    at_most: bool = False

    @property
    def worst(self) -> str:
        return (max if self.at_most else min)(self.values, key=self.values.get)

    @property
    def met(self) -> int:
        return sum(value <= self.limit if self.at_most else value >= self.limit for value in self.values.values())

    def row(self) -> list[str]:
        wanted = f"{'at most' if self.at_most else 'at least'} {self.limit:g}"
        met = "yes" if self.met == len(self.values) else f"{self.met} of {len(self.values)}"
        return [self.what, self.form, wanted, met, f"{self.values[self.worst]:.2f}: {self.worst}"]


def bars(report: dict) -> list[Bar]:
    """What ours is to reach; those for which something was measured."""
    return [bar for form in report["mma"] for bar in _bars(report, form) if bar.values]


def _bars(report: dict, form: str) -> Iterator[Bar]:
    def collect(
        value: Callable[[Result], float | None], where: Callable[[dict], bool], *kinds: str
    ) -> dict[str, float]:
        found = {result.name: value(result) for result in results(report, form, *kinds) if where(result.case)}
        return {name: number for name, number in found.items() if number is not None}

    def ratio(result: Result) -> float:
        return result.ratio

    hard = form in ("x1", "native")
    decode = collect(ratio, lambda case: True, "decode")
    yield Bar("decode: the peer's time over ours", form, 1.0, decode)
    if decode:
        yield Bar("decode, geometric mean", form, 1.15, {f"{len(decode)} cases": geometric_mean([*decode.values()])})
    if hard:
        for limit, rows, keys, next_n in ((1.6, 1, 64, 1), (1.6, 1, 1024, 1), (2.8, 1, 16384, 1), (4.0, 1, 16384, 4)):
            size = {"rows": rows, "keys": keys, "next_n": next_n, "heads": 64, "style": ""}
            found = collect(
                lambda result: result.above_empty, lambda case, size=size: size.items() <= case.items(), "decode"
            )
            name = f"{rows} x {keys}" + (f", next_n {next_n}" if next_n > 1 else "")
            yield Bar(f"{name}: us above an empty kernel", form, limit, found, at_most=True)
        large = collect(
            lambda result: result.of_copy,
            lambda case: case["rows"] * case["keys"] >= 1 << 20 and case["next_n"] == 1 and case["style"] == "",
            "decode",
        )
        yield Bar("64 x 16K and larger: bytes of keys a second over a copy's", form, 1.0, large)
    for fp4, paged in ((False, 1.5 if hard else 1.25), (True, 1.75 if hard else 1.5)):
        name = "FP4" if fp4 else "FP8"
        found = collect(ratio, lambda case, fp4=fp4: case["fp4"] is fp4, "prefill")
        yield Bar(f"{name} paged prefill: the peer's time over ours", form, paged, found)
        found = collect(ratio, lambda case, fp4=fp4: case["fp4"] is fp4 and case["heads"] > 16, "ragged")
        yield Bar(f"{name} ragged: the peer's time over ours", form, 1.25 if hard else 1.0, found)
    if not hard:
        shares = collect(
            lambda result: result.of_mma(result.ours), lambda case: case["heads"] > 16, "prefill", "ragged"
        )
        yield Bar("prefill and ragged: share of the MMA's rate", form, 0.8, shares)


# ---- on the terminal ------------------------------------------------------------------------------------------------


def show(report: dict, compact: bool = False) -> int:
    """Prints all of it; compact: a line a case. Returns 1 where a result was wrong, else 0."""
    wrong = any(result.off >= TOLERANCE for form in report["mma"] for result in results(report, form))
    if compact:
        print("\n".join([*map(one_line(report), report["cases"]), *summary(report)]))
        return int(wrong)
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for form in report["mma"]:
        table = Table(title=form, box=None, pad_edge=False)
        times = [*(f"{label} us" for label in report["trees"]), "peer us", "ratio", "above empty"]
        for column in ("case", *times, "of copy", "of mma", "peer's", "off"):
            table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
        for result in results(report, form):
            table.add_row(*row(result))
        console.print(table)
    table = Table("bar", "form", "wanted", "met", "worst", box=None, pad_edge=False)
    for bar in bars(report):
        table.add_row(*bar.row())
    console.print(table)
    console.print("\n".join(summary(report)), highlight=False)
    return int(wrong)


def row(result: Result) -> list[str]:
    return [
        result.name,
        *map(microseconds, result.entry["ours"].values()),
        microseconds(result.peer),
        number(result.ratio),
        number(result.above_empty),
        number(result.of_copy),
        number(result.of_mma(result.ours)),
        number(result.of_mma(result.peer)),
        f"{result.off:.0e}" if result.off < TOLERANCE else f"WRONG {result.off:.1e}",
    ]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def microseconds(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def one_line(report: dict) -> Callable[[dict], str]:
    """A case's times, ours (of several trees each) / the peer's = the ratio."""

    def line(case: dict) -> str:
        cells = []
        for form in case["forms"]:
            result = Result(report, case, form)
            ours = ">".join(f"{us:.4g}" for us in result.entry["ours"].values())
            wrong = "" if result.off < TOLERANCE else f" WRONG {result.off:.0e}"
            cells.append(f"{form} {ours}/{result.peer:.4g}={result.ratio:.2f}{wrong}")
        return f"{case['name']}: " + "  ".join(cells)

    return line


# ---- on paper -------------------------------------------------------------------------------------------------------

HEAD = """\
# Ours and the peer's on silicon

`make silicon`, {date}, {device}, {sms} SMs.

The peer is the SM120 kernels of sgl-deep-gemm 0.2.3.post2; both sides are built from their sources for this card and
run on the same inputs. Results are compared with float64 and with each other: no two are further apart than {off:.0e}
in relative norm. A time is the median of 7 replays of a CUDA graph of launches that take turns over inputs in DRAM;
schedules are made beforehand. An empty kernel in such a graph takes {empty_us:.2f} us, a large copy moves {copy:.2f}
TB/s.
{forms}
![the peer's time over ours](silicon.png)
"""
STANDIN = """\

**This is no SM120 card.** In both sides a native MMA of the same operands stands in the place of each of SM120's, and
everything around it is what is timed; a row of bytes is then read as pairs of fp16, of which float64 has the same dot
product. SM120's own MMA: one in 16 clocks of a sub-partition, a latency of 29 to 34.

| form | in the place of one | clocks of a sub-partition | latency |
| --- | --- | ---: | ---: |
{rows}

What differs from SM120 besides: FP8 keys and queries of ours are loaded by 16 bytes instead of 32; what the peer does
to pick FP4's scales out of a word falls away (ours does nothing); x2s takes two registers more, which ours spills where
the query fills them all; and DRAM, L2, clocks and SMs are this card's.
"""
FORM_MEANING = {
    "x1": "one: all else is pressed 2.3 times as hard as on SM120",
    "x2": "two in a row on the same accumulators: a warp stalls within each pair",
    "x2s": "two side by side, the second's sums dropped: what SM120 comes to",
}
LEGEND = """\
us are ours / the peer's in {form}, a ratio is the peer's time over ours. Above empty: ours, less an empty kernel. Copy:
the time in which a copy moves as many bytes as all keys have, over ours. MMA: share of the MMA's rate, ours / the
peer's{share}. n: query tokens of a request, h: heads, where not 1 and 64. varlen: the peer is told which rows are one
sequence's; compressed: column 0 is a row's first key.
"""


def document(report: dict) -> str:
    forms = [*report["mma"]]
    mmas = "\n".join(
        f"| {form} | {FORM_MEANING[form]} | {mma['interval']:.1f} | {mma['latency']:.1f} |"
        for form, mma in report["mma"].items()
        if form in FORM_MEANING
    )
    off = max((result.off for form in forms for result in results(report, form)), default=0)
    copy, standin = bandwidth(report), STANDIN.format(rows=mmas) if mmas else ""
    facts = {key: report[key] for key in ("date", "device", "sms", "empty_us")}
    parts = [HEAD.format(**facts, off=off, copy=copy, forms=standin)]
    rows = [["bar", "form", "wanted", "met", "worst"], *(bar.row() for bar in bars(report))]
    parts.append("## Bars\n\n" + markdown(rows))
    share = "" if len(forms) == 1 else f" in {forms[-1]}"
    parts.append("## Cases\n\n" + LEGEND.format(form=forms[0], share=share))
    for title, kinds, fp4 in (("FP8", KINDS[:3], False), ("FP4", KINDS[:3], True), ("Metadata", KINDS[3:], False)):
        cases = [case for case in report["cases"] if case["kind"] in kinds and case["fp4"] is fp4]
        if cases:
            head = ["case", "us", *forms, "above empty", "copy", "MMA"]
            rows = [paper_row(report, case, forms, forms[-1]) for case in cases]
            parts.append(f"### {title}\n\n" + markdown([head, *rows]))
    if report["missed"]:
        parts.append(f"Not timed: {', '.join(report['missed'])}.\n")
    return "\n".join(parts)


def paper_row(report: dict, case: dict, forms: list[str], shared: str) -> list[str]:
    found = {form: Result(report, case, form) for form in forms if form in case["forms"]}
    first, last = found[forms[0]], found.get(shared)
    shares = [number(last.of_mma(us)) for us in (last.ours, last.peer)] if last and case["mmas"] else []
    return [
        case["name"].removeprefix("fp8 ").removeprefix("fp4 ").removeprefix("metadata "),
        f"{microseconds(first.ours)} / {microseconds(first.peer)}",
        *(number(found[form].ratio) if form in found else "" for form in forms),
        number(first.above_empty),
        number(first.of_copy),
        " / ".join(shares),
    ]


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in body]) + "\n"


def draw(report: dict, path: Path) -> None:
    """The ratio of every case, FP8 and FP4 beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"FP8": False, "FP4": True}
    counts = [sum(case["fp4"] is fp4 for case in report["cases"]) for fp4 in panels.values()]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.17 * max(counts)), layout="constrained", sharex=True)
    for axis, (title, fp4) in zip(axes, panels.items()):
        cases = [case for case in report["cases"] if case["fp4"] is fp4]
        for form in report["mma"]:
            timed = [(y, Result(report, case, form)) for y, case in enumerate(cases) if form in case["forms"]]
            ratios, places = [result.ratio for _, result in timed], [y for y, _ in timed]
            axis.plot(ratios, places, "o", markersize=4, color=FORM_COLOURS[form], label=form)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(
            range(len(cases)), [case["name"].removeprefix(f"{title.lower()} ") for case in cases], fontsize=7
        )
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.grid(axis="x", linewidth=0.4)
        axis.set_title(f"{title}: the peer's time over ours", fontsize=10)
    axes[1].legend(title="in the MMA's place", fontsize=8, loc="upper right")
    figure.suptitle(f"{report['device']}, {report['date']}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(report: dict, place: Path) -> None:
    """Into a file *.json; or into a folder silicon.json, silicon.md and, where matplotlib is installed, silicon.png."""
    text = json.dumps(report, indent=1) + "\n"
    if place.suffix == ".json":
        place.write_text(text)
        return
    place.mkdir(parents=True, exist_ok=True)
    (place / "silicon.json").write_text(text)
    (place / "silicon.md").write_text(document(report))
    try:
        draw(report, place / "silicon.png")
    except ImportError:
        print("no picture: matplotlib is not installed")
