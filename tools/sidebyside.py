"""Ours and the peer's kernels on the same inputs, in the emulator: the same logits, and what each executes.

python tools/sidebyside.py           prints the tables and writes docs/performance/sidebyside.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
sys.path.append(str(ROOT / "tests"))
sys.path.append(str(ROOT / "sm120"))

import peer
from problems import Paged, Ragged

import deep_gemm
from deep_gemm.sm120.emulator import Buffer, Counters, Module, recording

PEER_SLOTS = 8  # persistent blocks of the peer's kernels


# ---- theirs ---------------------------------------------------------------------------------------------------------


def emulate(launch: peer.Launch, inputs: dict, outputs: dict, **options) -> Counters:
    """Runs one launch of the peer's in the emulator."""
    binary = launch.kernel.compile()
    params, maps = launch.parameters()
    buffers = [Buffer.of(tensor, name, writable=False) for name, tensor in inputs.items() if tensor is not None]
    buffers += [Buffer.of(tensor, name) for name, tensor in outputs.items()]
    return Module(binary.ptx).launch(
        binary.name,
        launch.grid,
        launch.block,
        params,
        buffers,
        shared_bytes=launch.kernel.shared_bytes,
        tensor_maps=maps,
        **options,
    )


def their_schedule(lengths: torch.Tensor, slots: int = PEER_SLOTS, indices: torch.Tensor | None = None) -> torch.Tensor:
    schedule = torch.full((slots + 1, 2), -1, dtype=torch.int32)
    inputs = {"context_lens": lengths, "indices": indices}
    emulate(peer.launch_metadata(lengths, schedule, indices), inputs, {"schedule": schedule})
    return schedule


def their_paged(
    problem: Paged, indices: torch.Tensor | None = None, slots: int = PEER_SLOTS, **options
) -> tuple[torch.Tensor, Counters]:
    """Logits and counters. Lengths must not be zero; `problem` has 2-D lengths unless next_n is 1."""
    batch = len(problem.lengths)
    lengths = problem.context_lens.view(batch, -1)
    # Their tail groups load the page that a table's unused entries name.
    known = (problem.block_table >= 0) & (problem.block_table < len(problem.kv_cache))
    table = torch.where(known, problem.block_table, 0)
    values, scales = problem.q if problem.fp4 else (problem.q, None)
    logits = peer.paged_logits(batch * problem.next_n, problem.max_context_len)
    schedule = their_schedule(lengths, slots, indices)
    launch = peer.launch_paged(problem.q, problem.kv_cache, problem.weights, lengths, table, schedule, logits, indices)
    inputs = {"q": values, "q scales": scales, "weights": problem.weights, "kv_cache": problem.kv_cache}
    inputs |= {"context_lens": lengths, "block_table": table, "schedule_meta": schedule, "indices": indices}
    counters = emulate(launch, inputs, {"logits": logits}, **options)
    return logits[:, : problem.max_context_len], counters


def their_ragged(problem: Ragged, max_seqlen_k: int = 0, sms: int = PEER_SLOTS, **options) -> tuple:
    """Logits and counters."""
    values, scales = problem.q if problem.fp4 else (problem.q, None)
    rows = len(problem.starts)
    logits = peer.ragged_logits(rows, problem.heads, problem.keys, max_seqlen_k)
    launch = peer.launch_ragged(
        problem.q, problem.kv, problem.weights, problem.ks, problem.ke, logits, max_seqlen_k, num_sms=sms
    )
    keys, key_scales = problem.kv
    inputs = {"q": values, "q scales": scales, "weights": problem.weights, "kv": keys, "kv scales": key_scales}
    inputs |= {"ks": problem.ks, "ke": problem.ke}
    counters = emulate(launch, inputs, {"logits": logits}, **options)
    return logits[:rows, : max_seqlen_k or problem.keys], counters


# ---- ours -----------------------------------------------------------------------------------------------------------


def our_paged(problem: Paged, slots: int = PEER_SLOTS, trace: bool = False) -> tuple[torch.Tensor, Counters]:
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, slots)
    with recording(trace) as launches:
        logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule))
    return logits, launches[0]


def our_ragged(problem: Ragged, max_seqlen_k: int = 0, trace: bool = False) -> tuple[torch.Tensor, Counters]:
    with recording(trace) as launches:
        logits = deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), max_seqlen_k=max_seqlen_k)
    return logits, launches[0]
