"""Times the Lightning Indexer on a GPU, beside whatever else computes it there, against what the card can do.

    python tools/bench/bench.py             the whole grid, at most 10 minutes, into bench-<device>-<date>/
    python tools/bench/bench.py --quick     a few sizes, at most 90 seconds
    python tools/bench/bench.py --dry-run   what would be timed, and how big it is; no GPU needed

Any card from SM89 up, from the wheel or the source tree; rich and matplotlib are used where they are installed. The
folder then holds bench.json (everything), bench.txt (the table) and roofline.png.

decode    requests of equal length, each with pages of its own; next_n query tokens each
prefill   4,096 query tokens of one sequence as SGLang makes them: paged rows, their lengths growing by 1 every 4 rows
ragged    4,096 query tokens over one run of keys, their lengths growing by 1 every row
metadata  the schedule of rows of random lengths
topk      the 512 best of random scores, as places in pages: beside SGLang's kernels, vLLM's and torch's
indexer   decode, logits and top-k: ours in one call, DeepGEMM's logits followed by SGLang's top-k

Each result is first compared with float64 on a sample of its rows; one that is wrong is reported and not timed. Times
are between CUDA events, the launches queued up beforehand. Cold: L2 is filled by reading something else before each
call, and calls take turns with several sets of inputs. Warm: the same call again and again. Ours runs on SM90 and SM100
too. The roof is the card's own: the longer of the time that the fewest possible bytes take at the bandwidth of a copy,
and the time that the multiplications take at the rate of a loop of nothing but MMAs.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("deep_gemm") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "sm120"))

from cases import METADATA_ROWS, PAGE, Case, figures, plan, short
from clock import Clock, measure_ceilings
from contenders import Prepare, Unsupported, find_peers
from indexer import has_indexer, run_indexer, run_topk, steps, topk_cases
from inputs import Cache, Inputs, poison, relative_error
from results import as_text, rounded, show, summary, write
from topk_peers import Peer
from topk_peers import find as find_choices

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import reference, upstream
from deep_gemm.sm120.jit import architecture_of

SCHEMA = 1
TOLERANCE = 1e-3  # relative norm: the tensor cores of some cards keep 14 bits of an FP8 sum
SETS = 3  # of inputs that take turns


# ---- one case after the other ---------------------------------------------------------------------------------------


def judge(inputs: list[Inputs], prepare: Prepare) -> tuple[list[Callable], dict[str, Any]]:
    """The calls to time, none unless the first one's logits are right; and a status, which says what is the matter."""
    try:
        calls = [prepare(each) for each in inputs]
        poison(inputs[0])
        error = relative_error(inputs[0], calls[0]())
    except Unsupported as reason:
        return [], {"status": "unsupported", "reason": str(reason)}
    except Exception as problem:  # a peer's kernel may fail in any way; the others go on
        return [], {"status": "failed", "reason": f"{type(problem).__name__}: {problem}".partition("\n")[0][:300]}
    if error > TOLERANCE:
        return [], {"status": "wrong", "error": error}
    return calls, {"status": "right", "error": error}


def run_case(
    case: Case,
    cache: Cache,
    peers: dict[str, Prepare],
    clock: Clock,
    ceilings: dict,
    choices: dict[str, Peer] | None = None,
) -> list[dict]:
    """One entry for each peer: what it said, and what its cold and warm times mean; and the indexer with `choices`."""
    inputs = cache.inputs(case, SETS if case.footprint < 1 << 30 else 1)
    entries = []
    for name, prepare in peers.items():
        calls, entry = judge(inputs, prepare)
        for mode, chosen in (("cold", calls), ("warm", calls[:1])):
            if calls:
                timing = clock.time(chosen, cold=mode == "cold")
                entry[mode] = {**asdict(timing), **figures(case, timing.median_us, ceilings)}
        entries.append({**asdict(case), "name": case.name, "peer": name, **entry})
    if choices is not None and has_indexer(case) and entries[0]["status"] == "right":
        packages = {name: prepare for name, prepare in peers.items() if name in upstream.CANDIDATES}
        logits = peers["ours"](inputs[0])().clone()
        entries += run_indexer(inputs, logits, steps(packages, choices), clock)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next case has other sizes
    return entries


