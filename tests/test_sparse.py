"""Sparse logits against float64: every size, every way to list blocks and to lay out what comes in, and what metadata
must bear."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import POISON, Sparse, assert_rows_apart, check, poisoned, shared_lists

import deep_gemm
from deep_gemm.sm120 import reference
from deep_gemm.sm120.emulator import recording
from deep_gemm.sm120.kernels import sparse

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["mxfp8", "mxfp4"])
LAYOUTS = pytest.mark.parametrize("block_kv", [64, 0], ids=["paged", "ragged"])


def run(problem: Sparse, metadata: torch.Tensor | None = None, pad: int = 7) -> torch.Tensor:
    """Computes on a poisoned output, compares with float64, returns the logits."""
    out = poisoned(len(problem.lengths), problem.width * problem.block, torch.bfloat16, problem.device, pad)
    logits = problem.logits(problem.metadata() if metadata is None else metadata, out)
    assert logits is out
    expected = problem.expected().cpu()
    check(logits.cpu(), expected)
    # Rounding to bf16 moves a number by up to 2^-8 of itself; what the sum in fp32 is off by, the row's size bounds.
    finite = torch.where(expected.isfinite(), expected, 0)
    error = torch.where(expected.isfinite(), logits.cpu().double() - expected, 0).abs()
    allowed = 2**-8 * finite.abs() + 1e-6 * finite.abs().amax(dim=1, keepdim=True)
    assert (error <= allowed).all(), (error - allowed).max()
    return logits


def rows_of_all_kinds(count: int) -> list[int]:
    """Lengths with empty, short and long rows among each other."""
    lengths = torch.randint(0, 300, (count,))
    lengths[torch.rand(count) < 0.3] = 0
    lengths[count // 2] = 900
    return lengths.tolist()


@FORMATS
@LAYOUTS
@pytest.mark.parametrize("heads", [8, 16, 24, 32, 40, 48, 56, 64])
def test_heads(heads: int, block_kv: int, fp4: bool, device: str) -> None:
    run(Sparse([100, 0, 37, 300], heads=heads, block_kv=block_kv, fp4=fp4, device=device))


@FORMATS
@pytest.mark.parametrize(
    "block, block_kv", [(8, 8), (8, 24), (16, 48), (24, 48), (32, 64), (40, 80), (48, 96), (56, 56), (64, 64)]
)
def test_blocks_and_pages(block: int, block_kv: int, fp4: bool, device: str) -> None:
    lengths = [block - 1, block, block + 1, 7 * block_kv, 13 * block, 0]
    run(Sparse(lengths, width=9, block=block, block_kv=block_kv, heads=8, fp4=fp4, device=device))
    run(Sparse(lengths, width=9, block=block, block_kv=0, heads=8, fp4=fp4, device=device))


@LAYOUTS
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 31, 68, 300])
def test_widths(width: int, block_kv: int, device: str) -> None:
    lengths = [1, 8 * width - 1, 8 * width, 8 * width + 1, 2000]
    run(Sparse(lengths, width=width, block_kv=block_kv, heads=8, device=device))


@FORMATS
@pytest.mark.parametrize("block_kv", [64, 128])
def test_v41(block_kv: int, fp4: bool, device: str) -> None:
    """2,048 blocks of 8 keys, 32 heads."""
    run(Sparse([20_000, 137, 16_383], width=2048, block_kv=block_kv, fp4=fp4, device=device))


@FORMATS
@pytest.mark.parametrize("block, block_kv", [(8, 64), (16, 48), (24, 0), (64, 128)])
@pytest.mark.parametrize("heads", [8, 24, 40, 64])
def test_one_row(heads: int, block: int, block_kv: int, fp4: bool, device: str) -> None:
    for length, weights in ((0, torch.float32), (1, torch.bfloat16), (13 * block - 5, torch.float32), (999, None)):
        weights = {"weights_dtype": weights} if weights else {}
        run(Sparse([length], width=13, block=block, block_kv=block_kv, heads=heads, fp4=fp4, device=device, **weights))


@FORMATS
@LAYOUTS
@pytest.mark.parametrize("width", [31, 32, 33])
def test_one_row_with_and_without_a_warp_for_every_eight_keys(
    width: int, block_kv: int, fp4: bool, device: str
) -> None:
    sms = deep_gemm.get_num_sms()
    try:
        deep_gemm.set_num_sms(2)  # of 16 warps
        run(Sparse([8 * width], width=width, block_kv=block_kv, heads=16, fp4=fp4, device=device))
    finally:
        deep_gemm.set_num_sms(sms)


@pytest.mark.parametrize("block_kv", [8, 64, 128, 0])
@pytest.mark.parametrize("width", [4, 68, 512, 4096])
def test_upstream_s_edges(width: int, block_kv: int, device: str) -> None:
    """Lengths at the ends of its splits of 640 keys, the tails of pull request 447's test, and lists of any width."""
    lengths = [0, 1, 137, 639, 640, 641, 1283, 5000]
    run(Sparse(lengths, width=width, block_kv=block_kv, heads=8, device=device))


