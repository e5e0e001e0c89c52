"""SGLang 0.5.23: its indexers of DeepSeek-V4, V4.1, V3.2 and GLM-5 on our kernels, on SM12x.

Logits     V4's are taken from `deep_gemm` without a variable, unless the user set one of the two that choose.
Top-k      the functions that SGLang calls after each kind of logits do what they say of their arguments with ours.
In one     decode's logits wait until SGLang asks for top-k, and both are one call; V3.2's layer is taken as a whole.
V4.1       the candidate indexer, which SGLang makes on SM100 alone, is made, and calls our sparse functions.
           Source: dense logits with the maxima of blocks in the same pass, top-k, the lists of blocks with their pages.
           Consumers: from the lists to the choice in one call.

Each function below has the arguments of SGLang's own. SGLang's plans for its top-k are made all the same: ours needs
none, but SGLang's may still be asked.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .hooks import Around, Hook, Plugin, Unfit, ours, serves

MOST = 2048  # the largest k
VARIABLES = ("SGLANG_FP8_PAGED_MQA_LOGITS_TORCH", "SGLANG_OPT_USE_TILELANG_INDEXER")  # either keeps SGLang's logits
FUSED = "fp8_fp4_paged_mqa_topk"
SPARSE = ("get_paged_sparse_mqa_logits_metadata", "fp8_fp4_paged_sparse_mqa_logits")
TOPK = "sglang.kernels.ops.attention.dsv4.topk"
V41 = "sglang.srt.layers.attention.dsv4.v41_indexer"


@contextlib.contextmanager
def choose_logits(server_args: Any) -> Iterator[bool]:
    """V4's logits by deep_gemm: what a user of SM120 had to set. SGLang sets its defaults where nothing is set."""
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_platform

    choose = get_platform().is_sm120 and not any(getattr(envs, name).is_set() for name in VARIABLES)
    if choose:
        for name in VARIABLES:
            getattr(envs, name).set(False)
    yield choose


def topk_transform_paged(scores, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices=None):
    """V4's top-k of fp32 logits, as pool slots and, if asked for, positions."""
    k = out_page_indices.shape[1]
    if not serves(scores.device) or k > MOST:
        return NotImplemented
    ours().topk(
        scores,
        seq_lens,
        k,
        block_table=page_tables,
        page=page_size,
        out=out_page_indices,
        positions=out_raw_indices,
    )
    return None


def topk_transform_paged_v2(scores, seq_lens, page_tables, out_page_indices, page_size, metadata, out_raw_indices=None):
    """The same with a plan; without a page table, positions alone."""
    if page_tables is None:
        page_size = 1
    return topk_transform_paged(scores, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices)


def topk_transform_ragged_v2(scores, seq_lens, *, out_offsets, out_indices, row_starts=None):
    """Prefill over one run of keys: positions within the row's window, plus the row's offset."""
    k = out_indices.shape[1]
    if not serves(scores.device) or k > MOST:
        return NotImplemented
    ours().topk(scores, seq_lens, k, starts=row_starts, offset=out_offsets, out=out_indices)
    return None


def topk_transform_bf16_small(scores, seq_lens, page_table, out_page_indices, page_size):
    """V4.1's consumers: bf16 scores of candidate blocks, mapped through the blocks."""
    return topk_transform_paged(scores, seq_lens, page_table, out_page_indices, page_size)


def topk_transform(
    self,
    logits,
    lengths,
    topk,
    topk_transform_method,
    attn_metadata,
    cu_seqlens_q_topk=None,
    topk_indices_offset=None,
    row_starts=None,
    batch_idx_list=None,
    force_unfused_topk=False,
):
    """V3.2's and GLM-5's top-k, where the backend is SGLang's own kernels (its default)."""
    import torch
    from sglang.srt.environ import envs

    if not self.is_sgl_kernel() or not serves(logits.device) or topk > MOST:
        return NotImplemented
    if len(lengths) != len(logits):
        return NotImplemented
    if force_unfused_topk or not envs.SGLANG_DSA_FUSE_TOPK.get():
        return ours().topk(logits, lengths, topk, starts=row_starts)
    if topk_transform_method.name == "RAGGED":
        if topk_indices_offset is None or len(topk_indices_offset) != len(logits):
            return NotImplemented
        return ours().topk(logits, lengths, topk, starts=row_starts, offset=topk_indices_offset)
    table = attn_metadata.real_page_table
    if row_starts is None and batch_idx_list is None and len(table) == len(logits):
        return ours().topk(logits, lengths, topk, block_table=table, page=attn_metadata.page_size)
    # A prefill whose rows have no table of their own: the slots are looked up in their requests' wide tables.
    requests = attn_metadata.token_to_batch_idx if batch_idx_list is None else batch_idx_list
    if not isinstance(requests, torch.Tensor) or len(requests) != len(logits) or attn_metadata.page_table_1 is None:
        return NotImplemented
    positions = ours().topk(logits, lengths, topk, starts=row_starts)
    slots = attn_metadata.page_table_1[requests.long()[:, None], positions.clamp_min(0).long()]
    return torch.where(positions >= 0, slots, -1)


