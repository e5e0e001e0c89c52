"""What only a GPU can show: CUDA graphs, streams, dependent launches, and the emulator's word beside the card's."""

import os

import pytest
import torch
from problems import POISON, Paged, Ragged, Sparse, check, poisoned, random_lists

import deep_gemm
from deep_gemm.sm120.jit import architecture_of

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
CUDA = torch.device("cuda", 0)


def decode(problem: Paged, out: torch.Tensor, schedule: torch.Tensor) -> None:
    """One step as a server captures it: the plan is copied into the buffer that the logits read."""
    schedule.copy_(deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, problem.slots))
    deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), clean_logits=True, out=out)


@FORMATS
@pytest.mark.parametrize("slots", [100, 3])  # few rows, and many
def test_a_captured_step_is_replayed_on_other_lengths_and_pages(slots: int, fp4: bool) -> None:
    problem = Paged([[900], [0], [5000], [64]], fp4=fp4, device="cuda", slots=slots)
    out = poisoned(4, 5000, device="cuda")
    schedule = torch.empty((slots + 1, 2), dtype=torch.int32, device="cuda")
    decode(problem, out, schedule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(problem, out, schedule)
    pages = problem.kv_cache.shape[0]
    for lengths in ([[1], [0], [0], [4999]], [[0]] * 4, [[5000], [17], [300], [0]]):
        problem.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for row, (length,) in enumerate(lengths):
            used = -(-length // 64)
            problem.block_table[row, :used] = torch.randperm(pages)[:used].to(torch.int32).cuda()
        out.fill_(POISON)
        graph.replay()
        check(out.cpu(), problem.expected().cpu(), cleaned=True)


def test_a_captured_prefill_is_replayed() -> None:
    problem = Ragged([0] * 40, [300 + row for row in range(40)], 400, device="cuda")
    out = poisoned(40, 400, device="cuda")
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), out=out)
    problem.ks.add_(7)
    out.fill_(POISON)
    graph.replay()
    check(out.cpu(), problem.expected().cpu())


def test_a_capture_allocates_its_result_from_the_graph_s_pool() -> None:
    problem = Paged([[900], [40]], device="cuda")
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 100)
    deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule))
    logits.fill_(POISON)
    graph.replay()
    check(logits.cpu(), problem.expected().cpu())


def test_streams_do_not_wait_for_each_other_s_results() -> None:
    problems = [Paged([[2000 + i], [i]], heads=32, device="cuda", slots=64) for i in range(8)]
    streams = [torch.cuda.Stream() for _ in problems]
    outs = [poisoned(2, problem.max_context_len, device="cuda") for problem in problems]
    torch.cuda.synchronize()
    for _ in range(5):
        for problem, stream, out in zip(problems, streams, outs):
            with torch.cuda.stream(stream):
                schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 64)
                deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), out=out)
    torch.cuda.synchronize()
    for problem, out in zip(problems, outs):
        check(out.cpu(), problem.expected().cpu())


def test_dependent_launches() -> None:
    """With PDL a kernel is set up while the one before it runs, and reads nothing before that one is done."""
    problem = Paged([[3000], [700], [0]], heads=32, device="cuda", slots=100)
    deep_gemm.set_pdl(True)
    try:
        for _ in range(50):
            out = poisoned(3, 3000, device="cuda")
            schedule = torch.full((101, 2), -1, dtype=torch.int32, device="cuda")
            decode(problem, out, schedule)
            check(out.cpu(), problem.expected().cpu(), cleaned=True)
    finally:
        deep_gemm.set_pdl(False)


def test_no_synchronisation() -> None:
    problem = Paged([[900], [40]], device="cuda")
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 100)
    deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), clean_logits=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 100)
        deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), clean_logits=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@FORMATS
