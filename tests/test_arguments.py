"""What is refused: before anything is written, by an error that names the argument, what came and what was expected."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import POISON, Paged, Ragged, Sparse, check, poisoned

import deep_gemm
from deep_gemm.sm120 import ArgumentError, checks, paged, ragged, settings
from deep_gemm.sm120.emulator import recording
from deep_gemm.sm120.jit import runtime

PAGED = ("q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len")
RAGGED = ("q", "kv", "weights", "ks", "ke")


def paged_arguments(fp4: bool = False) -> dict:
    problem = Paged([40, 0, 100], next_n=2, heads=16, fp4=fp4)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 48)
    return dict(zip(PAGED, problem.arguments(schedule)))


def ragged_arguments(fp4: bool = False) -> dict:
    return dict(zip(RAGGED, Ragged([0, 3], [5, 9], 20, heads=16, fp4=fp4).arguments()))


def refused(function: Callable, arguments: dict, rows: int, columns: int, *words: str) -> None:
    """`function` raises, its message has all `words`, and nothing was written."""
    out = poisoned(rows, columns)
    arguments = {"out": out, **arguments}
    with pytest.raises(ArgumentError) as caught:
        function(**arguments)
    assert isinstance(caught.value, RuntimeError)
    for word in ("expected", "got", *words):
        assert word in str(caught.value), str(caught.value)
    assert (out == POISON).all()


def with_row_stride(tensor: torch.Tensor, stride: int) -> torch.Tensor:
    """As if its rows were so many elements apart, though its memory does not reach that far."""
    strides = [by * tensor.itemsize for by in (stride, *tensor.stride()[1:])]
    return torch.from_numpy(np.lib.stride_tricks.as_strided(tensor.numpy(), tensor.shape, strides))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor."""
    wide = torch.empty((*tensor.shape, 2), dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


WRONG_PAGED = {
    "q": [
        (lambda q: q.float(), "float8_e4m3fn"),
        (lambda q: q[:, :, :12].contiguous(), "8, 16, ... 64 heads"),
        (lambda q: q.repeat(1, 1, 5, 1), "heads"),
        (lambda q: q[..., :96].contiguous(), "head dim"),
        (lambda q: q[0], "[batch, next_n, heads, dim]"),
        (lambda q: q[:2], "to match q"),
        (lambda q: q[:, :1].contiguous(), "to match q"),
        (lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "contiguous"),
        (lambda q: q.to("meta"), "on the CPU or a CUDA device"),
        (lambda q: None, "None"),
        (lambda q: (q, None, None), "tensor"),
    ],
    "kv_cache": [
        (lambda kv: kv.view(torch.int8), "uint8"),
        (lambda kv: kv[..., :128], "132"),
        (lambda kv: kv[:, :40], "a multiple of 16 keys"),
        (lambda kv: kv.squeeze(2), "[pages, block_kv, 1, 132]"),
        (lambda kv: kv.transpose(0, 1).contiguous().transpose(0, 1), "whole pages"),
        (lambda kv: kv.to("meta"), "meta"),
        (lambda kv: with_row_stride(kv, 64 * 132 + 2), "a multiple of 4 bytes"),
        (lambda kv: with_row_stride(kv, 64 * 132 - 4), "at least 8448 apart"),
        (lambda kv: with_row_stride(kv, 2**32), "whole pages"),
    ],
    "weights": [
        (lambda w: w.double(), "float32"),
        (lambda w: w[:5], "[6, 16]"),
        (lambda w: w[:, :8], "[6, 16]"),
        (lambda w: w.T.contiguous().T, "stride 1"),
    ],
    "context_lens": [
        (lambda lens: lens.long(), "int32"),
        (lambda lens: lens[:2], "[3]"),
        (lambda lens: lens[:, None], "[3, 2]"),
        (lambda lens: strided(lens), "contiguous"),
        (lambda lens: lens.tolist(), "int32 tensor"),
    ],
    "block_table": [
        (lambda table: table.long(), "int32"),
        (lambda table: table[:2], "[3, columns]"),
        (lambda table: strided(table), "stride 1"),
        (lambda table: with_row_stride(table, 2**31 // 3 + 1), "rows within 2^31 entries"),
    ],
    "schedule_meta": [
        (lambda schedule: schedule.long(), "int32"),
        (lambda schedule: schedule[:1], "num_sms + 1"),
        (lambda schedule: schedule[:, :1], "[num_sms + 1, 2]"),
        (lambda schedule: strided(schedule), "contiguous"),
        (lambda schedule: None, "None"),
    ],
    "max_context_len": [
        (lambda columns: -1, "int from 0"),
        (lambda columns: 100.0, "100.0 (float)"),
        (lambda columns: True, "True (bool)"),
    ],
}


@pytest.mark.parametrize(
    "argument, change, word", [(name, *case) for name, cases in WRONG_PAGED.items() for case in cases]
)
@pytest.mark.parametrize("function", ["fp8_paged_mqa_logits", "fp8_fp4_paged_mqa_logits"])
def test_paged(function: str, argument: str, change: Callable, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_known", checks.Known())
    arguments = paged_arguments()
    arguments[argument] = change(arguments[argument])
    refused(getattr(deep_gemm, function), arguments, 6, 100, argument, word)


@pytest.mark.parametrize(
    "argument, value, words",
    [
        ("clean_logits", 4096, ["clean_logits", "4096 (int)", "indices"]),
        ("clean_logits", "yes", ["clean_logits", "'yes'"]),
        ("logits_dtype", torch.float16, ["logits_dtype", "float16", "bfloat16"]),
        ("indices", torch.zeros(2, dtype=torch.int32), ["indices", "[3]"]),
        ("indices", torch.zeros(3, dtype=torch.int32), ["next_n = 1"]),
        ("out", torch.zeros(6, 99), ["out", "[6, 100]"]),
        ("out", torch.zeros(6, 100, dtype=torch.bfloat16), ["out", "float32"]),
        ("out", torch.zeros(100, 6).T, ["out", "stride 1"]),
        ("out", torch.zeros(1, 100).expand(6, 100), ["out", "overlap"]),
    ],
)
def test_paged_options(argument: str, value: object, words: list[str]) -> None:
    refused(deep_gemm.fp8_fp4_paged_mqa_logits, {**paged_arguments(), argument: value}, 6, 100, *words)


def test_paged_fp4() -> None:
    arguments = paged_arguments(fp4=True)
    values, scales = arguments["q"]
    function = deep_gemm.fp8_fp4_paged_mqa_logits
    refused(function, {**arguments, "q": (values.float(), scales)}, 6, 100, "q", "int8")
    refused(function, {**arguments, "q": (values, scales.float())}, 6, 100, "q scales", "int32")
    refused(function, {**arguments, "q": (values, scales[..., :8])}, 6, 100, "q scales", "[3, 2, 16]")
    refused(function, {**arguments, "q": (values[..., :16].contiguous(), scales)}, 6, 100, "head dim")
    refused(deep_gemm.fp8_paged_mqa_logits, arguments, 6, 100, "fp8_fp4_paged_mqa_logits")


WRONG_RAGGED = {
    "q": [
        (lambda q: q.float(), "float8_e4m3fn"),
        (lambda q: q[None], "[seq_len, heads, dim]"),
        (lambda q: q[..., :48].contiguous(), "head dim"),
    ],
    "kv": [
        (lambda kv: kv[0], "(keys, scales)"),
        (lambda kv: (kv[0].float(), kv[1]), "float8_e4m3fn"),
        (lambda kv: (kv[0][:, :64], kv[1]), "[seq_len_kv, 128]"),
        (lambda kv: (kv[0].T.contiguous().T, kv[1]), "contiguous"),
        (lambda kv: (kv[0], kv[1][:-1]), "[20]"),
        (lambda kv: (kv[0], kv[1].double()), "float32"),
    ],
    "weights": [(lambda w: w[:1], "[2, 16]")],
    "ks": [(lambda ks: ks.long(), "int32"), (lambda ks: ks[:1], "[2]"), (lambda ks: strided(ks), "contiguous")],
    "ke": [(lambda ke: ke.float(), "int32"), (lambda ke: ke.to("meta"), "meta")],
}


@pytest.mark.parametrize(
    "argument, change, word", [(name, *case) for name, cases in WRONG_RAGGED.items() for case in cases]
)
@pytest.mark.parametrize("function", ["fp8_mqa_logits", "fp8_fp4_mqa_logits"])
def test_ragged(function: str, argument: str, change: Callable, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "_known", checks.Known())
    arguments = ragged_arguments()
    arguments[argument] = change(arguments[argument])
    name = {"ks": "cu_seq_len_k_start", "ke": "cu_seq_len_k_end"}.get(argument, argument)
    refused(getattr(deep_gemm, function), arguments, 2, 20, name, word)


@pytest.mark.parametrize(
    "argument, value, words",
    [
        ("clean_logits", 1.0, ["clean_logits", "1.0 (float)", "max_seqlen_k"]),
        ("max_seqlen_k", -5, ["max_seqlen_k", "-5"]),
        ("max_seqlen_k", True, ["max_seqlen_k", "True (bool)"]),
        ("logits_dtype", torch.int32, ["logits_dtype"]),
        ("out", torch.zeros(2, 21), ["out", "[2, 20]"]),
    ],
)
def test_ragged_options(argument: str, value: object, words: list[str]) -> None:
    refused(deep_gemm.fp8_fp4_mqa_logits, {**ragged_arguments(), argument: value}, 2, 20, *words)


def test_metadata() -> None:
    lens = torch.zeros(4, 1, dtype=torch.int32)
    for arguments, words in [
        ((lens.long(), 64, 188), ["context_lens", "int32"]),
        ((lens[None], 64, 188), ["context_lens", "[batch, next_n]"]),
        ((strided(lens), 64, 188), ["context_lens", "contiguous"]),
        ((None, 64, 188), ["context_lens", "None"]),
        ((lens, 40, 188), ["block_kv", "multiple of 16"]),
        ((lens, 0, 188), ["block_kv", "0 (int)"]),
        ((lens, 64, 0), ["num_sms", "0 (int)"]),
        ((lens, 64, 188.0), ["num_sms", "188.0 (float)"]),
        ((lens, 64, 188, lens.long()), ["indices", "int32"]),
        ((torch.zeros(4, 2, dtype=torch.int32), 64, 188, lens[:, 0]), ["next_n = 1"]),
    ]:
        with pytest.raises(ArgumentError) as caught:
            deep_gemm.get_paged_mqa_logits_metadata(*arguments)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_metadata_elsewhere() -> None:
    """Another device than those that kernels run on."""
    for lens in (torch.zeros(4, 1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        with pytest.raises(
            ArgumentError, match="context_lens: expected a strided tensor on the CPU or a CUDA device, got .* meta"
        ):
            deep_gemm.get_paged_mqa_logits_metadata(lens.to("meta"), 64, 188)


# ---- memory ---------------------------------------------------------------------------------------------------------


def moved(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same values, beginning `by` bytes after a multiple of 64."""
    room = torch.zeros(tensor.nbytes + 128, dtype=torch.uint8).numpy()
    first = -room.ctypes.data % 64 + by
    there = torch.from_numpy(room[first : first + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
    return there.copy_(tensor)


PLACES = [  # format, function, argument, part of a pair, its name in the error, bytes that an element needs
    *[
        (kind, function, *place)
        for kind in ("fp8", "fp4")
        for function, place in [
            ("paged", ("q", 0, "q", 4)),
            ("paged", ("kv_cache", None, "kv_cache", 4)),
            ("paged", ("weights", None, "weights", 4)),
            ("paged", ("context_lens", None, "context_lens", 4)),
            ("paged", ("block_table", None, "block_table", 4)),
            ("paged", ("schedule_meta", None, "schedule_meta", 8)),
            ("paged", ("out", None, "out", 4)),
            ("ragged", ("q", 0, "q", 4)),
            ("ragged", ("kv", 0, "kv", 4)),
            ("ragged", ("kv", 1, "kv scales", 4)),
            ("ragged", ("weights", None, "weights", 4)),
            ("ragged", ("ks", None, "cu_seq_len_k_start", 4)),
            ("ragged", ("ke", None, "cu_seq_len_k_end", 4)),
            ("ragged", ("out", None, "out", 4)),
        ]
    ],
    ("fp4", "paged", "q", 1, "q scales", 4),
    ("fp4", "ragged", "q", 1, "q scales", 4),
]


@pytest.mark.parametrize("kind, function, argument, part, name, bytes_", PLACES)
def test_misaligned(kind: str, function: str, argument: str, part: int | None, name: str, bytes_: int) -> None:
    arguments, rows, columns = (
        (paged_arguments(kind == "fp4"), 6, 100) if function == "paged" else (ragged_arguments(kind == "fp4"), 2, 20)
    )
    call = deep_gemm.fp8_fp4_paged_mqa_logits if function == "paged" else deep_gemm.fp8_fp4_mqa_logits
    arguments["out"] = poisoned(rows, columns, pad=0)
    expected = call(**arguments).clone()
    whole = arguments[argument]
    for by in (1, 2, 3, 4):
        if part is None or (argument == "q" and kind == "fp8"):
            arguments[argument] = moved(whole, by)
        else:
            arguments[argument] = tuple(moved(x, by) if i == part else x for i, x in enumerate(whole))
        arguments["out"].fill_(POISON)
        if by % bytes_ == 0:
            assert torch.allclose(call(**arguments), expected, 1e-4, 1e-2)  # where it may begin, it is read rightly
            continue
        with pytest.raises(ArgumentError, match=f"{name}: expected .* at a multiple of {bytes_} bytes, got") as caught:
            call(**arguments)
        assert not isinstance(caught.value.__cause__, Exception)
        assert (arguments["out"] == POISON).all()


def test_two_bytes_are_enough_for_bf16() -> None:
    arguments = {**paged_arguments(), "logits_dtype": torch.bfloat16}
    arguments["weights"] = arguments["weights"].bfloat16()
    arguments["out"] = poisoned(6, 100, torch.bfloat16, pad=0)
    expected = deep_gemm.fp8_fp4_paged_mqa_logits(**arguments).clone()
    for name in ("weights", "out"):
        for by, right in [(2, True), (1, False), (3, False)]:
            changed = {**arguments, "out": poisoned(6, 100, torch.bfloat16, pad=0)}
            changed[name] = moved(changed[name], by)
            if right:
                assert torch.equal(deep_gemm.fp8_fp4_paged_mqa_logits(**changed), expected)
            else:
                with pytest.raises(ArgumentError, match=f"{name}: expected a tensor that begins at a multiple of 2"):
                    deep_gemm.fp8_fp4_paged_mqa_logits(**changed)


def test_metadata_misaligned() -> None:
    lens = torch.tensor([[40], [7]], dtype=torch.int32)
    for by in (1, 2, 3):
        with pytest.raises(ArgumentError, match="context_lens: expected a tensor that begins at a multiple of 4 bytes"):
            deep_gemm.get_paged_mqa_logits_metadata(moved(lens, by), 64, 188)


@pytest.mark.parametrize("argument", ["q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta"])
def test_out_over_an_input(argument: str) -> None:
    """Wherever the one begins in the other."""
    arguments = paged_arguments()
    source = arguments[argument]
    raw, needed = source.contiguous().view(torch.uint8).flatten(), 6 * 100 * 4
    room = torch.zeros(2 * needed + len(raw) + 64, dtype=torch.uint8)
    first = needed + (-room.data_ptr() - needed) % 32
    there = room[first : first + len(raw)]
    there.copy_(raw)
    arguments[argument] = there.view(source.dtype).view(source.shape)
    kept = there.clone()
    for start in (first, first - needed + 4, first + len(raw) - 4, first + len(raw) // 2 // 4 * 4):
        out = room[start : start + needed].view(torch.float32).view(6, 100)
        with pytest.raises(ArgumentError, match=f"out: expected memory of its own; this is {argument}'s as well, got"):
            deep_gemm.fp8_paged_mqa_logits(**arguments, out=out)
        assert torch.equal(there, kept)
    for start in (first - needed, first + len(raw)):  # side by side
        out = room[start : start + needed].view(torch.float32).view(6, 100)
        deep_gemm.fp8_paged_mqa_logits(**arguments, out=out)
        assert torch.equal(there, kept) and out.any()


def test_out_over_ragged_keys() -> None:
    arguments = ragged_arguments()
    keys, scales = arguments["kv"]
    wide = torch.zeros(20, 128)
    wide[:, :32] = keys.view(torch.float32)
    arguments["kv"] = wide.view(torch.float8_e4m3fn)[:, :128].contiguous(), wide.flatten()[:20]
    with pytest.raises(ArgumentError, match="out: .*this is kv scales's as well"):
        deep_gemm.fp8_mqa_logits(**arguments, out=wide[:2, :20])
    deep_gemm.fp8_mqa_logits(**arguments, out=wide[2:4, :20])


@pytest.mark.parametrize("columns, rows, apart", [((100, 116), 6, True), ((99, 115), 6, False), ((184, 200), 6, True)])
def test_out_between_the_rows_of_an_input(columns: tuple[int, int], rows: int, apart: bool) -> None:
    """One buffer for both, as a row of a workspace: 100 columns of logits, and weights beside them."""
    arguments = paged_arguments()
    room = torch.zeros(rows, 200)
    weights = room[:, columns[0] : columns[1]]
    weights.copy_(arguments["weights"])
    expected = deep_gemm.fp8_paged_mqa_logits(**arguments, clean_logits=True)
    arguments["weights"] = weights
    if not apart:
        with pytest.raises(ArgumentError, match="out: .*this is weights's as well"):
            deep_gemm.fp8_paged_mqa_logits(**arguments, clean_logits=True, out=room[:, :100])
    else:
        got = deep_gemm.fp8_paged_mqa_logits(**arguments, clean_logits=True, out=room[:, :100])
        assert torch.equal(got, expected)


def test_out_over_the_last_row_of_an_input() -> None:
    """Which lies far from the first: further than all of its numbers would take side by side."""
    arguments = paged_arguments()
    room = torch.zeros(6, 4000)
    weights = room[:, :16]
    weights.copy_(arguments["weights"])
    for out in (room[5, 10:610].view(6, 100), room[5, :2400].view(6, 400)[:, :100]):
        with pytest.raises(ArgumentError, match="out: .*this is weights's as well"):
            deep_gemm.fp8_paged_mqa_logits(**{**arguments, "weights": weights}, out=out)
    assert torch.equal(weights, arguments["weights"])


def test_overlap_is_that_of_the_bytes() -> None:
    """Against sets of byte addresses, for views of one buffer: rows between rows, runs between rows, runs."""
    room = torch.zeros(600, dtype=torch.uint8)

    def addresses(view: torch.Tensor) -> set[int]:
        places = torch.arange(600).as_strided(view.shape, view.stride(), view.storage_offset())
        return set(places.flatten().tolist())

    apart = feared = 0
    for _ in range(3000):
        views = []
        for _ in range(2):
            rows, stride, first = (int(torch.randint(1, high, ())) for high in (5, 60, 300))
            stride = int(torch.tensor([stride, 40])[torch.randint(0, 2, ())])
            row = int(torch.randint(1, stride + 1, ()))
            one = int(torch.randint(0, 3, ())) == 0  # of one dimension
            views.append(room[first : first + row] if one else room.as_strided((rows, row), (stride, 1), first))
        got, common = checks.overlap(*views), bool(addresses(views[0]) & addresses(views[1]))
        assert got or not common, [(view.shape, view.stride(), view.storage_offset()) for view in views]
        apart += not got
        feared += got and not common
    assert apart > 1000 and feared < 200  # where rows of different strides interleave, the answer is on the safe side


@pytest.mark.parametrize("written", [False, True], ids=["an input", "another output"])
@pytest.mark.parametrize("first", [0, 5, 19, 20, 39, 40, 50])
def test_two_tensors_alone(first: int, written: bool) -> None:
    """No third one raises a suspicion: 20 numbers at 20 beside 20 at another place, of one buffer or of two."""
    room = torch.zeros(80)
    one, other = room[20:40], room[first : first + 20]
    inputs, outputs = ({}, {"one": one, "other": other}) if written else ({"one": one}, {"other": other})
    if 0 < first < 40:
        with pytest.raises(ArgumentError, match="other: expected memory of its own; this is one's as well"):
            checks.memory(inputs, outputs)
    else:
        checks.memory(inputs, outputs)
    checks.memory({"one": torch.zeros(20)}, {"other": torch.zeros(20)})


def test_nothing_is_differentiated() -> None:
    arguments = paged_arguments()
    out = torch.zeros(6, 100, requires_grad=True)
    refused(deep_gemm.fp8_paged_mqa_logits, {**arguments, "out": out}, 6, 100, "out", "requires no grad")
    arguments["weights"].requires_grad_(True)
    assert not deep_gemm.fp8_paged_mqa_logits(**arguments).requires_grad


# ---- calls like an earlier one --------------------------------------------------------------------------------------


def test_a_known_call_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [(deep_gemm.fp8_paged_mqa_logits, paged_arguments()), (deep_gemm.fp8_mqa_logits, ragged_arguments())]
    calls = [(call, {**arguments, "clean_logits": True}) for call, arguments in calls]
    wanted = [call(**arguments) for call, arguments in calls]
    monkeypatch.setattr(checks, "tensor", lambda *_: pytest.fail("checked again"))
    for (call, arguments), want in zip(calls, wanted):
        assert call(**arguments).tolist() == want.tolist()
        with pytest.raises(pytest.fail.Exception):
            call(**arguments, out=want)  # which no call before had


@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_what_is_known_of_one_call_is_not_taken_for_another(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that differ in a single thing, one after the other and again in turn: each gives what is right for it."""
    known = checks.Known()
    monkeypatch.setattr({"paged": paged, "ragged": ragged}[kind], "_known", known)
    if kind == "paged":
        problem, names = Paged([40, 0, 130], heads=16, dim=64), PAGED
        arguments = dict(
            zip(names, problem.arguments(deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 9)))
        )
        call, keys, columns, wide = deep_gemm.fp8_fp4_paged_mqa_logits, "kv_cache", "max_context_len", 130
        other = {"context_lens": problem.context_lens.view(-1), "indices": torch.zeros(3, dtype=torch.int32)}
    else:
        problem, names = Ragged([0, 3, 9], [50, 9, 70], 130, heads=16, dim=64), RAGGED
        arguments = dict(zip(names, problem.arguments()))
        call, keys, columns, wide = deep_gemm.fp8_fp4_mqa_logits, "kv", "max_seqlen_k", 130
        other = {}
    q, kv, weights = arguments["q"], arguments[keys], arguments["weights"]
    padded = torch.zeros(3, 24)
    padded[:, :16] = weights
    ways = [{}, {"q": moved(q, 16)}, {"q": moved(q, 4)}, {"weights": padded[:, :16]}, {columns: 64}]
    ways += [{keys: moved(kv, 16) if kind == "paged" else (moved(kv[0], 16), kv[1])}]
    ways += [{"logits_dtype": torch.bfloat16}, {"block_max": True}, *({name: value} for name, value in other.items())]
    expected = problem.expected()
    compressed = problem.expected(64) if kind == "ragged" else expected[:, :64]
    for way in [*ways, *reversed(ways)]:
        for given in (False, True):
            shape, want = (3, way.get(columns, wide)), compressed if columns in way else expected
            dtype = way.get("logits_dtype", torch.float32)
            options = dict(way)
            if given:
                options["out"] = poisoned(*shape, dtype)
            if "block_max" in way:
                options["block_max"] = poisoned(3, -(-shape[1] // 8))
            got = call(**{**arguments, **options})
            assert got.dtype == dtype
            if given:
                check(got, want)
            else:
                inside = want > -torch.inf
                torch.testing.assert_close(got[inside].double(), want[inside], rtol=1e-2, atol=1e-2)
            if "block_max" in way:
                assert (options["block_max"][0, :4] != POISON).all()
    assert len(ways) < len(known) <= 2 * len(ways)
    with pytest.raises(ArgumentError, match="weights: .* on cpu to match q, got .* on meta"):
        call(**{**arguments, "weights": weights.to("meta")})


@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_what_else_a_call_depends_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are left out, and what kernels are compiled for: neither shows in a tensor."""
    if kind == "paged":
        problem = Paged([40, 0, 100], heads=16, dim=64)
        given = problem.arguments(deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 9))
        call = functools.partial(paged.paged_logits, *given, False, torch.float32, None)
    else:
        problem = Ragged([0, 9, 0], [40, 9, 100], 100, heads=16, dim=64)
        call = functools.partial(ragged.ragged_logits, *problem.arguments(), False, 0, torch.float32)
    for arch, least in (("sm_120f", 0), ("sm_90a", 0), ("sm_120f", 40), ("sm_120f", 0), ("sm_90a", 40)):
        monkeypatch.setenv("DG_SM120_ARCH", arch)
        out = poisoned(3, 100)
        with recording() as launches:
            call(out, None, least)
        assert all(
            any(opcode.endswith(".ue8m0") for opcode in launch.instructions) == (arch == "sm_120f")
            for launch in launches
        )
        assert (out[0] == POISON).all() if least else (out[0, :40] != POISON).all()
        check(out[2:], problem.expected()[2:])


def test_a_ragged_call_takes_the_sms_that_are_set_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, grids, wanted = Ragged([0] * 9, [999] * 9, 999).arguments(), [], (3, 9, 3)
    monkeypatch.setattr(runtime, "_emulate", lambda kernel, grid, *_: grids.append(grid[0]))
    for number in wanted:
        monkeypatch.setattr(settings, "_num_sms", number)
        deep_gemm.fp8_mqa_logits(*arguments)
    assert tuple(grids) == wanted


@pytest.mark.parametrize("argument", PAGED[:-1])
def test_an_argument_that_is_not_there(argument: str) -> None:
    """Without `out`: fewer tensors than a call has."""
    for _ in range(2):
        with pytest.raises(ArgumentError, match=f"^{argument}: expected .*, got None$"):
            deep_gemm.fp8_paged_mqa_logits(**{**paged_arguments(), argument: None})


def test_few_calls_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = checks.Known()
    monkeypatch.setattr(ragged, "_known", known)
    monkeypatch.setattr(checks, "_MOST_KNOWN", 4)
    arguments = ragged_arguments()
    for columns in range(1, 15):
        arguments["max_seqlen_k"] = columns
        deep_gemm.fp8_mqa_logits(**arguments)
        assert 0 < len(known) <= 4
        assert columns in next(reversed(known)), "the latest call is known"


def sparse_arguments(block_kv: int, fp4: bool = True) -> tuple[dict, dict]:
    """Of a metadata function and of the logits."""
    problem = Sparse([40, 0, 100], heads=16, block_kv=block_kv, fp4=fp4)
    ids = torch.zeros(3, dtype=torch.int32)
    first = (problem.context_lens, problem.block_table, ids, 64) if block_kv else (problem.ks, problem.ke, problem.keys)
    names = ("context_lens", "block_table", "indices", "page_kv") if block_kv else (
        "cu_seq_len_k_start", "cu_seq_len_k_end", "num_kv_tokens"
    )  # fmt: skip
    plan = dict(zip(names, first), sparse_kv_block_indices=problem.lists, qk_dtype=torch.int8, sparse_block_kv=8)
    keys = {"kv_cache": problem.kv_cache} if block_kv else {"kv": problem.kv}
    score = {"q": problem.q, **keys, "weights": problem.weights, "metadata": problem.metadata()}
    return plan, {**score, "num_max_sparse_blocks": 16, "sparse_block_kv": 8}


WRONG_LISTS = [
    ("sparse_kv_block_indices", lambda lists: lists.long(), "int32"),
    ("sparse_kv_block_indices", lambda lists: lists[:2], "[3, blocks of a row]"),
    ("sparse_kv_block_indices", lambda lists: lists[:, :0], "at least one block"),
    ("sparse_kv_block_indices", lambda lists: strided(lists), "stride 1"),
    ("sparse_kv_block_indices", lambda lists: None, "None"),
    ("qk_dtype", lambda dtype: torch.bfloat16, "float8_e4m3fn"),
    ("sparse_block_kv", lambda block: 12, "multiple of 8"),
    ("sparse_block_kv", lambda block: 72, "from 8 to 64"),
    ("sparse_block_kv", lambda block: 8.0, "8.0 (float)"),
]
WRONG_PAGED_LISTS = [
    ("context_lens", lambda lens: lens.long(), "int32"),
    ("context_lens", lambda lens: lens.tolist(), "int32 tensor"),
    ("context_lens", lambda lens: strided(lens), "contiguous"),
    ("context_lens", lambda lens: lens.to("meta"), "on the CPU or a CUDA device"),
    ("block_table", lambda table: table.to("meta"), "on cpu"),
    ("block_table", lambda table: table[:2], "[3, columns]"),
    ("block_table", lambda table: table.long(), "int32"),
    ("indices", lambda ids: ids[:2], "[3]"),
    ("page_kv", lambda page: 60, "multiple of 8"),
    ("page_kv", lambda page: 0, "0 (int)"),
]
WRONG_RAGGED_LISTS = [
    ("cu_seq_len_k_start", lambda ks: ks[None], "int32"),
    ("cu_seq_len_k_start", lambda ks: ks.long(), "int32"),
    ("cu_seq_len_k_start", lambda ks: ks.to("meta"), "on the CPU or a CUDA device"),
    ("cu_seq_len_k_end", lambda ke: ke[:2], "[3]"),
    ("num_kv_tokens", lambda keys: -1, "from 0"),
    ("num_kv_tokens", lambda keys: True, "True (bool)"),
]


@pytest.mark.parametrize(
    "block_kv, argument, change, word",
    [(64, *case) for case in WRONG_LISTS + WRONG_PAGED_LISTS]
    + [(0, *case) for case in WRONG_LISTS + WRONG_RAGGED_LISTS],
)
def test_sparse_metadata(block_kv: int, argument: str, change: Callable, word: str) -> None:
    plan, _ = sparse_arguments(block_kv)
    function = deep_gemm.get_paged_sparse_mqa_logits_metadata if block_kv else deep_gemm.get_sparse_mqa_logits_metadata
    plan[argument] = change(plan[argument])
    with pytest.raises(ArgumentError) as caught:
        function(**plan)
    assert argument in str(caught.value) and word in str(caught.value), str(caught.value)


def test_sparse_unaligned() -> None:
    plan, score = sparse_arguments(0)
    with pytest.raises(ArgumentError, match="use_unaligned_ks"):
        deep_gemm.get_sparse_mqa_logits_metadata(**plan, use_unaligned_ks=1)
    with pytest.raises(ArgumentError, match="use_unaligned_ks"):
        deep_gemm.fp8_fp4_sparse_mqa_logits(**score, use_unaligned_ks=None)


WRONG_SPARSE = [
    ("q", lambda q: q[0], "(values, scales)"),
    ("q", lambda q: (q[0], None), "(values, scales)"),
    ("q", lambda q: (q[0].float(), q[1]), "float8_e4m3fn"),
    ("q", lambda q: (q[0][..., :32].contiguous(), q[1]), "head dim of 128"),
    ("q", lambda q: (q[0][..., :12, :].contiguous(), q[1]), "8, 16, ... 64 heads"),
    ("q", lambda q: (q[0], q[1].float()), "q scales"),
    ("q", lambda q: (q[0], q[1][:2]), "q scales"),
    ("q", lambda q: tuple(part.to("meta") for part in q), "on the CPU or a CUDA device"),
    ("weights", lambda w: w[:2], "[3, 16]"),
    ("weights", lambda w: w.half(), "bfloat16"),
    ("metadata", lambda m: m[:-1], "bytes one after another"),
    ("metadata", lambda m: m.view(torch.int32), "uint8"),
    ("metadata", lambda m: m[None], "[bytes]"),
    ("metadata", lambda m: strided(m), "one after another"),
    ("metadata", lambda m: torch.cat([m, m])[8:], "a multiple of 16"),
    ("metadata", lambda m: torch.zeros(189, 2, dtype=torch.int32), "uint8"),
    ("metadata", lambda m: None, "None"),
    ("num_max_sparse_blocks", lambda width: 0, "0 (int)"),
    ("num_max_sparse_blocks", lambda width: 17, "metadata"),
    ("sparse_block_kv", lambda block: 4, "from 8"),
    ("out", lambda out: torch.zeros(3, 128), "bfloat16"),
    ("out", lambda out: torch.zeros(3, 127, dtype=torch.bfloat16), "[3, 128]"),
]
WRONG_SPARSE_PAGED = [
    ("kv_cache", lambda kv: kv[..., :64], "68"),
    ("kv_cache", lambda kv: kv[:, :60], "multiple of 8 keys"),
    ("kv_cache", lambda kv: kv.transpose(0, 1).contiguous().transpose(0, 1), "whole pages"),
    ("q", lambda q: (q[0].expand(3, 2, 16, 64).contiguous(), q[1]), "[seq_len, 1, heads"),
]
WRONG_SPARSE_RAGGED = [
    ("kv", lambda kv: kv[0], "(keys, scales)"),
    ("kv", lambda kv: (kv[0], kv[1].float()), "int32"),
    ("kv", lambda kv: (kv[0], kv[1][:-1]), "kv scales"),
]


@pytest.mark.parametrize(
    "block_kv, argument, change, word",
    [(64, *case) for case in WRONG_SPARSE + WRONG_SPARSE_PAGED]
    + [(0, *case) for case in WRONG_SPARSE + WRONG_SPARSE_RAGGED],
)
def test_sparse(block_kv: int, argument: str, change: Callable, word: str) -> None:
    _, score = sparse_arguments(block_kv)
    function = deep_gemm.fp8_fp4_paged_sparse_mqa_logits if block_kv else deep_gemm.fp8_fp4_sparse_mqa_logits
    score["out"] = out = poisoned(3, 128, torch.bfloat16)
    score[argument] = change(score[argument])
    with pytest.raises(ArgumentError) as caught:
        function(**score)
    named = "metadata" if argument == "num_max_sparse_blocks" else argument
    assert (named in str(caught.value) or argument in str(caught.value)) and word in str(caught.value), str(
        caught.value
    )
    assert (out == POISON).all()


def test_num_sms() -> None:
    before = deep_gemm.get_num_sms()
    for wrong in (0, -1, 1.5, True, None, 10**9):
        with pytest.raises(RuntimeError, match="num_sms"):
            deep_gemm.set_num_sms(wrong)
    assert deep_gemm.get_num_sms() == before
    deep_gemm.set_num_sms(20)
    try:
        assert deep_gemm.get_num_sms() == 20
    finally:
        deep_gemm.set_num_sms(before)