@LAYOUTS
@pytest.mark.parametrize("rows", [129, 187, 188, 189, 300])
def test_many_rows(rows: int, block_kv: int, device: str) -> None:
    run(Sparse(rows_of_all_kinds(rows), width=40, block_kv=block_kv, heads=8, device=device))


def test_a_long_row_among_many_is_shared_out() -> None:
    """Each block that has a piece of it reads its query; the others' are read once."""
    problem = Sparse([8] * 40 + [8000], width=1000, heads=8, fp4=True)
    metadata, sms = problem.metadata(), deep_gemm.get_num_sms()
    try:
        deep_gemm.set_num_sms(16)
        with recording(trace=True) as launches:
            run(problem, metadata)
    finally:
        deep_gemm.set_num_sms(sms)
    assert launches[0].blocks == 16
    assert launches[0].block_bytes["q"] > (41 + 4) * 8 * 64


@LAYOUTS
@pytest.mark.parametrize("lengths", [[0], [0] * 5, [0] * 200, [0] * 150 + [77] + [0] * 150, [5000] + [8] * 200])
def test_empty_and_short_rows(lengths: list[int], block_kv: int, device: str) -> None:
    run(Sparse(lengths, width=64, block_kv=block_kv, heads=8, device=device))


@LAYOUTS
def test_nothing_at_all(block_kv: int, device: str) -> None:
    assert run(Sparse([], block_kv=block_kv, device=device)).shape == (0, 128)


@FORMATS
@LAYOUTS
@pytest.mark.parametrize(
    "kind, tail", [("any", "garbage"), ("any", "last"), ("ascending", "last"), ("ascending", "garbage")]
)
@pytest.mark.parametrize("copies", [1, 50])
def test_lists(copies: int, kind: str, tail: str, block_kv: int, fp4: bool, device: str) -> None:
    """Repeats, any order, and anything after the entries that count."""
    lengths = [100, 0, 37, 300] * copies
    run(Sparse(lengths, width=21, kind=kind, tail=tail, block_kv=block_kv, heads=16, fp4=fp4, device=device))


@pytest.mark.parametrize("copies", [1, 60])
def test_shared_block_table(copies: int, device: str) -> None:
    """Rows of one request, whose table is expanded: its row stride is 0."""
    problem = Sparse([300, 301, 302] * copies, width=20, shared=True, heads=16, device=device)
    assert problem.block_table.stride(0) == 0
    run(problem)


@FORMATS
@pytest.mark.parametrize("padding", [4, 8, 16, 100])
def test_padded_cache(padding: int, fp4: bool, device: str) -> None:
    run(Sparse([100, 257], padding=padding, heads=16, fp4=fp4, device=device))


