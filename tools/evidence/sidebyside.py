"""Ours and the peer's kernels on the same inputs, in the emulator: the same logits, and what each executes.

python tools/evidence/sidebyside.py           prints the tables and writes docs/performance/sidebyside.md
"""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("tests", "sm120")]

import peer
import sparse_peer
from problems import Paged, Ragged, Sparse, shared_lists

import deep_gemm
from deep_gemm.sm120.emulator import Buffer, Counters, Module, recording
from deep_gemm.sm120.emulator.counters import CLASSES

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance" / "sidebyside.md"
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


def their_sparse(problem: Sparse, indices: list[int], sms: int = 20, **options) -> tuple[torch.Tensor, Counters]:
    """Logits and counters of a paged problem with 32 heads; neighbours with the same index belong together."""
    rows, columns = len(problem.lengths), problem.width * problem.block
    metadata = sparse_peer.metadata_buffer(rows, problem.width, problem.fp4, problem.block, sms)
    workspace = sparse_peer.workspace(rows)
    ids, table = torch.tensor(indices, dtype=torch.int32), problem.block_table.contiguous()
    plan = sparse_peer.launch_metadata(
        problem.context_lens, table, ids, problem.block_kv, problem.lists, problem.fp4, problem.block,
        metadata, workspace, sms,
    )  # fmt: skip
    inputs = {"context_lens": problem.context_lens, "block_table": table, "indices": ids, "lists": problem.lists}
    emulate(plan, inputs, {"metadata": metadata, "workspace": workspace})
    logits = torch.full((rows, -(-columns // 512) * 512), -123456.75, dtype=torch.bfloat16)[:, :columns]
    score = sparse_peer.launch_logits(
        problem.q, problem.kv_cache, problem.weights, metadata, problem.width, problem.block, logits, sms
    )
    inputs = {"q": problem.q[0], "q scales": problem.q[1], "weights": problem.weights, "metadata": metadata}
    counters = emulate(score, inputs | {"kv_cache": problem.kv_cache}, {"logits": logits}, **options)
    return logits, counters


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


# ---- side by side ---------------------------------------------------------------------------------------------------

HEADS = 64
KEYS = 2048
ROWS = {"paged": 4, "ragged": 32}

HEADER = f"""\
# Ours and the peer's, executed

`python tools/evidence/sidebyside.py`, {date.today()}. Both run in the emulator on the same inputs; the logits agree
with float64 to 1e-6.

The peer is the SM120 kernels of sgl-deep-gemm 0.2.3.post2. {HEADS} heads of 128, {PEER_SLOTS} SMs. Paged:
{ROWS["paged"]} requests of about {KEYS} keys, in pages of 64. Ragged: {ROWS["ragged"]} causal rows to key {KEYS}.
Everything is counted over the whole launch, prologue and idle turns included, and divided by the pairs of a query token
and a key that it sees. Instructions are those of warps; one serves 16 or 32 keys.

- Instructions are PTX: moves and addresses that the assembler drops or fuses are among them. What it makes of the loops
  is in [sass.md](sass.md). A wait counts once, however long it takes. A box that TMA copies is one instruction.
- Bytes asked for: by lanes or TMA. From L2: distinct sectors of 32 bytes that a block reads, the rest is in L1; TMA
  does not look there. Bytes written: by lanes, each counted (the peer's quads store a logit four times).
- Wavefronts: clocks of shared memory, each 128 bytes where no banks conflict, mbarriers' included; in parentheses what
  TMA's writes are of them.
"""


def figures(counters: Counters, pairs: int) -> dict[str, str]:
    """Rows of the table."""
    read, copied = (
        sum(counters.wavefronts[kind] for kind in kinds) for kinds in (("read", "write", "atomic"), ("copy",))
    )
    values = {"instructions": f"{sum(counters.instructions.values()) / pairs:.2f}"}
    values |= {f"- {name}": f"{counters.classes[name] / pairs:.3f}" for name in CLASSES}
    values["bytes asked for"] = f"{sum(counters.bytes_read.values()) / pairs:.1f}"
    values["- from L2"] = f"{sum(counters.block_bytes.values()) / pairs:.1f}"
    values["bytes written"] = f"{sum(counters.bytes_written.values()) / pairs:.2f}"
    values["wavefronts"] = f"{(read + copied) / pairs:.3f} ({copied / pairs:.3f})"
    return values


def compare(problem: Paged | Ragged) -> tuple[dict[str, str], dict[str, str]]:
    """Ours and theirs, after the logits have been compared."""
    paged = isinstance(problem, Paged)
    theirs, their_counters = (their_paged if paged else their_ragged)(problem, trace=True)
    ours, our_counters = (our_paged if paged else our_ragged)(problem, trace=True)
    expected = problem.expected()
    window = expected != -torch.inf
    want = expected[window]
    for logits in (ours, theirs):
        error = (logits[window].double() - want).norm() / want.norm()
        if not error < 1e-6:
            raise RuntimeError(f"the logits are off by {error:.2g}")
    pairs = int(window.sum())
    return figures(our_counters, pairs), figures(their_counters, pairs)


def table(fp4: bool) -> str:
    lengths = [KEYS - 37 * row for row in range(ROWS["paged"])]
    rows = ROWS["ragged"]
    problems = {
        f"paged, next_n {n}": Paged([[length + i for i in range(n)] for length in lengths], n, HEADS, fp4=fp4)
        for n in (1, 2, 4)
    }
    problems["ragged"] = Ragged([0] * rows, [KEYS - rows + 1 + row for row in range(rows)], KEYS, HEADS, fp4=fp4)
    columns = {}
    for label, problem in problems.items():
        columns[f"{label}: ours"], columns["theirs" + " " * len(columns)] = compare(problem)
    lines = ["| per key and query token | " + " | ".join(name.strip() for name in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for name in next(iter(columns.values())):
        lines.append(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")
    return "\n".join(lines)


KEY_BYTES = """\
## Bytes of a key that leave L2

A key and its scale are 132 bytes in FP8, 68 in FP4. For each key of a request, whatever the number of its tokens; and
for each key of a sequence of which 16 rows are in the batch, their lengths growing by one every four rows, with 2 SMs.
Full pages, 16 heads. The peer has kernels for up to six tokens.
"""


def key_bytes(fp4: bool) -> str:
    """One row of the table: ours / theirs for next_n 1 to 8, then for the rows of a prefill."""
    cells = []
    for next_n in range(1, 9):
        problem = Paged([[1024] * next_n, [2048] * next_n], next_n, 16, fp4=fp4)
        cells.append(_per_key(problem, 1024 + 2048, PEER_SLOTS, with_peer=next_n <= 6))
    rows = Paged([[1024 + row // 4] for row in range(16)], 1, 16, fp4=fp4)
    rows.block_table[:] = rows.block_table[-1].clone()
    cells.append(_per_key(rows, 1024 + 15 // 4, 2, with_peer=True))
    return f"| {'FP4' if fp4 else 'FP8'}, ours / theirs | " + " | ".join(cells) + " |"


def _per_key(problem: Paged, keys: int, slots: int, with_peer: bool) -> str:
    counts = [our_paged(problem, slots, trace=True)[1]]
    if with_peer:
        counts.append(their_paged(problem, slots=slots, trace=True)[1])
    found = [f"{counters.block_bytes['kv_cache'] / keys:.0f}" for counters in counts]
    return " / ".join(found if with_peer else [*found, "-"])


SPARSE = """\
## Sparse logits: bytes of a key that leave L2

For each row and each key that it has listed: 68 bytes in MXFP4, 132 in MXFP8, if nothing is shared. A prefill as SGLang
makes it: 64 rows of one request with 512 blocks of 8 keys each, of which neighbours have 90% in common; 32 heads. Ours
takes 16 rows at a time; the peer, DeepGEMM's pull request 447, two, whose lists its metadata have merged, with a block
for each pair. Beside the keys: metadata, likewise.
"""


def sparse_key_bytes(fp4: bool) -> str:
    """One row of the table: keys and metadata, ours / theirs."""
    rows, width = 64, 512
    problem = Sparse([16_384] * rows, width=width, shared=True, fp4=fp4, padding=-64 * (68 if fp4 else 132) % 512)
    problem.lists = shared_lists(rows, width, 16_384 // 8, 0.9)
    before, pairs = deep_gemm.get_num_sms(), rows * width * 8
    deep_gemm.set_num_sms(rows // 16)
    with recording(trace=True) as launches:
        problem.logits(problem.metadata())
    deep_gemm.set_num_sms(before)
    counts = launches[-1], their_sparse(problem, [row // 2 for row in range(rows)], rows // 2, trace=True)[1]
    cells = [" / ".join(f"{of.block_bytes[name] / pairs:.2f}" for of in counts) for name in ("kv_cache", "metadata")]
    return f"| {'MXFP4' if fp4 else 'MXFP8'}, ours / theirs | " + " | ".join(cells) + " |"


def main() -> None:
    deep_gemm.set_num_sms(PEER_SLOTS)
    parts = [HEADER]
    for fp4 in (False, True):
        parts.append(f"## {'FP4' if fp4 else 'FP8'}\n\n{table(fp4)}\n")
    columns = [*(f"next_n {n}" for n in range(1, 9)), "16 rows of a prefill"]
    lines = [
        "| | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        key_bytes(False),
        key_bytes(True),
    ]
    parts.append(KEY_BYTES + "\n" + "\n".join(lines) + "\n")
    lines = ["| | keys | metadata |", "| --- | ---: | ---: |", sparse_key_bytes(False), sparse_key_bytes(True)]
    parts.append(SPARSE + "\n" + "\n".join(lines) + "\n")
    text = "\n".join(parts)
    print(text)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
