"""Every argument of every function, wrong in every way: an ArgumentError that names it, and nothing is launched."""

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import Paged, Ragged, Sparse
from test_arguments import moved

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import ArgumentError, debug
from deep_gemm.sm120.jit import runtime

INT32 = torch.int32
OUTPUTS = ("out", "positions", "scores", "pages", "workspace", "block_max")
ALIGNMENT = {"schedule_meta": 8, "metadata": 16, "workspace": 16}  # bytes; else those of an element, or 4
# Under what other names an argument may stand in an error.
ALIASES = {
    "ks": ("cu_seq_len_k_start",),
    "ke": ("cu_seq_len_k_end",),
    "clean_logits": ("max_seqlen_k",),  # an int in its place, of the second generation
    "num_max_sparse_blocks": ("metadata", "out", "sparse_kv_block_indices"),
    "sparse_block_kv": ("metadata", "out", "page_kv"),
    "max_context_len": ("out", "workspace"),
    "max_seqlen_k": ("out",),
    "block_max": ("out",),
    "num_kv_tokens": (),
    "k": ("out",),
    "width": ("out",),
}


def paged(fp4: bool) -> dict[str, Any]:
    problem = Paged([40, 0, 100], heads=8, dim=64, fp4=fp4)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 4)
    names = ("q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len")
    return {**dict(zip(names, problem.arguments(schedule))), "indices": torch.zeros(3, dtype=INT32)}


def ragged(fp4: bool) -> dict[str, Any]:
    return dict(zip(("q", "kv", "weights", "ks", "ke"), Ragged([0, 3], [5, 9], 20, 8, 64, fp4).arguments()))


def results(rows: int, k: int) -> dict[str, torch.Tensor]:
    made = {name: torch.zeros(rows, k, dtype=INT32) for name in ("out", "positions")}
    return {**made, "scores": torch.zeros(rows, k), "workspace": torch.zeros(2**20, dtype=torch.uint8)}