def run_metadata(rows: int, device: torch.device, peers: dict[str, Prepare], clock: Clock) -> list[dict]:
    """Ours against the contract; upstream's, whose splits differ from card to card, as it comes."""
    lengths = torch.randint(0, 9000, (rows, 1), dtype=torch.int32, device=device)
    slots = torch.cuda.get_device_properties(device).multi_processor_count
    planners = {"ours": sm120.get_paged_mqa_logits_metadata}
    for name, prepare in peers.items():
        package = prepare.args[0] if isinstance(prepare, functools.partial) else None
        if hasattr(package, "get_paged_mqa_logits_metadata"):
            planners[name] = package.get_paged_mqa_logits_metadata
    entries = []
    for name, planner in planners.items():
        entry = {"kind": "metadata", "name": f"metadata {rows}", "rows": rows, "peer": name, "status": "right"}
        try:
            made = planner(lengths, PAGE, slots)
            same = torch.equal(made, reference.schedule(lengths, slots))
            if name == "ours" and not same:
                entry["status"] = "wrong"
            else:
                entry["same_contract"] = same
                entry["cold"] = asdict(clock.time([functools.partial(planner, lengths, PAGE, slots)], cold=True))
        except Exception as problem:
            entry |= {"status": "failed", "reason": f"{type(problem).__name__}: {problem}".partition("\n")[0][:300]}
        entries.append(entry)
    return entries


def fits(case: Case, free: int) -> bool:
    """With the logits of a peer that allocates its own, and room to work."""
    return case.footprint + 4 * case.tokens * case.keys + (2 << 30) < free


def run(args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything: the content of bench.json."""
    began = time.monotonic()
    peers, missing = find_peers()
    choices, others = find_choices()
    missing.update(others)
    if args.peers:
        missing.update({name: "not asked for" for name in (*peers, *choices) if name not in (*args.peers, "ours")})
        peers, choices = ({name: who for name, who in of.items() if name not in missing} for of in (peers, choices))
    say(f"peers: {', '.join(dict.fromkeys((*peers, *choices)))}")
    for name, reason in missing.items():
        say(f"not here: {name} ({reason})")
    with exact_tf32():
        clock = Clock(device, args.seconds)
        ceilings = measure_ceilings(device, clock)
        say(f"ceilings: {json.dumps(rounded(ceilings))}")
        result = {
            "schema": SCHEMA,
            **describe(device),
            "options": {"quick": args.quick, "heads": args.heads, "seconds": args.seconds, "minutes": args.minutes},
            "ceilings": ceilings,
            "missing_peers": missing,
            "results": [],
            "left_out": {},
        }
        for rows in METADATA_ROWS[1:3] if args.quick else METADATA_ROWS:
            result["results"] += run_metadata(rows, device, peers, clock)
        for case in topk_cases(args.quick):
            result["results"] += (entries := run_topk(case, choices, clock, device))
            say("  ".join(map(summary, entries)))
        cases = plan(args.quick, args.heads)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        cache = Cache(device)
        quick = len(plan(True, args.heads))
        for group in (cases[:quick], cases[quick:]):
            for fp4 in (False, True):
                mine = [case for case in group if case.fp4 == fp4 and fits(case, free)]
                paged = [case for case in mine if case.kind != "ragged"]
                for case in group:
                    if case.fp4 == fp4 and case not in mine:
                        result["left_out"][case.name] = f"does not fit in {free / 2**30:.0f} GiB"
                if time.monotonic() - began > 60 * args.minutes:
                    result["left_out"].update({case.name: "out of time" for case in mine})
                    continue
                cache.pages.clear()
                torch.cuda.empty_cache()
                if paged:
                    most = max(case.distinct_keys * (SETS if case.footprint < 1 << 30 else 1) for case in paged)
                    cache.reserve(fp4, most // PAGE)
                for case in mine:
                    if time.monotonic() - began > 60 * args.minutes:
                        result["left_out"][case.name] = "out of time"
                        continue
                    entries = run_case(case, cache, peers, clock, ceilings, choices)
                    result["results"] += entries
                    say("  ".join(summary(entry) for entry in entries if entry["status"] != "unsupported"))
    result["took_s"] = time.monotonic() - began
    return result


@contextmanager
def exact_tf32() -> Iterator[None]:
    """FP8 and FP4 numbers are TF32 numbers: torch may use its tensor cores."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- the machine ----------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as far as the figures depend on it; nothing that tells whose it is."""
    properties = torch.cuda.get_device_properties(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "deep_gemm": deep_gemm.__version__}
    for name in ("cuda-bindings", "cuda-core", "nvidia-cuda-nvrtc", "triton", "flashinfer-python", "sglang", "vllm"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    smi = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    said = [part.strip() for part in output_of([*smi, f"--id={device.index or 0}"]).split(",")]
    names = ("driver", "power_limit", "max_sm_clock", "max_memory_clock")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "built_for": architecture_of(device),
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            **(dict(zip(names, said)) if len(said) == len(names) else {}),
        },
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "switches": {name: value for name, value in os.environ.items() if re.match("DG_SM120_", name)},
        "revision": output_of(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]) or None,
    }


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ---- the program ----------------------------------------------------------------------------------------------------


