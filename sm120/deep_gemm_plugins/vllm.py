"""vLLM 0.33.0: the top-k of its sparse attention indexer on our kernels, on SM12x.

vLLM takes the logits from an installed `deep_gemm` by itself. Each function below has the arguments of vLLM's own.
"""

from .hooks import Hook, Plugin, ours, serves

MOST = 2048  # the largest k


def decode(self, logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len):
    """Decode's top-k, unless the user named a backend for it: `seq_lens` is one length a row, or one a request."""
    if self._backend != "auto" or not serves(logits.device) or topk_tokens > MOST:
        return NotImplemented
    lengths = self._row_ends(seq_lens, next_n, len(logits))
    ours().topk(logits, lengths, topk_tokens, out=topk_indices[: len(logits), :topk_tokens])
    return None


def prefill(logits, cu_seqlen_ks, cu_seqlen_ke, raw_topk_indices, num_rows, stride0, stride1, topk_tokens):
    """Prefill's top-k: row i's columns from cu_seqlen_ks[i] to cu_seqlen_ke[i], as positions from the former on."""
    if not serves(logits.device) or topk_tokens > MOST or len(logits) != num_rows:
        return NotImplemented
    ours().topk(
        logits,
        cu_seqlen_ke - cu_seqlen_ks,
        topk_tokens,
        starts=cu_seqlen_ks,
        out=raw_topk_indices[:num_rows, :topk_tokens],
    )
    return None


PLUGIN = Plugin(
    "vllm",
    "0.33.0",
    [
        Hook(
            "vllm.model_executor.layers.indexer_topk:SparseIndexerTopk.forward",
            "(self, logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len)",
            decode,
        ),
        Hook(
            "vllm._custom_ops:top_k_per_row_prefill",
            "(logits, cu_seqlen_ks, cu_seqlen_ke, raw_topk_indices, num_rows, stride0, stride1, topk_tokens)",
            prefill,
        ),
    ],
    "vllm serve deepseek-ai/DeepSeek-V4-Flash --tensor-parallel-size 2 --kv-cache-dtype fp8 --block-size 256",
)
register = PLUGIN.register