def functions() -> dict[str, tuple[Callable, dict[str, Any]]]:
    """By a name: a function, and arguments that are right, each of them given."""
    int32 = torch.zeros(2, dtype=INT32)
    found = {
        "get_paged_mqa_logits_metadata": (
            deep_gemm.get_paged_mqa_logits_metadata,
            {"context_lens": int32.view(2, 1), "block_kv": 64, "num_sms": 4, "indices": int32.clone()},
        ),
        "topk": (
            sm120.topk,
            {
                "logits": torch.randn(2, 9000), "lengths": int32 + 9000, "k": 5, "starts": int32.clone(), "page": 8,
                "block_table": torch.zeros(2, 9, dtype=INT32), "offset": int32.clone(), **results(2, 5),
            },
        ),
        "candidate_blocks": (
            sm120.candidate_blocks,
            {
                "block_max": torch.randn(2, 9000), "context_lens": int32 + 72000, "width": 5, "block": 8, "page": 64,
                "block_table": torch.zeros(2, 9, dtype=INT32), "out": torch.zeros(2, 5, dtype=INT32),
                "pages": torch.zeros(2, 5, dtype=INT32), "workspace": torch.zeros(2**20, dtype=torch.uint8),
                "starts": int32.clone(), "compressed": False,
            },
        ),
    }  # fmt: skip
    for fp4 in (False, True):
        which = "fp4" if fp4 else "fp8"
        out = {"clean_logits": False, "out": torch.zeros(3, 100), "block_max": torch.zeros(3, 13)}
        dtype = {"logits_dtype": torch.float32}
        run = {"clean_logits": False, "max_seqlen_k": 0, "out": torch.zeros(2, 20), "block_max": torch.zeros(2, 3)}
        places = {"offset": int32.clone(), "block_table": torch.zeros(2, 9, dtype=INT32), "page": 8}
        found |= {
            f"fp8_fp4_paged_mqa_logits, {which}": (deep_gemm.fp8_fp4_paged_mqa_logits, {**paged(fp4), **out, **dtype}),
            f"fp8_fp4_mqa_logits, {which}": (deep_gemm.fp8_fp4_mqa_logits, {**ragged(fp4), **run, **dtype}),
            f"fp8_fp4_paged_mqa_topk, {which}": (
                sm120.fp8_fp4_paged_mqa_topk, {**paged(fp4), "k": 5, "translate": True, **results(3, 5)},
            ),
            f"fp8_fp4_mqa_topk, {which}": (
                sm120.fp8_fp4_mqa_topk, {**ragged(fp4), "k": 5, **places, **results(2, 5)},
            ),
        }  # fmt: skip
        if not fp4:
            found["fp8_paged_mqa_logits"] = deep_gemm.fp8_paged_mqa_logits, {**paged(fp4), **out}
            found["fp8_mqa_logits"] = deep_gemm.fp8_mqa_logits, {**ragged(fp4), **run}
        pages, keys = (Sparse([40, 0, 100], heads=8, fp4=fp4, block_kv=block_kv) for block_kv in (64, 0))
        listed = {"qk_dtype": pages.qk_dtype, "sparse_block_kv": 8}
        score = {"num_max_sparse_blocks": 16, "sparse_block_kv": 8, "out": torch.zeros(3, 128, dtype=torch.bfloat16)}
        found |= {
            f"get_paged_sparse_mqa_logits_metadata, {which}": (
                deep_gemm.get_paged_sparse_mqa_logits_metadata,
                {
                    "context_lens": pages.context_lens, "block_table": pages.block_table, "page_kv": 64,
                    "indices": torch.zeros(3, dtype=INT32), "sparse_kv_block_indices": pages.lists, **listed,
                },
            ),
            f"get_sparse_mqa_logits_metadata, {which}": (
                deep_gemm.get_sparse_mqa_logits_metadata,
                {
                    "cu_seq_len_k_start": keys.ks, "cu_seq_len_k_end": keys.ke, "num_kv_tokens": keys.keys,
                    "sparse_kv_block_indices": keys.lists, **listed, "use_unaligned_ks": False,
                },
            ),
            f"fp8_fp4_paged_sparse_mqa_logits, {which}": (
                deep_gemm.fp8_fp4_paged_sparse_mqa_logits,
                {
                    "q": pages.q, "kv_cache": pages.kv_cache, "weights": pages.weights, "metadata": pages.metadata(),
                    **score,
                },
            ),
            f"fp8_fp4_sparse_mqa_logits, {which}": (
                deep_gemm.fp8_fp4_sparse_mqa_logits,
                {
                    "q": keys.q, "kv": keys.kv, "weights": keys.weights, "metadata": keys.metadata(), **score,
                    "use_unaligned_ks": False,
                },
            ),
        }  # fmt: skip
        chosen = results(3, 5)
        del chosen["positions"]
        found[f"fp8_fp4_paged_sparse_mqa_topk, {which}"] = (
            sm120.fp8_fp4_paged_sparse_mqa_topk,
            {
                "q": pages.q, "kv_cache": pages.kv_cache, "weights": pages.weights, "metadata": pages.metadata(),
                "num_max_sparse_blocks": 16, "sparse_block_kv": 8, "sparse_kv_block_indices": pages.lists,
                "context_lens": pages.context_lens, "k": 5, "translate": True, **chosen,
            },
        )  # fmt: skip
    return found


FUNCTIONS = functions()
each = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """What is launched ends here. A call of the function that is right has gone before: calls like it are known, and
    those that are wrong must not be taken for it."""
    launched = []
    monkeypatch.setattr(runtime, "_emulate", lambda kernel, *_: launched.append(kernel.name))
    if "name" in request.fixturenames:
        call, arguments = FUNCTIONS[request.getfixturevalue("name")]
        call(**arguments)
        launched.clear()
    return launched


def packed(value: torch.Tensor) -> torch.Tensor:
    """Of the same shape, without strides."""
    if value.dim() < 2 or value.dtype == torch.float8_e4m3fn:
        return torch.ones(value.shape).to_sparse()
    return torch.ones_like(value, memory_format=torch.contiguous_format).to_sparse_csr()


def freed(value: torch.Tensor) -> torch.Tensor:
    """As whoever saves memory between steps leaves a tensor: shape and strides, but no storage."""
    gone = value.clone()
    gone.untyped_storage().resize_(0)
    return gone


