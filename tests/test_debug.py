"""Debug mode names who hands in garbage: function, tensor, place, row and value."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import Paged, Ragged, Sparse

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import ArgumentError, debug, settings

ROW = 192 + 2 * (16 + 4 * 20)  # byte at which row 2 of metadata begins, of lists of 20 blocks
GARBAGE = [-(2**31), -1, 2**31 - 1]


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "ON", True)


def paged(device: str, next_n: int = 1) -> tuple[Paged, torch.Tensor]:
    lengths = [300, 0, 37, 520] if next_n == 1 else [[300, 301], [0, 0], [36, 37], [520, 519]]
    problem = Paged(lengths, next_n=next_n, heads=8, device=device)
    return problem, deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 6)


def refused(call: Callable, *words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("next_n", [1, 2])
def test_what_is_right_passes(device: str, next_n: int) -> None:
    problem, schedule = paged(device, next_n)
    assert deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule)).isfinite().any()
    whole = torch.tensor([[0, 0], [4, 0]], dtype=torch.int32, device=device)
    deep_gemm.fp8_paged_mqa_logits(*problem.arguments(whole))
    deep_gemm.fp8_mqa_logits(*Ragged([0, 5, 9], [8, 5, 20], 20, heads=8, device=device).arguments(), max_seqlen_k=11)
    empty = Paged([0, 0], heads=8, max_context_len=64, device=device)
    deep_gemm.fp8_paged_mqa_logits(*empty.arguments(deep_gemm.get_paged_mqa_logits_metadata(empty.context_lens, 64, 3)))


@pytest.mark.parametrize("block_kv", [64, 0])
def test_lists_and_their_metadata(device: str, block_kv: int) -> None:
    starts = None if block_kv else [0, 8, 16]
    problem = Sparse([300, 0, 37], width=20, block_kv=block_kv, starts=starts, heads=8, tail="garbage", device=device)
    metadata = problem.metadata()
    problem.logits(metadata)
    for value in (-1, 38, 2**31 - 1):
        problem.lists[0, 3] = value
        refused(problem.metadata, f"sparse_kv_block_indices[0, 3], row 0, is {value}; expected a block")
    other = Sparse([300, 0, 37], width=20, block=16, block_kv=block_kv, heads=8, device=device).metadata()
    refused(lambda: problem.logits(other), "metadata[0], row 0, is ", "expected the seal ")
    for offset, value, words in [
        (0, 7, "metadata[0], row 0, is 7; expected the header"),
        (4, 2, "metadata[1], row 1, is 2; expected the header, "),
        (ROW + 4, 168, "metadata[2], row 2, is 168; expected the columns of up to 20 blocks of 8 keys"),
        (ROW + 4, 9, "metadata[2], row 2, is 9; expected the columns"),
        (ROW + 4, -8, f"metadata[2], row 2, is {2**32 - 8}; expected the columns"),
        (ROW + 8, 2, "metadata[2], row 2, is 2; expected the number of splits of the rows before it"),
    ]:
        spoiled = metadata.clone()
        spoiled.view(torch.int32)[offset // 4] = value
        refused(lambda spoiled=spoiled: problem.logits(spoiled), words)


def test_lists_of_pages_that_are_not_there(device: str) -> None:
    """How many the cache has is seen when the metadata are used."""
    problem = Sparse([300, 0, 37], width=20, heads=8, tail="garbage", device=device)
    problem.block_table = problem.block_table.contiguous()
    (column, block), pages = divmod(int(problem.lists[0, 0]), 8), len(problem.kv_cache)
    before = int(problem.block_table[0, column])
    problem.block_table[0, column] = -7
    words = f"block_table[0, {column}], row 0, is -7; expected a page from 0 on"
    refused(problem.metadata, f"get_paged_sparse_mqa_logits_metadata: {words}")
    problem.block_table[0, column] = pages
    metadata = problem.metadata()
    words = (
        f"metadata[0, 0], row 0, is {8 * pages + block}; expected a place from 0 to {8 * pages - 1}, where there are"
    )
    refused(lambda: problem.logits(metadata), f"fp8_fp4_paged_sparse_mqa_logits: {words}")
    problem.block_table[0, column] = before
    problem.logits(problem.metadata())
    most = 64 * problem.block_table.shape[1]
    problem.context_lens[2] = most + 1
    refused(problem.metadata, f"context_lens[2], row 2, is {most + 1}; expected 0 to {most} keys")


# What a row of top-k may be told, and for each wrong value the words of its error.
ROWS = {"lengths": [70, 0, 30], "starts": [0, 100, 60], "offset": [0, -9, 5]}
WRONG = [
    ("lengths", 0, -1, "is -1; expected 0 to 100, for which there are columns behind the row's start"),
    ("lengths", 2, 41, "is 41; expected 0 to 100, for which there are columns behind the row's start"),
    ("lengths", 0, 2**31 - 1, f"is {2**31 - 1}; expected 0 to 100"),
    ("lengths", 0, 97, "is 97; expected 0 to 96 keys, which the 6 columns of block_table allow"),
    ("starts", 1, 101, "is 101; expected 0 to 100, the number of columns"),
    ("starts", 2, -(2**31), f"is {-(2**31)}; expected 0 to 100"),
    ("offset", 2, -1, "is -1; expected 0 or more, and that every result is less than 2^31"),
    ("offset", 0, 2**31 - 165, f"is {2**31 - 165}; expected 0 or more"),
    ("block_table", (2, 1), -1, f"is -1; expected a page from 0 to {2**27 - 1}, since the row has keys there"),
    ("block_table", (0, 0), 2**27, f"is {2**27}; expected a page from 0 to"),
]


@pytest.mark.parametrize("name, row, value, words", WRONG)
def test_topk(device: str, name: str, row: int | tuple[int, int], value: int, words: str) -> None:
    given = {key: torch.tensor(rows, dtype=torch.int32, device=device) for key, rows in ROWS.items()}
    # Pages up to 10; what lies past a row's last one is garbage, and so is the offset of the row without keys.
    table = torch.tensor([[0, 1, 2, 3, 10, -5], [-1] * 6, [4, 5, -1, -1, 2**31 - 1, -1]])
    given["block_table"] = table.to(torch.int32).to(device)
    logits = torch.randn(3, 100, device=device)
    given["offset"][0] = 2**31 - 166
    sm120.topk(logits, k=70, page=16, **given)
    given["offset"][0] = 0
    given[name][row] = value
    place, row = (f"{row[0]}, {row[1]}", row[0]) if isinstance(row, tuple) else (row, row)
    refused(lambda: sm120.topk(logits, k=5, page=16, **given), f"topk: {name}[{place}], row {row}, {words}")


def test_topk_of_rows_that_fill_their_table(device: str) -> None:
    logits = torch.randn(2, 100, device=device)
    lengths = torch.tensor([96, 95], dtype=torch.int32, device=device)
    table = torch.zeros(2, 6, dtype=torch.int32, device=device)
    sm120.topk(logits, lengths, 7, block_table=table, page=16)
    lengths[0] = 97
    words = "topk: lengths[0], row 0, is 97; expected 0 to 96 keys, which the 6 columns of block_table allow"
    refused(lambda: sm120.topk(logits, lengths, 7, block_table=table, page=16), words)


def test_topk_without_places(device: str) -> None:
    logits, lengths = torch.randn(2, 100, device=device), torch.tensor([100, 0], dtype=torch.int32, device=device)
    sm120.topk(logits, lengths, 7)
    lengths[1] = 101
    words = "topk: lengths[1], row 1, is 101; expected 0 to 100, for which there are columns ("
    refused(lambda: sm120.topk(logits, lengths, 7), words)


@pytest.mark.parametrize(
    "place, value, words",
    [
        (None, 801, "context_lens[1], row 1, is 801; expected 0 to 800, for which there are columns ("),
        (None, -4, "context_lens[1], row 1, is -4; expected 0 to 800"),
        ((1, 1), -3, "block_table[1, 1], row 1, is -3; expected a page from 0 to"),
        ((0, 12), 2**28, f"block_table[0, 12], row 0, is {2**28}; expected a page from 0 to {2**28 - 1}"),
    ],
)
def test_candidate_blocks(device: str, place: tuple[int, int] | None, value: int, words: str) -> None:
    maxima = torch.randn(2, 100, device=device)
    lengths = torch.tensor([[797], [90]], dtype=torch.int32, device=device)
    table = torch.full((2, 13), 2**28 - 1, dtype=torch.int32, device=device)
    table[1, 2:] = -1
    given = {"block_table": table, "pages": torch.empty(2, 30, dtype=torch.int32, device=device)}
    sm120.candidate_blocks(maxima, lengths, 30, **given)
    if place:
        table[place] = value
    else:
        lengths[1, 0] = value
    refused(lambda: sm120.candidate_blocks(maxima, lengths, 30, **given), f"candidate_blocks: {words}")


@pytest.mark.parametrize(
    "name, place, value, words",
    [
        ("starts", 1, -1, "starts[1], row 1, is -1; expected 0 to {most} ("),
        ("starts", 1, 801, "starts[1], row 1, is 801; expected 0 to 800, for which there are columns ("),
        ("context_lens", 0, 797, "context_lens[0], row 0, is 797; expected 0 to 800, for which there are columns be"),
        ("context_lens", 0, -1, "context_lens[0], row 0, is -1; expected 0 to 800, for which"),
        ("context_lens", 2, 97, "context_lens[2], row 2, is 97; expected 0 to 104 keys with those before its start, w"),
        ("block_table", (1, 11), -3, "block_table[1, 11], row 1, is -3; expected a page from 0 to"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
def test_candidate_blocks_of_a_run(device: str, name, place, value, words: str, compressed: bool) -> None:
    """Pages of 8 keys: row 1 has keys on the last two of the table. Those that a row does not reach may be anything."""
    rows = {"starts": [4, 95, 8, 50], "context_lens": [92, 9, 96, 0]}
    given = {key: torch.tensor(numbers, dtype=torch.int32, device=device) for key, numbers in rows.items()}
    given["block_table"] = torch.zeros(4, 13, dtype=torch.int32, device=device)
    for unseen in ((0, 12), (1, slice(11)), (2, 0), 3):
        given["block_table"][unseen] = -7
    given["pages"] = torch.empty(4, 30, dtype=torch.int32, device=device)
    maxima = torch.randn(4, 100, device=device)

    full = 800 - (given["starts"] % 8 if compressed else given["starts"])  # up to the last column
    sm120.candidate_blocks(maxima, full, 30, starts=given["starts"], compressed=compressed)

    def call():
        return sm120.candidate_blocks(maxima, width=30, page=8, compressed=compressed, **given)

    call()
    given[name][place] = value
    if compressed and value == 801:  # there a row may begin anywhere, if the table has it
        words = "context_lens[1], row 1, is 9; expected 0 to 104 keys with those before its start, which the 13 columns"
    most = "2147483647, an int32" if compressed else "800, for which there are columns"
    refused(call, f"candidate_blocks: {words.format(most=most)}")


def test_logits_and_choice_of_pages(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is launched, though rows are scored some at a time, and by their own numbers."""
    monkeypatch.setattr(settings, "_num_sms", 4)
    problem = Paged([[100 + row] for row in range(60)], heads=8, dim=32, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 6)
    out = torch.full((60, 9), -5, dtype=torch.int32, device=device)

    def call() -> None:
        sm120.fp8_fp4_paged_mqa_topk(*problem.arguments(schedule), 9, out=out)

    call()
    out.fill_(-5)
    problem.context_lens[55, 0] = 160
    refused(call, "fp8_fp4_paged_mqa_topk: context_lens[55, 0], row 55, is 160; expected 0 to 159 keys")
    problem.context_lens[55, 0], pages = 155, len(problem.kv_cache)
    problem.block_table[57, 2] = pages
    refused(call, f"fp8_fp4_paged_mqa_topk: block_table[57, 2], row 57, is {pages}; expected a page")
    problem.block_table[57, 2], schedule[3, 0] = 0, 99
    refused(call, "fp8_fp4_paged_mqa_topk: schedule_meta[3, 0], entry 3, is 99; expected a row from 0 to 60")
    assert (out == -5).all()