@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize("block", [8, 16, 24])
def test_unaligned_starts(block: int, copies: int, device: str) -> None:
    lengths, starts = [50, 100, 0, 333] * copies, [3, 17, 5, 70] * copies
    run(Sparse(lengths, block=block, block_kv=0, starts=starts, unaligned=True, heads=16, device=device))
    aligned = [start // block * block for start in starts]
    run(Sparse(lengths, block=block, block_kv=0, starts=aligned, heads=16, device=device))


def test_bounds_outside_the_run_are_cut(device: str) -> None:
    """a = min(ks, N), b = max(a, min(ke, N)); keys past the last one are zeros."""
    problem = Sparse([100, 60, 30, 40], block_kv=0, starts=[0, 16, 80, 64], heads=16, device=device)
    problem.kv = tuple(part[:70].contiguous() for part in problem.kv)
    problem.keys = 70
    problem.lists = torch.arange(16, dtype=torch.int32, device=device).repeat(4, 1)
    logits = run(problem)
    assert (logits[0, 70:72] == 0).all() and (logits[2] == POISON).all()


@pytest.mark.parametrize("end", [-(2**31), -1, 15, 16])
def test_a_row_that_ends_before_it_begins_is_empty(end: int, device: str) -> None:
    """However far before: the two may be more than 2^31 apart."""
    problem = Sparse([100, 60], block_kv=0, starts=[0, 16], heads=16, device=device)
    problem.ke[1] = end
    assert (run(problem)[1] == POISON).all()


def test_weights_of_fp32_and_with_a_stride(device: str) -> None:
    problem = Sparse([100, 60], weights_dtype=torch.float32, device=device)
    problem.weights = torch.cat([problem.weights, torch.full_like(problem.weights, torch.nan)], dim=1)[:, :32]
    run(problem)


def test_lists_and_tables_with_strides(device: str) -> None:
    problem = Sparse([100, 60, 300], heads=16, device=device)
    problem.lists = torch.cat([problem.lists, torch.full_like(problem.lists, -5)], dim=1)[:, :16]
    table = problem.block_table
    problem.block_table = torch.cat([table, table], dim=1)[:, : table.shape[1]]
    run(problem)


def test_context_lengths_of_any_rank(device: str) -> None:
    problem = Sparse([100, 0, 60, 300], heads=16, device=device)
    before = run(problem)
    for shape in ((4, 1), (2, 2), (1, 4, 1)):
        problem.context_lens = problem.context_lens.view(shape)
        out = problem.logits(problem.metadata(), torch.full_like(before, POISON))
        assert torch.equal(out, before)


def test_result_is_a_view_with_rows_of_1024_bytes(device: str) -> None:
    problem = Sparse([100, 60, 30], width=20, heads=16, device=device)
    logits = problem.logits(problem.metadata())
    assert logits.dtype == torch.bfloat16 and logits.shape == (3, 160) and logits.stride() == (512, 1)


def test_nan_keys(device: str) -> None:
    """A NaN in a listed key is one NaN; what is not listed never shows."""
    problem = Sparse([64] * 3, width=4, block_kv=0, heads=16, keys=64, device=device)
    problem.kv[1][5] = -1  # scales of 255 are NaN
    problem.lists = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4], [4, 0, 0, 7]], dtype=torch.int32, device=device)
    logits = run(problem)
    assert logits.isnan().nonzero().tolist() == [[0, 5], [2, 13], [2, 21]]


