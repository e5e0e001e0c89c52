"""`demo.py --sparse`: DeepSeek-V4.1's two levels of choosing, for 4 requests that decode.

One layer scores every key, and the 2,048 best blocks of 8 keys are the candidates of each request: by their best key,
the newest block in any case. A layer after it scores the candidates alone and takes its top 512 of them. What it has to
agree with is the same layer's logits for all keys, those of other blocks masked.
"""

import argparse
from dataclasses import dataclass, replace

import torch

import deep_gemm
from deep_gemm.sm120 import reference

BLOCK, CANDIDATES, NOTHING = 8, 2048, 2**31 - 1
ROUNDING = 2**-8  # of bf16


@dataclass(frozen=True)
class Choice:
    """One request: how far its logits are off, and how much of its top is in that of all keys, masked. Of the rest
    `ties` are as good but for bf16's rounding."""

    keys: int
    blocks: int
    error: float
    shared: int
    ties: int
    wanted: int

    @property
    def passed(self) -> bool:
        return self.error <= ROUNDING and self.shared + self.ties == self.wanted

    @property
    def cells(self) -> list[str]:
        if not self.wanted:
            return [f"{self.keys:,}", f"{self.blocks:,}", "-", "-"]
        overlap = f"{self.shared / self.wanted:.2%}" + (f" + {self.ties} ties" if self.ties else "")
        return [f"{self.keys:,}", f"{self.blocks:,}", f"{self.error:.2e}", overlap]


def candidates(logits: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """int32 [rows, CANDIDATES]: ascending blocks of the best keys of each row, the newest among them."""
    rows, columns = logits.shape
    seen = torch.arange(columns, device=logits.device) < lens.view(-1, 1)
    best = torch.where(seen, logits, -torch.inf).unflatten(1, (-1, BLOCK)).amax(dim=2)
    newest = (lens.view(-1, 1).long() - 1).clamp(min=0) // BLOCK
    best.scatter_(1, newest, torch.inf)
    values, blocks = best.topk(min(CANDIDATES, best.shape[1]), dim=1)
    there = (values > -torch.inf) & (lens.view(-1, 1) > 0)
    lists = torch.full((rows, CANDIDATES), NOTHING, dtype=torch.int32, device=logits.device)
    lists[:, : blocks.shape[1]] = torch.where(there, blocks, NOTHING).sort(dim=1).values.int()
    return lists


def positions_of(lists: torch.Tensor) -> torch.Tensor:
    """The key of each column."""
    return (lists.long()[..., None] * BLOCK + torch.arange(BLOCK, device=lists.device)).flatten(1)


def compare(logits: torch.Tensor, dense: torch.Tensor, exact: torch.Tensor, lists: torch.Tensor, lens, top: int):
    """A Choice for each row."""
    for row, keys in enumerate(lens.flatten().tolist()):
        listed = positions_of(lists[row : row + 1])[0]
        seen = listed < keys
        listed, got = listed[seen], logits[row, seen].double()
        k = min(top, len(listed))
        error = ((got - exact[row, listed]).norm() / exact[row, listed].norm()).item() if k else 0.0
        masked = torch.full_like(dense[row], -torch.inf)
        masked[listed] = dense[row, listed]
        mine, theirs = listed[got.topk(k).indices], masked.topk(k)
        others = dense[row, mine[~torch.isin(mine, theirs.indices)]]
        ties = others >= theirs.values.min() - 2 * ROUNDING * theirs.values.min().abs() if len(others) else others
        yield Choice(keys, -(-len(listed) // BLOCK), error, k - len(others), int(ties.sum()), k)


def run(args: argparse.Namespace, bench, make_step, top: int, device: torch.device) -> list[Choice]:
    """The step, each piece of it under its name."""
    source = bench.run("inputs", make_step, args, device)
    lens, page = source.context_lens, source.kv_cache.shape[1]
    other = make_step(args, device)
    consumer = replace(source, query=other.query, weights=other.weights.bfloat16())
    rows, ids = len(lens), torch.arange(len(lens), dtype=torch.int32, device=device)

    def listed(lists: torch.Tensor) -> torch.Tensor:
        return deep_gemm.get_paged_sparse_mqa_logits_metadata(
            lens, consumer.block_table, ids, page, lists, torch.int8, BLOCK
        )

    def sparse(metadata: torch.Tensor) -> torch.Tensor:
        return deep_gemm.fp8_fp4_paged_sparse_mqa_logits(
            consumer.query, consumer.kv_cache, consumer.weights, metadata, CANDIDATES, BLOCK
        )

    def first_call() -> None:
        empty = replace(source, context_lens=torch.zeros_like(lens))
        for step in (empty, replace(empty, weights=consumer.weights)):
            step.paged(step.plan(deep_gemm.get_num_sms()))
        sparse(torch.zeros_like(listed(torch.zeros(rows, CANDIDATES, dtype=torch.int32, device=device))))

    bench.run("compile", first_call)
    schedule = bench.run("plan", source.plan, deep_gemm.get_num_sms())
    scored = bench.run("source: logits of all keys", source.paged, schedule)
    lists = bench.run("source: candidates", candidates, scored, lens)
    metadata = bench.run("candidates' places", listed, lists)
    logits = bench.run("consumer: logits of candidates", sparse, metadata).cpu()
    dense = bench.run("consumer: logits of all keys", consumer.paged, schedule).cpu()
    exact = bench.run("reference", consumer.ragged, reference.ragged_logits).cpu()
    return list(compare(logits, dense, exact, lists.cpu(), lens.cpu(), top))
