"""What comes after the logits, as rows of the benchmark: top-k alone, and the whole indexer step beside SGLang's.

topk      the 512 best of random scores, as places in pages of 64; everybody of topk_peers.py
indexer   a decode step from query to places: ours is one call, theirs DeepGEMM's logits and then one of SGLang's top-k
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import topk
import torch
from cases import PAGE, Case, short
from contenders import Prepare, Unsupported
from inputs import Inputs
from topk_peers import Bind, Launch, Peer, distance, positions_of

from deep_gemm import sm120

K = 512
TOLERANCE = 1e-3  # of the largest logit: how far the chosen ones may be from the best


def topk_cases(quick: bool) -> list[topk.Case]:
    return [(1, 64 << 10, K)] if quick else [(rows, keys << 10, K) for rows in (1, 64) for keys in (4, 16, 64, 256)]


def has_indexer(case: Case) -> bool:
    """Whether a case of the logits is timed with top-k behind them, too."""
    return case.kind == "decode" and case.next_n == 1 and case.rows in (1, 8, 64) and case.keys >= 16 << 10


# ---- who computes it ------------------------------------------------------------------------------------------------


def ours(it: Inputs, out: torch.Tensor) -> Launch:
    device, case = out.device, it.case
    schedule = sm120.get_paged_mqa_logits_metadata(it.lengths, PAGE, sm120.settings.sms_of(device))
    size = sm120.mqa_topk_workspace_bytes(case.rows, case.keys, K, device=device)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    return functools.partial(
        sm120.fp8_fp4_paged_mqa_topk, it.q, it.kv_cache, it.weights, it.lengths, it.block_table, schedule, case.keys, K,
        translate=True, out=out, workspace=workspace,
    )  # fmt: skip


def two_calls(prepare: Prepare, choose: Bind, it: Inputs, out: torch.Tensor) -> Launch:
    """Logits as somebody's call returns them, and somebody's choice among them."""
    score, lengths = prepare(it), it.lengths.flatten()

    def call() -> torch.Tensor:
        chosen = choose(score(), lengths, it.block_table, out)
        if chosen is None:
            raise Unsupported(f"not for {it.case.name}")
        chosen()
        return out

    return call


Step = Callable[[Inputs, torch.Tensor], Launch]


def steps(scorers: dict[str, Prepare], choices: dict[str, Peer]) -> dict[str, Step]:
    """Ours, and every logits function followed by every choice among SGLang's that SM120 has."""
    found: dict[str, Step] = {"ours": ours}
    for scorer, prepare in scorers.items():
        for name in ("SGLang v1", "SGLang v2"):
            if name in choices:
                found[f"{scorer} + {name}"] = functools.partial(two_calls, prepare, choices[name].bind)
    return found


# ---- the rows -------------------------------------------------------------------------------------------------------


def run_topk(case: topk.Case, peers: dict[str, Peer], clock: Any, device: torch.device) -> list[dict]:
    """An entry for each peer."""
    rows, keys, k = case
    pool = torch.randn(topk.INPUTS * rows * keys, device=device)

    def both(launches: list[Launch]) -> dict[str, Any]:
        return {
            "cold": asdict(clock.time(launches, cold=True)),
            "warm": asdict(clock.time(launches[:1], cold=False)),
        }

    measured = topk.compare(case, {"ours": Peer(topk.ours, True), **peers}, both, pool)
    described = {"kind": "topk", "name": f"topk {rows} x {short(keys)}", "rows": rows, "keys": keys, "k": k}
    entries = [described | {"peer": name, "status": "right"} | times for name, times in measured["us"].items()]
    for name, what in measured["wrong"].items():
        entries.append(described | {"peer": name, "status": "wrong" if what == "wrong" else "failed", "reason": what})
    return entries


def run_indexer(inputs: list[Inputs], logits: torch.Tensor, sides: dict[str, Step], clock: Any) -> list[dict]:
    """An entry for each side; `logits` are right ones of the first inputs."""
    case, entries = inputs[0].case, []
    described = asdict(case) | {"kind": "indexer", "name": case.name.replace("decode", "indexer"), "k": K}
    for name, step in sides.items():
        outs = [torch.full((case.rows, K), -7, dtype=torch.int32, device=logits.device) for _ in inputs]
        try:
            calls = [step(it, out) for it, out in zip(inputs, outs)]
            calls[0]()
            error = distance(logits, inputs[0].lengths.flatten(), positions_of(outs[0], inputs[0].block_table))
            entry: dict[str, Any] = {"status": "right" if error <= TOLERANCE else "wrong", "error": error}
            if entry["status"] == "right":
                entry["cold"] = asdict(clock.time(calls, cold=True))
                entry["warm"] = asdict(clock.time(calls[:1], cold=False))
        except Unsupported as reason:
            entry = {"status": "unsupported", "reason": str(reason)}
        except Exception as problem:  # a peer's kernel may fail in any way; the others go on
            entry = {"status": "failed", "reason": f"{type(problem).__name__}: {problem}".partition("\n")[0][:300]}
        entries.append(described | {"peer": name, **entry})
    return entries
