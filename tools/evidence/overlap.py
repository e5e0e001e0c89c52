"""What other instructions cost beside an MMA on the card at hand.

    python tools/evidence/overlap.py

Clocks of a sub-partition for one `mma.sync.m16n8k16.f32.f16.f16.f32` (form x1 of the stand-in, substitute.py) and n
FP32 instructions after it, in a loop of eight of these, all independent of each other. If they overlapped, n would not
show before it reaches the MMA's own interval.
"""

from __future__ import annotations

import struct
import sys

import peer
import torch
from silicon_card import Function, architecture

TURNS, MMAS = 512, 8
OTHERS = {
    "FFMA": ("fma.rn.f32 %0, %0, %1, %2;",) * 2,
    "FMNMX": ("max.NaN.f32 %0, %0, %1;",) * 2,
    "half each": ("max.NaN.f32 %0, %0, %1;", "fma.rn.f32 %0, %0, %1, %2;"),
}
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


def source(others: str, count: int) -> str:
    even, odd = OTHERS[others]
    return SOURCE.replace("COUNT", str(count)).replace("EVEN", even).replace("ODD", odd)


def main() -> int:
    if not torch.cuda.is_available():
        print("This needs a GPU.")
        return 1
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    clocks = torch.zeros(sms, dtype=torch.int64, device="cuda")
    sink = torch.zeros(1024, device="cuda")
    arguments = struct.pack("Q", clocks.data_ptr()), struct.pack("Q", sink.data_ptr()), struct.pack("i", TURNS)
    counts = range(7)
    print("| warps of a sub-partition | beside an MMA |", *(f"{n} |" for n in counts))
    print("| --- | --- |", *("---: |" for _ in counts))
    for warps in (3, 4):
        for others in OTHERS:
            row = []
            for count in counts:
                cubin = peer.build(source(others, count), "probe", [f"--gpu-architecture={architecture()}"], {}).cubin
                call = Function("probe", cubin).bind((sms, 1, 1), 128 * warps, *arguments)
                call()
                call()
                torch.cuda.synchronize()
                row.append(float(clocks.double().median()) / (TURNS * MMAS * warps))
            print(f"| {warps} | {others} |", *(f"{clock:.1f} |" for clock in row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