def wrong(value: Any) -> Iterator[tuple[str, Any]]:
    """What no argument that takes `value` takes, and what it is."""
    yield from [("a string", "x"), ("numbers", [1, 2]), ("nothing", ()), ("three", (1, 2, 3)), ("a fraction", 1.5)]
    if not isinstance(value, torch.dtype):
        yield "a dtype", torch.float64
    if isinstance(value, int) and not isinstance(value, bool):
        yield from [("a negative number", -7), ("a large number", 2**40), ("a bool", True), ("None", None)]
    if isinstance(value, torch.Tensor):
        wide = torch.empty((*value.shape, 2), dtype=value.dtype)
        yield from [
            ("a number", 3),
            ("numpy's", value.contiguous().view(torch.uint8).numpy()),
            ("on no device", value.to("meta")),
            ("of another type", torch.zeros(value.shape, dtype=torch.complex64)),
            ("of bools", torch.zeros(value.shape, dtype=torch.bool)),
            ("without a dimension", torch.zeros((), dtype=value.dtype)),
            ("sparse", torch.eye(3).to_sparse()),
            ("of packed rows", packed(value)),
            ("whose memory is gone", freed(value)),
            ("of five dimensions", value.view(*[1] * (5 - value.dim()), *value.shape)),
            ("with holes", wide[..., 0]),
        ]
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            if part is None:
                continue
            for what, bad in wrong(part):
                if isinstance(bad, torch.Tensor) or bad is not None and i == 0:
                    yield f"{what}, part {i}", tuple(bad if j == i else other for j, other in enumerate(value))


def refusal(call: Callable, arguments: dict, what: str, names: tuple[str, ...], launches: list[str]) -> None:
    """One of `names` is in the error, outside of what it says it got."""
    try:
        call(**arguments)
    except ArgumentError as error:
        said = str(error).split(", got ")[0]
        assert any(name in said for name in names), f"{what}: {error}"
        assert not launches, f"{what}: {error} after {launches}"
    else:
        raise AssertionError(f"{what} is taken")


@each
def test_what_is_right_is_taken(name: str, launches: list[str]) -> None:
    call, arguments = FUNCTIONS[name]
    call(**arguments)
    assert launches


@each
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_arguments_of_other_kinds(name: str, launches: list[str]) -> None:
    call, arguments = FUNCTIONS[name]
    for argument, value in arguments.items():
        for what, bad in wrong(value):
            unread = "with holes", "whose memory is gone"
            if argument == "indices" and what in unread or argument == "context_lens" and "five" in what:
                continue  # indices are not read; lengths of sparse logits and of candidates may have any shape
            if argument in ("clean_logits", "max_seqlen_k") and what in ("numbers", "None"):
                continue
            names = (argument, *ALIASES.get(argument, ()))
            refusal(call, {**arguments, argument: bad}, f"{argument} ({what})", names, launches)


