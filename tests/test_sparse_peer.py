"""The kernel of DeepGEMM's pull request 447 beside ours, in the emulator: both against float64 and against the rounding
that it states. Its metadata are made by its own kernel."""

import peer
import pytest
import sparse_peer
import torch
from problems import Sparse, check, poisoned, shared_lists
from sidebyside import emulate, their_sparse

from deep_gemm.sm120 import reference
from deep_gemm.sm120.emulator import recording

pytestmark = pytest.mark.peer
FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["mxfp8", "mxfp4"])


@pytest.fixture(scope="module", autouse=True)
def fetched() -> None:
    try:
        peer.fetch()
        sparse_peer.fetch()
    except peer.PeerUnavailable as problem:
        pytest.skip(f"vLLM's wheel cannot be fetched: {str(problem).splitlines()[0]}")


@FORMATS
@pytest.mark.parametrize("block, block_kv, rows", [(8, 64, 3), (16, 128, 3), (8, 128, 18)])
def test_both_beside_float64_and_the_chains(block: int, block_kv: int, rows: int, fp4: bool) -> None:
    """Theirs are the chains, bit for bit but for the order of sums inside the MMA; ours are nearer to float64."""
    lengths = torch.randint(0, 700, (rows,)).tolist()
    problem = Sparse(
        lengths, width=68, block=block, block_kv=block_kv, fp4=fp4, padding=-block_kv * (68 if fp4 else 132) % 512
    )
    logits, _ = their_sparse(problem, list(range(rows)))
    chained, exact = problem.expected(logits_of=reference.chained_logits_of), problem.expected()
    inside = exact != -torch.inf
    assert (logits[inside] == chained[inside]).double().mean() > 0.99
    check(logits, exact, tolerance=2**-7)
    ours = problem.logits(problem.metadata(), poisoned(*exact.shape, torch.bfloat16))
    check(ours, exact)
    assert (ours[inside] - exact[inside]).norm() < 0.7 * (logits[inside] - exact[inside]).norm()


def test_pairs_of_rows() -> None:
    """Rows of one request are merged two by two."""
    problem = Sparse([600] * 5, width=40, shared=True, padding=-64 * 68 % 512)
    logits, _ = their_sparse(problem, [0, 0, 0, 1, 1])
    check(logits, problem.expected(), tolerance=2**-7)


def test_what_a_prefill_brings_from_l2() -> None:
    """Neighbours with 90% of their blocks in common: bytes of distinct sectors that each block of the grid reads, for a
    row and key that it sees. Theirs merges two rows' lists, which saves 45%; ours takes 16 rows side by side."""
    rows, width, length = 384, 68, 4000
    problem = Sparse([length] * rows, width=width, shared=True, padding=-64 * 68 % 512)
    problem.lists = shared_lists(rows, width, length // 8, 0.9)
    _, theirs = their_sparse(problem, [0] * rows, sms=rows // 2, trace=True)  # a pair of rows for each block
    with recording(trace=True) as launches:
        check(problem.logits(problem.metadata()), problem.expected())
    ours = launches[-1]
    mine, other = (counters.block_bytes["kv_cache"] / (rows * width * 8) for counters in (ours, theirs))
    print(f"bytes of L2 a row and key: {mine:.1f}, theirs {other:.1f}, alone 68")
    assert mine < 0.5 * other < 0.35 * 68


@pytest.mark.parametrize("rows", [3, 66])
@pytest.mark.parametrize("unaligned", [False, True])
def test_one_run_of_keys(unaligned: bool, rows: int) -> None:
    """Its other kernel: half of the warps gather, half score."""
    lengths = [int(length) for length in torch.randint(1, 2000, (rows,))]
    lengths[0] = 20_000
    starts = [3, 11] * (rows // 2) + [8] * (rows % 2) if unaligned else [0] * rows
    problem = Sparse(lengths, width=2048, block_kv=0, starts=starts, unaligned=unaligned)
    metadata = sparse_peer.metadata_buffer(rows, 2048, True, 8, 20)
    workspace = sparse_peer.workspace(rows)
    plan = sparse_peer.launch_ragged_metadata(
        problem.ks, problem.ke, problem.keys, problem.lists, metadata, workspace, 20, unaligned
    )
    emulate(
        plan,
        {"ks": problem.ks, "ke": problem.ke, "lists": problem.lists},
        {"metadata": metadata, "workspace": workspace},
    )
    logits = poisoned(rows, 2048 * 8, torch.bfloat16, pad=0)
    score = sparse_peer.launch_ragged_logits(problem.q, problem.kv, problem.weights, metadata, logits, 20, unaligned)
    (q, q_scales), (keys, key_scales) = problem.q, problem.kv
    inputs = {"q": q, "q scales": q_scales, "kv": keys, "kv scales": key_scales, "weights": problem.weights}
    emulate(score, inputs | {"metadata": metadata}, {"logits": logits})
    check(logits, problem.expected(), tolerance=2**-7)
    chained = problem.expected(logits_of=reference.chained_logits_of)
    inside = chained != -torch.inf
    assert (logits[inside] == chained[inside]).double().mean() > 0.99
