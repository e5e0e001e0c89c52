"""CUDA C++ compiled by NVRTC, run in the emulator, for each architecture that we build for."""

import numpy as np
import pytest
from emulator_harness import HEADER, RNG

from deep_gemm.sm120.emulator import Buffer, Module

SOURCE = r"""
extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}
extern "C" __global__ void reduce(const float* a, float* sums, int n) {
    __shared__ float partial[256];
    float sum = 0;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) sum += a[i];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int width = 128; width; width /= 2) {
        if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}
extern "C" __global__ void histogram(const unsigned char* a, int* bins, int n) {
    __shared__ int mine[16];
    if (threadIdx.x < 16) mine[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&mine[a[i] % 16], 1);
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&bins[threadIdx.x], mine[threadIdx.x]);
}
extern "C" __global__ void scan(int* a) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, value = a[i];
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(~0u, value, d);
        if (threadIdx.x % 32 >= d) value += other;
    }
    a[i] = value;
}
struct Shape { long long rows; short columns; double scale; };
__device__ double twist(double x, int depth) { return depth ? sin(x) / depth + twist(x * 0.5, depth - 1) : x; }
extern "C" __global__ void transpose(const double* in, double* out, const __grid_constant__ Shape shape) {
    __shared__ double tile[16][17];
    int x = blockIdx.x * 16 + threadIdx.x, y = blockIdx.y * 16 + threadIdx.y;
    if (x < shape.columns && y < shape.rows) tile[threadIdx.y][threadIdx.x] = in[y * shape.columns + x] * shape.scale;
    __syncthreads();
    int u = blockIdx.y * 16 + threadIdx.x, v = blockIdx.x * 16 + threadIdx.y;
    if (u < shape.rows && v < shape.columns) out[v * shape.rows + u] = tile[threadIdx.x][threadIdx.y];
}
extern "C" __global__ void arithmetic(const int* a, const unsigned* b, long long* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int stack[8];
    for (int j = 0; j < 8; ++j) stack[j] = a[(i + j) % n];
    long long total = stack[b[i] % 8];
    total += (long long)(a[i] / (int)(b[i] % 100 + 1)) * (a[i] % 7) + __popc(b[i]) - __clz(b[i])
    + (b[i] << (a[i] & 15));
    switch (b[i] % 6) {
        case 0: total ^= 0x123456789abcll; break;
        case 1: total = -total; break;
        case 2: total *= 3;
        case 3: total += __byte_perm(a[i], b[i], 0x5140); break;
        case 4: total = total / 17; break;
        default: total += (long long)((float)a[i] * 0.5f);
    }
    out[i] = total;
}
"""


def compile_ptx(source: str, arch: str) -> str:
    from cuda.bindings import nvrtc

    def call(function, *arguments):
        error, *results = function(*arguments)
        assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
        return results[0] if results else None

    program = call(nvrtc.nvrtcCreateProgram, source.encode(), b"test.cu", 0, [], [])
    error, *_ = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={arch}".encode()])
    log = bytearray(call(nvrtc.nvrtcGetProgramLogSize, program))
    call(nvrtc.nvrtcGetProgramLog, program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    ptx = bytearray(call(nvrtc.nvrtcGetPTXSize, program))
    call(nvrtc.nvrtcGetPTX, program, ptx)
    return ptx.rstrip(b"\0").decode()


@pytest.fixture(scope="module", params=["sm_120f", "sm_90a", "sm_89", "sm_100a"])
def module(request) -> Module:
    return Module(compile_ptx(SOURCE, request.param))


def launch(module, name, grid, block, arrays, *scalars):
    buffers = [Buffer.of(array, f"{name}{n}") for n, array in enumerate(arrays)]
    return module.launch(name, grid, block, [*(array.ctypes.data for array in arrays), *scalars], buffers)


def test_vector_add(module):
    n = int(RNG.integers(1, 20000))
    a, b = RNG.standard_normal((2, n)).astype(np.float32)
    c = np.full(n, np.nan, np.float32)
    counters = launch(module, "add", -(-n // 192), 192, [a, b, c], n)
    np.testing.assert_array_equal(c, a + b)
    assert counters.bytes_read == {"add0": 4 * n, "add1": 4 * n} and counters.bytes_written == {"add2": 4 * n}


def test_block_reduction(module):
    a, sums = RNG.standard_normal(12345).astype(np.float32), np.zeros(7, np.float32)
    launch(module, "reduce", 7, 256, [a, sums], len(a))
    np.testing.assert_allclose(sums.sum(), a.astype(float).sum(), rtol=1e-4, atol=1e-3)


def test_histogram(module):
    a, bins = RNG.integers(0, 256, 30000).astype(np.uint8), np.zeros(16, np.int32)
    launch(module, "histogram", 5, 200, [a, bins], len(a))
    np.testing.assert_array_equal(bins, np.bincount(a % 16))


def test_scan(module):
    a = RNG.integers(-1000, 1000, 256).astype(np.int32)
    want = np.cumsum(a.reshape(-1, 32), axis=1).reshape(-1)
    launch(module, "scan", 2, 128, [a])
    np.testing.assert_array_equal(a, want)


def test_transpose_with_a_struct(module):
    rows, columns, scale = 37, 29, 1.5
    a, out = RNG.standard_normal((rows, columns)), np.zeros((columns, rows))
    shape = np.array([(rows, columns, scale)], np.dtype("i8, i2, f8", align=True)).tobytes()
    launch(module, "transpose", (2, 3), (16, 16), [a, out], shape)
    np.testing.assert_array_equal(out, a.T * scale)


def test_arithmetic(module):
    n = 1500
    a, b = RNG.integers(-(2**31), 2**31, n).astype(np.int32), RNG.integers(0, 2**32, n).astype(np.uint32)
    out = np.zeros(n, np.int64)
    launch(module, "arithmetic", -(-n // 128), 128, [a, b, out], n)

    def divide(x, y):
        return abs(x) // y * (1 if x >= 0 else -1)

    def scalar(i):
        x, y = int(a[i]), int(b[i])
        total = int(a[(i + y % 8) % n]) + divide(x, y % 100 + 1) * (x - divide(x, 7) * 7)
        total += bin(y).count("1") - (32 - y.bit_length()) + (y << (x & 15)) % 2**32
        case = y % 6
        if case == 0:
            total ^= 0x123456789ABC
        elif case == 1:
            total = -total
        elif case in (2, 3):
            octets = [(y << 32 | x & 0xFFFFFFFF) >> 8 * n & 255 for n in range(8)]
            total = total * 3 if case == 2 else total
            total += octets[0] | octets[4] << 8 | octets[1] << 16 | octets[5] << 24
        elif case == 4:
            total = divide(total, 17)
        else:
            total += int(np.float32(x) * np.float32(0.5))
        return total

    np.testing.assert_array_equal(out, [scalar(i) for i in range(n)])


def test_thousands_of_lines():
    lines = [
        "{ .reg .b32 t; add.u32 t, %r1, 5; mad.lo.s32 %r2, t, %r1, %r3; }",
        "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d1+16];",
    ]
    text = HEADER + ".visible .entry k(.param .u64 p) {\n.reg .b32 %r<9>; .reg .b64 %d<9>;\n"
    text += "\n".join(lines * 1500) + "\nret; }"
    assert len(Module(text).steps("k")) == 3 * 1500 + 1
