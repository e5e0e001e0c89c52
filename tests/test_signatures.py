"""Both generations of callers, by position and by keyword, word for word as SGLang and vLLM call: each gets what it
expects, and a call that fits neither is refused."""

import pytest
import torch
from problems import POISON, Paged, Ragged, Sparse, check, poisoned

import deep_gemm
from deep_gemm.sm120 import ArgumentError

FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])


class Calls:
    """One problem, called in many ways: each must give the result, or the result with -inf around it."""

    def __init__(self, problem, rows: int, columns: int) -> None:
        self.problem, self.rows, self.columns = problem, rows, columns

    def same(self, function, *args, clean: bool = False, dtype=torch.float32, columns: int = 0, **kwargs) -> None:
        out = poisoned(self.rows, columns or self.columns, dtype)
        result = function(*args, **kwargs, out=out)
        assert result is out
        compressed = {"max_seqlen_k": columns} if columns else {}
        check(out, self.problem.expected(**compressed), cleaned=clean)


@pytest.fixture
def paged() -> tuple[Calls, tuple]:
    problem = Paged([40, 0, 100], heads=16, max_context_len=150)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 48)
    return Calls(problem, 3, 150), problem.arguments(schedule)


@pytest.fixture
def ragged() -> tuple[Calls, tuple]:
    problem = Ragged([0, 5, 9], [5, 5, 20], 20, heads=16)
    return Calls(problem, 3, 20), problem.arguments()


INDICES = torch.zeros(3, dtype=torch.int32)


def test_fp8_fp4_paged(paged: tuple[Calls, tuple]) -> None:
    calls, seven = paged
    function = deep_gemm.fp8_fp4_paged_mqa_logits
    # main, nv_dev, sgl-deep-gemm 0.2.3: clean_logits, logits_dtype, indices
    calls.same(function, *seven)
    calls.same(function, *seven, False)
    calls.same(function, *seven, True, clean=True)
    calls.same(function, *seven, clean_logits=True, clean=True)
    calls.same(function, *seven, False, torch.bfloat16, dtype=torch.bfloat16)
    calls.same(function, *seven, True, torch.float32, INDICES, clean=True)
    calls.same(function, *seven, logits_dtype=torch.float, indices=INDICES)
    # sgl-deep-gemm 0.2.5, vLLM: indices
    calls.same(function, *seven, INDICES)
    calls.same(function, *seven, None)
    calls.same(function, *seven, indices=None)
    # q as a tensor, (q, None), [q, None]
    calls.same(function, (seven[0], None), *seven[1:])
    calls.same(function, [seven[0], None], *seven[1:])
    names = ("q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len")
    calls.same(function, **dict(zip(names, seven)))


def test_fp8_paged(paged: tuple[Calls, tuple]) -> None:
    calls, seven = paged
    function = deep_gemm.fp8_paged_mqa_logits
    calls.same(function, *seven)
    calls.same(function, *seven, True, clean=True)
    calls.same(function, *seven, False, INDICES)
    calls.same(function, *seven, INDICES)
    calls.same(function, *seven, clean_logits=False, indices=None)


def test_fp8_fp4_ragged(ragged: tuple[Calls, tuple]) -> None:
    calls, five = ragged
    function = deep_gemm.fp8_fp4_mqa_logits
    # main, nv_dev, sgl-deep-gemm 0.2.3: clean_logits, max_seqlen_k, logits_dtype, schedule_meta
    calls.same(function, *five)
    calls.same(function, *five, False)
    calls.same(function, *five, True, clean=True)
    calls.same(function, *five, True, 16, clean=True, columns=16)
    calls.same(function, *five, False, 16, torch.bfloat16, columns=16, dtype=torch.bfloat16)
    calls.same(function, *five, clean_logits=False, max_seqlen_k=12, logits_dtype=torch.float32, columns=12)
    calls.same(function, *five, False, 0, torch.float32, INDICES)
    calls.same(function, *five, schedule_meta=INDICES)
    # sgl-deep-gemm 0.2.5, vLLM: max_seqlen_k, schedule_meta
    calls.same(function, *five, 16, columns=16)
    calls.same(function, *five, 0)
    calls.same(function, *five, 16, INDICES, columns=16)
    calls.same(function, *five, 16, None, columns=16)
    calls.same(function, *five, 16, schedule_meta=INDICES, columns=16)
    # the bounds under either name
    q, kv, weights, ks, ke = five
    calls.same(function, q, kv, weights, ks=ks, ke=ke)
    calls.same(function, q, kv, weights, cu_seq_len_k_start=ks, cu_seq_len_k_end=ke, max_seqlen_k=16, columns=16)
    calls.same(function, (q, None), kv, weights, ks, ke=ke)