class TestProperties:
    @FORMATS
    @pytest.mark.parametrize("copies", [1, 40])
    def test_permuted_lists_permute_the_columns(self, copies: int, fp4: bool, device: str) -> None:
        problem = Sparse([256, 300, 900, 256] * copies, width=32, heads=32, fp4=fp4, device=device)
        before = run(problem).view(-1, 32, 8)
        order = torch.randperm(32, device=device)
        problem.lists = problem.lists[:, order].contiguous()
        assert torch.equal(run(problem).view(-1, 32, 8), before[:, order])

    @pytest.mark.parametrize("block_kv", [64, 128, 0])
    @pytest.mark.parametrize("heads", [8, 32, 64])
    def test_equal_to_the_dense_function(self, heads: int, block_kv: int, device: str) -> None:
        """Bit for bit where the types are the same."""
        problem = Sparse([100, 0, 37, 900], width=40, heads=heads, block_kv=block_kv, device=device)
        sparse_logits = run(problem)
        if block_kv:
            schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, block_kv, 48)
            dense = deep_gemm.fp8_fp4_paged_mqa_logits(
                problem.q, problem.kv_cache, problem.weights, problem.context_lens, problem.block_table, schedule, 900,
                clean_logits=True, logits_dtype=torch.bfloat16,
            )  # fmt: skip
        else:
            dense = deep_gemm.fp8_fp4_mqa_logits(
                problem.q, problem.kv, problem.weights, problem.ks, problem.ke, clean_logits=True,
                logits_dtype=torch.bfloat16,
            )  # fmt: skip
        lengths = torch.tensor(problem.lengths, device=device)
        positions = reference.listed_positions(problem.lists, lengths, 8)
        seen = (positions >= 0) & (positions < lengths[:, None])
        gathered = dense.gather(1, torch.where(seen, positions, 0))
        assert torch.equal(sparse_logits[seen], gathered[seen])

    @LAYOUTS
    def test_slots_do_not_matter(self, block_kv: int, device: str) -> None:
        problem = Sparse(rows_of_all_kinds(150), width=40, heads=8, block_kv=block_kv, device=device)
        before, sms = run(problem), deep_gemm.get_num_sms()
        try:
            for slots in (1, 2, 7, 100):
                deep_gemm.set_num_sms(slots)
                assert torch.equal(run(problem), before)
        finally:
            deep_gemm.set_num_sms(sms)

    def test_rounding_is_nearer_than_the_chains(self, device: str) -> None:
        """One rounding at the end; DeepGEMM's own kernels round at every step."""
        problem = Sparse([2000] * 4, width=200, device=device)
        exact, chained = problem.expected(), problem.expected(logits_of=reference.chained_logits_of)
        ours = run(problem).double()
        assert (ours - exact).norm() < 0.6 * (chained - exact).norm()
        largest = exact.abs().amax(dim=1, keepdim=True)  # vLLM's test: the error over the row's maximum
        error = ((ours - chained).abs() / largest).flatten()
        assert error.quantile(0.99) < 1e-2 and error.max() < 2e-2


