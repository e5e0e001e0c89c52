"""The Lightning Indexer's kernels for SM120 and SM121 (and, from the same source, SM89, SM90 and SM100).

Reading order: `attention.py` (the functions: checks, plan, launch), `kernels/logits.py` beside `kernels/logits.cuh`,
then `jit/` and, for tensors on the CPU, `emulator/`.
"""

from .attention import (
    fp8_fp4_mqa_logits,
    fp8_fp4_paged_mqa_logits,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    get_paged_mqa_logits_metadata,
)
from .checks import ArgumentError
from .prepare import warmup
from .settings import get_num_sms, get_pdl, set_num_sms, set_pdl

__all__ = [
    "ArgumentError",
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
    "get_pdl",
    "set_num_sms",
    "set_pdl",
    "warmup",
]
