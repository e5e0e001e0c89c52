"""Top-k beside everybody else's (see topk_peers.py). It has no MMA, so times of any card from SM89 up are real ones.

    python tools/bench/topk.py                                    all of it, into docs/performance/topk.json and .md
    python tools/bench/topk.py --quick                            k 512 and fewer sizes
    python tools/bench/topk.py --rows 1,16 --keys 4096,65536 --k 512,2048 [--out FILE.json]
    python tools/bench/topk.py --show [FILE.json]                 prints the tables of a topk.json
    python tools/bench/topk.py --dry-run                          what would be timed; no GPU needed

fp32 scores, normal; places in pages of 64, as in serving, or positions where a peer has no places. A time is the median
of 7 replays of a CUDA graph of 24 launches that take turns over 8 inputs (prefill: 2), us a launch. Every result is
compared with torch.topk by the scores that it chose; one that is wrong is reported and not timed. Of a prefill a limit
is timed, too: the fastest of several kernels that read all scores and store as many words as are chosen, nothing else.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from topk_peers import PAGE, Launch, Peer, distance, find, positions_of

ROOT = Path(__file__).parents[2]
if importlib.util.find_spec("deep_gemm") is None:
    sys.path.insert(0, str(ROOT / "sm120"))

from cases import short  # noqa: E402
from probes import Reader, run_rows  # noqa: E402

from deep_gemm import sm120  # noqa: E402
from deep_gemm.sm120.jit import Kernel, launch  # noqa: E402
from deep_gemm.sm120.kernels.windows import Windows  # noqa: E402

RESULTS = ROOT / "docs" / "performance" / "topk.json"
ROWS, PREFILL = (1, 4, 16, 64, 256), 4096
KEYS = tuple(1 << n for n in range(10, 19))
PREFILL_KEYS = (1024, 4096, 16384, 65536)
KS = (512, 1024, 2048)
INPUTS, LAUNCHES, REPLAYS = 8, 24, 7
RECORD = "SGLang v2 (clusters)"  # which SM120 does not have: for the record
OURS = {"ours": True, "ours, no PDL": False}  # with programmatic dependent launch, as SGLang launches its own, or not

Case = tuple[int, int, int]  # rows, keys, k


def plan(rows: tuple[int, ...], keys: tuple[int, ...], ks: tuple[int, ...]) -> list[Case]:
    """Without rows of at most k keys, of which nothing is chosen. A prefill has fewer sizes."""
    every = [(r, n, k) for k in ks for r in rows for n in keys]
    return [(r, n, k) for r, n, k in every if n > k and (r < PREFILL or n in PREFILL_KEYS)]


# ---- one case -------------------------------------------------------------------------------------------------------


def ours(
    logits: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, out: torch.Tensor, pdl: bool = True
) -> Launch:
    size = sm120.topk_workspace_bytes(*logits.shape, out.shape[1], device=logits.device)
    workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)

    def call() -> None:
        before = sm120.get_pdl()
        sm120.set_pdl(pdl)
        sm120.topk(logits, lengths, out.shape[1], block_table=table, page=PAGE, out=out, workspace=workspace)
        sm120.set_pdl(before)

    return call


class Problem:
    """Inputs that take turns: views of a pool of random scores; each row has pages of its own."""

    def __init__(self, case: Case, pool: torch.Tensor) -> None:
        rows, keys, k = case
        inputs = 2 if rows >= PREFILL else INPUTS
        self.logits = pool[: rows * keys * inputs].view(inputs, rows, keys)
        self.lengths = torch.full((rows,), keys, dtype=torch.int32, device=pool.device)
        pages = -(-keys // PAGE)
        self.table = torch.randperm(rows * pages, device=pool.device).int().view(rows, pages)
        self.out = torch.empty((inputs, rows, k), dtype=torch.int32, device=pool.device)

    def launches(self, peer: Peer) -> list[Launch] | None:
        made = [peer.bind(logits, self.lengths, self.table, out) for logits, out in zip(self.logits, self.out)]
        return None if made[0] is None else made

    def right(self, peer: Peer, call: Launch) -> bool:
        """Whether the first input's result has the best scores, each key once."""
        out = self.out[0].fill_(-7)
        call()
        chosen = getattr(call, "indices", out)
        if peer.places:
            chosen = positions_of(chosen, self.table)
        return distance(self.logits[0], self.lengths, chosen) == 0


