"""Ours beside NVIDIA's SM120 kernels on the card at hand, every case timed in one run.

    python tools/evidence/silicon.py                    builds both sides, runs, writes docs/performance/silicon.*
    python tools/evidence/silicon.py build --into DIR   builds the peer's kernels into DIR; needs no GPU
    python tools/evidence/silicon.py run DIR            runs with those; builds only ours, fetches nothing
    python tools/evidence/silicon.py show FILE          what a silicon.json says

On SM120 both sides run as they are (form `native`). On SM90 the MMA of both is replaced (forms `x1`, `x2`, `x2s`; see
substitute.py), and everything around it is what is timed. Without a GPU everything is built, and the plan printed.

    --only decode,metadata  --formats fp8  --forms x1  --heads 64  --case "1 x 16K"      some of the cases
    --tree before=PATH --tree after=PATH                several source trees of ours in the same run
    --ncu "fp8 1 x 64" --side peer                      launches one case of one side a few times, for a profiler

A time is the median of 7 replays of a CUDA graph of 12 or 24 launches (4, where one takes milliseconds), which take
turns over inputs that lie in DRAM: L2 is filled with something else before each replay, and no launch finds what
another one has read. Schedules are made beforehand, each side's by its own planner. Results are compared with each
other and, on a sample of rows, with float64; where they differ, the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import date
from pathlib import Path

import peer
import silicon_report
import torch
from silicon_card import Clock, PeerKernels, architecture, copy_times, empty_us, mma_figures
from silicon_cases import KINDS, PAGE, Case, Inputs, Pool, distance, error_against_float64, plan
from substitute import FORMS, GEOMETRY, NATIVE, Tree, build_peer

ROOT = Path(__file__).parent.parent.parent
SMS = 132  # of an H100: for which the peer's kernels are built where there is no card


# ---- the peer's kernels, built here or elsewhere --------------------------------------------------------------------


def peer_kernels(case: Case, sms: int) -> tuple[peer.Kernel | None, peer.Kernel | None]:
    """Of a case: logits, schedule."""
    kind, varlen = "fp4" if case.fp4 else "fp8", case.style == "varlen"
    planner = None if case.kind == "ragged" else peer.metadata(case.rows, sms, varlen=varlen)
    if case.kind == "metadata":
        return None, planner
    if case.kind == "ragged":
        return peer.ragged(kind, case.heads, compressed=case.style == "compressed", num_sms=sms), None
    return peer.paged(kind, case.heads, case.next_n, varlen=varlen), planner


class Built:
    """The peer's cubins by form and instantiation: out of a folder, else built when asked for."""

    FILE = "peer.zip"

    def __init__(self, folder: Path | None = None) -> None:
        self.binaries: dict[tuple[str, str], tuple[str, bytes]] = {}
        if folder is not None:
            with zipfile.ZipFile(folder / self.FILE) as archive:
                for entry in json.loads(archive.read("index.json")):
                    self.binaries[entry["form"], entry["instance"]] = (entry["name"], archive.read(entry["file"]))

    def get(self, kernel: peer.Kernel, form: str) -> tuple[str, bytes]:
        """Symbol and cubin."""
        key = (form if form == NATIVE or "metadata" not in kernel.instance else FORMS[0], kernel.instance)
        if key not in self.binaries:
            binary = build_peer(kernel, key[0])
            self.binaries[key] = (binary.name, binary.cubin)
        return self.binaries[key]

    def build(self, cases: list[Case], forms: Iterable[str], sms: int) -> None:
        kernels = dict.fromkeys(k for case in cases for k in peer_kernels(case, sms) if k is not None)
        for form, kernel in itertools.product(forms, kernels):
            self.get(kernel, form)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / self.FILE, "w", zipfile.ZIP_LZMA) as archive:
            index = []
            for number, ((form, instance), (name, cubin)) in enumerate(self.binaries.items()):
                index.append({"form": form, "instance": instance, "name": name, "file": f"{number}.cubin"})
                archive.writestr(f"{number}.cubin", cubin)
            archive.writestr("index.json", json.dumps(index, indent=1))


# ---- the two sides: the call for a set of inputs --------------------------------------------------------------------


def our_call(tree: Tree, it: Inputs, sms: int) -> Callable[[], None]:
    """One of the package's functions, its schedule made."""
    api, case = tree.sm120, it.case
    if case.kind == "metadata":
        return functools.partial(api.get_paged_mqa_logits_metadata, it.lengths, PAGE, sms)
    if case.kind == "ragged":
        return functools.partial(
            api.fp8_fp4_mqa_logits, it.q, it.kv, it.weights, it.starts, it.lengths,
            max_seqlen_k=case.keys if case.style == "compressed" else 0, out=it.out,
        )  # fmt: skip
    schedule = api.get_paged_mqa_logits_metadata(it.lengths, PAGE, sms)
    return functools.partial(
        api.fp8_fp4_paged_mqa_logits, it.q, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, case.keys,
        indices=it.indices, out=it.out,
    )  # fmt: skip