def test_fp8_ragged(ragged: tuple[Calls, tuple]) -> None:
    calls, five = ragged
    function = deep_gemm.fp8_mqa_logits
    q, kv, weights, ks, ke = five
    calls.same(function, *five)
    calls.same(function, *five, True, clean=True)
    calls.same(function, *five, True, 16, clean=True, columns=16)
    calls.same(function, *five, clean_logits=False, max_seqlen_k=16, columns=16)
    calls.same(function, *five, 16, columns=16)
    calls.same(function, q, kv, weights, ks=ks, ke=ke)
    calls.same(function, q, kv, weights, cu_seq_len_k_start=ks, cu_seq_len_k_end=ke)


@pytest.mark.parametrize("block_kv", [64, 0])
def test_sparse(block_kv: int) -> None:
    """By position and by keyword."""
    problem = Sparse([40, 0, 100], heads=16, block_kv=block_kv, weights_dtype=torch.float32)
    ids, lists = torch.zeros(3, dtype=torch.int32), problem.lists
    if block_kv:
        make, score = deep_gemm.get_paged_sparse_mqa_logits_metadata, deep_gemm.fp8_fp4_paged_sparse_mqa_logits
        names = "context_lens", "block_table", "indices", "page_kv"
        first = (problem.context_lens, problem.block_table, ids, 64)
        keys = {"kv_cache": problem.kv_cache}
    else:
        make, score = deep_gemm.get_sparse_mqa_logits_metadata, deep_gemm.fp8_fp4_sparse_mqa_logits
        names = "cu_seq_len_k_start", "cu_seq_len_k_end", "num_kv_tokens"
        first = (problem.ks, problem.ke, problem.keys)
        keys = {"kv": problem.kv}
    by_name = dict(zip(names, first), sparse_kv_block_indices=lists, qk_dtype=torch.int8, sparse_block_kv=8)
    metadata = make(*first, lists, torch.int8, 8)
    for call in (
        lambda out: score(problem.q, *keys.values(), problem.weights, metadata, 16, 8, out=out),
        lambda out: score(
            q=list(problem.q),
            **keys,
            weights=problem.weights,
            metadata=make(**by_name),
            num_max_sparse_blocks=16,
            sparse_block_kv=8,
            out=out,
        ),  # fmt: skip
    ):
        out = poisoned(3, 128, torch.bfloat16)
        assert call(out) is out
        check(out, problem.expected())


def test_contradictions_are_refused(paged: tuple[Calls, tuple], ragged: tuple[Calls, tuple]) -> None:
    _, seven = paged
    _, five = ragged
    q, kv, weights, ks, ke = five
    for call in (
        lambda: deep_gemm.fp8_fp4_paged_mqa_logits(*seven, 4096),  # vLLM's ragged form on the paged function
        lambda: deep_gemm.fp8_fp4_paged_mqa_logits(*seven, INDICES, indices=INDICES),
        lambda: deep_gemm.fp8_paged_mqa_logits(*seven, 0),
        lambda: deep_gemm.fp8_paged_mqa_logits(*seven, INDICES, INDICES),
        lambda: deep_gemm.fp8_fp4_mqa_logits(*five, 16, 16),
        lambda: deep_gemm.fp8_fp4_mqa_logits(*five, INDICES),
        lambda: deep_gemm.fp8_fp4_mqa_logits(*five, None),
        lambda: deep_gemm.fp8_mqa_logits(*five, 16, 8),
        lambda: deep_gemm.fp8_mqa_logits(q, kv, weights, ke=ke, ks=ks, cu_seq_len_k_start=ks),
    ):
        with pytest.raises(ArgumentError):
            call()
    for call in (
        lambda: deep_gemm.fp8_mqa_logits(q, kv, weights),
        lambda: deep_gemm.fp8_mqa_logits(*five, False, 0, torch.float32),
        lambda: deep_gemm.fp8_paged_mqa_logits(*seven, False, None, torch.empty(3, 150)),
    ):
        with pytest.raises(TypeError):
            call()


