"""Host time of a call, from Python to the launch.

    python tools/bench/host_time.py [calls]

The driver is the tests' stand-in (tests/standin), which does nothing with a launch, under the real cuda.bindings; the
tensors lie on the CPU. What is left is what a caller waits for before his next line: checks, allocation of the output,
packing, look-up, cuda.bindings. PyTorch's queries for current stream and device are left out (0.1 us each on a GPU).
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
BATCH = 8


def main(calls: int = 2000) -> None:
    from standin.driver import Standin

    standin = Standin()
    standin.without_emulator()
    for name, call in cases().items():
        print(f"{name:44}{median_time(call, calls):6.1f} us")


def cases() -> dict[str, Callable[[], object]]:
    """The calls of a decode step of DeepSeek-V4, and of a prefill."""
    import torch
    from problems import Paged, Ragged

    import deep_gemm

    out = torch.empty(BATCH, 1000)
    found: dict[str, Callable[[], object]] = {}
    for fp4 in (False, True):
        kind = "FP4" if fp4 else "FP8"
        paged = Paged([[1000]] * BATCH, fp4=fp4)
        plan = partial(deep_gemm.get_paged_mqa_logits_metadata, paged.context_lens, 64, 188)
        paged_logits = deep_gemm.fp8_fp4_paged_mqa_logits if fp4 else deep_gemm.fp8_paged_mqa_logits
        decode = partial(paged_logits, *paged.arguments(plan()))
        logits = deep_gemm.fp8_fp4_mqa_logits if fp4 else deep_gemm.fp8_mqa_logits
        prefill = partial(logits, *Ragged([0] * BATCH, [1000] * BATCH, 1000, fp4=fp4).arguments())
        found |= {
            "metadata": plan,
            f"{kind} paged, out given": partial(decode, out=out),
            f"{kind} paged, cleaned, out given": partial(decode, clean_logits=True, out=out),
            f"{kind} paged": decode,
            f"{kind} ragged, out given": partial(prefill, out=out),
        }
    return found


def median_time(call: Callable[[], object], calls: int) -> float:
    """Microseconds; the median over rounds of 100 calls."""
    for _ in range(100):
        call()
    rounds = []
    for _ in range(max(calls // 100, 5)):
        start = time.perf_counter()
        for _ in range(100):
            call()
        rounds.append((time.perf_counter() - start) * 1e4)
    return statistics.median(rounds)


if __name__ == "__main__":
    for folder in ("sm120", "tests"):
        sys.path.insert(0, str(ROOT / folder))
    if "STANDIN" not in os.environ:  # the library must be in sight before the process starts
        from standin.driver import build

        os.environ |= {"STANDIN": "1", "LD_LIBRARY_PATH": str(build())}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main(*map(int, sys.argv[1:]))