def peer_call(kernels: PeerKernels, form: str, it: Inputs, sms: int) -> Callable[[], None]:
    """A launch of the peer's, its schedule made."""
    case = it.case
    if case.kind == "ragged":
        compressed = case.keys if case.style == "compressed" else 0
        launch = peer.launch_ragged(it.q, it.kv, it.weights, it.starts, it.lengths, it.logits, compressed, num_sms=sms)
        return kernels.bind(launch, form)
    if "schedule" not in it.made:
        it.made["schedule"] = torch.full((sms + 1, 2), -1, dtype=torch.int32, device=it.lengths.device)
    schedule = it.made["schedule"]
    planner = kernels.bind(peer.launch_metadata(it.lengths, schedule, it.indices), form)
    if case.kind == "metadata":
        return planner
    planner()
    launch = peer.launch_paged(
        it.q, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, it.logits, it.indices
    )
    return kernels.bind(launch, form)


# ---- the run --------------------------------------------------------------------------------------------------------


def run(cases: list[Case], forms: list[str], trees: list[Tree], built: Built, limit: float) -> dict:
    """Times everything; returns what silicon.json holds."""
    began, device = time.perf_counter(), torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    sms = properties.multi_processor_count
    clock, pool, kernels = Clock(device), Pool(device), PeerKernels(built.get)
    report = {
        "date": str(date.today()),
        "device": properties.name,
        "sms": sms,
        "trees": [tree.label for tree in trees],
        "empty_us": empty_us(clock, sms),
        "copy_us": copy_times(clock, device),
        "mma": {form: mma_figures(trees[0], form, sms, device) for form in forms},
        "cases": [],
        "missed": [],
    }
    for fp4 in (False, True):  # the two have pages of their own, made once and large enough for the largest case
        mine = [case for case in cases if case.fp4 is fp4]
        pages = max((c.distinct_pages * (c.sets + 1) for c in mine if c.kind in ("decode", "prefill")), default=0)
        for case in mine:
            if time.perf_counter() - began > limit:
                report["missed"].append(case.name)
                continue
            if pages:
                pool.pages(fp4, pages)
            try:
                report["cases"].append(measure(case, forms, trees, kernels, clock, pool, sms))
            except Exception as problem:  # leaves the other cases; the context may be lost, and then they fail at once
                traceback.print_exc()
                report["missed"].append(f"{case.name} ({type(problem).__name__})")
    report["seconds"] = time.perf_counter() - began
    return report


def measure(
    case: Case, forms: list[str], trees: list[Tree], kernels: PeerKernels, clock: Clock, pool: Pool, sms: int
) -> dict:
    """Times of one case by form and side, and how far off the results were."""
    inputs = pool.inputs(case)
    one, dequantize = inputs[0], trees[0].reference.dequantize
    measured = asdict(case) | {"name": case.name, "key_bytes": case.key_bytes, "mmas": case.mmas, "forms": {}}
    for form in forms[:1] if case.kind == "metadata" else forms:
        sides = {"peer": functools.partial(peer_call, kernels, form)}
        for tree in trees:
            tree.use(form)
            sides[tree.label] = functools.partial(our_call, tree)
        times, off, logits = {}, {}, {}
        for label, call in sides.items():
            calls = [call(it, sms) for it in inputs]
            one.logits.fill_(math.nan)
            calls[0]()
            if case.kind != "metadata":
                off[label] = error_against_float64(one, form, one.out, dequantize)
                logits[label] = one.out.clone()
            times[label] = clock.time(calls, case.launches)
        theirs = logits.pop("peer", None)
        apart = {label: distance(one, mine, theirs) for label, mine in logits.items()}
        measured["forms"][form] = {"peer": times.pop("peer"), "ours": times, "off": off, "apart": apart}
    return measured


# ---- the command line -----------------------------------------------------------------------------------------------


def selected(arguments: argparse.Namespace) -> list[Case]:
    """Cases that the arguments leave, metadata whatever the format."""
    cases = [case for case in plan() if case.kind in arguments.only]
    cases = [case for case in cases if case.kind == "metadata" or ("fp4" if case.fp4 else "fp8") in arguments.formats]
    cases = [case for case in cases if case.kind == "metadata" or case.heads in arguments.heads]
    if arguments.case:
        cases = [case for case in cases if any(wanted in case.name for wanted in arguments.case)]
    return cases