@pytest.mark.parametrize("block_kv", [64, 128])
@pytest.mark.parametrize("rows", [3, 200])
def test_a_captured_sparse_step_is_replayed_with_other_lists_and_empty_rows(
    rows: int, block_kv: int, fp4: bool
) -> None:
    """As SGLang captures it: metadata are made on a side stream, copied into a larger buffer, and serve two layers."""
    problem = Sparse([900] * rows, width=48, block_kv=block_kv, fp4=fp4, device="cuda")
    buffer = torch.zeros(problem.metadata().numel() + 4096, dtype=torch.uint8, device="cuda")
    outs = [poisoned(rows, 384, torch.bfloat16, "cuda") for _ in range(2)]
    side = torch.cuda.Stream()

    def step() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            made = problem.metadata()
            buffer[: made.numel()].copy_(made)
        main.wait_stream(side)
        for out in outs:
            problem.logits(buffer, out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for longest in (900, 0, 77):
        lengths = torch.randint(0, longest + 1, (rows,), dtype=torch.int32)
        lengths[torch.rand(rows) < 0.3] = 0
        problem.context_lens.copy_(lengths)
        problem.lists.copy_(random_lists(lengths.tolist(), 48, 8, "ascending", problem.rng))
        for out in outs:
            out.fill_(POISON)
        graph.replay()
        for out in outs:
            check(out.cpu(), problem.expected().cpu())


def test_two_sparse_graphs_on_two_streams() -> None:
    problems = [Sparse([700 + i] * 5, width=40, device="cuda") for i in range(2)]
    outs = [poisoned(5, 320, torch.bfloat16, "cuda") for _ in problems]
    graphs, streams = [torch.cuda.CUDAGraph() for _ in problems], [torch.cuda.Stream() for _ in problems]
    for problem, out, graph in zip(problems, outs, graphs):
        problem.logits(problem.metadata(), out)
        with torch.cuda.graph(graph):
            problem.logits(problem.metadata(), out)
        out.fill_(POISON)
    torch.cuda.synchronize()
    for _ in range(30):
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for problem, out in zip(problems, outs):
        check(out.cpu(), problem.expected().cpu())


def test_no_synchronisation_in_a_sparse_step() -> None:
    problem = Sparse([700, 0, 64], width=40, device="cuda")
    problem.logits(problem.metadata())
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.logits(problem.metadata())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(os.environ.get("DG_TEST_DEVICES") == "cpu", reason="the tests are kept off the GPU")
@FORMATS
@pytest.mark.parametrize("heads, dim", [(64, 128), (16, 64)])
def test_the_emulator_beside_the_card(fp4: bool, heads: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source for the same architecture on the same inputs. The tensor core may cut products off before it adds
    them up, so the two differ by rounding, and by no more."""
    monkeypatch.setenv("DG_SM120_ARCH", architecture_of(CUDA))
    here = Paged([[900, 899], [0, 64]], next_n=2, heads=heads, dim=dim, fp4=fp4, slots=20)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(here.context_lens, 64, 20)
    emulated = deep_gemm.fp8_fp4_paged_mqa_logits(*here.arguments(schedule), clean_logits=True)
    there = [tuple(p.cuda() for p in a) if isinstance(a, tuple) else a.cuda() for a in here.arguments(schedule)[:-1]]
    card = deep_gemm.fp8_fp4_paged_mqa_logits(*there, here.max_context_len, clean_logits=True).cpu()
    inside = card != -torch.inf
    assert torch.equal(inside, emulated != -torch.inf)
    difference = torch.where(inside, card - emulated, 0).double().abs()
    row, column = divmod(difference.argmax().item(), difference.shape[1])
    relative = (difference.norm() / emulated[inside].double().norm()).item()
    print(
        f"{architecture_of(CUDA)} {'fp4' if fp4 else 'fp8'} h{heads} d{dim}: relative norm of the difference "
        f"{relative:.2e}; the largest, {difference.max().item():.3e}, at [{row}, {column}]: {card[row, column].item()}"
    )
    assert relative < 1e-6