@each
def test_what_has_no_memory_is_not_looked_at(name: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In debug mode either, which looks at what integers say before launches look at addresses."""
    monkeypatch.setattr(debug, "ON", True)
    call, arguments = FUNCTIONS[name]
    for argument, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.dtype == INT32 and argument not in (*OUTPUTS, "indices"):
            names = (argument, *ALIASES.get(argument, ()), *arguments)  # or another, which debug mode knows to be wrong
            refusal(call, {**arguments, argument: freed(value)}, argument, names, launches)


@each
def test_rows_that_disagree(name: str, launches: list[str]) -> None:
    """Of one tensor alone there is a row less: it is named, or what it does not match is."""
    call, arguments = FUNCTIONS[name]
    for argument, value in arguments.items():
        if argument in ("kv", "kv_cache", "schedule_meta", "metadata", "workspace"):
            continue  # of as many rows as they like
        if isinstance(value, torch.Tensor):
            refusal(
                call, {**arguments, argument: value[:-1]}, argument, (argument, *ALIASES.get(argument, ())), launches
            )
        elif isinstance(value, tuple):
            less = tuple(None if part is None else part[:-1] for part in value)
            refusal(call, {**arguments, argument: less}, argument, (argument,), launches)


@each
def test_tensors_that_begin_between_elements(name: str, launches: list[str]) -> None:
    call, arguments = FUNCTIONS[name]
    for argument, value in arguments.items():
        for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if not isinstance(part, torch.Tensor) or argument == "indices":
                continue
            needed = ALIGNMENT.get(argument, max(part.itemsize, 4) if part.itemsize != 2 else 2)
            for by in (1, 2, 4, 8):
                if by % needed:
                    there = moved(part, by)
                    bad = (
                        tuple(there if j == i else x for j, x in enumerate(value))
                        if isinstance(value, tuple)
                        else there
                    )
                    names = (argument, *ALIASES.get(argument, ()))
                    refusal(call, {**arguments, argument: bad}, f"{argument} at {by}", names, launches)


@each
def test_outputs_over_what_is_read_or_written(name: str, launches: list[str]) -> None:
    call, arguments = FUNCTIONS[name]
    for output in OUTPUTS:
        if output not in arguments or (name, output) == ("candidate_blocks", "block_max"):
            continue
        written = arguments[output]
        for argument, value in arguments.items():
            for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
                if argument == output or not isinstance(part, torch.Tensor):
                    continue
                room = torch.zeros(max(part.numel() * part.itemsize, written.nbytes) + 64, dtype=torch.uint8)
                first = -room.data_ptr() % 64

                def put(tensor: torch.Tensor, room=room, first=first) -> torch.Tensor:
                    return room[first : first + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)

                read = put(part).copy_(part)
                both = tuple(read if j == i else x for j, x in enumerate(value)) if isinstance(value, tuple) else read
                given = {**arguments, output: put(written), argument: both}
                refusal(call, given, f"{output} over {argument}", (f"{output}: ", f"{argument}: "), launches)


@each
def test_results_that_require_grad(name: str, launches: list[str]) -> None:
    call, arguments = FUNCTIONS[name]
    for output in OUTPUTS:
        if (name, output) == ("candidate_blocks", "block_max"):
            continue  # an input
        if output in arguments and arguments[output].is_floating_point():
            there = arguments[output].clone().requires_grad_()
            refusal(call, {**arguments, output: there}, output, (f"{output}: ",), launches)


def test_more_columns_than_an_int32_counts(launches: list[str]) -> None:
    """In addresses that no memory stands behind, since nobody touches it."""
    unreserved = 0x4000  # MAP_NORESERVE; Python names it from 3.11 on
    room = mmap.mmap(-1, 2**36, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)
    room = torch.frombuffer(room, dtype=torch.uint8)
    many, lengths = room[: 2**33].view(torch.float32).view(1, -1), torch.tensor([9], dtype=INT32)
    halves = many.view(torch.bfloat16)
    refusal(sm120.topk, {"logits": halves, "lengths": lengths, "k": 4}, "logits", ("2^31 columns",), launches)
    refusal(sm120.candidate_blocks, {"block_max": many, "context_lens": lengths}, "maxima", ("2^31 columns",), launches)
    few = dict(zip(("q", "kv", "weights", "ks", "ke"), Ragged([3], [9], 20, 8, 32).arguments()))
    few["kv"] = room.view(torch.float8_e4m3fn).view(-1, 32), many[0]
    refusal(deep_gemm.fp8_mqa_logits, {**few, "max_seqlen_k": 8}, "keys", ("kv: expected fewer than 2^31",), launches)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_is_launched_for_nothing(rows: int, launches: list[str]) -> None:
    """No rows, or no columns."""
    columns = 0 if rows else 100
    paged, ragged = (
        Paged([0] * rows, heads=8, dim=32, max_context_len=0),
        Ragged([0] * rows, [0] * rows, columns, 8, 32),
    )
    schedule = torch.zeros(5, 2, dtype=INT32)
    arguments = (*paged.arguments(schedule)[:-1], columns)
    assert deep_gemm.fp8_fp4_paged_mqa_logits(*arguments, True).shape == (rows, columns)
    assert deep_gemm.fp8_fp4_mqa_logits(*ragged.arguments(), True).shape == (rows, columns)
    if rows == 0:
        assert sm120.topk(torch.zeros(0, 100), torch.zeros(0, dtype=INT32), 5).shape == (0, 5)
        assert sm120.candidate_blocks(torch.zeros(0, 100), torch.zeros(0, dtype=INT32), 5).shape == (0, 5)
        assert sm120.fp8_fp4_paged_mqa_topk(*arguments, 5).shape == (0, 5)
        assert sm120.fp8_fp4_mqa_topk(*ragged.arguments(), 5).shape == (0, 5)
    assert not launches