def test_clean_logits_is_off_by_default(paged: tuple[Calls, tuple], ragged: tuple[Calls, tuple]) -> None:
    """As in sgl-deep-gemm 0.2.3, the generation that this wheel stands for."""
    out = poisoned(3, 150)
    deep_gemm.fp8_fp4_paged_mqa_logits(*paged[1], out=out)
    assert (out[1] == POISON).all()
    out = poisoned(3, 20)
    deep_gemm.fp8_mqa_logits(*ragged[1], out=out)
    assert (out[1] == POISON).all()


class TestSGLang:
    """DeepSeek-V4 in SGLang 0.5.23, and DeepSeek-V3.2 / GLM-5."""

    @FORMATS
    def test_decode(self, fp4: bool, device: str) -> None:
        problem = Paged([[40], [0], [100]], fp4=fp4, device=device, max_context_len=4096)
        lens = problem.context_lens.view(-1)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lens.view(-1, 1), 64, deep_gemm.get_num_sms())
        cache = problem.kv_cache
        assert cache.stride() == ((4352, 68, 68, 1) if fp4 else (8448, 132, 132, 1))
        function = deep_gemm.fp8_fp4_paged_mqa_logits if fp4 else deep_gemm.fp8_paged_mqa_logits
        logits = function(
            problem.q, cache, problem.weights, problem.context_lens, problem.block_table, schedule, 4096, False
        )
        assert logits.shape == (3, 4096) and logits.stride(0) % 4 == 0
        expected = problem.expected().cpu()
        inside = expected != -torch.inf
        check(torch.where(inside, logits.cpu(), POISON), expected)

    def test_ragged_without_max_seqlen_k(self, device: str) -> None:
        problem = Ragged([0, 0, 7], [5, 20, 7], 20, device=device)
        q, kv, weights, ks, ke = problem.arguments()
        logits = deep_gemm.fp8_mqa_logits(q, kv, weights, ks, ke, clean_logits=False)
        assert logits.shape[1] == 20
        inside = problem.expected().cpu() != -torch.inf
        check(torch.where(inside, logits.cpu(), POISON), problem.expected().cpu())

    @pytest.mark.parametrize("page", [64, 128])
    def test_v41_decode(self, page: int, device: str) -> None:
        """The candidate source scores densely in fp32, the layers after it what it has listed, in bf16."""
        problem = Sparse([900, 0, 4000], width=64, block_kv=page, device=device)
        seq_lens, page_table = problem.context_lens, problem.block_table
        schedule = deep_gemm.get_paged_mqa_logits_metadata(seq_lens.unsqueeze(-1), page, deep_gemm.get_num_sms())
        dense = deep_gemm.fp8_fp4_paged_mqa_logits(
            problem.q, problem.kv_cache, problem.weights.float(), seq_lens.unsqueeze(-1), page_table, schedule, 4096,
            False, logits_dtype=torch.float32,
        )  # fmt: skip
        request_ids = torch.arange(3, dtype=torch.int32, device=device)
        sparse_schedule = deep_gemm.get_paged_sparse_mqa_logits_metadata(
            seq_lens.contiguous(), page_table, request_ids, page, problem.lists, torch.int8, 8
        )
        larger = torch.empty(sparse_schedule.numel() + 1000, dtype=torch.uint8, device=device)
        larger[: sparse_schedule.shape[0]].copy_(sparse_schedule)
        q_fp4, q_sf = problem.q
        logits = deep_gemm.fp8_fp4_paged_sparse_mqa_logits(
            (q_fp4, q_sf), problem.kv_cache, problem.weights, larger, 64, 8
        )
        assert logits.dtype == torch.bfloat16 and logits.shape == (3, 512) and logits.stride(0) % 512 == 0
        expected = problem.expected().cpu()
        check(torch.where(expected != -torch.inf, logits.cpu(), POISON), expected)
        listed = problem.lists[2].long()
        assert torch.equal(dense[2].view(-1, 8)[listed].bfloat16().flatten()[:504], logits[2, :504])


