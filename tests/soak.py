"""Calls by the ten thousand, over changing shapes, streams and threads, and what grew meanwhile, as JSON:

python tests/soak.py 100000 cuda    launches run, and one result in 50 is compared
python tests/soak.py 100000 cpu     launches end in the driver's stand-in, which test_soak.py puts in sight
"""

import collections
import copy
import gc
import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # before what it brings
    sys.path.insert(1, str(Path(__file__).parent.parent / "sm120"))

import torch
from problems import Paged, Ragged, Sparse

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import paged as paged_calls
from deep_gemm.sm120 import ragged as ragged_calls
from deep_gemm.sm120.jit import runtime
from deep_gemm.sm120.kernels import logits

THREADS, ROUNDS, BATCH, STREAMS = 4, 8, 24, 2  # streams of a thread

Call = Callable[[random.Random], tuple[torch.Tensor, torch.Tensor]]


def paged(problem: Paged) -> Call:
    """Any part of the batch and of the columns, cleaned or not, into the caller's tensor or one of ours."""
    q, cache, weights, lengths, table, _, columns = problem.arguments(None)
    expected = problem.expected()

    def call(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        batch, width = rng.randint(1, BATCH), rng.randint(1, columns)
        rows = batch * problem.next_n
        query = tuple(part[:batch] for part in q) if problem.fp4 else q[:batch]
        plan = deep_gemm.get_paged_mqa_logits_metadata(lengths[:batch], problem.block_kv, rng.randint(1, 188))
        got = deep_gemm.fp8_fp4_paged_mqa_logits(
            query, cache, weights[:rows], lengths[:batch], table[:batch], plan, width, rng.random() < 0.5,
            out=torch.empty(rows, width, device=weights.device) if rng.random() < 0.5 else None,
        )  # fmt: skip
        return got, expected[:rows, :width]

    return call


def ragged(problem: Ragged) -> Call:
    """Any of the rows and of the keys, cleaned or not."""
    expected = problem.expected()

    def call(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        rows, keys = rng.randint(1, BATCH), rng.randint(1, len(problem.kv[0]))
        q, kv, *rest = problem.arguments()
        kv = tuple(part[:keys] for part in kv)
        got = deep_gemm.fp8_mqa_logits(q[:rows], kv, *(x[:rows] for x in rest), rng.random() < 0.5)
        return got, expected[:rows, :keys]

    return call


def sparse(problem: Sparse) -> Call:
    """Any of the rows, on metadata of their own or on those of more."""
    expected, metadata = problem.expected(), problem.metadata()

    def call(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        rows, whole = rng.randint(1, BATCH), vars(problem)
        some = copy.copy(problem)
        some.q, some.weights = tuple(part[:rows] for part in whole["q"]), whole["weights"][:rows]
        for name in ("lengths", "lists", "block_table", "context_lens", "ks", "ke"):
            if name in whole:
                setattr(some, name, whole[name][:rows])
        return some.logits(some.metadata() if rng.random() < 0.5 else metadata), expected[:rows]

    return call


def chosen(logits: torch.Tensor) -> Call:
    """Any number of the largest of any columns, by one block a row or by several."""

    def call(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = rng.randint(1, 3), rng.randint(1, logits.shape[1])
        k = rng.randint(1, min(columns, 2048))
        lengths = torch.full((rows,), columns, dtype=torch.int32, device=logits.device)
        scores = torch.empty(rows, k, device=logits.device)
        sm120.topk(logits[:rows], lengths, k, scores=scores)
        return scores.sort(descending=True).values, logits[:rows, :columns].topk(k).values.double()

    return call


def scored_and_chosen(problem: Ragged) -> Call:
    expected = problem.expected()

    def call(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        rows, k = rng.randint(1, BATCH), rng.randint(1, 64)
        q, kv, *rest = problem.arguments()
        scores = torch.empty(rows, k, device=problem.device)
        sm120.fp8_fp4_mqa_topk(q[:rows], kv, *(x[:rows] for x in rest), k, scores=scores)
        return scores.sort(descending=True).values, expected[:rows].topk(k).values

    return call


def paged_and_chosen(problem: Paged) -> Call:
    """Logits, maxima and a choice in one, of whole requests."""
    q, cache, weights, lengths, table, _, columns = problem.arguments(None)
    expected = problem.expected()

    def call(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        batch, k = rng.randint(1, BATCH), rng.randint(1, 64)
        rows = batch * problem.next_n
        plan = deep_gemm.get_paged_mqa_logits_metadata(lengths[:batch], problem.block_kv, rng.randint(1, 188))
        scores = torch.empty(rows, k, device=problem.device)
        sm120.fp8_fp4_paged_mqa_topk(
            q[:batch], cache, weights[:rows], lengths[:batch], table[:batch], plan, columns, k, scores=scores
        )
        return scores.sort(descending=True).values, expected[:rows].topk(k).values

    return call


def candidates(problem: Paged, consumer: Sparse) -> Call:
    """A step of V4.1: the maxima of a source's blocks, candidates, and a consumer's choice among them. What can be
    compared is how many keys each row has."""
    q, cache, weights, lengths, table, _, columns = problem.arguments(None)

    def call(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        rows = rng.randint(1, BATCH)
        plan = deep_gemm.get_paged_mqa_logits_metadata(lengths[:rows], problem.block_kv, rng.randint(1, 188))
        maxima = torch.empty(rows, -(-columns // 8), device=problem.device)
        deep_gemm.fp8_fp4_paged_mqa_logits(
            tuple(part[:rows] for part in q), cache, weights[:rows], lengths[:rows], table[:rows], plan, columns,
            block_max=maxima,
        )  # fmt: skip
        lists = sm120.candidate_blocks(maxima, lengths[:rows], consumer.width)
        page, some = problem.block_kv, (lengths[:rows], table[:rows])
        metadata = deep_gemm.get_paged_sparse_mqa_logits_metadata(*some, None, page, lists, torch.int8, 8)
        queries, k = tuple(part[:rows] for part in consumer.q), 8 * consumer.width
        out = sm120.fp8_fp4_paged_sparse_mqa_topk(
            queries, cache, consumer.weights[:rows], metadata, consumer.width, 8, lists, lengths[:rows], k
        )
        seen = lengths[:rows].flatten()  # the last of the candidates is the newest block, which may not be full
        most = torch.where(seen > k, k - 8 + (seen - 1) % 8 + 1, seen)
        return (out >= 0).sum(dim=1).double(), most.double()

    return call


def calls_on(device: str) -> list[Call]:
    """What a server of several models mixes: they differ in whatever a kernel is compiled for."""
    made = []
    for heads, page, fp4, next_n in [(8, 64, False, 1), (16, 64, False, 2), (8, 32, True, 1), (16, 128, True, 9)]:
        lengths = [[random.randint(0, 300) for _ in range(next_n)] for _ in range(BATCH)]
        made.append(paged(Paged(lengths, next_n=next_n, heads=heads, block_kv=page, fp4=fp4, device=device)))
    ends = [random.randint(0, 200) for _ in range(BATCH)]
    run = Ragged([0] * BATCH, ends, 200, heads=8, device=device)
    listed = [Sparse(ends, heads=8, block_kv=page, width=9, device=device) for page in (64, 0)]
    logits = torch.randn(3, 12_000, device=device)
    tokens = Paged([[end, end] for end in ends], next_n=2, heads=8, device=device)
    source = Paged([[end + 1] for end in ends], heads=8, fp4=True, device=device)
    made += [paged_and_chosen(tokens), candidates(source, Sparse(ends, heads=8, width=9, device=device))]
    return [*made, ragged(run), *map(sparse, listed), chosen(logits), chosen(logits.bfloat16()), scored_and_chosen(run)]


class Card:
    """A GPU: the streams that threads choose from, and what can be seen of its memory."""

    def __init__(self) -> None:
        self.streams = [torch.cuda.Stream() for _ in range(STREAMS * THREADS)]

    def choose(self, number: int) -> None:
        """Makes stream `number` this thread's current one."""
        torch.cuda.set_stream(self.streams[number])

    def compare(self, got: torch.Tensor, expected: torch.Tensor) -> bool:
        inside = expected != -torch.inf
        rtol = 1e-3 if got.dtype == torch.float32 else 2**-7
        return torch.allclose(got[inside].double(), expected[inside], rtol=rtol, atol=1e-2)

    def state(self) -> dict[str, int]:
        torch.cuda.synchronize()
        free, whole = torch.cuda.mem_get_info()
        return {"tensors": torch.cuda.memory_allocated(), "device": whole - free}


class StandIn:
    """The driver's stand-in: counts what arrives on which stream."""

    def __init__(self) -> None:
        from standin.driver import Standin

        self.standin, self.chosen, self.arrived, self.loads = Standin(), threading.local(), collections.Counter(), 0
        self.standin.without_emulator()
        self.callback = type(self.standin._callback)(self._arrive)
        self.standin.library.standin_on_launch(self.callback)
        runtime._emulate = lambda kernel, grid, parameters, *_: runtime._launch_on_gpu(
            kernel, 0, self.chosen.stream, grid, parameters
        )

    def _arrive(self, launch) -> int:
        self.arrived[launch.contents.stream] += 1
        return 0 if launch.contents.stream == self.chosen.stream else 400

    def choose(self, number: int) -> None:
        self.chosen.stream = number + 1

    def compare(self, got: torch.Tensor, expected: torch.Tensor) -> bool:
        return got.shape == expected.shape

    def state(self) -> dict[str, int]:
        calls = self.standin.calls()
        self.loads += calls.count("cuLibraryLoadData") - calls.count("cuLibraryUnload")
        return {"modules": self.loads, "streams": len(self.arrived), "launches": sum(self.arrived.values())}


def state(card: Card | StandIn) -> dict[str, int]:
    """All that could grow. What is known of calls comes and goes: it is bounded by a number, see test_arguments.py."""
    for known in (paged_calls._known, ragged_calls._known):
        known.clear()
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return card.state() | {
        "blocks": sys.getallocatedblocks(),
        "resident": resident,
        "loaded": len(runtime._loaded),
        "configurations": logits.configure.cache_info().currsize,
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


def soak(total: int, device: str) -> dict:
    card = Card() if device == "cuda" else StandIn()
    card.choose(0)
    calls, problems = calls_on(device), []

    def work(share: int, thread: int) -> None:
        rng = random.Random()
        try:
            for i in range(share):
                card.choose(STREAMS * thread + rng.randrange(STREAMS))
                got, expected = rng.choice(calls)(rng)
                if i % 50 == 0 and not card.compare(got, expected):
                    problems.append("wrong logits")
        except Exception as problem:
            problems.append(repr(problem))

    def round_of(share: int) -> None:  # threads of its own, as a server's pool has
        threads = [threading.Thread(target=work, args=(share, thread)) for thread in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    if device == "cuda":
        torch.cuda.synchronize()
    for _ in range(2):
        round_of(1500)  # until caches that have a bound are full
    before = state(card)
    for _ in range(ROUNDS):
        round_of(total // THREADS // ROUNDS)
    return {"before": before, "after": state(card), "problems": problems[:5]}


if __name__ == "__main__":
    print(json.dumps(soak(int(sys.argv[1]), sys.argv[2])))
