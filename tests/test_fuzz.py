"""Anything that the functions take, at once: a few examples in `make test`, 500 of each in `make fuzz`.

Everything is compared with float64, what lies outside the windows must not be touched, and the sanitizers watch.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Paged, Ragged, Sparse, check, poisoned

import deep_gemm
from deep_gemm.sm120 import reference
from deep_gemm.sm120.emulator import recording

DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16])
HEADS = st.sampled_from(range(8, 65, 8))
FORMATS = st.sampled_from([(False, 32), (False, 64), (False, 128), (True, 64), (True, 128)])
EDGES = st.sampled_from([0, 0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513])


def with_stride(tensor: torch.Tensor, more: int, fill) -> torch.Tensor:
    """The same rows, further apart, with ``fill`` between them."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + more), fill, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


@st.composite
def schedules(draw: st.DrawFn, lengths: torch.Tensor) -> torch.Tensor:
    """A plan of ours, or any list of slots in order: empty ones, huge ones."""
    slots = draw(st.integers(1, 40) | st.sampled_from([170, 188]))
    if draw(st.booleans()):
        return deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, slots)
    whole = reference.schedule(lengths, 1)
    longest = lengths.reshape(len(lengths), -1).amax(dim=1).tolist() if len(lengths) else []
    splits = [[row, split] for row, length in enumerate(longest) for split in range(-(-length // 256))]
    cuts = sorted(draw(st.lists(st.integers(0, len(splits)), min_size=slots - 1, max_size=slots - 1)))
    entries = [whole[0].tolist(), *([*splits, whole[-1].tolist()][cut] for cut in cuts), whole[-1].tolist()]
    return torch.tensor(entries, dtype=torch.int32)


@given(st.data())
def test_any_paged(data: st.DataObject) -> None:
    draw = data.draw
    next_n = draw(st.sampled_from([1, 1, 1, 2, 3, 4, 5, 8, 9, 17]))
    batch = draw(st.integers(0, 12) if next_n > 1 else st.integers(0, 60))
    length = st.integers(0, 700) | EDGES
    one_dimensional = draw(st.booleans())
    row = length if one_dimensional else st.lists(length, min_size=next_n, max_size=next_n)
    fp4, dim = draw(FORMATS)
    problem = Paged(
        draw(st.lists(row, min_size=batch, max_size=batch)),
        next_n=next_n,
        heads=draw(HEADS),
        dim=dim,
        block_kv=draw(st.sampled_from([16, 32, 48, 64, 80, 128, 256])),
        fp4=fp4,
        padding=draw(st.sampled_from([0, 4, 12, 16, 32, 100])),
        weights_dtype=draw(DTYPES),
    )
    if not batch and not one_dimensional:
        problem.context_lens = problem.context_lens.view(0, next_n)
    if draw(st.booleans()) and batch:  # rows of one sequence
        longest = problem.context_lens.reshape(batch, -1).amax(dim=1).argmax()
        problem.block_table[:] = problem.block_table[longest].clone()
    problem.block_table = with_stride(problem.block_table, draw(st.sampled_from([0, 1, 7])), -1)
    problem.weights = with_stride(problem.weights, draw(st.sampled_from([0, 1, 8])), torch.nan)
    schedule = draw(schedules(problem.context_lens))
    expected = problem.expected()
    columns = problem.max_context_len = draw(st.integers(0, 1200) | st.just(expected.shape[1]))
    expected = torch.nn.functional.pad(expected, (0, max(0, columns - expected.shape[1])), value=-torch.inf)
    clean, dtype = draw(st.booleans()), draw(DTYPES)
    out = poisoned(batch * next_n, columns, dtype, pad=draw(st.sampled_from([0, 1, 7])))
    with recording(sanitize=draw(st.booleans())):
        deep_gemm.fp8_fp4_paged_mqa_logits(*problem.arguments(schedule), clean, logits_dtype=dtype, out=out)
    check(out, expected[:, :columns], cleaned=clean)


@given(st.data())
def test_any_ragged(data: st.DataObject) -> None:
    draw = data.draw
    keys = draw(st.integers(1, 500) | st.sampled_from([16, 32, 256, 512, 1100, 1700]))
    bound = st.integers(-5, keys + 20) | st.sampled_from([0, 15, 16, 17, 32, keys])
    windows = draw(st.lists(st.tuples(bound, bound), max_size=40))
    fp4, dim = draw(FORMATS)
    starts, ends = [start for start, _ in windows], [end for _, end in windows]
    problem = Ragged(starts, ends, keys, heads=draw(HEADS), dim=dim, fp4=fp4, weights_dtype=draw(DTYPES))
    problem.weights = with_stride(problem.weights, draw(st.sampled_from([0, 1, 8])), torch.nan)
    columns = draw(st.just(0) | st.integers(1, 600))
    clean, dtype = draw(st.booleans()), draw(DTYPES)
    out = poisoned(len(windows), columns or keys, dtype, pad=draw(st.sampled_from([0, 1, 7])))
    with recording(sanitize=draw(st.booleans())):
        deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), clean, columns, dtype, out=out)
    # What the bounds mean: cut at the keys there are, and at the columns.
    problem.ks = problem.ks.clamp(min=0)
    problem.ke = problem.ke.clamp(max=keys)
    if columns:
        problem.ke = torch.minimum(problem.ke, problem.ks + columns)
    check(out, problem.expected(columns), cleaned=clean)


@given(st.data())
def test_any_sparse(data: st.DataObject) -> None:
    draw = data.draw
    rows, paged = draw(st.integers(0, 12) | st.integers(120, 260)), draw(st.booleans())
    block = draw(st.sampled_from(range(8, 65, 8)))
    lengths = draw(st.lists(st.integers(0, 700) | EDGES, min_size=rows, max_size=rows))
    unaligned = not paged and draw(st.booleans())
    starts = [0] * rows if paged else draw(st.lists(st.integers(0, 300), min_size=rows, max_size=rows))
    problem = Sparse(
        lengths,
        width=draw(st.integers(1, 90)),
        block=block,
        block_kv=block * draw(st.integers(1, 8)) if paged else 0,
        heads=draw(HEADS),
        fp4=draw(st.booleans()),
        starts=starts if unaligned else [start // block * block for start in starts],
        unaligned=unaligned,
        kind=draw(st.sampled_from(["ascending", "any"])),
        tail=draw(st.sampled_from(["largest", "last", "garbage"])),
        shared=paged and draw(st.booleans()),
        padding=draw(st.sampled_from([0, 4, 12, 16, 32, 100])),
        weights_dtype=draw(DTYPES),
    )
    problem.lists = with_stride(problem.lists, draw(st.sampled_from([0, 1, 7])), -3)
    problem.weights = with_stride(problem.weights, draw(st.sampled_from([0, 1, 8])), torch.nan)
    out = poisoned(rows, problem.width * block, torch.bfloat16, pad=draw(st.sampled_from([0, 1, 7])))
    with recording(sanitize=draw(st.booleans())):
        metadata = problem.metadata()
        larger = torch.randint(0, 256, (metadata.numel() + 16 * draw(st.integers(0, 9)),), dtype=torch.uint8)
        larger[: metadata.numel()] = metadata
        problem.logits(larger, out)
    check(out, problem.expected())


@given(st.data())
def test_any_schedule(data: st.DataObject) -> None:
    draw = data.draw
    rows, tokens = draw(st.integers(0, 2200)), draw(st.integers(1, 6))
    lengths = torch.randint(0, draw(st.sampled_from([2, 300, 5000, 100_000])), (rows, tokens), dtype=torch.int32)
    lengths[torch.rand(rows) < draw(st.sampled_from([0, 0.5, 0.99]))] = 0
    if tokens == 1 and draw(st.booleans()):
        lengths = lengths[:, 0].contiguous()
    slots = draw(st.integers(1, 400) | st.sampled_from([1024, 1025, 3000]))
    with recording(sanitize=draw(st.booleans())):
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 16 * draw(st.integers(1, 16)), slots)
    assert torch.equal(schedule, reference.schedule(lengths, slots))