def test_logits_and_choice_of_a_run(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_num_sms", 4)
    problem = Ragged([*range(60)], [*range(100, 160)], 160, heads=8, dim=32, device=device)
    table = torch.zeros(60, 7, dtype=torch.int32, device=device)
    out = torch.full((60, 9), -5, dtype=torch.int32, device=device)

    def call() -> None:
        given = {"offset": problem.ks, "block_table": table, "page": 16}
        sm120.fp8_fp4_mqa_topk(*problem.arguments(), 9, out=out, **given)

    call()
    out.fill_(-5)
    for change, words in [
        (lambda: problem.ke.__setitem__(57, 161), "ke[57], row 57, is 161; expected 0 to 160, the number of keys"),
        (lambda: problem.ke.__setitem__(57, 20), "ke[57], row 57, is 20; expected at least ks of the row"),
        (lambda: problem.ks.__setitem__(57, -1), "ks[57], row 57, is -1; expected 0 to 160, the number of keys"),
        (lambda: problem.ks.__setitem__(57, 0), "ke - ks[57], row 57, is 157; expected 0 to 112 keys, which the 7 col"),
        (lambda: table.__setitem__((57, 6), -1), "block_table[57, 6], row 57, is -1; expected a page from 0 to"),
    ]:
        before = problem.ks.clone(), problem.ke.clone()
        change()
        refused(call, f"fp8_fp4_mqa_topk: {words}")
        problem.ks, problem.ke = before
    assert (out == -5).all()


@pytest.mark.parametrize("value", [*GARBAGE, 521])
@pytest.mark.parametrize("next_n", [1, 2])
def test_lengths(device: str, next_n: int, value: int) -> None:
    problem, schedule = paged(device, next_n)
    problem.context_lens.view(4, -1)[2, 0] = value
    place = "context_lens[2, 0], row 2," if next_n == 2 else "context_lens[2], row 2,"
    words = "fp8_paged_mqa_logits: ", f"{place} is {value}; expected 0 to 520 keys, which max_context_len allow"
    refused(lambda: deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule)), *words)
    if value < 0:
        words = "get_paged_mqa_logits_metadata: ", f"{place} is {value}; expected 0 or more keys"
        refused(lambda: deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 6), *words)


