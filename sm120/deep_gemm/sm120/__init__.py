"""The Lightning Indexer's kernels for SM120 and SM121 (and, from the same source, SM89, SM90 and SM100).

    logits[i, n] = sum_h weights[i, h] * relu(sum_d q[i, h, d] * k[n, d])          scales applied to q and k

FP8: q is e4m3, its scale folded into the weights; k is e4m3 times one fp32 scale a token. FP4: q and k are e2m1, two
to a byte, low nibble first, times 2^(byte - 127) for every 32 elements; the scale bytes of a row stand in one int32,
byte j for elements 32j to 32j + 31. Sums are fp32. (DeepSeek-V3.2-Exp report, section 2; the formats are DeepGEMM's.)

relu keeps a NaN, as torch's does: a NaN (or, with a weight of zero, an infinity) in a key that a row sees makes that
one logit NaN. Keys that no row sees may hold anything.

Nothing is differentiated: results require no grad, whatever the arguments do.

Reading order: `paged.py`, `ragged.py`, `sparse.py`, `topk.py` (the functions, one file a family; each one: check,
allocate, configure, launch) with `arguments.py`; `kernels/logits.py`, which launches `kernels/paged.cuh` and
`kernels/ragged.cuh`; then `jit/` and, for tensors on the CPU, `emulator/`.
"""

from .checks import ArgumentError
from .paged import fp8_fp4_paged_mqa_logits, fp8_paged_mqa_logits, get_paged_mqa_logits_metadata
from .prepare import warmup
from .ragged import fp8_fp4_mqa_logits, fp8_mqa_logits
from .settings import get_num_sms, get_pdl, set_num_sms, set_pdl
from .sparse import (
    fp8_fp4_paged_sparse_mqa_logits,
    fp8_fp4_sparse_mqa_logits,
    get_paged_sparse_mqa_logits_metadata,
    get_sparse_mqa_logits_metadata,
)
from .topk import (
    candidate_blocks,
    fp8_fp4_mqa_topk,
    fp8_fp4_paged_mqa_topk,
    fp8_fp4_paged_sparse_mqa_topk,
    mqa_topk_workspace_bytes,
    sparse_mqa_topk_workspace_bytes,
    topk,
    topk_workspace_bytes,
)

__all__ = [
    "ArgumentError",
    "candidate_blocks",
    "fp8_fp4_mqa_logits",
    "fp8_fp4_mqa_topk",
    "fp8_fp4_paged_mqa_logits",
    "fp8_fp4_paged_mqa_topk",
    "fp8_fp4_paged_sparse_mqa_logits",
    "fp8_fp4_paged_sparse_mqa_topk",
    "fp8_fp4_sparse_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
    "get_paged_sparse_mqa_logits_metadata",
    "get_pdl",
    "get_sparse_mqa_logits_metadata",
    "mqa_topk_workspace_bytes",
    "set_num_sms",
    "set_pdl",
    "sparse_mqa_topk_workspace_bytes",
    "topk",
    "topk_workspace_bytes",
    "warmup",
]
