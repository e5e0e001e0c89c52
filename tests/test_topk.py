"""The k largest of each row: exactly those that a stable sort gives, whatever the values and whichever the path."""

import importlib
import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Paged, Ragged, assert_rows_apart, keys_read, poisoned

import deep_gemm
from deep_gemm import sm120
from deep_gemm.sm120 import reference, settings
from deep_gemm.sm120.emulator import operands, recording
from deep_gemm.sm120.jit import compiler, runtime
from deep_gemm.sm120.kernels import topk as kernels

topk_module = importlib.import_module("deep_gemm.sm120.topk")  # `sm120.topk` is the function


def check(logits: torch.Tensor, lengths: list[int], k: int, starts: list[int] | None = None, table=None, page: int = 1,
          offset: list[int] | None = None, device: str = "cpu") -> None:  # fmt: skip
    """Compares all results of `topk` with the reference; runs it twice, which must agree to the bit."""
    rows = len(lengths)

    def int32(numbers: list[int] | None) -> torch.Tensor | None:
        return None if numbers is None else torch.tensor(numbers, dtype=torch.int32, device=device)

    there = logits if device == "cpu" else logits.to(device)
    runs = []
    for _ in range(2):
        out, positions = (poisoned(rows, k, torch.int32, device) for _ in range(2))
        scores = poisoned(rows, k, torch.float32, device)
        given = sm120.topk(
            there, int32(lengths), k, starts=int32(starts), block_table=None if table is None else table.to(device),
            page=page, offset=int32(offset), out=out, positions=positions, scores=scores,
        )  # fmt: skip
        assert given is out
        assert_rows_apart(out, positions, scores)
        runs.append([result.clone().cpu() for result in (out, positions, scores)])
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(*runs)), "two runs differ"

    out, positions, scores = runs[0]
    for row, expected in enumerate(reference.topk(logits, lengths, k, starts)):
        count, start = len(expected), starts[row] if starts else 0
        got = positions[row, :count]
        assert sorted(got.tolist()) == expected, difference(logits[row, start:], sorted(got.tolist()), expected)
        assert (positions[row, count:] == -1).all() and (out[row, count:] == -1).all()
        assert (scores[row, count:] == -torch.inf).all()
        chosen = got.long()
        torch.testing.assert_close(
            scores[row, :count], logits[row, start + chosen].float(), rtol=0, atol=0, equal_nan=True
        )
        where = got if table is None else table[row, chosen // page] * page + got % page
        assert torch.equal(out[row, :count], where + (offset[row] if offset else 0))


def difference(row: torch.Tensor, got: list[int], expected: list[int]) -> str:
    wrong, missing = sorted(set(got) - set(expected)), sorted(set(expected) - set(got))
    what = ", ".join(f"{p}: {row[p].item()!r}" if 0 <= p < len(row) else f"{p}" for p in wrong[:3])
    lacks = ", ".join(f"{p}: {row[p].item()!r}" for p in missing[:3])
    return f"{len(wrong)} of {len(expected)} are wrong ({what}), {len(missing)} are missing ({lacks})"


@pytest.fixture
def one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any length are taken by one block each, as where there are many."""
    monkeypatch.setattr(settings, "_num_sms", 1)


# --- values that others stumbled over ---------------------------------------------------------------------------------

Fill = Callable[[int, int], torch.Tensor]


def ulps(rows: int, columns: int) -> torch.Tensor:
    """Neighbouring floats."""
    bits = 0x3F800000 + torch.randint(0, 40, (rows, columns), dtype=torch.int32)
    return bits.view(torch.float32)


def nearly_all_nan(rows: int, columns: int) -> torch.Tensor:
    x = torch.full((rows, columns), torch.nan)
    x[torch.rand(rows, columns) < 0.01] = -torch.inf
    x[torch.rand(rows, columns) < 0.01] = 3.0
    return x


def of_signs(rows: int, columns: int) -> torch.Tensor:
    """NaNs of both signs with payloads, infinities, zeros of both signs, subnormals."""
    words = [0x7FC00000, -0x400000, 0x7F800001, -1, 0x7F800000, -0x800000, 0, -0x80000000, 1, -0x7FFFFFFF, 0x7FFFFF]
    return torch.tensor(words, dtype=torch.int32)[torch.randint(0, len(words), (rows, columns))].view(torch.float32)


def one_digit_apart(shift: int) -> Fill:
    """Most keys share all digits above `shift`; what lies below decides."""

    def fill(rows: int, columns: int) -> torch.Tensor:
        bits = 0x42F00000 + torch.randint(0, 2048, (rows, columns), dtype=torch.int32) * (1 << shift)
        return bits.view(torch.float32)

    return fill


def in_one_chunk_of(parts: int) -> Fill:
    """The largest all lie where one of so many parts looks: each has 8 vectors in turn."""

    def fill(rows: int, columns: int) -> torch.Tensor:
        mine = torch.arange(columns) // 32 % parts == 1
        return torch.randn(rows, columns) + 50.0 * mine

    return fill


def in_few_lanes(rows: int, columns: int) -> torch.Tensor:
    """The largest all lie in groups of few lanes, so that the maxima of groups tell little."""
    mine = torch.arange(columns) // 4 % 32 < 2
    return torch.randn(rows, columns) + 50.0 * mine


def mostly_infinite(rows: int, columns: int) -> torch.Tensor:
    return torch.where(torch.rand(rows, columns) < 0.5, torch.inf, torch.randn(rows, columns))


FILLS: dict[str, Fill] = {
    "normal": torch.randn,
    "all equal": lambda rows, columns: torch.full((rows, columns), 1.5),
    "two values": lambda rows, columns: (torch.rand(rows, columns) < 0.03).float(),
    "zeros of both signs": lambda rows, columns: torch.where(torch.rand(rows, columns) < 0.5, 0.0, -0.0),
    "neighbouring floats": ulps,
    "rising": lambda rows, columns: torch.arange(columns).float().expand(rows, -1).contiguous(),
    "falling": lambda rows, columns: -torch.arange(columns).float().expand(rows, -1).contiguous(),
    "span of 1e38": lambda rows, columns: (torch.rand(rows, columns) - 0.5) * 3e38,
    "subnormal": lambda rows, columns: torch.randn(rows, columns) * 1e-41,
    "all NaN": lambda rows, columns: torch.full((rows, columns), torch.nan),
    "nearly all NaN": nearly_all_nan,
    "infinities, NaNs, zeros": of_signs,
    "close together": lambda rows, columns: 100 + torch.randn(rows, columns) * 0.01,
    "second digit": one_digit_apart(10),
    "third digit": one_digit_apart(0),
    "first digit": lambda rows, columns: torch.randint(-(2**31), 2**31, (rows, columns)).int().view(torch.float32),
    "one part has them all": in_one_chunk_of(3),
    "few lanes have them all": in_few_lanes,
    "mostly infinite": mostly_infinite,
}
SHAPES = [(700, 512), (700, 2048), (5000, 512), (5000, 2048), (11000, 512), (11000, 2048), (13000, 1000)]


@pytest.mark.parametrize("columns, k", SHAPES)
@pytest.mark.parametrize("fill", FILLS)
def test_any_values(fill: str, columns: int, k: int, device: str) -> None:
    """Few rows: several parts each where the row is longer than a piece."""
    check(FILLS[fill](2, columns), [columns, columns - 77], k, device=device)


@pytest.mark.parametrize("columns, k", [(14000, 2048), (17000, 2048), (20000, 512)])
@pytest.mark.parametrize("fill", FILLS)
def test_any_values_in_one_part(fill: str, columns: int, k: int, device: str, one_part: None) -> None:
    """A block goes through the row piece by piece, behind a gate that rises."""
    check(FILLS[fill](2, columns), [columns, columns - 77], k, device=device)


@pytest.mark.parametrize("fill", FILLS)
def test_any_values_in_parts_of_several_pieces(fill: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_num_sms", 2)
    config, parts = kernels.configure(torch.float32, 600, 1, 70000, 2)
    assert parts == 4 and config.groups and config.share * parts < 70000
    check(FILLS[fill](1, 70000), [69923], 600, device=device)


def zeros_at_the_kth(columns: int, k: int) -> torch.Tensor:
    """In two rows 200 of both signs, 100 of which are chosen: few enough to be ranked, by their positions."""
    places = torch.randperm(columns)
    logits = -1 - torch.rand(1, columns)
    logits[0, places[: k - 100]] = 1 + torch.rand(k - 100)
    logits[0, places[k - 100 : k + 100]] = torch.where(torch.rand(200) < 0.5, 0.0, -0.0)
    return torch.cat([logits, logits.flip(1)])


@pytest.mark.parametrize("columns, k", [(900, 512), (3000, 512), (11000, 512), (70_000, 600)])
def test_zeros_of_both_signs_are_equal(columns: int, k: int, device: str) -> None:
    check(zeros_at_the_kth(columns, k), [columns, columns], k, device=device)


@pytest.mark.parametrize("columns, k", [(17_000, 2048), (20_000, 512)])
def test_zeros_of_both_signs_are_equal_in_one_part(columns: int, k: int, device: str, one_part: None) -> None:
    check(zeros_at_the_kth(columns, k), [columns, columns], k, device=device)


def test_one_part_has_more_than_its_list_holds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the largest of all, in one bin, and publishes none; the others publish more than k."""
    monkeypatch.setattr(settings, "_num_sms", 2)
    config, parts = kernels.configure(torch.float32, 600, 1, 70000, 2)
    assert parts == 4 and 70000 // 8 > config.capacity and 3 * (config.fronts // parts) > 600
    mine = torch.arange(70000) // 32 % parts == 1
    check(torch.where(mine, torch.rand(1, 70000) * 1e38, torch.randn(1, 70000)), [69923], 600, device=device)


def test_parts_have_as_many_keys_in_a_bin_as_a_front_holds(device: str) -> None:
    """A front is filled to its last entry, and not further."""
    config, parts = kernels.configure(torch.float32, 512, 1, 70000, deep_gemm.get_num_sms())
    room = config.fronts // parts
    assert parts > 1 and not config.groups and room > room // 4 + 16
    logits = torch.randn(1, 70000)
    for part in range(parts):
        mine = (torch.arange(70000) // 32 % parts == part).nonzero().flatten()
        logits[0, mine[torch.randperm(len(mine))[:room]]] = 8 + torch.rand(room) / 8
    check(logits, [70000], 512, device=device)


@pytest.mark.parametrize("columns, k", [(5000, 700), (11000, 512)])
@pytest.mark.parametrize("fill", FILLS)
def test_any_values_in_bf16(fill: str, columns: int, k: int, device: str) -> None:
    check(FILLS[fill](2, columns).bfloat16(), [columns, columns - 77], k, device=device)


def test_the_row_is_read_again_only_where_it_matters() -> None:
    """Bytes that the merge reads: of random rows the fronts alone; where one part has the largest, the row as well."""

    def read(fill: Fill) -> tuple[int, int]:
        logits = fill(1, 70000)
        with recording() as launches:
            sm120.topk(logits, torch.tensor([70000], dtype=torch.int32), 512)
        assert launches[0].bytes_read["logits"] == 4 * 70000
        return launches[1].bytes_read["workspace"], launches[1].bytes_read["logits"]

    config, parts = kernels.configure(torch.float32, 512, 1, 70000, 188)
    assert parts > 1
    fronts, logits = read(torch.randn)
    assert fronts > 8 * parts * (config.fronts // parts) and logits == 0
    assert read(in_one_chunk_of(parts)) > (fronts, 4 * 70000)


@pytest.mark.parametrize("columns, k", [(30_000, 512), (40_000, 2048)])
def test_a_first_piece_that_is_no_sample(columns: int, k: int, one_part: None) -> None:
    """It has all of the largest: the gate for its share of them lets too few pass, and the row is read once more."""
    config, parts = kernels.configure(torch.float32, k, 2, columns, 1)
    pieces = -(-columns // config.share)
    assert parts == 1 and config.groups and pieces > 1
    first = torch.arange(columns) // (128 * config.vectors) % pieces == 0
    lopsided = torch.where(first, torch.exp2(14 * torch.rand(2, columns)), torch.randn(2, columns).clamp(max=1))
    for logits, times in ((torch.randn(2, columns), 1), (lopsided, 2)):
        check(logits, [columns, columns], k)
        with recording() as launches:
            sm120.topk(logits, torch.tensor([columns, columns], dtype=torch.int32), k)
        looked_up = launches[0].bytes_read["logits"] - times * logits.nbytes
        assert 0 <= looked_up <= 4 * 2 * config.capacity  # of keys that have been listed


def test_a_list_that_runs_full(one_part: None) -> None:
    """More keys reach the sample's gate than there is room for, the largest first: it rises to about the k-th of the
    list, and no more of the row is read again than the piece that was too much."""
    config, parts = kernels.configure(torch.float32, 512, 3, 100_000, 1)
    chunk, pieces = 128 * config.vectors, -(-100_000 // config.share)
    assert parts == 1 and config.groups and config.capacity < 2500 < (pieces - 1) * chunk
    first = 100_000 // (2 * pieces * chunk) * pieces * chunk + chunk  # of what the pieces behind the sample have there
    logits = torch.randn(3, 100_000)
    logits[:, first : first + 2500] = torch.linspace(11, 10, 2500)
    check(logits, [100_000] * 3, 512)
    with recording() as launches:
        sm120.topk(logits, torch.full((3,), 100_000, dtype=torch.int32), 512)
    assert launches[0].bytes_read["logits"] < 2 * logits.nbytes


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 511, 512, 513, 1024, 1025, 2047, 2048])
def test_any_k_beside_any_length(k: int, device: str) -> None:
    lengths = [0, 1, -5, k - 1, k, k + 1, k + 40, 3000, 4096, 4097, 6000]
    check(torch.randn(len(lengths), 6000), lengths, k, device=device)


def test_rows_of_all_lengths_in_one_part(device: str, one_part: None) -> None:
    lengths = [0, 5, 600, 4096, 4097, 8191, 8192, 8193, 12288, 20000]
    check(torch.randn(len(lengths), 20000), lengths, 512, device=device)


def test_the_last_keys_of_a_row_begin_a_piece(device: str, one_part: None) -> None:
    """They are few, and the largest."""
    config, _ = kernels.configure(torch.float32, 512, 5, 40000, 1)
    assert config.groups and config.share == 8192
    check(FILLS["rising"](5, 40000), [16384, 16385, 16511, 32769, 32784], 512, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 7, 8])
def test_any_alignment(start: int, dtype: torch.dtype, device: str) -> None:
    """Rows begin anywhere; what lies outside is larger than anything within."""
    whole = torch.full((3, 5021), 1e30, dtype=dtype)
    logits = whole[:, start:]
    starts, lengths = [0, 13, 4], [5021 - start - 9, 4900, 4999 - start]
    for row in range(3):
        logits[row, starts[row] : starts[row] + lengths[row]] = torch.randn(lengths[row]).to(dtype)
    check(logits if device == "cpu" else logits.clone(), lengths, 600, starts, device=device)


def test_a_length_past_the_columns_ends_there(device: str) -> None:
    logits = torch.randn(4, 1000)
    lengths = torch.tensor([2000, 2**31 - 1, 500, 7], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 300, 900, 1200], dtype=torch.int32, device=device)
    out = sm120.topk(logits.to(device), lengths, 600, starts=starts).cpu()
    expected = reference.topk(logits, [1000, 700, 100, 0], 600, [0, 300, 900, 1000])
    assert [sorted(p for p in row if p >= 0) for row in out.tolist()] == expected


def test_a_row_may_start_past_its_length(device: str) -> None:
    check(torch.randn(4, 3000), [0, 10, 700, -3], 20, [1, 2000, 1500, 5], device=device)


def test_pages_and_offsets(device: str) -> None:
    columns, page = 7000, 48
    table = torch.stack([torch.randperm(500)[:200] for _ in range(3)]).int()
    check(torch.randn(3, columns), [columns, 300, 5000], 512, table=table, page=page, device=device)
    check(torch.randn(3, columns), [columns, 300, 0], 512, offset=[7, -5, 100000], device=device)
    same = table[:1].expand(3, -1)
    check(torch.randn(3, columns), [columns, 300, 5000], 512, table=same, page=64, offset=[1, 2, 3], device=device)


def test_a_row_of_at_most_k_keys_is_not_read() -> None:
    logits = torch.full((3, 1000), torch.nan)
    with recording() as launches:
        sm120.topk(logits, torch.tensor([1000, 900, 3], dtype=torch.int32), 1000)
    assert launches[0].bytes_read["logits"] == 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns, again", [(40_000, 3072), (14_000, 256)])
def test_every_logit_is_read_once(rows: int, columns: int, again: int, one_part: None) -> None:
    """But for keys of the list, where there is one, and of the last bin, where lanes go through their chosen ones."""
    with recording() as launches:
        sm120.topk(torch.randn(rows, columns), torch.full((rows,), columns, dtype=torch.int32), 1024)
    assert 0 <= launches[0].bytes_read["logits"] - rows * columns * 4 <= rows * again * 4


@pytest.mark.parametrize("sms", [188, 1])
def test_the_last_bin_of_a_long_row_is_divided(sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds more keys than are ranked; the row is not read again for that."""
    monkeypatch.setattr(settings, "_num_sms", sms)
    logits = torch.randn(1, 262144)
    with recording() as launches:
        out = sm120.topk(logits, torch.tensor([262144], dtype=torch.int32), 2048)
    assert sorted(out[0].tolist()) == reference.topk(logits, [262144], 2048)[0]
    config, _ = kernels.configure(torch.float32, 2048, 1, 262144, sms)
    again = sum(launch.bytes_read["logits"] for launch in launches) - 4 * 262144
    assert 0 <= again <= 4 * config.capacity * config.ahead  # listed keys are looked up


def test_the_cost_follows_the_lengths() -> None:
    """In a row that is wide and short all blocks but one leave at once."""

    def work(columns: int, length: int) -> int:
        with recording() as launches:
            sm120.topk(torch.randn(1, columns), torch.tensor([length], dtype=torch.int32), 512)
        return sum(sum(launch.instructions.values()) for launch in launches)

    short, narrow, long = work(250_000, 4000), work(4000, 4000), work(250_000, 250_000)
    assert short - narrow < 0.3 * long


@pytest.mark.parametrize("columns, rows", [(3000, 5), (9000, 5), (40_000, 1), (40_000, 300)])
def test_what_the_kernel_before_has_yet_to_write(columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may begin while the one before it runs: until it has waited for that, all that it reads may change."""
    k = 100
    final = torch.randn(rows, columns)
    lengths = torch.tensor([columns, 50, columns - 700, 0, 101] * 60)[:rows].int()
    starts = torch.tensor([0, 300, 700, columns, 5] * 60)[:rows].int()
    logits, given, begin = torch.full_like(final, torch.nan), lengths.roll(1) * 2 - 1, starts.roll(2) + 4

    def waiting(i):
        def write(wave, lanes):
            if "wait" in i.parts:
                logits.copy_(final), given.copy_(lengths), begin.copy_(starts)

        return write

    monkeypatch.setitem(operands.TABLE, "griddepcontrol", waiting)
    monkeypatch.setattr(runtime, "_loaded", {})
    out = poisoned(rows, k, torch.int32, "cpu")
    sm120.topk(logits, given, k, starts=begin, out=out)
    expected = reference.topk(final, lengths.tolist(), k, starts.tolist())
    assert [sorted(row[row >= 0].tolist()) for row in out] == expected


def test_more_than_2_to_the_31_logits(device: str) -> None:
    stride = 2**31 + 2**12
    whole = torch.empty(stride + 5000, dtype=torch.bfloat16, device=device)
    logits = whole.as_strided((2, 5000), (stride, 1))
    rows = torch.randn(2, 5000).bfloat16()
    logits.copy_(rows)
    out = sm120.topk(logits, torch.tensor([5000, 4000], dtype=torch.int32, device=device), 512).cpu()
    assert [sorted(row) for row in out.tolist()] == reference.topk(rows, [5000, 4000], 512)


def test_no_rows_and_no_columns(device: str) -> None:
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert sm120.topk(torch.empty(0, 100, device=device), none, 5).shape == (0, 5)
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=device)
    assert (sm120.topk(torch.empty(2, 0, device=device), lengths, 5) == -1).all()


def test_a_workspace_may_hold_anything(device: str) -> None:
    logits = torch.randn(1, 20000)
    size = sm120.topk_workspace_bytes(1, 20000, 512, device=device)
    assert size > 0
    workspace = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    for _ in range(2):
        lengths = torch.tensor([20000], dtype=torch.int32, device=device)
        out = sm120.topk(logits.to(device), lengths, 512, workspace=workspace).cpu()
        assert [sorted(row) for row in out.tolist()] == reference.topk(logits, [20000], 512)


def test_the_merge_leaves_rows_of_one_part_alone(device: str) -> None:
    """Nothing is published of them: what stands in the workspace could be fronts, and is none."""
    lengths = [1000, 300, 37, 1, 700]
    logits, k = torch.randn(len(lengths), 20000), 2
    size = sm120.topk_workspace_bytes(len(lengths), 20000, k, device=device)
    assert size > 0
    workspace = torch.randn(size // 4).view(torch.uint8).to(device)
    there = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = sm120.topk(logits.to(device), there, k, workspace=workspace).cpu()
    assert [sorted(p for p in row if p >= 0) for row in out.tolist()] == reference.topk(logits, lengths, k)


@given(data=st.data())
def test_any_problem(data: st.DataObject, device: str) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 14000))
    k = data.draw(st.integers(1, 2048))
    starts = [data.draw(st.integers(0, columns)) for _ in range(rows)]
    lengths = [data.draw(st.integers(0, columns - start)) for start in starts]
    logits = FILLS[data.draw(st.sampled_from(list(FILLS)))](rows, columns)
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    check(logits, lengths, k, starts, device=device)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_100a", "sm_121f"])
def test_other_cards(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    for columns in (900, 3000, 11000):
        check(torch.randn(2, columns), [columns, columns // 2], 512)


@pytest.mark.parametrize("arch", ["sm_120f", "sm_90a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiler_has_nothing_to_say(arch: str, dtype: torch.dtype) -> None:
    nvrtc, options = compiler._bindings(), [*compiler._options(arch), f"--include-path={compiler.HEADERS}"]
    for k, rows, columns, ascending in ((512, 1, 900, False), (2048, 1, 99000, True), (600, 4096, 9000, False)):
        config, _ = kernels.configure(dtype, k, rows, columns, 188, ascending)
        for kernel in (config.choose, config.merge):
            _, program = nvrtc.nvrtcCreateProgram(kernel.source.encode(), b"", 0, [], [])
            (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            log = (
                compiler._fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().strip("\0\n")
            )
            assert not error and not log, log


# --- candidates of a sparse indexer -----------------------------------------------------------------------------------

INFINITE = 2**31 - 1


@pytest.mark.parametrize("fill", ["normal", "all equal", "two values", "nearly all NaN", "one part has them all"])
@pytest.mark.parametrize("blocks, width", [(900, 2048), (5000, 2048), (9001, 512), (70_000, 2048)])
def test_candidate_blocks(blocks: int, width: int, fill: str, device: str) -> None:
    """Lists that ascend, logical and as pages, out of rows of several lengths."""
    block, page, rows = 8, 64, 3
    lens = [blocks * block, blocks * block // 2 - 3, 5]
    maxima = FILLS[fill](rows, blocks)
    counts = [-(-length // block) for length in lens]
    for row, count in enumerate(counts):
        maxima[row, count - 1] = torch.inf
    table = torch.stack([torch.randperm(blocks)[: -(-blocks * block // page)] for _ in range(rows)]).int()
    out, pages = (poisoned(rows, width, torch.int32, device) for _ in range(2))
    lengths = torch.tensor(lens, dtype=torch.int32, device=device).view(rows, 1)
    given = sm120.candidate_blocks(
        maxima.to(device), lengths, width, block=block, block_table=table.to(device), page=page, out=out, pages=pages
    )
    assert given is out
    plain = sm120.candidate_blocks(maxima.to(device), lengths, width, block=block)
    assert torch.equal(plain, out)
    for row, expected in enumerate(reference.topk(maxima, counts, width)):
        end = [INFINITE] * (width - len(expected))
        assert out[row].tolist() == expected + end
        assert counts[row] - 1 in expected
        ids = torch.tensor(expected)
        places = table[row, ids // 8].long() * 8 + ids % 8
        assert pages[row].tolist() == places.tolist() + end


@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
@pytest.mark.parametrize("blocks, width", [(40, 9), (900, 2048), (5000, 2048), (9001, 512), (70_000, 600)])
def test_candidate_blocks_of_a_run(blocks: int, width: int, compressed: bool, device: str) -> None:
    """Rows begin anywhere in the run: their lists have its blocks. What lies beside a row is larger than all of it."""
    block, page, keys = 8, 64, 8 * blocks - 3
    starts = [0, 5, 8, keys - 1, keys, keys // 2 + 3, keys // 3, 7, 7, 13]
    lens = [keys, keys - 5, 1, 1, 0, keys // 3, 0, 1, 2, 8 * width]
    rows, ends = len(starts), [start + length for start, length in zip(starts, lens)]
    first = [start // block for start in starts]
    counts = [-(-end // block) - begin if length else 0 for end, begin, length in zip(ends, first, lens)]
    maxima = torch.full((rows, blocks), 1e30)
    columns = [0] * rows if compressed else first
    for row, (column, count) in enumerate(zip(columns, counts)):
        maxima[row, column : column + count] = torch.randn(len(maxima[row, column : column + count]))
    counts = [min(count, blocks - column) for column, count in zip(columns, counts)]
    table = torch.stack([torch.randperm(2 * blocks)[: blocks // 4 + 2] for _ in range(rows)]).int()
    out, pages = (poisoned(rows, width, torch.int32, device) for _ in range(2))
    begins, lengths = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (starts, lens))
    options = {"block": block, "starts": begins, "compressed": compressed}
    sm120.candidate_blocks(
        maxima.to(device), lengths, width, **options, block_table=table.to(device), page=page, out=out, pages=pages
    )
    assert torch.equal(sm120.candidate_blocks(maxima.to(device), lengths, width, **options), out)
    for row, chosen in enumerate(reference.topk(maxima, counts, width, columns)):
        ids = torch.tensor([first[row] + at for at in chosen], dtype=torch.int64)
        end = [INFINITE] * (width - len(ids))
        assert out[row].tolist() == ids.tolist() + end
        assert pages[row].tolist() == (table[row, ids // 8].long() * 8 + ids % 8).tolist() + end


def test_candidates_of_a_row_that_begins_at_the_last_key_of_all(device: str) -> None:
    """Keys are counted in 31 bits, whatever lengths say."""
    begins, lengths = (torch.tensor([number], dtype=torch.int32, device=device) for number in (2**31 - 2, 2**31 - 1))
    options = {"block": 2**16, "starts": begins, "compressed": True}
    lists = sm120.candidate_blocks(torch.randn(1, 4, device=device), lengths, 3, page=2**16, **options)
    assert lists.tolist() == [[2**15 - 1, INFINITE, INFINITE]]


# --- logits and choice in one call ------------------------------------------------------------------------------------


def chosen_of_paged(problem: Paged, k: int, device: str, **options) -> None:
    """`fp8_fp4_paged_mqa_topk` against `topk` of the logits, which are the same to the bit."""
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, problem.slots)
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), clean_logits=True).cpu()
    rows = len(logits)
    lengths = reference.windows(problem.context_lens.cpu(), problem.next_n).reshape(-1).tolist()
    expected = reference.topk(logits, lengths, k)
    table = problem.block_table.cpu()
    for translate in (False, True):
        out, positions = (poisoned(rows, k, torch.int32, device) for _ in range(2))
        scores = poisoned(rows, k, torch.float32, device)
        sm120.fp8_fp4_paged_mqa_topk(
            *problem.arguments(schedule), k, translate=translate, out=out, positions=positions, scores=scores, **options
        )
        unscored = poisoned(rows, k, torch.int32, device)
        sm120.fp8_fp4_paged_mqa_topk(*problem.arguments(schedule), k, translate=translate, out=unscored, **options)
        assert torch.equal(unscored.sort().values, out.sort().values)
        for row, want in enumerate(expected):
            got = positions[row, : len(want)].cpu()
            assert sorted(got.tolist()) == want
            assert (positions[row, len(want) :] == -1).all() and (out[row, len(want) :] == -1).all()
            scored = scores[row, : len(want)].cpu()
            torch.testing.assert_close(scored, logits[row, got.long()], rtol=0, atol=0, equal_nan=True)
            pages = table[row // problem.next_n, got.long() // problem.block_kv]
            where = pages * problem.block_kv + got % problem.block_kv if translate else got
            assert torch.equal(out[row, : len(want)].cpu(), where)


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
@pytest.mark.parametrize("next_n, lengths", [(1, [[900], [0], [3000], [77]]), (2, [[900, 899], [5, 4], [9000, 8999]])])
def test_paged_logits_and_choice(fp4: bool, next_n: int, lengths: list, device: str) -> None:
    chosen_of_paged(Paged(lengths, next_n, heads=16, fp4=fp4, device=device), 512, device)


def test_paged_lengths_of_one_dimension(device: str) -> None:
    chosen_of_paged(Paged([700, 1, 0], 3, heads=8, dim=64, device=device), 300, device)


@pytest.fixture(params=["rows", "keys"])
def turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With few SMs 48 rows are a prefill, of which little is kept: some of its rows, or some of its keys."""
    monkeypatch.setattr(settings, "_num_sms", 8)
    monkeypatch.setattr(topk_module, "_LOGITS_BYTES", 1024 if request.param == "rows" else 5000)
    monkeypatch.setattr(topk_module, "_PIECE", 64)
    monkeypatch.setattr(topk_module, "_LEAST_ROWS", 3 if request.param == "rows" else 99)
    return request.param


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
@pytest.mark.parametrize("next_n", [1, 3])
def test_a_paged_prefill_takes_turns(next_n: int, fp4: bool, turns: str, device: str) -> None:
    """In a workspace of no more than is allowed, in which anything may stand."""
    lengths = torch.randint(0, 2000, (48 // next_n, next_n)).tolist()
    problem = Paged(lengths, next_n, heads=8, dim=64, fp4=fp4, slots=8, device=device)
    size = sm120.mqa_topk_workspace_bytes(48, problem.max_context_len, 200, next_n, device)
    assert size <= 48 * topk_module._LOGITS_BYTES
    workspace = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    chosen_of_paged(problem, 200, device, workspace=workspace)


def test_a_paged_prefill_with_lengths_of_one_dimension(turns: str, device: str) -> None:
    lengths = [700, 1, 0, 2000, 64, 65, 321, 200] * 2
    chosen_of_paged(Paged(lengths, 3, heads=8, dim=32, slots=8, device=device), 200, device)


@pytest.mark.parametrize("block_kv", [16, 48, 1008])
def test_a_paged_prefill_with_other_pages(block_kv: int, turns: str, device: str) -> None:
    lengths = torch.randint(0, 2000, (48, 1)).tolist()
    chosen_of_paged(Paged(lengths, block_kv=block_kv, heads=8, dim=32, slots=8, device=device), 77, device)


def chosen_of_ragged(problem: Ragged, k: int, device: str, **options) -> None:
    logits = deep_gemm.fp8_fp4_mqa_logits(*problem.arguments()).cpu()
    starts = [min(max(start, 0), problem.keys) for start in problem.starts]
    ends = [min(end, problem.keys) for end in problem.ends]
    lengths, rows = [max(0, end - start) for start, end in zip(starts, ends)], len(starts)
    expected = reference.topk(logits, lengths, k, starts)
    out, positions = (poisoned(rows, k, torch.int32, device) for _ in range(2))
    scores = poisoned(rows, k, torch.float32, device)
    sm120.fp8_fp4_mqa_topk(
        *problem.arguments(), k, offset=problem.ks, out=out, positions=positions, scores=scores, **options
    )
    unscored = poisoned(rows, k, torch.int32, device)
    sm120.fp8_fp4_mqa_topk(*problem.arguments(), k, offset=problem.ks, out=unscored, **options)
    assert torch.equal(unscored.sort().values, out.sort().values)
    for row, want in enumerate(expected):
        count, got = len(want), positions[row].cpu()
        assert sorted(got[:count].tolist()) == want, difference(logits[row, starts[row] :], sorted(got.tolist()), want)
        assert sorted(out[row, :count].tolist()) == [problem.starts[row] + position for position in want]
        assert (got[count:] == -1).all() and (out[row, count:] == -1).all()
        chosen = logits[row, starts[row] + got[:count].long()]
        torch.testing.assert_close(scores[row, :count].cpu(), chosen, rtol=0, atol=0, equal_nan=True)
        assert (scores[row, count:] == -torch.inf).all()


BOUNDS = [0, 5, 100, 1000, 7, 1400, 640, -3] * 6, [800, 5, 1500, 1200, 900, 1401, 3000, 700] * 6


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
def test_ragged_logits_and_choice(fp4: bool, device: str) -> None:
    chosen_of_ragged(Ragged(*BOUNDS, 1500, heads=8, dim=64, fp4=fp4, device=device), 300, device)


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
def test_a_ragged_prefill_takes_turns(fp4: bool, turns: str, device: str) -> None:
    problem = Ragged(*BOUNDS, 1500, heads=8, dim=64, fp4=fp4, device=device)
    size = sm120.mqa_topk_workspace_bytes(48, 1500, 200, device=device)
    assert size <= 48 * topk_module._LOGITS_BYTES
    workspace = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    chosen_of_ragged(problem, 200, device, workspace=workspace)


@pytest.mark.parametrize(
    "next_n, rows, slots", [(1, 1, 9), (3, 1, 9), (1, 5, 9), (2, 40, 50), (1, 300, 3), (2, 300, 3)]
)
def test_keys_of_rows_that_are_chosen_whole_are_not_read(next_n: int, rows: int, slots: int) -> None:
    """Nor of a token of at most k keys beside one of more, unless the two are looked at together. Whoever wants scores
    has them read."""
    lengths = torch.randint(0, 301, (rows, next_n)).tolist()

    def choice(**options) -> float:
        problem = Paged(lengths, next_n, heads=8, dim=64, slots=slots)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, slots)
        call = partial(sm120.fp8_fp4_paged_mqa_topk, *problem.arguments(schedule), 300)
        return keys_read(call, "kv_cache", 68, **options)

    assert choice() == 0
    scores = poisoned(rows * next_n, 300, torch.float32, "cpu")
    assert choice(scores=scores) >= max(map(max, lengths))
    lengths[rows // 2] = [301] * next_n
    assert 301 <= choice() <= 320 * next_n


@pytest.mark.parametrize("next_n, whole", [(1, 146), (1, 150), (1, 158), (3, 147)])
def test_a_slot_ends_among_rows_that_are_chosen_whole(next_n: int, whole: int, device: str) -> None:
    """The first of two slots ends after row 145 of 290. The rows before it, and some after it in the same group, are
    chosen whole, and so are not looked at; of the group's last rows the slot has a part of the keys all the same."""
    problem = Paged([[400] * next_n] * whole + [[512] * next_n] * (290 - whole), next_n, 8, 64, slots=2, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, problem.block_kv, 2)
    assert schedule[1].tolist() == [145, 0]
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), clean_logits=True).cpu()
    lengths = reference.windows(problem.context_lens.cpu(), next_n).reshape(-1).tolist()
    rows = len(lengths)
    size = sm120.mqa_topk_workspace_bytes(rows, 512, 400, next_n, device)
    workspace = torch.full((size,), 0x7F, dtype=torch.uint8, device=device)  # what is not scored would be chosen
    out = poisoned(rows, 400, torch.int32, device)
    sm120.fp8_fp4_paged_mqa_topk(*problem.arguments(schedule), 400, out=out, workspace=workspace)
    for got, want in zip(out.cpu(), reference.topk(logits, lengths, 400), strict=True):
        assert sorted(got.tolist()) == want


def test_keys_of_a_run_that_are_chosen_whole_are_not_read() -> None:
    problem = Ragged([0, 100, 7] * 20, [300, 400, 7] * 20, 500, heads=8, dim=64)
    choice = partial(sm120.fp8_fp4_mqa_topk, *problem.arguments())
    assert keys_read(partial(choice, 300), "kv", 64) == 0
    assert keys_read(partial(choice, 299), "kv", 64) >= 300


def test_keys_of_a_prefill_that_are_chosen_whole_are_not_read(turns: str) -> None:
    lengths = [*torch.randint(0, 201, (47, 1)).tolist(), [200]]
    paged = Paged([*lengths, [2000]], heads=8, dim=64, slots=8)  # columns enough for turns
    schedule = deep_gemm.get_paged_mqa_logits_metadata(paged.context_lens, paged.block_kv, paged.slots)
    choice = partial(sm120.fp8_fp4_paged_mqa_topk, *paged.arguments(schedule), 200)
    assert 2000 <= keys_read(choice, "kv_cache", 68) <= 2040
    ragged = Ragged([900] * 48, [900 + row for (row,) in lengths], 1500, heads=8, dim=64)
    assert keys_read(partial(sm120.fp8_fp4_mqa_topk, *ragged.arguments(), 200), "kv", 64) == 0


@pytest.mark.parametrize("values", ["equal", "few", "NaN", "all NaN"])
def test_pieces_break_ties_as_the_whole_does(values: str, turns: str, device: str) -> None:
    """Equal logits across pieces, NaN that is carried while nothing else is there, and driven out later."""
    problem = Ragged([0, 70, 600] * 16, [1500, 1500, 1490] * 16, 1500, heads=8, dim=64, device=device)
    keys, scales = problem.kv
    keys.view(torch.uint8).copy_(keys.view(torch.uint8)[:1].clone().expand_as(keys))
    scales.fill_(1)
    if values == "few":
        scales.copy_(torch.randint(1, 4, scales.shape))
    elif values == "all NaN":
        scales.fill_(torch.nan)
    elif values == "NaN":
        scales.copy_(torch.rand(scales.shape))
        scales[:1300] = torch.nan
        scales[torch.randint(0, 1500, (20,))] = 1.0
    chosen_of_ragged(problem, 200, device)


def test_pages_and_offsets_of_pieces(turns: str, device: str) -> None:
    problem = Ragged([0] * 48, [1500, 3, 700] * 16, 1500, heads=8, dim=64, device=device)
    table = torch.randint(0, 1000, (48, 20), dtype=torch.int32, device=device)  # fewer than the rows are long
    offset = torch.randint(-5, 99, (48,), dtype=torch.int32, device=device)
    positions = poisoned(48, 200, torch.int32, device)
    out = sm120.fp8_fp4_mqa_topk(
        *problem.arguments(), 200, block_table=table, page=64, offset=offset, positions=positions
    )
    pages = table.gather(1, (positions.clamp(min=0) // 64).clamp(max=19).long())
    places = pages * 64 + positions.clamp(min=0) % 64 + offset[:, None]
    assert torch.equal(out, torch.where(positions < 0, -1, places))


@given(data=st.data())
def test_any_prefill(data: st.DataObject, device: str) -> None:
    """Few keys a piece, any bounds."""
    draw = data.draw
    rows, keys, k = draw(st.integers(16, 30)), draw(st.integers(0, 1500)), draw(st.integers(1, 300))
    bound = st.integers(-5, keys + 5)
    starts, ends = (draw(st.lists(bound, min_size=rows, max_size=rows)) for _ in range(2))
    problem = Ragged(starts, ends, keys, heads=8, dim=64, fp4=draw(st.booleans()), device=device)
    with pytest.MonkeyPatch.context() as patch, recording(sanitize=draw(st.booleans())):
        patch.setattr(settings, "_num_sms", 4)
        each = draw(st.integers(max(1, keys // 40), 500))  # more pieces take minutes, and are not other ones
        patch.setattr(topk_module, "_LOGITS_BYTES", 4 * (-(-k // 64) * 64 + 2 * k + 4 + each))
        patch.setattr(topk_module, "_LEAST_ROWS", 99)
        patch.setattr(topk_module, "_PIECE", draw(st.sampled_from([1, 32, 100])))
        chosen_of_ragged(problem, k, device)


def test_prefills_are_kept_within_64_KB_a_row() -> None:
    for rows in (2 * 188, 512, 1000, 4096):
        for columns in (0, 1000, 16_384, 20_000, 65_536, 300_000, 1_000_000):
            for k, next_n in itertools.product((1, 512, 2048), (1, 2, 4, rows)):
                assert sm120.mqa_topk_workspace_bytes(rows, columns, k, next_n, "cpu") <= rows * 65536


def test_no_keys_at_all(device: str) -> None:
    chosen_of_paged(Paged([[0], [0]], heads=8, dim=32, device=device), 5, device)
    problem = Ragged([0, 0], [0, 0], 0, heads=8, dim=32, device=device)
    assert (sm120.fp8_fp4_mqa_topk(*problem.arguments(), 5) == -1).all()


# --- sanitizers, arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["normal", "all equal", "close together", "one part has them all"])
@pytest.mark.parametrize("columns, k, sms", [(900, 512, 188), (9000, 2048, 188), (9000, 512, 1)])
def test_clean_under_the_sanitizers(columns: int, k: int, sms: int, fill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_num_sms", sms)
    with recording(sanitize=True):
        check(FILLS[fill](2, columns), [columns, columns // 3], k)


ARGUMENTS = {
    "logits": [torch.zeros(2, 50, dtype=torch.float16), torch.zeros(2, 50, 1), torch.zeros(50, 2).T, None],
    "lengths": [torch.zeros(3, dtype=torch.int32), torch.zeros(2), torch.zeros(4, dtype=torch.int32)[::2], None],
    "k": [0, 2049, True, 3.0],
    "starts": [torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)],
    "block_table": [torch.zeros(3, 9, dtype=torch.int32), torch.zeros(9, 2, dtype=torch.int32).T],
    "page": [0, -1, 64],
    "offset": [torch.zeros(2, 1, dtype=torch.int32)],
    "out": [torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 5), torch.zeros(1, 5, dtype=torch.int32).expand(2, 5)],
    "positions": [torch.zeros(2, 5)],
    "scores": [torch.zeros(2, 5, dtype=torch.int32)],
    "workspace": [torch.zeros(2), torch.zeros(2, 8, dtype=torch.uint8)],
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_refused_argument_is_named(argument: str) -> None:
    good = {"logits": torch.zeros(2, 50), "lengths": torch.zeros(2, dtype=torch.int32), "k": 5}
    for value in ARGUMENTS[argument]:
        with pytest.raises(sm120.ArgumentError, match=f"^{argument}: expected"):
            sm120.topk(**{**good, argument: value})


def test_a_workspace_that_is_too_small_is_refused() -> None:
    size = sm120.topk_workspace_bytes(1, 20000, 512, device="cpu")
    with pytest.raises(sm120.ArgumentError, match=f"workspace: expected at least {size} bytes"):
        workspace = torch.zeros(size - 1, dtype=torch.uint8)
        sm120.topk(torch.zeros(1, 20000), torch.zeros(1, dtype=torch.int32), 512, workspace=workspace)