def test_lengths_past_the_table(device: str) -> None:
    problem, schedule = paged(device)
    problem.block_table = problem.block_table[:, :8].contiguous()
    words = "context_lens[3], row 3, is 520", "0 to 512 keys, which the 8 columns of block_table allow"
    refused(lambda: deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule)), *words)


@pytest.mark.parametrize("value", [*GARBAGE, "pages"])
def test_pages(device: str, value: int | str) -> None:
    """Within the row's length; what lies past it may be anything (and is, in these problems)."""
    problem, schedule = paged(device)
    pages = len(problem.kv_cache)
    value = pages if value == "pages" else value
    problem.block_table[3, 8] = value
    words = "fp8_fp4_paged_mqa_logits: block_table[3, 8], row 3,", f"is {value}; expected a page from 0 to {pages - 1}"
    refused(lambda: deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule)), *words)


@pytest.mark.parametrize(
    "slot, entry, words",
    [
        (2, (7, 0), ["schedule_meta[2, 0], entry 2, is 7", "a row from 0 to 4"]),
        (2, (-1, 0), ["schedule_meta[2, 0], entry 2, is -1"]),
        (3, (3, 9), ["schedule_meta[3, 1], entry 3, is 9", "a split that its row has"]),
        (3, (3, -9), ["schedule_meta[3, 1], entry 3, is -9"]),
        (4, (0, 0), ["schedule_meta[4, 0], entry 4, is 0", "behind the one before it"]),
        (6, (3, 2), ["schedule_meta[6, 0], entry 6, is 3", "all 6 splits of these context_lens"]),
        (0, (0, 1), ["schedule_meta[0, 0], entry 0, is 0", "all 6 splits of these context_lens"]),
    ],
)
def test_schedules(device: str, slot: int, entry: tuple[int, int], words: list[str]) -> None:
    problem, schedule = paged(device)
    schedule[slot] = torch.tensor(entry)
    refused(lambda: deep_gemm.fp8_paged_mqa_logits(*problem.arguments(schedule)), "fp8_paged_mqa_logits: ", *words)


