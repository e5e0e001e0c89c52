"""Kernels of the benchmark's own, for what the card can do: reads, reads of rows that are answered, and MMAs."""

from __future__ import annotations

import ctypes
import functools

import torch

from deep_gemm.sm120.jit import Kernel, launch


class ProbeParams(ctypes.Structure):
    _fields_ = [("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("count", ctypes.c_int64)]


class RowsParams(ctypes.Structure):
    _fields_ = [
        ("input", ctypes.c_void_p), ("output", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("rows", "vectors", "results")),
    ]  # fmt: skip


class Probe(Kernel):
    """A kernel of this file's own, compiled and launched like the package's."""

    @property
    def source(self) -> str:
        struct = self.parameters.__name__
        return (
            '#include "ptx.cuh"\nstruct ProbeParams { const uint8* input; uint32* output; int64 count; };\n'
            "struct RowsParams { const uint8* input; uint32* output; int rows, vectors, results; };\n"
            f'static_assert(sizeof({struct}) == {ctypes.sizeof(self.parameters)}, "as in the launcher");\n'
            f'extern "C" __global__ __launch_bounds__({self.threads}, 1)\n'
            f"void {self.name}(const __grid_constant__ {struct} p) {{\n"
            "    [[maybe_unused]] const int64 id = int64(blockIdx.x) * blockDim.x + threadIdx.x;\n"
            f"{self.body}\n}}\n"
        )


_READS = 8  # of 16 bytes, by a thread at once

READ = Probe(
    "read_all",
    "ptx.cuh",
    f"""
    const int64 threads = int64(gridDim.x) * blockDim.x;
    uint32 all = 0;
    for (int64 turn = 0; turn < p.count; ++turn) {{
        uint32 words[{_READS}][4];
        #pragma unroll
        for (int i = 0; i < {_READS}; ++i) {{
            ptx::load<4>(words[i], p.input + 16 * (id + threads * (turn * {_READS} + i)));
        }}
        #pragma unroll
        for (int i = 0; i < {_READS}; ++i) all ^= words[i][0] ^ words[i][1] ^ words[i][2] ^ words[i][3];
    }}
    p.output[id] = all;""",
    1024,
    ProbeParams,
)


@functools.cache
def read_rows(threads: int) -> Probe:
    """What a choice of each row cannot leave out: a block reads a row and stores as many words as are chosen of it; a
    small grid goes from row to row."""
    body = f"""
    ptx::griddepcontrol();
    for (int row = blockIdx.x; row < p.rows; row += gridDim.x) {{
        const uint8* begin = p.input + int64(row) * p.vectors * 16;
        uint32 all = 0;
        for (int first = threadIdx.x; first < p.vectors; first += {_READS * threads}) {{
            uint32 words[{_READS}][4] = {{}};
            #pragma unroll
            for (int i = 0; i < {_READS}; ++i) {{
                const int at = first + i * {threads};
                if (at < p.vectors) ptx::load<4>(words[i], begin + int64(at) * 16);
            }}
            #pragma unroll
            for (int i = 0; i < {_READS}; ++i) all ^= words[i][0] ^ words[i][1] ^ words[i][2] ^ words[i][3];
        }}
        for (int i = threadIdx.x; i < p.results; i += {threads}) p.output[int64(row) * p.results + i] = all;
    }}"""
    return Probe(f"read_rows_{threads}", "ptx.cuh", body, threads, RowsParams)


_CHAINS = 8  # independent sums of a warp
_MMA = {  # name: (instruction, k)
    "fp8_plain": ("ptx::mma_e4m3(sums[c], a, b0, b1)", 32),
    "fp8_block_scaled": ("ptx::mma_e4m3_block_scaled(sums[c], a, b0, b1, 0x7f7f7f7f)", 32),
    "fp4": ("ptx::mma_e2m1<0, 0, 0>(sums[c], a, b0, b1, 0x7f7f7f7f, 0x7f7f7f7f)", 64),
}


@functools.cache
def mma_loop(name: str) -> Probe:
    """Nothing but MMAs on random numbers: `count` turns of _CHAINS in each of 16 warps.

    Every chain has a `b` of its own and every turn other signs: where the instruction is emulated (SM90: the product
    first, then a plain addition) the compiler would else multiply once and only add in the loop (24 Nov 2026).
    """
    body = f"""
    uint32 a[4], b[{_CHAINS}][2];
    #pragma unroll
    for (int i = 0; i < 4 + 2 * {_CHAINS}; ++i) {{
        uint32 word = uint32(id * (4 + 2 * {_CHAINS}) + i + 1) * 2654435761u;
        word = (word ^ word >> 15) * 2246822519u & 0xf7f7f7f7;    // no NaN among them
        (i < 4 ? a[i] : b[(i - 4) / 2][i % 2]) = word;
    }}
    float sums[{_CHAINS}][4] = {{}};
    for (int64 turn = 0; turn < p.count; ++turn) {{
        const uint32 signs = uint32(turn) * 2654435761u & 0x80808080;
        #pragma unroll
        for (int c = 0; c < {_CHAINS}; ++c) {{
            const uint32 b0 = b[c][0] ^ signs, b1 = b[c][1] ^ signs;
            {_MMA[name][0]};
        }}
    }}
    float all = 0;
    #pragma unroll
    for (int c = 0; c < {_CHAINS}; ++c) all += sums[c][0] + sums[c][1] + sums[c][2] + sums[c][3];
    p.output[id] = __float_as_uint(all);"""
    return Probe(f"mma_{name}", "ptx.cuh", body, 512, ProbeParams)


def mma_flops(name: str, blocks: int, turns: int) -> int:
    return blocks * (512 // 32) * turns * _CHAINS * 2 * 16 * 8 * _MMA[name][1]


def mma_kinds(arch: str) -> list[str]:
    return ["fp8_plain", "fp8_block_scaled", "fp4"] if arch.startswith("sm_12") else ["fp8_plain"]


def run_probe(kernel: Probe, blocks: int, source: torch.Tensor, sink: torch.Tensor, count: int) -> None:
    parameters = ProbeParams(source.data_ptr(), sink.data_ptr(), count)
    launch(kernel, sink.device, (blocks, 1), parameters, {"input": source}, {"output": sink})


def run_rows(threads: int, blocks: int, source: torch.Tensor, sink: torch.Tensor) -> None:
    """`source` [rows, columns], any 4 bytes each and contiguous; `sink` int32 [rows, results]."""
    (rows, columns), results = source.shape, sink.shape[1]
    parameters = RowsParams(source.data_ptr(), sink.data_ptr(), rows, columns * source.element_size() // 16, results)
    kernel = read_rows(threads)
    launch(kernel, sink.device, (min(blocks, rows), 1), parameters, {"input": source}, {"output": sink})


class Reader:
    """Reads a buffer from end to end: what DRAM gives, and how L2 is emptied of everything else."""

    def __init__(self, at_least: int, device: torch.device, blocks: int) -> None:
        step = blocks * READ.threads * 16 * _READS
        self.turns, self.blocks = -(-at_least // step), blocks
        self.buffer = torch.randint(-(2**31), 2**31 - 1, (self.turns * step // 4,), dtype=torch.int32, device=device)
        self.sink = torch.empty(blocks * READ.threads, dtype=torch.int32, device=device)
        self.bytes = self.turns * step

    def __call__(self) -> None:
        run_probe(READ, self.blocks, self.buffer, self.sink, self.turns)