class TestMetadata:
    @LAYOUTS
    def test_form(self, block_kv: int, device: str) -> None:
        problem = Sparse([100, 60, 300], width=21, block_kv=block_kv, device=device)
        metadata = problem.metadata()
        assert metadata.dtype == torch.uint8 and metadata.dim() == 1 and metadata.is_contiguous()
        assert metadata.numel() == 192 + 3 * (16 + 4 * 24)
        sizes = [sparse.size(rows, 2048) for rows in range(0, 5000, 7)]
        assert sizes == sorted(sizes) and sizes[0] >= 16 and sparse.size(4096, 2048) < 4096 * 2048 * 4 * 1.01

    @LAYOUTS
    @pytest.mark.parametrize("copies", [1, 60])
    def test_a_byte_copy_into_a_larger_buffer(self, copies: int, block_kv: int, device: str) -> None:
        problem = Sparse([100, 0, 60, 300] * copies, width=21, block_kv=block_kv, heads=8, device=device)
        metadata = problem.metadata()
        buffer = torch.randint(0, 256, (metadata.numel() + 5000,), dtype=torch.uint8, device=device)
        buffer[: metadata.numel()].copy_(metadata)
        moved = buffer[16 * 7 :]
        moved[: metadata.numel()].copy_(metadata)
        before = run(problem, metadata)
        assert torch.equal(run(problem, moved), before)

    def test_rows_of_metadata_for_more(self, device: str) -> None:
        """The first rows of it serve a call with fewer."""
        problem = Sparse([100, 0, 60, 300] * 60, width=21, heads=8, device=device)
        metadata, whole = problem.metadata(), run(problem)
        for rows in (3, 130, 239):
            problem.q = tuple(part[:rows] for part in problem.q)
            problem.weights = problem.weights[:rows]
            for name in ("lengths", "lists", "block_table", "context_lens"):
                setattr(problem, name, getattr(problem, name)[:rows])
            assert torch.equal(run(problem, metadata), whole[:rows])
            problem = Sparse([100, 0, 60, 300] * 60, width=21, heads=8, device=device)
            metadata, whole = problem.metadata(), run(problem)

    @pytest.mark.parametrize("copies", [1, 60])
    @LAYOUTS
    def test_another_query_and_other_keys(self, copies: int, block_kv: int, device: str) -> None:
        """One piece of metadata serves all layers of a step."""
        problem = Sparse([100, 0, 60, 300] * copies, width=21, block_kv=block_kv, heads=8, device=device)
        metadata = problem.metadata()
        run(problem, metadata)
        other = Sparse([100, 0, 60, 300] * copies, width=21, block_kv=block_kv, heads=8, device=device)
        for name in ("lists", "block_table", "context_lens"):
            if block_kv or name == "lists":
                setattr(other, name, getattr(problem, name))
        run(other, metadata)

    @LAYOUTS
    @pytest.mark.parametrize("rows", [1, 5, 300])
    @pytest.mark.parametrize(
        "what", ["noise", "zeros", "ones", "other width", "other block", "other layout", "noise with a seal"]
    )
    def test_foreign_bytes_write_nothing_outside(self, what: str, rows: int, block_kv: int) -> None:
        """The emulator refuses every access outside; bytes of another piece of metadata leave the rows as they were."""
        problem = Sparse([300] * rows, width=20, block_kv=block_kv, heads=8)
        metadata = problem.metadata()
        noise = torch.randint(0, 256, metadata.shape, dtype=torch.uint8)
        if what == "noise with a seal":
            pitch = sparse.pitch(20)
            for row in range(rows):
                start = 192 + row * pitch
                noise[start : start + 4] = metadata[start : start + 4]
            noise[:8] = metadata[:8]
        others = {
            "noise": noise,
            "noise with a seal": noise,
            "zeros": torch.zeros_like(metadata),
            "ones": torch.full_like(metadata, 255),
            "other width": Sparse([300] * rows, width=24, block_kv=block_kv).metadata(),
            "other block": Sparse([300] * rows, width=20, block=16, block_kv=block_kv).metadata(),
            "other layout": Sparse([300] * rows, width=20, block_kv=64 - block_kv).metadata(),
        }
        out = poisoned(rows, 160, torch.bfloat16)
        # With a seal in front of noise two blocks may well compute the same logit, which is a race.
        with recording(sanitize=what != "noise with a seal"):
            problem.logits(others[what], out)
        assert (out.as_strided((rows, 7), (167, 1), 160) == POISON).all()
        if what != "noise with a seal":
            assert (out == POISON).all()

    def test_truncated_copy(self) -> None:
        """Rows that were not copied have no keys."""
        problem = Sparse([300] * 200, width=20, heads=8)
        metadata, pitch = problem.metadata(), sparse.pitch(20)
        metadata[192 + 150 * pitch :] = torch.randint(0, 256, metadata[192 + 150 * pitch :].shape, dtype=torch.uint8)
        out = poisoned(200, 160, torch.bfloat16)
        problem.logits(metadata, out)
        assert (out[150:] == POISON).all()

    @LAYOUTS
    @pytest.mark.parametrize("rows", [1, 5, 300])
    def test_columns_past_the_output_are_cut(self, rows: int, block_kv: int, device: str) -> None:
        """Whatever a row's head promises; all else of it is as it was made."""
        problem = Sparse([160] * rows, width=20, block_kv=block_kv, heads=8, device=device)
        metadata = problem.metadata()
        before = run(problem, metadata)
        words, pitch = metadata.view(torch.int32), sparse.pitch(20) // 4
        for columns in (168, 2000, 2**31 - 1):
            words[49 : 49 + pitch * rows : pitch] = columns
            out = poisoned(rows, 160, torch.bfloat16, device)
            assert torch.equal(problem.logits(metadata, out), before)
            assert_rows_apart(out)

    def test_garbage_ids_stay_inside(self) -> None:
        """Ids and page numbers that lead nowhere are read as something that is there."""
        for block_kv in (64, 0):
            problem = Sparse([300, 299] * 3, width=20, block_kv=block_kv, heads=8)
            problem.lists = torch.randint(-(2**31), 2**31 - 1, problem.lists.shape, dtype=torch.int32)
            if block_kv:
                problem.block_table = torch.randint(-(2**31), 2**31 - 1, problem.block_table.shape, dtype=torch.int32)
            with recording(sanitize=True):
                out = problem.logits(problem.metadata(), poisoned(6, 160, torch.bfloat16))
            assert (out != POISON).all()