def limit(problem: Problem, clock: Callable, sms: int) -> float:
    """us that it takes to read the scores of a prefill and to store as many words as are chosen."""
    rows = problem.logits.shape[1]
    return min(
        clock([functools.partial(run_rows, threads, blocks, *each) for each in zip(problem.logits, problem.out)])
        for threads in (128, 256, 512)
        for blocks in (rows, 2048 // threads * sms)
    )


def compare(case: Case, peers: dict[str, Peer], clock: Callable, pool: torch.Tensor, sms: int = 1) -> dict:
    """us by name; of a result that is not right, or a peer that fails, what is the matter."""
    problem = Problem(case, pool)
    measured = {"rows": case[0], "keys": case[1], "k": case[2], "us": {}, "wrong": {}}
    for name, peer in peers.items():
        try:
            if (launches := problem.launches(peer)) is None:
                continue
            if problem.right(peer, launches[0]):
                measured["us"][name] = clock(launches)
            else:
                measured["wrong"][name] = "wrong"
        except Exception as error:  # a peer's kernel may fail in any way; the others go on
            measured["wrong"][name] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    if case[0] >= PREFILL:
        measured["limit_us"] = limit(problem, clock, sms)
    return measured


def time(launches: list[Launch], count: int = LAUNCHES) -> float:
    """us a launch."""
    count = -(-count // len(launches)) * len(launches)
    for start in launches:
        start()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            launches[index % len(launches)]()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # until all of the replay is on its way
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


# ---- the run --------------------------------------------------------------------------------------------------------


def empty_kernel() -> Launch:
    kernel, device = Kernel("empty", "window.cuh", "", 32, Windows), torch.device("cuda", torch.cuda.current_device())
    return lambda: launch(kernel, device, (1, 1), Windows(), {}, {})


def run(cases: list[Case]) -> dict:
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    found, missing = find()
    peers = {name: Peer(functools.partial(ours, pdl=pdl), True) for name, pdl in OURS.items()} | found
    for name, reason in missing.items():
        print(f"not here: {name} ({reason})")
    torch.manual_seed(0)
    reader = Reader(1 << 30, device, 2 * properties.multi_processor_count)
    report = {
        "date": str(date.today()), "device": properties.name, "sms": properties.multi_processor_count,
        "torch": torch.__version__, "empty_us": time([empty_kernel()]), "missing": missing, "cases": [],
    }  # fmt: skip
    report["read_tbps"] = reader.bytes / time([reader], 4) * 1e-6
    pool = torch.randn(max(r * n * (2 if r >= PREFILL else INPUTS) for r, n, _ in cases), device=device)
    for case in cases:
        report["cases"].append(compare(case, peers, time, pool, report["sms"]))
        print(line(report["cases"][-1]), flush=True)
    return report


# ---- what it says ---------------------------------------------------------------------------------------------------


def name_of(case: dict) -> str:
    return f"{case['rows']:,} x {short(case['keys'])}"


def line(case: dict) -> str:
    cells = [f"{name} {us:.1f}" for name, us in case["us"].items()]
    cells += [f"{name}: {what.upper() if what == 'wrong' else what}" for name, what in case["wrong"].items()]
    return f"{name_of(case)}, k {case['k']}: {', '.join(cells)}"


def best_peer(case: dict) -> float | None:
    """us of the fastest of what SM120 would have."""
    return min((us for name, us in case["us"].items() if name not in (*OURS, RECORD)), default=None)


def tables(report: dict) -> str:
    """Markdown: a table for each k, the fastest of what SM120 has in bold, and what missed its bar."""
    names = list(dict.fromkeys(name for case in report["cases"] for name in (*case["us"], *case["wrong"])))
    parts = [
        f"`python tools/bench/topk.py`, {report['date']}, {report['device']}, {report['sms']} SMs, torch "
        f"{report['torch']}; us a launch, fp32 scores, places in pages of {PAGE}. An empty kernel takes "
        f"{report['empty_us']:.1f}, a read reaches {report['read_tbps']:.2f} TB/s.",
        "Ours and SGLang's are launched with programmatic dependent launch (PDL), as SGLang does it: launches in "
        f"a row overlap. Ours also without. {RECORD}: for the record, SM120 has none. Ratio: the fastest peer's time, "
        "that one left out, over ours.",
    ]
    parts += [f"Not here: {name} ({reason})." for name, reason in report["missing"].items()]
    for k in dict.fromkeys(case["k"] for case in report["cases"]):
        mine = [case for case in report["cases"] if case["k"] == k]
        here = [name for name in names if any(name in case["us"] or name in case["wrong"] for case in mine)]
        rows = [f"| k {k:,}: rows x keys | {' | '.join(here)} | ratio |", "| --- |" + " ---: |" * (len(here) + 1)]
        for case in mine:
            best = min((us for name, us in case["us"].items() if name not in (RECORD, "ours, no PDL")), default=None)
            cells = [name_of(case)]
            for name in here:
                us = case["us"].get(name)
                text = case["wrong"].get(name, "") and "wrong" if us is None else f"{us:.1f}"
                cells.append(f"**{text}**" if us is not None and us == best else text)
            peer, us = best_peer(case), case["us"].get("ours")
            cells.append(f"{peer / us:.2f}" if peer and us else "")
            rows.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    parts += prefill_table(report)
    rows = ["| bar | met | the farthest |", "| --- | --- | --- |"]
    rows += [f"| {bar} | {met} of {count} | {worst} |" for bar, met, count, worst in bars(report)]
    return "\n\n".join([*parts, "\n".join(rows)]) + "\n"


def prefill_table(report: dict) -> list[str]:
    """What is asked of a prefill, the limit of any choice, and ours; none where no limit was timed."""
    cases = [case for case in report["cases"] if "limit_us" in case and "ours" in case["us"]]
    rows = ["| prefill: rows x keys | k | asked, us | limit | ours | ours / limit | asked |"]
    rows.append("| --- |" + " ---: |" * 5 + " --- |")
    for case in cases:
        asked, least, ours = asked_us(report, case), case["limit_us"], case["us"]["ours"]
        verdict = "met" if ours <= asked else "out of reach" if least > asked else "not met"
        numbers = f"{case['k']:,} | {asked:.1f} | {least:.1f} | {ours:.1f} | {ours / least:.2f}"
        rows.append(f"| {name_of(case)} | {numbers} | {verdict} |")
    return ["\n".join(rows)] if cases else []


def asked_us(report: dict, case: dict) -> float:
    """A prefill's time at 80% of a read's bandwidth, counting each score once."""
    return case["rows"] * case["keys"] * 4e-6 / (0.8 * report["read_tbps"])


def bars(report: dict) -> list[tuple[str, int, int, str]]:
    """What was asked for: in how many cases it is met, of how many, and the case that is farthest from it."""
    cases = [case for case in report["cases"] if "ours" in case["us"]]
    empty = report["empty_us"]
    most_us = {4096: 3.5, 16384: 5.0, 65536: 6.0, 262144: 8.0}
    times_v1 = {16384: 2.0, 65536: 4.0, 262144: 10.0}

    def ahead(case):
        peer = best_peer(case)
        return peer and peer / case["us"]["ours"]

    def above_empty(case):
        if case["rows"] in (1, 4) and case["k"] == 512 and case["keys"] in most_us:
            alone = case["us"].get("ours, no PDL", case["us"]["ours"])
            return most_us[case["keys"]] / max(alone - empty, 1e-3)

    def beside_v1(case):
        if case["rows"] <= 16 and case["keys"] in times_v1 and "SGLang v1" in case["us"]:
            return case["us"]["SGLang v1"] / case["us"]["ours"] / times_v1[case["keys"]]

    def bandwidth(case):
        if case["rows"] >= PREFILL:
            return asked_us(report, case) / case["us"]["ours"]

    found = []
    for bar, share in (
        ("ahead of every peer", ahead),
        (
            "rows 1 and 4, k 512, no PDL: at most 3.5, 5, 6, 8 us above an empty kernel at 4K, 16K, 64K, 256K",
            above_empty,
        ),
        ("rows 1 to 16: 2, 4, 10 times as fast as SGLang v1 at 16K, 64K, 256K", beside_v1),
        (f"{PREFILL:,} rows: 80% of a read's bandwidth", bandwidth),
    ):
        shares = [(value, case) for case in cases if (value := share(case))]  # at least 1 where the bar is met
        if shares:
            value, case = min(shares, key=lambda pair: pair[0])
            worst = f"{value:.2f} of it: {name_of(case)}, k {case['k']:,}"
            found.append((bar, sum(value >= 1 for value, _ in shares), len(shares), worst))
    return found


def numbers(text: str) -> tuple[int, ...]:
    """An argument parser's type: positive numbers with commas, as 16K or 16384."""
    values = tuple(int(word[:-1]) << 10 if word.upper().endswith("K") else int(word) for word in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected positive numbers")
    return values


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="k 512 and fewer sizes")
    parser.add_argument("--rows", type=numbers, help="some of the rows, with commas; 4,096 is a prefill")
    parser.add_argument("--keys", type=numbers, help="of each row, as 16K or 16384")
    parser.add_argument("--k", type=numbers, help="1 to 2,048")
    parser.add_argument("--out", type=Path, help="a file *.json, beside which a *.md is written; default, if nothing "
                        "is left out: docs/performance/topk.json")  # fmt: skip
    parser.add_argument(
        "--show", nargs="?", const=RESULTS, type=Path, metavar="FILE", help="print a topk.json's tables"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be timed")
    args = parser.parse_args(arguments)
    if args.show:
        print(tables(json.loads(args.show.read_text())))
        return 0
    defaults = (*ROWS, PREFILL), KEYS[::2] if args.quick else KEYS, KS[:1] if args.quick else KS
    cases = plan(args.rows or defaults[0], args.keys or defaults[1], args.k or defaults[2])
    if args.dry_run:
        for rows, keys, k in cases:
            print(f"{rows:,} x {short(keys)}, k {k}")
        return 0
    if not torch.cuda.is_available():
        print("topk: there is no GPU that PyTorch can use; --dry-run shows what would be timed", file=sys.stderr)
        return 2
    report = run(cases)
    whole = cases == plan((*ROWS, PREFILL), KEYS, KS)
    print(tables(report))
    if out := args.out or (RESULTS if whole else None):
        out.write_text(json.dumps(report, indent=1) + "\n")
        out.with_suffix(".md").write_text("# Top-k on silicon\n\n" + tables(report))
    return int(any("ours" in case["wrong"] for case in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