class Pending:
    """Paged logits that are not computed yet: SGLang hands them to its top-k unread, and ours does both at once."""

    def __init__(self, hook: Hook, function: Callable, arguments: tuple, options: dict) -> None:
        self.hook, self.function, self.arguments, self.options = hook, function, arguments, options
        self.dtype = options.get("logits_dtype")  # all that SGLang asks of them on the way

    def logits(self) -> Any:
        return self.function(*self.arguments, **self.options)

    def choose(self, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices=None) -> bool:
        """The choice from keys and queries, if the top-k is over what the logits are of; else nothing is done."""
        q, cache, weights, lens, table, schedule, columns = self.arguments[:7]
        rows, k = out_page_indices.shape
        tokens = rows // max(len(table), 1)  # rows of a request: every so many rows of top-k's table is the logits'
        if not (
            lens.data_ptr() == seq_lens.data_ptr()
            and lens.numel() == seq_lens.numel() == rows
            and table.data_ptr() == page_tables.data_ptr()
            and (len(table) * tokens, table.shape[1]) == page_tables.shape
            and (table.stride(0) == tokens * page_tables.stride(0) or rows == 1)
            and cache.shape[1] == page_size
            and k <= MOST
        ):
            return False
        ours().fp8_fp4_paged_mqa_topk(
            q,
            cache,
            weights,
            lens,
            table,
            schedule,
            columns,
            k,
            translate=True,
            out=out_page_indices,
            positions=out_raw_indices,
        )
        return True


_in_this_thread = threading.local()  # .logits: what becomes of those that SGLang asks for now
PENDING, MAXIMA = "they go to top-k, and nowhere else", "the maxima of their blocks are wanted too"


@contextlib.contextmanager
def _logits(wanted: str | None) -> Iterator[bool]:
    _in_this_thread.logits = wanted
    try:
        yield wanted is not None
    finally:
        _in_this_thread.logits = None


