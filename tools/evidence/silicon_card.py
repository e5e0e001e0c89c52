"""What `silicon.py` does with a card: it loads and launches cubins, times graphs of launches, and measures the card."""

from __future__ import annotations

import ctypes
import functools
import itertools
import statistics
import struct
from collections.abc import Callable

import peer
import torch
from cuda.bindings import driver
from substitute import GEOMETRY, NATIVE, Tree

REPLAYS = 7


def architecture() -> str:
    """What to compile for on the current device."""
    major, minor = torch.cuda.get_device_capability()
    return GEOMETRY if major == 12 else f"sm_{major}{minor}a"


# ---- the driver -----------------------------------------------------------------------------------------------------


def checked(result: tuple):
    """What a driver's call returned, or its error raised."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver: {error.name}")
    return values[0] if values else None


class Function:
    """A kernel of a cubin, loaded on the current device."""

    def __init__(self, name: str, cubin: bytes, shared_bytes: int = 0) -> None:
        self.shared_bytes = shared_bytes
        library = checked(driver.cuLibraryLoadData(cubin, None, None, 0, None, None, 0))
        kernel = checked(driver.cuLibraryGetKernel(library, name.encode()))
        if shared_bytes > 48 << 10:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, torch.cuda.current_device()))
        self.handle = driver.CUfunction(int(kernel))

    def bind(
        self, grid: tuple[int, int, int], threads: int, *arguments: bytes, overlap: bool = False
    ) -> Callable[[], None]:
        """The call that launches it on the current stream; with `overlap` its blocks are set up while the kernel before
        it still runs (programmatic dependent launch)."""
        values = [ctypes.create_string_buffer(argument, len(argument)) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], int(overlap)

        def call(_=values) -> None:
            config.hStream = torch.cuda.current_stream().cuda_stream
            checked(driver.cuLaunchKernelEx(config, self.handle, ctypes.addressof(pointers), 0))

        return call


def encode(described: peer.TensorMap) -> bytes:
    """The 128 bytes of a tensor map."""
    kinds = driver.CUtensorMapDataType
    swizzle = f"{described.swizzle}B" if described.swizzle else "NONE"
    made = driver.cuTensorMapEncodeTiled(
        {1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8, 4: kinds.CU_TENSOR_MAP_DATA_TYPE_INT32}[described.element_bytes],
        len(described.dims),
        described.address,
        [driver.cuuint64_t(size) for size in described.dims],
        [driver.cuuint64_t(max(16, -(-stride // 16) * 16)) for stride in described.strides[1:]],
        [driver.cuuint32_t(size) for size in described.box],
        [driver.cuuint32_t(1)] * len(described.dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(checked(made).getPtr(), 128)


class PeerKernels:
    """Loads and launches the peer's kernels; `cubin_of` has the symbol and the cubin of a kernel in a form."""

    def __init__(self, cubin_of: Callable[[peer.Kernel, str], tuple[str, bytes]], overlap: bool = False) -> None:
        self.cubin_of, self.overlap = cubin_of, overlap
        self.functions: dict[tuple[str, peer.Kernel], Function] = {}

    def bind(self, launch: peer.Launch, form: str) -> Callable[[], None]:
        """The call that launches it on the current stream."""
        key = (form, launch.kernel)
        if key not in self.functions:
            self.functions[key] = Function(*self.cubin_of(launch.kernel, form), launch.kernel.shared_bytes)
        arguments = (encode(a) if isinstance(a, peer.TensorMap) else struct.pack(*a) for a in launch.arguments)
        return self.functions[key].bind(launch.grid, launch.kernel.threads, *arguments, overlap=self.overlap)


# ---- time -----------------------------------------------------------------------------------------------------------


class Clock:
    """Times graphs of launches."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.zeros(3 * l2 // 4, dtype=torch.int32, device=device)
        self.side = torch.cuda.Stream(device)

    def capture(self, calls: list[Callable], launches: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.side):
            graph.capture_begin(capture_error_mode="thread_local")
            for call in itertools.islice(itertools.cycle(calls), launches):
                call()
            graph.capture_end()
        return graph

    def time(self, calls: list[Callable], launches: int) -> float:
        """Microseconds of one launch. The last call goes ahead of each replay, so that the kernel's code is there."""
        turns = calls[:-1] or calls
        for call in calls:
            call()
        torch.cuda.synchronize()
        first, graph = self.capture(calls[-1:], 1), self.capture(turns, launches)
        marks = []
        torch.cuda.synchronize()
        with torch.cuda.stream(self.side):
            graph.replay()
            for _ in range(REPLAYS):
                self.flush.sum()
                first.replay()
                marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                marks[-1][0].record()
                graph.replay()
                marks[-1][1].record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in marks) * 1e3 / launches


