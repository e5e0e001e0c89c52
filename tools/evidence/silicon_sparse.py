"""Sparse logits on the card at hand, ours beside pull request 447's and beside our own dense call (see silicon.py).

    python tools/evidence/silicon_sparse.py build --into DIR     builds the peer's kernels into DIR; needs no GPU
    python tools/evidence/silicon_sparse.py run [DIR] [--tree L=PATH] [--forms x1,x2s] [--out FILE.json]
    python tools/evidence/silicon_sparse.py show FILE.json       writes docs/performance/silicon_sparse.md

DeepSeek-V4.1-Flash: 32 heads, MXFP4, 2,048 blocks of 8 keys, pages of 64. Decode: requests with pages of their own, of
so many keys each. Prefill: neighbouring rows of one request, with 90% of their blocks in common. Metadata are made
beforehand, each side's by its own kernel, and timed by themselves.
"""

from __future__ import annotations

import argparse
import functools
import json
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import peer
import sparse_peer
import torch
from silicon import Built, several
from silicon_card import Clock, Function, PeerKernels, architecture, empty_us
from silicon_cases import random_bytes, random_scales, short
from substitute import COUNTS, FORMS, GEOMETRY, NATIVE, Tree, number_pairs, replace_mma

ROOT = Path(__file__).parent.parent.parent
HEADS, WIDTH, BLOCK, PAGE, ROW = 32, 2048, 8, 64, 64
COLUMNS = WIDTH * BLOCK
SMS = 132  # of an H100
KEPT = 0.9  # blocks that neighbours have in common