def several(kind: Callable = str, among: tuple = ()) -> Callable:
    """An argument parser's type: a list with commas."""

    def parse(text: str) -> list:
        values = [kind(word) for word in text.split(",")]
        if among and not set(values) <= set(among):
            raise argparse.ArgumentTypeError(f"{text}: expected some of {', '.join(map(str, among))}")
        return values

    return parse


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", nargs="?", choices=("all", "build", "run", "show"), default="all")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="run: where `build --into` has put the peer's kernels; show: a silicon.json",
    )
    parser.add_argument("--into", type=Path, help="build: the folder")
    parser.add_argument("--only", type=several(among=KINDS), default=list(KINDS))
    parser.add_argument("--formats", type=several(among=("fp8", "fp4")), default=["fp8", "fp4"])
    parser.add_argument("--forms", type=several(among=(*FORMS, NATIVE)), help="default: what the card allows")
    parser.add_argument("--heads", type=several(int), default=[64, 32, 16])
    parser.add_argument("--case", action="append", help="only cases whose names contain this; may be repeated")
    parser.add_argument("--tree", action="append", metavar="LABEL=PATH", help="a source tree of ours; may be repeated")
    parser.add_argument("--sms", type=int, default=SMS, help="build: SMs of the card that will run it")
    parser.add_argument("--ncu", metavar="CASE", help="launch one case a few times and stop")
    parser.add_argument("--side", choices=("ours", "peer"), default="ours", help="with --ncu")
    parser.add_argument("--limit", type=float, default=90, help="seconds after which no more cases are begun")
    parser.add_argument("--compact", action="store_true", help="one line a case")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results, or a file *.json; default: docs/performance, if nothing is left out",
    )
    arguments = parser.parse_args(words)
    if arguments.mode in ("run", "show") and arguments.folder is None:
        parser.error(f"{arguments.mode}: which one?")
    if any("=" not in pair or pair.startswith("peer=") for pair in arguments.tree or ()):
        parser.error("--tree: LABEL=PATH, and no label is `peer`")
    return arguments


def profile(case: Case, side: str, form: str, tree: Tree, built: Built) -> None:
    """A few launches of one case, each on inputs of its own."""
    device = torch.device("cuda", torch.cuda.current_device())
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    kernels = PeerKernels(built.get)
    tree.use(form)
    for it in Pool(device).inputs(case)[:4]:
        (our_call(tree, it, sms) if side == "ours" else peer_call(kernels, form, it, sms))()
    torch.cuda.synchronize()


def main() -> int:
    arguments = parse_arguments()
    if arguments.mode == "show":
        report = json.loads(arguments.folder.read_text())
        if arguments.out:
            silicon_report.write(report, arguments.out)
        return silicon_report.show(report, arguments.compact)
    on_card = torch.cuda.is_available() and arguments.mode != "build"
    arch = architecture() if on_card else "sm_90a"
    if arch not in ("sm_90a", GEOMETRY):
        print(f"The peer's kernels need an SM120 card, or an SM90 one to stand in; this is {arch}.")
        return 1
    forms = arguments.forms or ([NATIVE] if arch == GEOMETRY else list(FORMS))
    cases, built = selected(arguments), Built(arguments.folder)
    trees = [Tree(*pair.split("=", 1), arch=arch) for pair in arguments.tree or [f"ours={ROOT}"]]
    if arguments.ncu:
        case = next(case for case in plan() if case.name == arguments.ncu)
        profile(case, arguments.side, forms[0], trees[-1], built)
        return 0

    began = time.perf_counter()
    for tree in trees:
        count = tree.prepare({(case.heads, case.fp4) for case in cases}, forms)
        took = time.perf_counter() - began
        print(f"{tree.label}: {count} kernels of ours built for {', '.join(forms)} ({took:.0f} s)")
    if arguments.mode != "run":
        sms = torch.cuda.get_device_properties(0).multi_processor_count if on_card else arguments.sms
        built.build(cases, forms, sms)
        print(f"{len(built.binaries)} kernels of the peer built ({time.perf_counter() - began:.0f} s)")
    if arguments.into:
        built.write(arguments.into)
    if not on_card:
        if arguments.mode != "build":
            print(f"No GPU here. On one would be timed, in the forms {', '.join(forms)}:")
            print("\n".join(f"  {case.name}" for case in cases))
        return 0

    report = run(cases, forms, trees, built, arguments.limit)
    wrong = silicon_report.show(report, arguments.compact)
    print(f"{report['seconds']:.0f} s on the card")
    whole = arguments.tree is None and cases == plan() and not report["missed"]
    if out := arguments.out or (ROOT / "docs" / "performance" if whole else None):
        silicon_report.write(report, out)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
