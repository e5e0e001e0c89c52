"""What is said about the times: entries, the table, the picture, the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case


def rounded(value: Any) -> Any:
    """Four digits are more than a clock gives."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def summary(entry: dict) -> str:
    if "cold" not in entry:
        return f"{entry['peer']}: {entry['status'].upper()} {entry.get('reason', entry.get('error'))}"
    cold = entry["cold"]
    if entry["peer"] != "ours":
        return f"{entry['peer']} {cold['median_us']:.1f} us"
    if "of_roof" not in cold:
        return f"{entry['name']}: {cold['median_us']:.1f} us,"
    return f"{entry['name']}: {cold['median_us']:.1f} us, {cold['tbps']:.2f} TB/s, {cold['tflops']:.0f} TFLOPS,"


HEADINGS = ("case", "us", "spread", "warm us", "TB/s", "TFLOPS", "of copy", "of MMA", "of roof", "error")


def table_of(result: dict) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a line for each case, ours first, then every peer's time, and how many times ours it is."""
    peers = list(dict.fromkeys(entry["peer"] for entry in result["results"]))
    others = [peer for peer in peers if peer != "ours"]
    cases: dict[str, dict[str, dict]] = {}
    for entry in result["results"]:
        cases.setdefault(entry["name"], {})[entry["peer"]] = entry
    rows = []
    for name, entries in cases.items():
        mine = entries.get("ours", {})
        cold, warm = mine.get("cold", {}), mine.get("warm", {})
        row = [name, *([mine.get("status", "-").upper()] if not cold else [f"{cold['median_us']:.1f}"])]
        row.append(f"{cold['low_us']:.1f}-{cold['high_us']:.1f}" if cold else "-")
        row.append(f"{warm['median_us']:.1f}" if warm else "-")
        row += [f"{cold[key]:.3g}" if key in cold else "-" for key in ("tbps", "tflops")]
        row += [f"{cold[key]:.0%}" if key in cold else "-" for key in ("of_copy", "of_mma", "of_roof")]
        row.append(f"{mine['error']:.0e}" if mine.get("error") is not None else "-")
        for other in others:
            theirs = entries.get(other, {})
            if "cold" not in theirs:
                row.append({"unsupported": "-"}.get(theirs.get("status", "-"), theirs.get("status", "-")))
            else:
                ratio = theirs["cold"]["median_us"] / cold["median_us"] if cold else math.nan
                row.append(f"{theirs['cold']['median_us']:.1f} ({ratio:.2f}x)")
        rows.append(row)
    return [*HEADINGS, *others], rows


def as_text(headings: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths)) for line in [headings, *rows])
    ]
    return "\n".join(line.rstrip() for line in lines)


def draw(result: dict, path: Path) -> None:
    """The roofline: work per byte across, rate upwards; and what part of the roof each case of ours reaches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    figure.suptitle(f"{result['device']['name']}, {result['date'][:10]}, cold L2", fontweight="bold")
    roofline, share = figure.subplots(1, 2, width_ratios=(3, 2))
    ceilings = result["ceilings"]
    timed = [entry for entry in result["results"] if "of_roof" in entry.get("cold", {})]
    cases = {id(entry): Case(*(entry[key] for key in Case.__dataclass_fields__)) for entry in timed}
    peers = list(dict.fromkeys(entry["peer"] for entry in timed))
    for number, peer in enumerate(peers):
        for fp4 in (False, True):
            mine = [entry for entry in timed if entry["peer"] == peer and entry["fp4"] == fp4]
            x = [cases[id(entry)].flops / cases[id(entry)].bytes for entry in mine]
            style = {"s": 34, "alpha": 0.8, "color": f"C{number}", "marker": "s" if fp4 else "o"}
            if mine:
                label = f"{peer}, {'FP4' if fp4 else 'FP8'}"
                roofline.scatter(x, [entry["cold"]["tflops"] for entry in mine], label=label, **style)
            if mine and peer == "ours":
                floors = [entry["cold"]["floor_us"] for entry in mine]
                share.scatter(floors, [100 * entry["cold"]["of_roof"] for entry in mine], label=label, **style)
    peaks, copy = ceilings["mma_tflops"], ceilings["copy_tbps"]
    tallest = max([*peaks.values(), *(entry["cold"]["tflops"] for entry in timed)])
    roofline.plot([10, tallest / copy], [10 * copy, tallest], color="grey", label=f"copy: {copy:.2f} TB/s")
    for (name, peak), dashes in zip(peaks.items(), ("-", "--", ":")):
        roofline.plot([peak / copy, 2e4], [peak, peak], dashes, color="black", label=f"MMA {name}: {peak:.0f} TFLOPS")
    roofline.set(xscale="log", yscale="log", xlabel="FLOP a byte, every byte once", ylabel="TFLOPS", title="Roofline")
    share.set(
        xscale="log", xlabel="the roof's time, us", ylabel="% of the roof", title="Ours: part of the roof reached"
    )
    share.set_ylim(0)
    for panel in (roofline, share):
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write(result: dict, folder: Path, say: Callable[[str], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    headings, rows = table_of(result)
    text = as_text(headings, rows)
    (folder / "bench.txt").write_text(text + "\n")
    show(headings, rows, text)
    try:
        draw(result, folder / "roofline.png")
    except ImportError:
        say("no picture: matplotlib is not installed")
    say(f"{result['took_s']:.0f} s; {folder / 'bench.json'} is the file to send")


def show(headings: list[str], rows: list[list[str]], text: str) -> None:
    """With rich where it is and there is a terminal; else as in bench.txt."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(text)
        return
    console = Console()
    if not console.is_terminal:
        print(text)
        return
    table = Table(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