class Logits(Hook):
    """A function of `deep_gemm`, where SGLang is about to ask for what comes after the logits: gives Pending, or logits
    with `.maxima`."""

    def __init__(self, target: str) -> None:
        super().__init__(target, None, None)

    def __call__(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        wanted = getattr(_in_this_thread, "logits", None) if self.active else None
        if wanted is PENDING and len(args) == 8 and args[7] is False:
            return Pending(self, original, args, kwargs)
        if wanted is MAXIMA:
            maxima = _room_for_maxima(len(args[2]), args[6], args[2].device)
            logits = original(*args, **kwargs, block_max=maxima)
            logits.maxima = maxima
            if not self.used:
                self.tell()
            return logits
        return original(*args, **kwargs)


def _room_for_maxima(rows: int, columns: int, device: Any) -> Any:
    """Those of blocks of 8 logits; rows lie 16 bytes apart, as SGLang's kernels want them."""
    import torch

    return torch.empty(rows, -(-columns // 32) * 4, dtype=torch.float32, device=device)[:, : -(-columns // 8)]


class AfterLogits(Hook):
    """A top-k of SGLang's whose scores may be Pending. After an error of both at once they are made one by one."""

    def __call__(self, original: Callable, scores: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(scores, Pending):
            without_plan = args[:4] + args[5:] if self.path == "topk_transform_paged_v2" else args
            try:
                if scores.choose(*without_plan, **kwargs):
                    if not scores.hook.used:
                        scores.hook.tell()
                    return None
            except Exception as error:
                scores.hook.refuse(error)
            scores = scores.logits()
        return super().__call__(original, scores, *args, **kwargs)


def _pending(possible: bool) -> contextlib.AbstractContextManager[bool]:
    return _logits(PENDING if possible and hasattr(ours(), FUSED) else None)


def fuse_v4(self, x, *_: Any, **__: Any) -> contextlib.AbstractContextManager[bool]:
    """V4's logits and top-k in one, where SGLang's own kernels would choose."""
    return _pending(serves(x.device) and self.dsa_topk_backend.is_sgl_kernel())


def fuse_v41(self, inputs) -> contextlib.AbstractContextManager[bool]:
    """V4.1's layers outside the candidate scheme."""
    return _pending(serves(inputs.out_page_indices.device))


def get_topk_paged(self, forward_batch, layer_id, q_fp8, weights, metadata):
    """V3.2's and GLM-5's decode and verify: logits and top-k in one, of however many rows."""
    import torch
    from sglang.srt.environ import envs
    from sglang.srt.layers.attention.dsa import dsa_indexer
    from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata

    if not (
        serves(q_fp8.device)
        and hasattr(ours(), FUSED)
        and type(metadata) is DSAIndexerMetadata
        and metadata.topk_backend.is_sgl_kernel()
        and metadata.topk_transform_method.name == "PAGED"
        and not metadata.force_unfused_topk
        and metadata.paged_mqa_schedule_metadata is not None
        and metadata.paged_mqa_ctx_lens_2d is not None
        and envs.SGLANG_DSA_FUSE_TOPK.get()
        and not envs.SGLANG_FP8_PAGED_MQA_LOGITS_TORCH.get()
        and self.paged_mqa_logits_backend.is_deepgemm()
        and self.num_init_tokens == self.num_local_tokens == 0
        and self.index_topk <= MOST
    ):
        return NotImplemented
    # One length for each row, as SGLang has them on SM12x: those of its SM100 form are no bounds for top-k.
    pool, lens, table = dsa_indexer.get_token_to_kv_pool(), metadata.paged_mqa_ctx_lens_2d, metadata.get_page_table_64()
    rows = sum(metadata.get_dsa_extend_len_cpu())
    if not rows or lens.shape != (rows, 1) or len(table) != rows or pool.index_page_size != 64:
        return NotImplemented
    cache = self._get_index_k_read_buffer(pool, layer_id)
    chosen = torch.empty((len(q_fp8), self.index_topk), dtype=torch.int32, device=q_fp8.device)
    chosen[rows:] = -1  # padding of the hidden states
    ours().fp8_fp4_paged_mqa_topk(
        q_fp8[:rows].unsqueeze(1),
        cache.view(len(cache), 64, 1, 132),
        weights[:rows].squeeze(2),
        lens,
        table,
        metadata.paged_mqa_schedule_metadata,
        table.shape[1] * 64,
        self.index_topk,
        translate=True,
        out=chosen[:rows],
    )
    return chosen


def publish_decode(self, inputs) -> contextlib.AbstractContextManager[bool]:
    """V4.1's source in decode and verify: its logits are asked for, then top-k, then the two functions below."""
    return _logits(MAXIMA if LISTS.active and serves(inputs.out_page_indices.device) else None)


def amax_topk_blocks(logits, seq_lens, nblocks, topk_blocks, max_seq_len=None):
    """The best blocks of each row: their choice waits until SGLang asks for them as lists, which is next."""
    import torch

    if not hasattr(logits, "maxima") or not LISTS.active or topk_blocks > MOST:
        return NotImplemented
    logits.maxima.record_stream(torch.cuda.current_stream())  # not the one of the logits
    blocks = torch.empty(len(logits), topk_blocks, dtype=torch.int32, device=logits.device)
    blocks.waits_for = logits.maxima, nblocks
    return blocks


def sort_candidate_blocks(blocks, seq_lens, page_table, page_size, *, out_pages=None):
    """The lists of blocks: ascending and, in the result, as places in the cache."""
    import torch
    from sglang.kernels.ops.attention.dsv4.candidate_blocks import plan_topk_v2, topk_transform_paged_v2

    if hasattr(blocks, "pages"):
        return vars(blocks).pop("pages")  # publish_prefill_table has made both
    if not hasattr(blocks, "waits_for"):
        return NotImplemented  # SGLang chose them
    maxima, nblocks = vars(blocks).pop("waits_for")  # which are not kept as long as the lists are
    pages = torch.empty_like(blocks) if out_pages is None else out_pages
    try:
        _list_blocks(maxima, seq_lens, page_table, page_size, blocks, pages)
    except Exception:  # chosen as SGLang does, which then sorts them
        topk_transform_paged_v2(maxima, nblocks, None, blocks, 1, plan_topk_v2(nblocks))
        raise
    return pages


def _list_blocks(maxima, lens, page_table, page_size, blocks, pages) -> None:
    ours().candidate_blocks(
        maxima, lens, blocks.shape[1], block_table=page_table, page=page_size, out=blocks, pages=pages
    )


def publish_prefill_table(*, data, kv, index_page_table, index_page_size, topk_blocks, out_positions):
    """V4.1's source in a prefill: out of each tile of logits its own top-k and the lists of blocks."""
    import torch
    from sglang.srt.layers.attention.dsv4.v41_indexer import sparse_table as theirs

    rows, k, device = data.num_rows, out_positions.shape[1], out_positions.device
    if not serves(device) or max(k, topk_blocks) > MOST:
        return NotImplemented
    # Maxima that come with the logits are of blocks of the run of all keys, SGLang's are of each request's: the same
    # where requests begin at multiples of 8, as a lone one does. Else SGLang's kernel reads the logits for them.
    aligned = not any(start % 8 for start in itertools.accumulate(data.lens_per_request[:-1]))
    blocks, pages = torch.empty(2, rows, topk_blocks, dtype=torch.int32, device=device)
    with _logits(MAXIMA if aligned else None):
        for tile, logits in theirs.score_tiles(data, kv):
            lens = data.compress_lens[tile]
            ours().topk(logits, lens, k, out=out_positions[tile])
            maxima = getattr(logits, "maxima", None)
            if maxima is None:
                maxima = theirs.amax8_varlen(logits, lens, out=_room_for_maxima(*logits.shape, device))
            _list_blocks(maxima, lens, index_page_table[tile], index_page_size, blocks[tile], pages[tile])
            del logits, maxima  # before the next tile's
    blocks.pages = pages
    return theirs._build_prefill_table(
        blocks=blocks,
        compress_lens=data.compress_lens,
        page_table=index_page_table,
        page_size=index_page_size,
        request_ids=theirs._row_pair_ids(data.rows_per_request, device=device),
        rows_per_request=data.rows_per_request,
        q_dtype=data.q_fp4.dtype,
        valid_lens=theirs.candidate_row_lens(data.compress_lens, topk_blocks)[1],
    )


def consume_decode(self, inputs, published):
    """V4.1's consumers in decode and verify: from the lists to places in the cache."""
    import torch
    from sglang.srt.layers.attention.dsv4.v41_indexer import sparse_table as theirs

    out, lens = inputs.out_page_indices, inputs.paged_metadata.compressed_seq_lens.reshape(-1)
    if not serves(out.device) or published is None:
        return NotImplemented
    data = theirs.get_deep_gemm_decode_data(inputs, self.token_to_kv_pool)
    torch.cuda.current_stream().wait_event(published.ready)
    query = data.q_fp4, data.q_sf
    _choose_among_blocks(query, data.k_cache, data.weights, published, lens, out, translate=True)
    return None


def select_prefill_table(*, table, data, k_cache, out_positions):
    """The same in a prefill, to positions. (Under a graph SGLang asks for both of one row of logits, and its table has
    no lengths: there our logits are followed by our top-k twice.)"""
    if not serves(out_positions.device):
        return NotImplemented
    query = data.q_fp4.unsqueeze(1), data.q_sf.unsqueeze(1)
    _choose_among_blocks(query, k_cache, data.weights, table, table.compress_lens, out_positions, translate=False)
    return None


def _choose_among_blocks(query, cache, weights, table, lens, out, translate: bool) -> None:
    """In one call, and with the weights as they are, which SGLang rounds to bf16 first."""
    width, k = table.blocks.shape[1], out.shape[1]
    ours().fp8_fp4_paged_sparse_mqa_topk(
        query, cache, weights, table.schedule, width, 8, table.blocks, lens, k, translate=translate, out=out
    )


@contextlib.contextmanager
def open_candidates(candidate_topk_blocks: int, **_: Any) -> Iterator[bool]:
    """The gate of V4.1's candidate indexer, which asks for SM100, stands open while the indexer is made, if all that
    the indexer calls is ours."""
    from sglang.srt.environ import envs
    from sglang.srt.layers.deep_gemm_wrapper import configurer
    from sglang.srt.runtime_context import get_platform

    if configurer.DEEPGEMM_PAGED_SPARSE_MQA_LOGITS or candidate_topk_blocks <= 0 or not get_platform().is_sm120:
        yield False  # open already, or a model without candidates
        return
    missing = [hook.path for hook in CANDIDATES if not hook.active]
    if missing or not envs.SGLANG_ENABLE_JIT_DEEPGEMM.get():
        raise Unfit(f"not without {', '.join(missing)}" if missing else "SGLANG_ENABLE_JIT_DEEPGEMM=0")
    if not all(hasattr(ours(), name) for name in SPARSE):
        raise Unfit(f"deep_gemm.sm120 has not all of {', '.join(SPARSE)}")
    configurer.DEEPGEMM_PAGED_SPARSE_MQA_LOGITS = True
    try:
        yield True
    finally:
        configurer.DEEPGEMM_PAGED_SPARSE_MQA_LOGITS = False


LISTS = Hook(
    "sglang.kernels.ops.attention.dsv4.candidate_table:sort_candidate_blocks",
    "(blocks, seq_lens, page_table, page_size, *, out_pages=None)",
    sort_candidate_blocks,
)
CANDIDATES = [
    AfterLogits(
        f"{TOPK}:topk_transform_paged",
        "(scores, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices=None)",
        topk_transform_paged,
    ),
    AfterLogits(
        f"{TOPK}:topk_transform_paged_v2",
        "(scores, seq_lens, page_tables, out_page_indices, page_size, metadata, out_raw_indices=None)",
        topk_transform_paged_v2,
    ),
    Hook(
        f"{TOPK}:topk_transform_ragged_v2",
        "(scores, seq_lens, *, out_offsets, out_indices, row_starts=None)",
        topk_transform_ragged_v2,
    ),
    Hook(
        f"{TOPK}:topk_transform_bf16_small",
        "(scores, seq_lens, page_table, out_page_indices, page_size)",
        topk_transform_bf16_small,
    ),
    Hook(
        "sglang.kernels.ops.attention.dsv4.candidate_blocks:amax_topk_blocks",
        "(logits, seq_lens, nblocks, topk_blocks, max_seq_len=None)",
        amax_topk_blocks,
    ),
    LISTS,
    Around(f"{V41}.sparse_table:SparseTableBackend.publish_decode", "(self, inputs)", publish_decode),
]

PLUGIN = Plugin(
    "sglang",
    "0.5.23",
    [
        Around("sglang.srt.arg_groups.model_hook:handle_model_specific_adjustments", "(server_args)", choose_logits),
        *CANDIDATES,
        Hook(
            "sglang.srt.layers.attention.dsa.dsa_indexer:Indexer._get_topk_paged",
            "(self, forward_batch, layer_id, q_fp8, weights, metadata)",
            get_topk_paged,
        ),
        Hook(
            "sglang.srt.layers.attention.dsa.dsa_topk_backend:DSATopKBackend.topk_transform",
            "(self, logits, lengths, topk, topk_transform_method, attn_metadata, cu_seqlens_q_topk=None, "
            "topk_indices_offset=None, row_starts=None, batch_idx_list=None, force_unfused_topk=False)",
            topk_transform,
        ),
        Logits("deep_gemm:fp8_paged_mqa_logits"),
        Logits("deep_gemm:fp8_fp4_paged_mqa_logits"),
        Logits("deep_gemm:fp8_fp4_mqa_logits"),
        Around(
            "sglang.srt.layers.attention.dsv4.indexer:C4IndexerBackendMixin.forward_c4_indexer",
            "(self, x, q_lora, c4_indexer, forward_batch, alt_streams=None, enable_multi_stream=False, "
            "q_lora_ready=None, skip_compressor=False, q_lora_quant=None)",
            fuse_v4,
        ),
        Around(f"{V41}.full_topk:FullTopKIndexer._deep_gemm_decode", "(self, inputs)", fuse_v41),
        Around(
            f"{V41}:make_candidate_indexer",
            "(*, token_to_kv_pool, req_to_token, page_size, candidate_topk_blocks, candidate_block_size)",
            open_candidates,
        ),
        Hook(
            f"{V41}.sparse_table:publish_prefill_table",
            "(*, data, kv, index_page_table, index_page_size, topk_blocks, out_positions)",
            publish_prefill_table,
        ),
        Hook(f"{V41}.sparse_table:SparseTableBackend.consume_decode", "(self, inputs, published)", consume_decode),
        Hook(
            f"{V41}.sparse_table:select_prefill_table",
            "(*, table, data, k_cache, out_positions)",
            select_prefill_table,
        ),
    ],
    "python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V4-Flash --trust-remote-code --tp 2",
)
register = PLUGIN.register