def show_plan(args: argparse.Namespace) -> None:
    """--dry-run: the cases and their sizes."""
    headings = ["case", "keys GB", "logits GB", "bytes GB", "GFLOP", "FLOP/byte", "memory GB"]
    rows = []
    for case in plan(args.quick, args.heads):
        sizes = (case.key_bytes, 4 * case.pairs, case.bytes, case.flops)
        cells = [f"{size * 1e-9:.3g}" for size in sizes]
        rows.append([case.name, *cells, f"{case.flops / case.bytes:.0f}", f"{case.footprint * 1e-9:.3g}"])
    show(headings, rows, as_text(headings, rows))
    print(f"{len(rows)} cases, and metadata of {METADATA_ROWS} rows; cold and warm; every peer that is installed")
    choices = ", ".join(f"{rows} x {short(keys)}" for rows, keys, _ in topk_cases(args.quick))
    steps = ", ".join(case.name for case in plan(args.quick, args.heads) if has_indexer(case))
    print(f"top-k: {choices}\nlogits with top-k behind them: {steps}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few sizes")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its sizes, time nothing")
    parser.add_argument("--heads", type=int, choices=(64, 32, 16), default=64, help="of the indexer (64)")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="beside ours only these (all that are installed)")
    parser.add_argument("--out", type=Path, help="folder for the results (./bench-<device>-<date>)")
    parser.add_argument("--device", type=int, default=0, help="which GPU (0)")
    parser.add_argument("--seconds", type=float, default=0.15, help="about so many for each time taken (0.15)")
    parser.add_argument("--minutes", type=float, help="start no case after so many (9, --quick 1.2)")
    args = parser.parse_args(arguments)
    args.minutes = args.minutes or (1.2 if args.quick else 9)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.dry_run:
        show_plan(args)
        return 0
    if not torch.cuda.is_available():
        print("bench: there is no GPU that PyTorch can use; --dry-run shows what would be timed", file=sys.stderr)
        return 2
    device = torch.device("cuda", args.device)
    if torch.cuda.get_device_capability(device) < (8, 9):
        print(f"bench: {torch.cuda.get_device_name(device)} has no FP8 MMA; SM89 or later is needed", file=sys.stderr)
        return 2
    torch.cuda.set_device(device)
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-").lower()
    folder = args.out or Path(f"bench-{name}-{datetime.date.today().isoformat()}")
    write(run(args, device, functools.partial(print, flush=True)), folder, print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