# ---- what the card can do ------------------------------------------------------------------------------------------


def empty_us(clock: Clock, sms: int) -> float:
    """Microseconds of a kernel that does nothing."""
    source = 'extern "C" __global__ void empty() {}'
    empty = Function("empty", peer.build(source, "empty", [f"--gpu-architecture={architecture()}"], {}).cubin)
    return clock.time([empty.bind((sms, 1, 1), 384)], 24)


MMAS = 8  # in a turn of the loop, each with an operand of its own: else ptxas takes the second of x2s out of the loop
PROBE = """
#include "ptx.cuh"
extern "C" __global__ __launch_bounds__(512, 1) void probe(long long* clocks, float* sink, int turns) {
    uint32 a[8][4], b[2];
    for (int i = 0; i < 32; ++i) a[i / 4][i %% 4] = (threadIdx.x * 40503u + i * 2654435761u) & 0x3bff3bff;
    for (int i = 0; i < 2; ++i) b[i] = (threadIdx.x * 2246822519u + i) & 0x3bff3bff;
    float sums[%(chains)d][4] = {};
    __syncthreads();
    const long long begin = clock64();
    #pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const uint32 signs = uint32(turn) * 2654435761u & 0x80008000;
        const uint32 b0 = b[0] ^ signs, b1 = b[1] ^ signs;
        #pragma unroll
        for (int i = 0; i < 8; ++i) ptx::mma_e4m3_block_scaled(sums[i %% %(chains)d], a[i], b0, b1, 0x7f7f7f7f);
    }
    __syncthreads();
    const long long end = clock64();
    float all = 0;
    for (int c = 0; c < %(chains)d; ++c) all += sums[c][0] + sums[c][1] + sums[c][2] + sums[c][3];
    sink[blockIdx.x * blockDim.x + threadIdx.x] = all;
    if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
}
"""


def probe(tree: Tree, form: str, chains: int) -> bytes:
    """A cubin that does nothing but MMAs, on so many sums."""
    arch = GEOMETRY if form == NATIVE else tree.arch
    options = [f"--gpu-architecture={arch}", "--std=c++17"]
    return peer.build(PROBE % {"chains": chains}, "probe", options, tree.headers(form)).cubin


def mma_figures(tree: Tree, form: str, sms: int, device: torch.device) -> dict[str, float]:
    """Of one MMA as a form has it: clocks of a sub-partition, clocks from one to the next that depends on it, and how
    many a second the whole card does."""
    clocks = torch.zeros(sms, dtype=torch.int64, device=device)
    sink = torch.zeros(sms * 512, device=device)
    turns, found = 4096, {}
    arguments = struct.pack("Q", clocks.data_ptr()), struct.pack("Q", sink.data_ptr()), struct.pack("i", turns)
    for name, chains, threads in (("interval", MMAS, 512), ("latency", 1, 32)):
        call = Function("probe", probe(tree, form, chains)).bind((sms, 1, 1), threads, *arguments)
        call()
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        call()
        marks[1].record()
        torch.cuda.synchronize()
        per_partition = turns * MMAS * max(1, threads // 128)
        found[name] = float(clocks.double().median()) / per_partition
        if name == "interval":
            found["rate"] = sms * turns * MMAS * threads / 32 / (marks[0].elapsed_time(marks[1]) * 1e-3)
    return found


def copy_times(clock: Clock, device: torch.device) -> dict[int, float]:
    """Microseconds that a pass takes which reads and writes so many bytes in all, half of them each."""
    times = {}
    for size in (1 << n for n in range(16, 31, 2)):
        sets = min(24, max(4, -(-(192 << 20) // size))) + 1
        buffers = torch.zeros((sets, 2, size // 8), dtype=torch.int32, device=device)
        times[size] = clock.time(
            [functools.partial(torch.neg, a, out=b) for a, b in buffers], 24 if size < 1 << 26 else 12
        )
    return times
