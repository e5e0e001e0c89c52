"""What other instructions cost beside an MMA on the card at hand.

    python tools/evidence/overlap.py

Clocks of a sub-partition for one MMA as the stand-in's forms have it (substitute.py) and n FP32 instructions beside it,
in a loop of eight of these, all independent of each other. If they overlapped, n would not show before it reaches the
MMA's own interval.
"""

from __future__ import annotations

import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import peer
import torch
from silicon_card import Function, architecture
from substitute import FORMS, replace_mma

TURNS, MMAS, COUNTS, WARPS = 512, 8, range(9), (3, 4)
OTHERS = {
    "FFMA": ("fma.rn.f32 %0, %0, %1, %2;",) * 2,
    "FMNMX": ("max.NaN.f32 %0, %0, %1;",) * 2,
    "half each": ("max.NaN.f32 %0, %0, %1;", "fma.rn.f32 %0, %0, %1, %2;"),
}
# A turn's operands differ from those of the turn before: else ptxas takes x2s's second MMA out of the loop.
SOURCE = """
extern "C" __global__ __launch_bounds__(512, 1) void probe(long long* clocks, float* sink, int turns) {
    unsigned a[8][4], b[2];
    float sums[8][4] = {}, x[16];
    for (int i = 0; i < 32; ++i) a[i / 4][i % 4] = (threadIdx.x * 40503u + i * 2654435761u) & 0x3bff3bff;
    for (int i = 0; i < 2; ++i) b[i] = (threadIdx.x * 2246822519u + i) & 0x3bff3bff;
    for (int i = 0; i < 16; ++i) x[i] = threadIdx.x * 0.25f + i;
    const float v = sink[threadIdx.x], w = sink[threadIdx.x + 512];
    __syncthreads();
    const long long begin = clock64();
    #pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        b[0] ^= 0x80008000;
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                         "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
                         : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[0]), "r"(b[1]));
            #pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                float& y = x[(i * COUNT + j) % 16];
                if (j % 2) asm volatile("ODD" : "+f"(y) : "f"(v), "f"(w));
                else asm volatile("EVEN" : "+f"(y) : "f"(v), "f"(w));
            }
        }
    }
    __syncthreads();
    const long long end = clock64();
    float all = 0;
    for (int i = 0; i < 32; ++i) all += sums[i / 4][i % 4] + x[i % 16];
    sink[threadIdx.x] = all;
    if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
}
"""


def source(others: str, count: int, form: str = FORMS[0]) -> str:
    even, odd = OTHERS[others]
    return replace_mma(SOURCE, form).replace("COUNT", str(count)).replace("EVEN", even).replace("ODD", odd)


def measure() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Clocks by form, warps of a sub-partition and kind of the other instructions, for each number of these."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    clocks = torch.zeros(sms, dtype=torch.int64, device="cuda")
    sink = torch.zeros(1024, device="cuda")
    arguments = struct.pack("Q", clocks.data_ptr()), struct.pack("Q", sink.data_ptr()), struct.pack("i", TURNS)
    probes, options = list(product(FORMS, OTHERS, COUNTS)), [f"--gpu-architecture={architecture()}"]
    with ThreadPoolExecutor() as workers:
        texts = [source(others, count, form) for form, others, count in probes]
        built = list(workers.map(lambda text: peer.build(text, "probe", options, {}).cubin, texts))
    found = {form: {str(warps): {others: [] for others in OTHERS} for warps in WARPS} for form in FORMS}
    for (form, others, _), cubin in zip(probes, built, strict=True):
        function = Function("probe", cubin)
        for warps in WARPS:
            call = function.bind((sms, 1, 1), 128 * warps, *arguments)
            call()
            call()
            torch.cuda.synchronize()
            found[form][str(warps)][others].append(float(clocks.double().median()) / (TURNS * MMAS * warps))
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("This needs a GPU.")
        return 1
    print("| form | warps of a sub-partition | beside an MMA |", *(f"{n} |" for n in COUNTS))
    print("| --- | --- | --- |", *("---: |" for _ in COUNTS))
    for form, by_warps in measure().items():
        for warps, by_others in by_warps.items():
            for others, row in by_others.items():
                print(f"| {form} | {warps} | {others} |", *(f"{clock:.1f} |" for clock in row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
