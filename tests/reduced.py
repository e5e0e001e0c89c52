"""Small problems of every function and path against float64, in seconds and without a test runner: for tools that watch
a program, such as compute-sanitizer's (its four run this file in test_sanitizers.py, where there are one and a GPU).

    python tests/reduced.py                      on the GPU, or else in the emulator
    python tests/reduced.py --garbage            the same with anything in the integer tensors; nothing is compared
    python tests/reduced.py --planted memcheck   a kernel with a fault that this tool has to find
    python tests/reduced.py --only sparse        cases whose names have this in them

On a GPU each tensor is an allocation of its own, and comes there by a copy: what lies past it, and what nobody wrote,
shows.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # before what it brings
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    os.environ.setdefault("DG_SM120_FORCE", "1")
    sys.path.insert(1, str(Path(__file__).parent.parent / "sm120"))

import torch
from problems import POISON, Paged, Ragged, Sparse, check, poisoned
from vector_add import AddParams, make_kernel, write_header

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import reference, settings
from deep_gemm.sm120.jit import launch
from deep_gemm.sm120.kernels import sparse

EDGES = [-(2**31), -257, -1, 0, 1, 2**24, 2**30, 2**31 - 1]
FAULTS = {  # tool -> a body for the kernel that adds vectors
    "memcheck": "    p.sum[p.count] = 1.0f;",
    "initcheck": "    p.sum[threadIdx.x] = p.a[threadIdx.x];",
    "racecheck": "    __shared__ float x[64];\n    x[threadIdx.x] = 1;\n    p.sum[threadIdx.x] = x[63 - threadIdx.x];",
    "synccheck": "    if (threadIdx.x < 40) __syncthreads();\n    p.sum[threadIdx.x] = 1.0f;",
}


class Suite:
    """The cases on a device, as they are or with garbage in every integer tensor that a call hands in."""

    def __init__(self, device: str, garbage: bool = False) -> None:
        self.device, self.garbage = device, garbage

    def cases(self) -> dict[str, Callable[[], None]]:
        """What to call, by its name."""
        bf16, found = torch.bfloat16, {}
        for fp4 in (False, True):
            name = "fp4" if fp4 else "fp8"
            found |= {
                f"paged, few rows, {name}": lambda fp4=fp4: self.paged([300, 0, 37], 100, heads=16, fp4=fp4),
                f"paged, many rows, {name}": lambda fp4=fp4: self.paged([90, 0, 520] * 7, 5, heads=16, fp4=fp4),
                f"ragged, {name}": lambda fp4=fp4: self.ragged([0, 5, 70, 9], [1, 5, 200, 90], fp4=fp4),
                f"sparse, paged, few rows, {name}": lambda fp4=fp4: self.sparse([100, 0, 300], fp4=fp4),
            }
        return found | {
            "paged, one short row": lambda: self.paged([50], 100, heads=8, block_kv=16),
            "paged, drafts": lambda: self.paged([[300, 301, 302], [0, 9, 0]], 100, next_n=3, heads=8, fp4=True),
            "paged, 64 heads, bf16, cleaned": lambda: self.paged([77, 200], 60, bf16, True, padding=4),
            "paged, many short rows": lambda: self.paged([3, 0, 0, 40] * 40, 3, heads=8, dim=32),
            "ragged, compressed, bf16, cleaned": lambda: self.ragged([0, 5, 70], [1, 5, 200], 150, bf16, True),
            "sparse, paged, many rows": lambda: self.sparse([100, 0, 37] * 50, block=16, kind="any", tail="garbage"),
            "sparse, ragged, few rows": lambda: self.sparse([100, 60], block_kv=0, starts=[3, 17], unaligned=True),
            "sparse, ragged, many rows": lambda: self.sparse([80, 0, 33] * 50, block_kv=0, starts=[0, 8, 16] * 50),
            "topk, short rows": lambda: self.topk([700, 3, 0], 700, 512),
            "topk, one part": lambda: self.topk([2000, 1500], 2000, 100, starts=[0, 7]),
            "topk, parts and merge": lambda: self.topk([9000, 8000], 9000, 600, page=64),
            "topk, bf16, parts and merge": lambda: self.topk([17000], 17000, 512, dtype=bf16),
            "topk, sifted": lambda: self.topk([20000, 9000], 20000, 100, sms=1),
            "topk, sifted, many rows": lambda: self.topk([9000, 5000, 40] * 6, 9000, 100, sms=1),
            "topk, sifted, parts and merge": lambda: self.topk([70000], 70000, 600, sms=2),
            "topk, sifted, a full list": lambda: self.topk([100000], 100000, 600, sms=1, fill=torch.arange(100000.0)),
            "topk, equal logits": lambda: self.topk([9000], 9000, 2048, fill=1.5),
            "candidates, parts and merge": lambda: self.candidates([9000, 40], 2048),
            "paged, with maxima": lambda: self.paged([300, 0, 37], 100, heads=8, maxima=True),
            "ragged, with maxima": lambda: self.ragged([0, 5, 64], [1, 5, 200], maxima=True),
            "sparse, one row": lambda: self.sparse([300]),
            "sparse logits and choice": lambda: self.sparse_topk([100, 0, 300], 50),
            "logits and choice, keys in pieces": lambda: self.in_pieces(lambda: self.paged_topk([[700]] * 9, 50)),
            "logits and choice, run in pieces": lambda: self.in_pieces(lambda: self.ragged_topk([3] * 9, [800] * 9, 7)),
            "logits and choice, paged": lambda: self.paged_topk([[900, 3], [0, 700]], 200),
            "logits and choice, one token": lambda: self.paged_topk([[9000]], 200),
            "logits and choice, ragged": lambda: self.ragged_topk([0, 100, 7], [900, 120, 1000], 200),
            "metadata, few and many rows": lambda: [self.metadata(rows) for rows in (1, 40, 1025, 3000)],
        }  # fmt: skip

    # ---- one function each ----

    def metadata(self, rows: int) -> None:
        lengths = torch.randint(0, 3000, (rows, 2), dtype=torch.int32)
        (there,) = self.spoiled(lengths.to(self.device))
        schedule = deep_gemm.get_paged_mqa_logits_metadata(there, 64, 47)
        if not self.garbage:
            assert torch.equal(schedule.cpu(), reference.schedule(lengths, 47))

    def paged(self, lengths, slots, dtype=torch.float32, clean=False, maxima=False, **options) -> None:
        problem = Paged(lengths, device=self.device, **options)
        problem.context_lens, problem.block_table = self.spoiled(problem.context_lens, problem.block_table)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, slots)
        (schedule,) = self.spoiled(schedule)
        out = self.output(len(problem.weights), problem.max_context_len, dtype)
        more = self.maxima(out) if maxima else {}
        deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), clean, logits_dtype=dtype, out=out, **more)
        self.compare(out, problem.expected, clean)
        if maxima and not self.garbage:
            ends = reference.windows(problem.context_lens, problem.next_n).flatten().tolist()
            self.compare_maxima(more["block_max"], reference.block_max(out.cpu(), [0] * len(ends), ends))

    def ragged(
        self, starts, ends, columns=0, dtype=torch.float32, clean=False, heads=16, maxima=False, **options
    ) -> None:
        problem = Ragged(starts, ends, max(ends), heads, device=self.device, **options)
        problem.ks, problem.ke = self.spoiled(problem.ks, problem.ke)
        out = self.output(len(starts), columns or max(ends), dtype)
        more = self.maxima(out) if maxima else {}
        deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), clean, columns, dtype, out=out, **more)
        self.compare(out, lambda: problem.expected(columns), clean)
        if maxima and not self.garbage:
            self.compare_maxima(more["block_max"], reference.block_max(out.cpu(), starts, ends))

    def sparse(self, lengths, **options) -> None:
        problem = Sparse(lengths, width=21, heads=8, device=self.device, **options)
        (problem.lists,) = self.spoiled(problem.lists)
        if problem.block_kv:
            problem.context_lens, problem.block_table = self.spoiled(problem.context_lens, problem.block_table)
        else:
            problem.ks, problem.ke = self.spoiled(problem.ks, problem.ke)
        metadata = self.foreign(problem) if self.garbage else problem.metadata()
        out = self.output(len(lengths), problem.width * problem.block, torch.bfloat16)
        problem.logits(metadata, out)
        self.compare(out, problem.expected)

    def topk(self, lengths, columns, k, starts=None, page=1, dtype=torch.float32, fill=None, sms=None) -> None:
        """`fill`: what all logits are, or a row of them; `sms`: as if so many were there, few for rows of few parts."""
        rows = len(lengths)
        logits = torch.randn(rows, columns) if fill is None else torch.as_tensor(fill).expand(rows, columns).clone()
        logits = logits.to(dtype)
        starts = starts or [0] * rows
        table = (
            torch.stack([torch.randperm(500)[: -(-columns // page)] for _ in range(rows)]).int() if page > 1 else None
        )
        lengths = [min(length, columns - start) for length, start in zip(lengths, starts)]
        given = [torch.tensor(numbers, dtype=torch.int32, device=self.device) for numbers in (lengths, starts)]
        there = None if table is None else self.spoiled(table.to(self.device))[0]
        lens, begins = self.spoiled(*given)
        out, positions = (self.output(rows, k, torch.int32) for _ in range(2))
        scores = self.output(rows, k, torch.float32)
        with mock.patch.object(settings, "_num_sms", sms or settings._num_sms):
            sm120.topk(
                logits.to(self.device), lens, k, starts=begins, block_table=there, page=page, out=out,
                positions=positions, scores=scores,
            )  # fmt: skip
        self.compare_choice(positions, reference.topk(logits, lengths, k, starts))
        if table is not None and not self.garbage:
            chosen = positions.cpu().long()
            assert torch.equal(out.cpu(), (table.gather(1, chosen // page) * page + chosen % page).int())

    def candidates(self, blocks, width) -> None:
        maxima = torch.randn(len(blocks), max(blocks))
        lens = torch.tensor([8 * count - 3 for count in blocks], dtype=torch.int32, device=self.device)
        table = torch.stack([torch.randperm(2000)[: -(-max(blocks) // 8)] for _ in blocks]).int().to(self.device)
        lens, table = self.spoiled(lens, table)
        out, pages = (self.output(len(blocks), width, torch.int32) for _ in range(2))
        sm120.candidate_blocks(maxima.to(self.device), lens, width, block_table=table, out=out, pages=pages)
        self.compare_choice(out, reference.topk(maxima, blocks, width), 2**31 - 1)

    def paged_topk(self, lengths, k) -> None:
        problem = Paged(lengths, len(lengths[0]), heads=8, dim=64, device=self.device)
        problem.context_lens, problem.block_table = self.spoiled(problem.context_lens, problem.block_table)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 100)
        (schedule,) = self.spoiled(schedule)
        positions = self.output(len(problem.weights), k, torch.int32)
        sm120.fp8_fp4_paged_mqa_topk(*problem.arguments(schedule), k, translate=True, positions=positions)
        if not self.garbage:
            logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), True).cpu()
            self.compare_choice(positions, reference.topk(logits, [length for row in lengths for length in row], k))

    def ragged_topk(self, starts, ends, k) -> None:
        problem = Ragged(starts, ends, max(ends), heads=8, dim=64, device=self.device)
        problem.ks, problem.ke = self.spoiled(problem.ks, problem.ke)
        positions = self.output(len(starts), k, torch.int32)
        sm120.fp8_fp4_mqa_topk(*problem.arguments(), k, offset=problem.ks, positions=positions)
        if not self.garbage:
            logits = deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), True).cpu()
            lengths = [end - start for start, end in zip(starts, ends)]
            self.compare_choice(positions, reference.topk(logits, lengths, k, starts))

    def sparse_topk(self, lengths, k) -> None:
        problem = Sparse(lengths, width=21, heads=8, device=self.device)
        problem.lists, problem.context_lens = self.spoiled(problem.lists, problem.context_lens)
        metadata = self.foreign(problem) if self.garbage else problem.metadata()
        scores = self.output(len(lengths), k, torch.float32)
        choice = sm120.fp8_fp4_paged_sparse_mqa_topk(
            problem.q, problem.kv_cache, problem.weights, metadata, problem.width, problem.block, problem.lists,
            problem.context_lens, k, translate=True, scores=scores,
        )  # fmt: skip
        if self.garbage:
            return
        scored = problem.logits(metadata, self.output(len(lengths), problem.width * 8, torch.bfloat16)).float().cpu()
        for row, (length, logits) in enumerate(zip(lengths, scored)):
            seen = min(length, problem.width * 8)
            if length > seen:
                seen -= problem.lists[row, -1].item() == length // 8 and 8 - length % 8
            count = min(k, seen)
            assert scores[row, :count].sort(descending=True).values.cpu().equal(logits[:seen].topk(count).values)
            assert (choice[row, count:] == -1).all() and (choice[row, :count] >= 0).all()

    def in_pieces(self, call: Callable[[], None]) -> None:
        """With rows that count as many, and little room for each: the best so far are carried from piece to piece."""
        module = sys.modules["deep_gemm.sm120.topk"]
        before = module._LOGITS_BYTES, module._LEAST_ROWS, module._PIECE, settings._num_sms
        module._LOGITS_BYTES, module._LEAST_ROWS, module._PIECE, settings._num_sms = 2000, 99, 64, 4
        try:
            call()
        finally:
            module._LOGITS_BYTES, module._LEAST_ROWS, module._PIECE, settings._num_sms = before

    # ---- what they share ----

    def maxima(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"block_max": self.output(len(out), -(-out.shape[1] // 8), torch.float32)}

    def compare_maxima(self, maxima: torch.Tensor, expected: torch.Tensor) -> None:
        wanted = torch.where(expected == -torch.inf, POISON, expected)
        assert torch.equal(maxima.double().cpu(), wanted)

    def output(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """All poison, on the device by a copy."""
        whole = poisoned(rows, columns, torch.float32).as_strided((rows, columns + 7), (columns + 7, 1))
        return whole.to(dtype).to(self.device)[:, :columns]

    def spoiled(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The tensors, or, where garbage is asked for, others like them: one in two entries is anything."""
        if not self.garbage:
            return list(tensors)
        made = []
        for tensor in tensors:
            values = tensor.cpu().clone(memory_format=torch.contiguous_format).flatten()
            anything = torch.randint(-(2**31), 2**31, values.shape).int()
            edges = torch.tensor(random.choices(EDGES, k=len(values)), dtype=torch.int32)
            anything = torch.where(torch.rand(values.shape) < 0.5, edges, anything)
            made.append(
                torch.where(torch.rand(values.shape) < 0.5, anything, values).view(tensor.shape).to(self.device)
            )
        return made

    def foreign(self, problem: Sparse) -> torch.Tensor:
        """Metadata of which the rows' seals alone are right."""
        problem.metadata()
        rows, pitch = len(problem.lengths), sparse.pitch(problem.width)
        words = torch.randint(-(2**31), 2**31, (sparse.size(rows, problem.width) // 4,)).int()
        seal = sparse.seal(problem.width, problem.block, problem.block_kv, problem.unaligned)
        words[sparse.FIRST_ROW // 4 :: pitch // 4] = seal - 2**32 * (seal >= 2**31)
        return words.view(torch.uint8).to(self.device)

    def compare(self, out: torch.Tensor, expected: Callable[[], torch.Tensor], cleaned: bool = False) -> None:
        if not self.garbage:
            check(out.cpu(), expected().cpu(), cleaned=cleaned)

    def compare_choice(self, positions: torch.Tensor, expected: list[list[int]], nowhere: int = -1) -> None:
        for row, wanted in zip(positions.cpu().tolist(), expected):
            rest = [nowhere] * (len(row) - len(wanted))
            assert self.garbage or sorted(row[: len(wanted)]) == wanted and row[len(wanted) :] == rest


def plant(tool: str) -> None:
    """Launches, as the package launches its own, a kernel with a fault of the kind that `tool` looks for."""
    a, total = torch.empty(64, device="cuda"), torch.zeros(64).cuda()
    with tempfile.TemporaryDirectory() as folder:
        write_header(Path(folder))
        kernel = make_kernel("planted", FAULTS[tool])
        parameters = AddParams(a.data_ptr(), a.data_ptr(), total.data_ptr(), 64)
        launch(kernel, a.device, (1, 1), parameters, {"a": a}, {"sum": total})
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--garbage", action="store_true", help="anything in the integer tensors")
    parser.add_argument("--planted", choices=FAULTS, help="the tool whose fault is planted")
    parser.add_argument("--only", default="", help="part of the names of cases")
    arguments = parser.parse_args()
    if arguments.planted:
        return plant(arguments.planted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = Suite(device, arguments.garbage).cases()
    chosen = [name for name in cases if arguments.only in name]
    for name in chosen:
        cases[name]()
        if device == "cuda":
            torch.cuda.synchronize()
        print(name, flush=True)
    print(f"{len(chosen)} cases on {device} are right")


if __name__ == "__main__":
    main()