@FORMATS
def test_neighbours_read_the_blocks_that_they_share_together(fp4: bool) -> None:
    """A prefill, more rows than are taken one by one: neighbours have 90% of their blocks in common. Each block of the
    grid reads a key once, so its rows get along with about 1 / rows + 10% of what they would read alone; upstream's
    pairs of rows with 55%."""
    rows, width, length = 384, 64, 8000
    problem = Sparse([length] * rows, width=width, shared=True, heads=8, fp4=fp4)
    problem.lists = shared_lists(rows, width, length // 8, 0.9)
    with recording(trace=True) as launches:
        run(problem)
    counters = launches[-1]
    row = 64 if fp4 else 128
    alone = rows * width * 8 * (row + 4)
    assert counters.bytes_read["kv_cache"] >= alone
    assert counters.block_bytes["kv_cache"] < 0.3 * alone


@pytest.mark.parametrize("length", [16_384, 1000, 0])
def test_one_row_fills_the_chip(length: int) -> None:
    problem = Sparse([length], width=2048, heads=32)
    metadata = problem.metadata()
    with recording(trace=True, sanitize=True) as launches:
        run(problem, metadata)
    (counters,) = launches
    assert counters.blocks == deep_gemm.get_num_sms()
    assert counters.block_bytes["kv_cache"] == length * 68  # no key twice, and none that does not count


@st.composite
def problems(draw: st.DrawFn) -> dict:
    block = draw(st.sampled_from([8, 8, 8, 16, 16, 24, 32, 48, 64]))
    rows = draw(st.integers(0, 12) | st.integers(120, 220))
    length = st.integers(0, 700) | st.sampled_from([0, 0, 1, 7, 8, 9, 63, 64, 65, 255, 256, 257])
    paged = draw(st.booleans())
    lengths = draw(st.lists(length, min_size=rows, max_size=rows))
    made = dict(
        lengths=lengths,
        width=draw(st.integers(1, 70)),
        block=block,
        block_kv=block * draw(st.sampled_from([1, 2, 4, 8])) if paged else 0,
        heads=draw(st.sampled_from([8, 16, 24, 32, 64])),
        fp4=draw(st.booleans()),
        kind=draw(st.sampled_from(["ascending", "any"])),
        tail=draw(st.sampled_from(["largest", "last", "garbage"])),
        weights_dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
    )
    if paged:
        return {**made, "padding": draw(st.sampled_from([0, 4, 16, 100])), "shared": draw(st.booleans())}
    unaligned = draw(st.booleans())
    starts = draw(st.lists(st.integers(0, 300), min_size=rows, max_size=rows))
    return {**made, "unaligned": unaligned, "starts": starts if unaligned else [n // block * block for n in starts]}


@given(problem=problems(), pad=st.sampled_from([0, 1, 7]))
def test_any_problem(problem: dict, pad: int, device: str) -> None:
    run(Sparse(**problem, device=device), pad=pad)