def test_a_schedule_of_other_rows(device: str) -> None:
    """It ends before the last row; one of other lengths may still be whole, and is taken."""
    problem, _ = paged(device)
    few = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens[:3], 64, 6)
    words = "fp8_paged_mqa_logits: ", "schedule_meta[6, 0], entry 6, is 3", "all 6 splits of these context_lens"
    refused(lambda: deep_gemm.fp8_paged_mqa_logits(*problem.arguments(few)), *words)
    shorter = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens // 2, 64, 6)
    deep_gemm.fp8_paged_mqa_logits(*problem.arguments(shorter))


@pytest.mark.parametrize(
    "bound, value, columns, words",
    [
        ("ks", -1, 0, ["cu_seq_len_k_start[1], row 1, is -1", "0 to 20, the number of keys"]),
        ("ke", 21, 0, ["cu_seq_len_k_end[1], row 1, is 21"]),
        ("ke", -(2**31), 0, [f"cu_seq_len_k_end[1], row 1, is {-(2**31)}"]),
        ("ke", 4, 0, ["cu_seq_len_k_end[1], row 1, is 4", "at least cu_seq_len_k_start"]),
        ("ke", 17, 11, ["cu_seq_len_k_end[1], row 1, is 17", "at most max_seqlen_k = 11 keys"]),
    ],
)
@pytest.mark.parametrize("function", ["fp8_mqa_logits", "fp8_fp4_mqa_logits"])
def test_bounds(device: str, function: str, bound: str, value: int, columns: int, words: list[str]) -> None:
    problem = Ragged([0, 5, 9], [8, 5, 20], 20, heads=8, device=device)
    getattr(problem, bound)[1] = value
    call = getattr(deep_gemm, function)
    refused(lambda: call(*problem.arguments(), max_seqlen_k=columns), f"{function}: ", *words)


def test_the_switch() -> None:
    code = """
import torch, deep_gemm
try:
    deep_gemm.get_paged_mqa_logits_metadata(torch.tensor([[-5]], dtype=torch.int32), 64, 6)
    print("taken")
except RuntimeError as error:
    print(error)"""
    said = []
    for switch in ("0", "1"):
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(deep_gemm.__file__).parent.parent),
            "DG_SM120_DEBUG": switch,
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        said.append(done.stdout.strip())
    assert said[0] == "taken" and "context_lens[0, 0], row 0, is -5" in said[1]