@dataclass(frozen=True)
class Case:
    rows: int
    keys: int  # of each row
    prefill: bool = False
    dense: bool = False  # our dense call is timed as well
    ragged: bool = False  # one run of keys, as vLLM's prefill; else pages, as SGLang's

    @property
    def name(self) -> str:
        kind = "ragged " if self.ragged else "prefill " if self.prefill else ""
        return f"{kind}{self.rows} x {short(self.keys)}"

    @property
    def requests(self) -> int:
        return 1 if self.prefill else self.rows

    @property
    def pages(self) -> int:
        return self.requests * (self.keys // PAGE)

    @property
    def launches(self) -> int:
        return 24 if self.rows <= 64 else 8 if self.rows <= 256 else 4

    @property
    def sets(self) -> int:
        return max(4, min(self.launches, 192 // self.rows)) if self.rows <= 256 else 2


def plan() -> list[Case]:
    k = 1 << 10
    cases = [Case(rows, 64 * k) for rows in (1, 4, 16, 64, 128, 256)]
    cases += [Case(rows, 64 * k, True, ragged=ragged) for ragged in (False, True) for rows in (1024, 4096)]
    dense = ((1, 32), (1, 128), (1, 256), (16, 32), (16, 128))
    cases += [Case(rows, keys * k, dense=True) for rows, keys in dense]
    return cases + [Case(1024, keys * k, True, True) for keys in (32, 128)]


# ---- the peer -------------------------------------------------------------------------------------------------------


def build_peer(kernel: sparse_peer.Kernel, form: str, arch: str) -> peer.Binary:
    """One of its kernels with the MMA replaced; loads of scales stay."""
    if form == NATIVE:
        return kernel.compile()
    edited = {}
    for name in ("common/sm120_utils.cuh", "mma/sm120.cuh", "impls/sm120_fp8_fp4_sparse_mqa_logits.cuh"):
        text = (
            (sparse_peer.fetch() / "deep_gemm" / name)
            .read_text()
            .replace("__CUDA_ARCH__ >= 1200", "__CUDA_ARCH__ >= 900")
        )
        for load in ("smem.sf_kv[stage][warp * 16 + g + (t & 1) * 8]", "smem.sf_q[qi * kNumHeads + nt * 8 + g]"):
            text = text.replace(load, f"*reinterpret_cast<const volatile uint32_t*>(&{load})")
        edited[f"deep_gemm/{name}"] = replace_mma(text, form)
    return kernel.compile(arch, edited)


def peer_kernels(case: Case, sms: int) -> tuple[sparse_peer.Kernel, sparse_peer.Kernel]:
    """Its planner and its logits kernel."""
    if case.ragged:
        return (
            sparse_peer.metadata_kernel(True, WIDTH, BLOCK, 0, sms),
            sparse_peer.ragged_logits_kernel(case.rows, sms),
        )
    return (
        sparse_peer.metadata_kernel(True, WIDTH, BLOCK, PAGE, sms),
        sparse_peer.logits_kernel(True, case.rows, BLOCK, PAGE, sms),
    )


def build(forms: list[str], sms: int, arch: str) -> Built:
    built = Built()
    for case in plan():
        for kernel in peer_kernels(case, sms):
            for form in forms:
                if (form, kernel.instance) not in built.binaries:
                    binary = build_peer(kernel, form, arch)
                    built.binaries[form, kernel.instance] = binary.name, binary.cubin
    return built


# ---- inputs ---------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    q: tuple[torch.Tensor, torch.Tensor]
    kv_cache: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    lists: torch.Tensor
    indices: torch.Tensor
    logits: torch.Tensor
    kv: tuple[torch.Tensor, torch.Tensor] | None = None
    starts: torch.Tensor | None = None


def lists_of(case: Case, device: torch.device) -> torch.Tensor:
    """int32 [rows, WIDTH], ascending: any blocks, or from row to row KEPT of them."""
    blocks = case.keys // BLOCK
    if not case.prefill:
        chosen = torch.rand((case.rows, blocks), device=device).topk(WIDTH, dim=1).indices
        return chosen.sort(dim=1).values.int()
    # Scores drift, half of them up and half down.
    step, rows = 1 - KEPT, []
    score = torch.rand(blocks, device=device)
    drift = torch.rand(blocks, device=device) - 0.5
    for _ in range(case.rows):
        rows.append(((score + drift) % 1).topk(WIDTH).indices.sort().values)
        score += drift.sign() * step * WIDTH / blocks * 0.95
    return torch.stack(rows).int()


def pool(count: int, device: torch.device) -> torch.Tensor:
    flat = torch.empty((count, PAGE * (ROW + 4) + 256), dtype=torch.uint8, device=device)  # pages 4,608 bytes apart
    for piece in flat.split(1 << 15):
        piece[:, : PAGE * ROW] = random_bytes(len(piece), PAGE * ROW, device)
        scales = random_scales(len(piece) * PAGE, True, device).contiguous()
        piece[:, PAGE * ROW : PAGE * (ROW + 4)] = scales.view(torch.uint8).view(len(piece), -1)
    stride = flat.stride(0)
    return flat.as_strided((count, PAGE, 1, ROW + 4), (stride, ROW + 4, ROW + 4, 1))


def inputs(case: Case, cache: torch.Tensor, device: torch.device) -> list[Inputs]:
    made, lists = [], lists_of(case, device)
    for _ in range(case.sets + 1):
        pages = torch.randperm(len(cache), device=device)[: case.pages].int()
        table = pages.view(case.requests, -1).expand(case.rows, -1).contiguous()
        values = random_bytes(case.rows * HEADS, ROW, device).view(case.rows, 1, HEADS, ROW).view(torch.int8)
        scales = random_scales(case.rows * HEADS, True, device).view(case.rows, 1, HEADS).contiguous()
        row = torch.arange(case.rows, dtype=torch.int32, device=device)
        made.append(
            Inputs(
                (values, scales),
                cache,
                torch.randn((case.rows, HEADS), device=device).bfloat16(),
                torch.full((case.rows,), case.keys, dtype=torch.int32, device=device),
                table,
                lists.clone(),
                row - row % 2 if case.prefill else row,
                torch.empty((case.rows, COLUMNS), dtype=torch.bfloat16, device=device),
            )  # fmt: skip
        )
        if case.ragged:
            keys = random_bytes(case.keys, ROW, device).view(torch.int8)
            made[-1].kv = (keys, random_scales(case.keys, True, device).contiguous())
            made[-1].starts = torch.zeros_like(made[-1].lengths)
            scales, q = made[-1].q[1].view(case.rows, HEADS), made[-1].q[0].view(case.rows, HEADS, ROW)
            made[-1].q = (q, scales)
    return made


# ---- the sides ------------------------------------------------------------------------------------------------------


def our_metadata(tree: Tree, it: Inputs) -> Callable[[], torch.Tensor]:
    if it.kv:
        function, keys = tree.sm120.get_sparse_mqa_logits_metadata, len(it.kv[0])
        return functools.partial(function, it.starts, it.lengths, keys, it.lists, torch.int8, BLOCK)
    function = tree.sm120.get_paged_sparse_mqa_logits_metadata
    return functools.partial(function, it.lengths, it.table, it.indices, PAGE, it.lists, torch.int8, BLOCK)


def our_call(tree: Tree, it: Inputs) -> Callable[[], torch.Tensor]:
    metadata, function = our_metadata(tree, it)(), tree.sm120.fp8_fp4_paged_sparse_mqa_logits
    if it.kv:
        function = tree.sm120.fp8_fp4_sparse_mqa_logits
        return functools.partial(function, it.q, it.kv, it.weights, metadata, WIDTH, BLOCK, out=it.logits)
    return functools.partial(function, it.q, it.kv_cache, it.weights, metadata, WIDTH, BLOCK, out=it.logits)


def our_dense(tree: Tree, case: Case, it: Inputs, sms: int) -> Callable[[], torch.Tensor]:
    schedule = tree.sm120.get_paged_mqa_logits_metadata(it.lengths.view(-1, 1), PAGE, sms)
    out = torch.empty((case.rows, case.keys), dtype=torch.bfloat16, device=it.lengths.device)
    return functools.partial(
        tree.sm120.fp8_fp4_paged_mqa_logits, it.q, it.kv_cache, it.weights, it.lengths.view(-1, 1), it.table, schedule,
        case.keys, logits_dtype=torch.bfloat16, out=out,
    )  # fmt: skip


def their_calls(kernels: PeerKernels, form: str, it: Inputs, sms: int) -> tuple[Callable, Callable]:
    rows, device = len(it.lists), it.lists.device
    metadata = sparse_peer.metadata_buffer(rows, WIDTH, True, BLOCK, sms, device)
    workspace = sparse_peer.workspace(rows, device)
    if it.kv:
        planned = sparse_peer.launch_ragged_metadata(
            it.starts, it.lengths, len(it.kv[0]), it.lists, metadata, workspace, sms
        )
        scored = sparse_peer.launch_ragged_logits(it.q, it.kv, it.weights, metadata, it.logits, sms)
    else:
        planned = sparse_peer.launch_metadata(
            it.lengths, it.table, it.indices, PAGE, it.lists, True, BLOCK, metadata, workspace, sms
        )
        scored = sparse_peer.launch_logits(it.q, it.kv_cache, it.weights, metadata, WIDTH, BLOCK, it.logits, sms)
    plan_call, call = kernels.bind(planned, form), kernels.bind(scored, form)
    plan_call()
    keep = (metadata, workspace)
    return functools.partial(lambda call, _: call(), plan_call, keep), functools.partial(lambda c, _: c(), call, keep)


# ---- the floor ------------------------------------------------------------------------------------------------------

# One row, and of what it takes only what waits for each other: a warp for eight keys, as ours has it, looks up their
# place, then reads all of them, then stores a logit's bytes. No query, no MMA, no sums.
FLOOR = """
extern "C" __global__ __launch_bounds__(512, 1)
void floor_of_one_row(const unsigned char* places, const unsigned char* cache, unsigned page_stride, unsigned width,
                      unsigned short* logits) {
    const unsigned lane = threadIdx.x % 32;
    for (unsigned eight = blockIdx.x + gridDim.x * (threadIdx.x / 32); eight < width; eight += gridDim.x * 16) {
        unsigned place, words[4], scale;
        asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(place) : "l"(places + 4 * eight));
        const unsigned char* page = cache + (unsigned long long)(place / 8) * page_stride;
        asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]),
                     "=r"(words[3]) : "l"(page + place % 8 * 512 + 16 * lane));
        asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(scale) : "l"(page + 64 * 64 + place % 8 * 32 + lane / 4 * 4));
        if (lane < 8) logits[8 * eight + lane] = words[0] ^ words[1] ^ words[2] ^ words[3] ^ scale;
    }
}
"""


@functools.cache
def floor_kernel() -> Function:
    name = "floor_of_one_row"
    return Function(name, peer.build(FLOOR, name, [f"--gpu-architecture={architecture()}"], {}).cubin)


def floor_call(tree: Tree, it: Inputs, sms: int) -> Callable[[], None]:
    """The least that one row takes, on our metadata."""
    metadata = our_metadata(tree, it)()
    places = metadata.data_ptr() + 192 + 16  # of the first row, see lists.cuh
    arguments = ("Q", places), ("Q", it.kv_cache.data_ptr()), ("I", it.kv_cache.stride(0)), ("I", WIDTH)
    launch = floor_kernel().bind(
        (sms, 1, 1), 512, *(struct.pack(*a) for a in (*arguments, ("Q", it.logits.data_ptr())))
    )
    return functools.partial(lambda call, _: call(), launch, metadata)


def error(it: Inputs, form: str, logits: torch.Tensor, dequantize: Callable) -> float:
    """Relative norm over a few rows."""
    apart = length = 0.0
    flat = it.kv_cache.as_strided((len(it.kv_cache), PAGE * (ROW + 4)), (it.kv_cache.stride(0), 1))
    for row in sorted({0, len(it.lists) // 2, len(it.lists) - 1}):
        tokens = (it.lists[row].long()[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten()
        pages, within = it.table[row].long()[tokens // PAGE], tokens % PAGE
        if it.kv:
            keys, words = (part[tokens] for part in it.kv)
        else:
            every = torch.arange(len(tokens), device=logits.device)
            keys = flat[pages, : PAGE * ROW].view(-1, PAGE, ROW)[every, within].contiguous()
            words = flat[pages, PAGE * ROW :].view(-1, PAGE, 4)[every, within].contiguous().view(torch.int32)[:, 0]
        query, scales = it.q[0][row].view(HEADS, ROW), it.q[1][row].view(HEADS)
        if form == NATIVE:
            query, keys = dequantize(query, scales), dequantize(keys.view(torch.int8), words)
        else:
            query, keys = number_pairs(query.contiguous()), number_pairs(keys)
        want = torch.relu(keys @ query.T) @ it.weights[row].double() * COUNTS[form]
        apart += float((logits[row].double() - want).square().sum())
        length += float(want.square().sum())
    return (apart / length) ** 0.5


# ---- the run --------------------------------------------------------------------------------------------------------


def measure(
    case: Case, forms: list[str], trees: list[Tree], kernels: PeerKernels, clock: Clock, cache, sms: int
) -> dict:
    device = cache.device
    made = inputs(case, cache, device)
    measured = asdict(case) | {"name": case.name, "forms": {}}
    for form in forms:
        times, off = {}, {}
        theirs = [their_calls(kernels, form, it, sms) for it in made]
        made[0].logits.fill_(torch.nan)
        theirs[0][1]()
        off["peer"] = error(made[0], form, made[0].logits, trees[0].reference.dequantize)
        times["peer"] = clock.time([call for _, call in theirs], case.launches)
        if form == forms[0]:
            times["peer metadata"] = clock.time([call for call, _ in theirs], case.launches)
        for tree in trees:
            tree.use(form)
            made[0].logits.fill_(torch.nan)
            calls = [our_call(tree, it) for it in made]
            calls[0]()
            off[tree.label] = error(made[0], form, made[0].logits, tree.reference.dequantize)
            times[tree.label] = clock.time(calls, case.launches)
            if form == forms[0] and case.rows == 1:
                times["floor"] = clock.time([floor_call(tree, it, sms) for it in made], case.launches)
            if form == forms[0]:
                times[f"{tree.label} metadata"] = clock.time([our_metadata(tree, it) for it in made], case.launches)
            if case.dense:
                times[f"{tree.label} dense"] = clock.time([our_dense(tree, case, it, sms) for it in made[:3]], 4)
        measured["forms"][form] = {"us": times, "off": off}
    return measured


def line(measured: dict, label: str) -> str:
    """One case, all forms: ours / the peer's, and the ratio."""
    words = [f"{measured['name']:18}"]
    for form, of in measured["forms"].items():
        us = of["us"]
        words.append(f"{form} {us[label]:.1f}/{us['peer']:.1f}={us['peer'] / us[label]:.2f}")
        if f"{label} metadata" in us:
            words.append(f"meta {us[f'{label} metadata']:.1f}/{us['peer metadata']:.1f}")
        if "floor" in us:
            words.append(f"floor {us['floor']:.1f}")
        if f"{label} dense" in us:
            words.append(f"dense {us[f'{label} dense']:.1f} ({us[f'{label} dense'] / us[label]:.2f})")
        worst = max((value, side) for side, value in of["off"].items() if side != "peer")
        words.append(f"off {worst[0]:.1e}/{of['off']['peer']:.1e}")
    return "  ".join(words)


DOCUMENT = ROOT / "docs" / "performance" / "silicon_sparse.md"
TEXT = """\
# Sparse logits on silicon

`make silicon-sparse`, {date}, {device}, {sms} SMs{native}. How it is timed, and what
the forms x1 and x2s are, stands in [silicon.md](silicon.md): both sides with a native MMA in the place of SM120's.

DeepSeek-V4.1-Flash: 32 heads of 128, MXFP4, 2,048 blocks of 8 keys, pages of 64. Decode: requests with pages of their
own. Prefill: neighbouring rows of one request, about 90% of whose blocks are the same from row to row. The peer is the
SM120 kernel of DeepGEMM's pull request 447 as vLLM 0.33.0's wheel carries it, launched as that request's host code
does, with metadata from its own kernel; no release launches it. us are ours / the peer's, a ratio is the peer's time
over ours. Off is the relative norm of the difference from float64, ours / the peer's.

"""
DENSE = """

## Beside our own dense call

The same rows and keys, all of them scored, bf16 logits; {form}. The floor is a kernel for one row that does only what
must wait for each other: with as many warps as ours it looks up the place of eight keys, on our metadata, reads them
and stores as many bytes as there are logits. It shows what there is left to gain; an empty kernel takes {empty:.2f} us.

"""


def document(report: dict) -> str:
    forms = list(report["cases"][0]["forms"])
    heads = ["case", *(part for form in forms for part in (f"{form}, us", "ratio")), "metadata, us", "off"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    dense = [
        "| case | sparse, us | dense, us | dense / sparse | floor, us | dense / floor |",
        "| --- |" + " ---: |" * 5,
    ]
    for case in report["cases"]:
        us = {form: of["us"] for form, of in case["forms"].items()}
        (label,) = {name for name in us[forms[0]] if " " not in name} - {"peer", "floor"}
        cells = [case["name"]]
        for form in forms:
            mine, theirs = us[form][label], us[form]["peer"]
            cells += [f"{mine:.1f} / {theirs:.1f}", f"{theirs / mine:.2f}"]
        first, off = us[forms[0]], case["forms"][forms[0]]["off"]
        cells.append(f"{first[f'{label} metadata']:.1f} / {first['peer metadata']:.1f}")
        cells.append(f"{off[label]:.1e} / {off['peer']:.1e}")
        if case["dense"]:
            last = us[forms[-1]]
            mine, all_keys = last[label], last[f"{label} dense"]
            floor = (f"{first['floor']:.2f}", f"{all_keys / first['floor']:.2f}") if "floor" in first else ("", "")
            mine_and_all = f"{mine:.2f} | {all_keys:.2f} | {all_keys / mine:.2f}"
            dense.append(f"| {case['name']} | {mine_and_all} | {' | '.join(floor)} |")
        else:
            lines.append("| " + " | ".join(cells) + " |")
    native = ": no SM120 card" if forms != [NATIVE] else ""
    text = TEXT.format(native=native, date=report["date"], device=report["device"], sms=report["sms"])
    return text + "\n".join(lines) + DENSE.format(form=forms[-1], empty=report["empty"]) + "\n".join(dense) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", choices=("build", "run", "show"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--forms", type=several(among=(*FORMS, NATIVE)), default=["x1", "x2s"])
    parser.add_argument("--tree", action="append", metavar="LABEL=PATH")
    parser.add_argument("--case", action="append")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.mode == "build":
        build(arguments.forms, SMS, "sm_90a").write(arguments.into)
        return 0
    if arguments.mode == "show":
        DOCUMENT.write_text(document(json.loads(arguments.folder.read_text())))
        return 0
    device, arch = torch.device("cuda", 0), architecture()
    forms = [NATIVE] if arch == GEOMETRY else arguments.forms
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    built = Built(arguments.folder) if arguments.folder else build(forms, sms, arch)
    kernels = PeerKernels(lambda kernel, form: built.binaries[form, kernel.instance])
    trees = [Tree(*pair.split("=", 1), arch=arch) for pair in arguments.tree or [f"ours={ROOT}"]]
    cases = [case for case in plan() if not arguments.case or any(word in case.name for word in arguments.case)]
    cache, clock, results = pool(max(case.pages for case in cases), device), Clock(device), []
    for case in cases:
        results.append(measure(case, forms, trees, kernels, clock, cache, sms))
        print(line(results[-1], trees[-1].label), flush=True)
    report = {"date": str(date.today()), "device": torch.cuda.get_device_name(device), "sms": sms}
    report |= {"empty": empty_us(clock, sms), "cases": results}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1))
    elif not arguments.tree and not arguments.case:
        DOCUMENT.write_text(document(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