class TestVLLM:
    """vLLM 0.33.0: q is always a pair, paged takes seven arguments and at most `indices` by name, ragged takes
    max_seqlen_k sixth. On its own wrappers: client_vllm.py."""

    @FORMATS
    def test_paged(self, fp4: bool, device: str) -> None:
        problem = Paged([[40, 41], [0, 0], [100, 101]], next_n=2, fp4=fp4, device=device)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 170)
        captured = torch.zeros_like(schedule)
        captured[:] = schedule
        q, *rest = problem.arguments(captured)
        logits = deep_gemm.fp8_fp4_paged_mqa_logits(q if fp4 else (q, None), *rest)
        inside = problem.expected().cpu() != -torch.inf
        check(torch.where(inside, logits.cpu(), POISON), problem.expected().cpu())

    def test_rows_of_one_request(self, device: str) -> None:
        problem = Paged([[40], [41], [100]], device=device)
        indices = torch.tensor([0, 0, 1], dtype=torch.int32, device=device)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(problem.context_lens, 64, 170, indices=indices)
        q, *rest = problem.arguments(schedule)
        logits = deep_gemm.fp8_fp4_paged_mqa_logits((q, None), *rest, indices=indices)
        inside = problem.expected().cpu() != -torch.inf
        check(torch.where(inside, logits.cpu(), POISON), problem.expected().cpu())

    @FORMATS
    def test_ragged(self, fp4: bool, device: str) -> None:
        problem = Ragged([0, 0, 7], [5, 20, 7], 20, fp4=fp4, device=device)
        q, kv, weights, ks, ke = problem.arguments()
        logits = deep_gemm.fp8_fp4_mqa_logits(q if fp4 else (q, None), kv, weights, ks, ke, 20)
        assert logits.shape == (3, 20)
        expected = problem.expected(20).cpu()
        check(torch.where(expected != -torch.inf, logits.cpu(), POISON), expected)

    @pytest.mark.parametrize("stride", [0, 8704 * 3])
    def test_v41_decode(self, stride: int, device: str) -> None:
        """Pages of 128, far apart: other layers' lie between. The default is dense, with the rest masked."""
        problem = Sparse([900, 901, 0, 130], width=64, block_kv=128, padding=stride, tail="last", device=device)
        lens, indices = problem.context_lens.view(-1, 1), torch.tensor([0, 0, 1, 2], dtype=torch.int32, device=device)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, 128, 170, indices=indices)
        dense = deep_gemm.fp8_fp4_paged_mqa_logits(
            problem.q,
            problem.kv_cache,
            problem.weights.float(),
            lens,
            problem.block_table,
            schedule,
            1024,
            indices=indices,
        )
        metadata = deep_gemm.get_paged_sparse_mqa_logits_metadata(
            lens, problem.block_table, indices, 128, problem.lists, torch.int8, 8
        )
        logits = deep_gemm.fp8_fp4_paged_sparse_mqa_logits(
            problem.q, problem.kv_cache, problem.weights, metadata, 64, 8
        )
        expected = problem.expected().cpu()
        check(torch.where(expected != -torch.inf, logits.cpu(), POISON), expected)
        listed = problem.lists[0].long()
        assert torch.equal(dense[0].view(-1, 8)[listed].bfloat16().flatten()[:504], logits[0, :504])

    def test_v41_prefill(self, device: str) -> None:
        problem = Sparse([90, 91, 400], block_kv=0, starts=[3, 3, 0], unaligned=True, tail="last", device=device)
        metadata = deep_gemm.get_sparse_mqa_logits_metadata(
            problem.ks, problem.ke, problem.keys, problem.lists, torch.int8, 8, use_unaligned_ks=True
        )
        logits = deep_gemm.fp8_fp4_sparse_mqa_logits(
            problem.q, problem.kv, problem.weights, metadata, 16, 8, use_unaligned_ks=True
        )
        expected = problem.expected().cpu()
        check(torch.where(expected != -torch.inf, logits.cpu(), POISON), expected)
