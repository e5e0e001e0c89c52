"""The whole indexer step on the card at hand, logits and top-k: before, NVIDIA's and SGLang's; after, ours.

    python tools/evidence/silicon_step.py                    builds, runs, writes docs/performance/silicon_step.json
    python tools/evidence/silicon_step.py build --into DIR   builds both sides' kernels into DIR; needs no GPU
    python tools/evidence/silicon_step.py run DIR            runs with those
    python tools/evidence/silicon_step.py show [FILE]        prints the table of a silicon_step.json
    python tools/evidence/silicon_step.py show --write       puts it into docs/performance.md, between the marks there

    --case "1 x 64K"  --formats fp8  --k 512  --tree PATH  --out FILE.json        less, of another tree, to elsewhere
    --no-pdl                                                 programmatic dependent launch for SGLang's kernels alone

One layer of a decode step: the scores of every key of each request, and the 512 best as places in pages of 64. Plans
are made beforehand, each side's by its own planner, since all layers of a step share them. Kernels are launched with
programmatic dependent launch, SGLang's default for its own and for DeepGEMM's. The stand-in for SM120's MMA is that of
`silicon.py` (x1, on both sides; on SM120 nothing is replaced); top-k has no MMA, and runs as it is. Times are taken as
there, too: CUDA graphs of 24 launches (12 or 4, where they are long) that take turns over inputs in DRAM, the median of
7 replays.

Choices are compared: by our logits, the scores of each side's keys may differ from the best ones by what two orders of
a sum differ, relative to the largest logit. Where they do not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch
from silicon import SMS, Built, our_call, peer_call, several
from silicon_card import Clock, PeerKernels, architecture, empty_us
from silicon_cases import PAGE, Case, Inputs, Pool
from substitute import FORMS, GEOMETRY, NATIVE, Tree

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "tools" / "bench"))

import topk_peers  # noqa: E402

DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "performance" / "silicon_step.json"
MARKS = "<!-- silicon_step -->", "<!-- /silicon_step -->"
K = 512
TOLERANCE = 1e-5
CHOICES = {"v1": topk_peers.sglang_v1, "v2": topk_peers.sglang_v2}  # SGLang's, as SM120 gets them


def plan() -> list[Case]:
    k = 1 << 10
    return [Case("decode", fp4, b, n * k) for fp4 in (False, True) for b in (1, 8, 64) for n in (16, 64, 256)]


# ---- the sides ------------------------------------------------------------------------------------------------------


def together(*calls: Callable) -> Callable[[], None]:
    def call() -> None:
        for each in calls:
            each()

    return call


def flat(it: Inputs) -> tuple[torch.Tensor, ...]:
    """Of one call what top-k takes: logits, lengths, pages."""
    return it.out, it.lengths.flatten(), it.block_table


def ours(tree: Tree, it: Inputs, out: torch.Tensor, sms: int) -> dict[str, Callable]:
    """Our logits alone, followed by our top-k, and both in one call."""
    api, k, device = tree.sm120, out.shape[1], it.lengths.device
    scored, (logits, lengths, table) = our_call(tree, it, sms), flat(it)
    one, two = (
        torch.empty(size, dtype=torch.uint8, device=device)
        for size in (
            api.topk_workspace_bytes(*logits.shape, k, device=device),
            api.mqa_topk_workspace_bytes(*logits.shape, k, device=device),
        )
    )
    choose = functools.partial(api.topk, logits, lengths, k, block_table=table, page=PAGE, out=out, workspace=one)
    schedule = api.get_paged_mqa_logits_metadata(it.lengths, PAGE, sms)
    fused = functools.partial(
        api.fp8_fp4_paged_mqa_topk, it.q, it.kv_cache, it.weights, it.lengths, table, schedule, it.case.keys, k,
        translate=True, out=out, workspace=two,
    )  # fmt: skip
    return {"our logits": scored, "ours": together(scored, choose), "one call": fused}


def theirs(kernels: PeerKernels, form: str, it: Inputs, out: torch.Tensor, sms: int, choices: dict) -> dict:
    """NVIDIA's logits alone, and followed by each of SGLang's choices."""
    scored = peer_call(kernels, form, it, sms)
    sides = {"NVIDIA's logits": scored}
    for name, bind in choices.items():
        if (choose := bind(*flat(it), out)) is not None:
            sides[name] = together(scored, choose)
    return sides


# ---- the run --------------------------------------------------------------------------------------------------------


def measure(
    case: Case, k: int, form: str, tree: Tree, kernels: PeerKernels, clock: Clock, pool: Pool, sms: int, choices: dict
) -> dict:
    """us of each side, and how far its choice is from the best."""
    inputs = pool.inputs(case)
    outs = [torch.empty((case.rows, k), dtype=torch.int32, device=pool.device) for _ in inputs]
    sides: dict[str, list[Callable]] = {}
    for it, out in zip(inputs, outs):
        for name, call in {**theirs(kernels, form, it, out, sms, choices), **ours(tree, it, out, sms)}.items():
            sides.setdefault(name, []).append(call)
    sides["our logits"][0]()
    logits = inputs[0].out.clone()
    measured = asdict(case) | {"name": case.name, "k": k, "us": {}, "apart": {}}
    for name, calls in sides.items():
        inputs[0].logits.fill_(torch.nan)
        outs[0].fill_(-7)
        calls[0]()
        if "logits" not in name:
            chosen = topk_peers.positions_of(outs[0], inputs[0].block_table)
            measured["apart"][name] = topk_peers.distance(logits, inputs[0].lengths.flatten(), chosen)
        measured["us"][name] = clock.time(calls, case.launches)
    return measured


def run(cases: list[Case], k: int, form: str, tree: Tree, built: Built, pdl: bool = True) -> dict:
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    sms = properties.multi_processor_count
    clock, pool, kernels = Clock(device), Pool(device), PeerKernels(built.get, overlap=pdl)
    tree.use(form)
    tree.sm120.set_pdl(pdl)
    report = {
        "date": str(date.today()), "device": properties.name, "sms": sms, "form": form, "pdl": pdl,
        "empty_us": empty_us(clock, sms), "cases": [],
    }  # fmt: skip
    for fp4 in (False, True):
        mine = [case for case in cases if case.fp4 is fp4]
        if mine:
            pool.pages(fp4, max(case.distinct_pages * (case.sets + 1) for case in mine))
        for case in mine:
            report["cases"].append(measure(case, k, form, tree, kernels, clock, pool, sms, CHOICES))
            print(line(report["cases"][-1]), flush=True)
    return report


# ---- what it says ---------------------------------------------------------------------------------------------------


def line(case: dict) -> str:
    times = "  ".join(f"{name} {us:.1f}" for name, us in case["us"].items())
    return f"{case['name']}: {times}; apart {max(case['apart'].values()):.0e}{'' if right(case) else ' WRONG'}"


def right(case: dict) -> bool:
    return all(value <= TOLERANCE for value in case["apart"].values())


def table(report: dict) -> str:
    """Markdown: a table for each format."""
    parts = []
    for fp4 in (False, True):
        cases = [case for case in report["cases"] if case["fp4"] is fp4]
        if not cases:
            continue
        heads = [f"{'FP4' if fp4 else 'FP8'}, requests x keys", "NVIDIA's logits", "+ v1", "+ v2", "our logits"]
        heads += ["+ our top-k", "in one call", "v1 / one call", "v2 / one call"]
        parts += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
        for case in cases:
            us = case["us"]
            cells = [case["name"].removeprefix("fp4 ").removeprefix("fp8 ")]
            names = ("NVIDIA's logits", "v1", "v2", "our logits", "ours", "one call")
            cells += [f"{us[name]:.1f}" if name in us else "" for name in names]
            cells += [f"{us[name] / us['one call']:.2f}" if name in us else "" for name in ("v1", "v2")]
            if not right(case):
                cells[0] += " **wrong**"
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    how = "as they are" if report["form"] == NATIVE else f"form {report['form']} of the stand-in on both sides"
    how += "" if report["pdl"] else ", programmatic dependent launch of SGLang's kernels alone"
    words = f"`make silicon-step`, {report['date']}, {report['device']}, {report['sms']} SMs, {how}; us, k "
    words += f"{report['cases'][0]['k']}; an empty kernel takes {report['empty_us']:.1f}."
    return words + "\n\n" + "\n".join(parts)


def put(report: dict, document: Path) -> None:
    """Replaces what stands between the marks."""
    before, begin, rest = document.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{document}: expected {MARKS[0]} ... {MARKS[1]}")
    document.write_text(f"{before}{begin}\n\n{table(report)}\n{end}{after}")


# ---- building -------------------------------------------------------------------------------------------------------


def kernels_of(tree: Tree, case: Case, k: int, sms: int) -> list:
    """Our kernels that a case launches on a card of so many SMs: its calls are made, and nothing is launched."""
    found: list = []

    def note(kernel):
        found.append(kernel)
        return SimpleNamespace(launch=lambda *_, **__: None)

    pages = case.keys // PAGE
    row, like = case.row_bytes, functools.partial(torch.empty, device="cpu")
    values = like((case.rows, 1, case.heads, row), dtype=torch.int8 if case.fp4 else torch.float8_e4m3fn)
    q = (values, like((case.rows, 1, case.heads), dtype=torch.int32)) if case.fp4 else values
    it = Inputs(
        case, q, like((case.rows, case.heads)), case.lengths, like((case.rows, case.keys)),
        like((1, PAGE, 1, row + 4), dtype=torch.uint8), like((case.rows, pages), dtype=torch.int32),
    )  # fmt: skip
    runtime, settings = tree.runtime, sys.modules[f"{tree.sm120.__name__}.settings"]
    before = runtime._emulated, settings._num_sms
    runtime._emulated, settings._num_sms = note, sms
    try:
        for call in ours(tree, it, like((case.rows, k), dtype=torch.int32), sms).values():
            call()
    finally:
        runtime._emulated, settings._num_sms = before
    return found


def prepare(tree: Tree, cases: list[Case], k: int, form: str, sms: int) -> int:
    """Compiles all of ours, into the cache on disk; returns how many kernels."""
    kernels = dict.fromkeys(kernel for case in cases for kernel in kernels_of(tree, case, k, sms))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return len(list(threads.map(lambda kernel: tree.compile(kernel, form), kernels)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", nargs="?", choices=("all", "build", "run", "show"), default="all")
    parser.add_argument("folder", nargs="?", type=Path, help="run: what `build --into` has made; show: a JSON")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--case", action="append", help="only cases whose names contain this; may be repeated")
    parser.add_argument("--formats", type=several(among=("fp8", "fp4")), default=["fp8", "fp4"])
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--form", choices=(*FORMS, NATIVE), help="default: x1, on SM120 native")
    parser.add_argument("--tree", type=Path, default=ROOT, help="a source tree of ours")
    parser.add_argument(
        "--no-pdl", action="store_true", help="programmatic dependent launch for SGLang's kernels alone"
    )
    parser.add_argument("--write", action="store_true", help="show: into docs/performance.md")
    parser.add_argument("--out", type=Path, help=f"default, if nothing is left out: {RESULTS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.mode == "show":
        report = json.loads((arguments.folder or RESULTS).read_text())
        put(report, DOCUMENT) if arguments.write else print(table(report))
        return not all(right(case) for case in report["cases"])

    on_card = torch.cuda.is_available() and arguments.mode != "build"
    arch = architecture() if on_card else "sm_90a"
    form = arguments.form or (NATIVE if arch == GEOMETRY else FORMS[0])
    sms = torch.cuda.get_device_properties(0).multi_processor_count if on_card else SMS
    cases = [case for case in plan() if ("fp4" if case.fp4 else "fp8") in arguments.formats]
    if arguments.case:
        cases = [case for case in cases if any(wanted in case.name for wanted in arguments.case)]
    if arguments.mode == "run":
        os.environ["DG_PEER_SOURCES"] = str(arguments.folder)
    built, tree = Built(arguments.folder), Tree("ours", arguments.tree, arch=arch)
    print(f"{prepare(tree, cases, arguments.k, form, sms)} kernels of ours built for {form}")
    if arguments.mode != "run":
        built.build(cases, [form], sms)
        print(f"{len(built.binaries)} kernels of the peer built")
    if arguments.into:
        built.write(arguments.into)
        for version in CHOICES:
            topk_peers.build(version, arch)
            shutil.copy(topk_peers.directory() / f"{version}.{arch}.cubin", arguments.into)
    if not on_card:
        if arguments.mode != "build":
            print(f"No GPU here. On one would be timed, in the form {form}:")
            print("\n".join(f"  {case.name}" for case in cases))
        return 0
    report = run(cases, arguments.k, form, tree, built, not arguments.no_pdl)
    print(table(report))
    whole = arguments.tree == ROOT and cases == plan() and arguments.k == K and not arguments.no_pdl
    if out := arguments.out or (RESULTS if whole else None):
        out.write_text(json.dumps(report, indent=1) + "\n")
    return not all(right(case) for case in report["cases"])


if __name__ == "__main__":
    sys.exit(main())
