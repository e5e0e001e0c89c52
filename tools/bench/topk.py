"""Top-k beside SGLang's kernels and torch.topk: `python tools/bench/topk.py [--quick]`; on a GPU, real time.

SGLang's sources come out of its wheel on PyPI (pinned, fetched into the cache folder, not part of this repository) and
are compiled by nvcc without their host halves:
    v1              what SGLang runs on SM120: one block a row, k up to 1,024
    v2              its newer kernels without clusters, which is what SM120 would get
    v2 (clusters)   for the record: SM90's form, for few long rows
Both are asked for pages of 64, as in serving; so are we. Each time is the median over replays of a CUDA graph of
launches that take turns over eight inputs, divided by the launches.
"""

import argparse
import ctypes
import functools
import os
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "sm120"))

from deep_gemm import sm120  # noqa: E402
from deep_gemm.sm120 import reference  # noqa: E402
from deep_gemm.sm120.jit import Kernel, cache, launch  # noqa: E402
from deep_gemm.sm120.kernels.windows import Windows  # noqa: E402

PINNED = ("sglang==0.5.23", "apache-tvm-ffi==0.1.15.post2")
INPUTS = 8
PAGE = 64
ROWS = (1, 4, 16, 64, 256)
COLUMNS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
KS = (512, 1024, 2048)

Launch = Callable[[], None]

# ---- SGLang's -------------------------------------------------------------------------------------------------------

_HEAD_ENDS = "template <bool kUsePDL>\nstruct TopKKernel"  # what follows is host code
_KERNELS = {
    "v1": "template __global__ void topk_transform_kernel<true>(const __grid_constant__ TopKParams);",
    "v2": "\n".join(
        f"template __global__ void topk_main_kernel<true, {level}, TopKMode::PAGE_TABLE>"
        "(const __grid_constant__ TopKPagedParams);"
        for level in (0, 1, 2)
    )
    + "\n#if SUPPORT_CLUSTER\ntemplate __global__ void topk_small_batch_cluster_kernel"
    "<true, TopKMode::PAGE_TABLE, 8, 2>(const __grid_constant__ TopKPagedParams);\n#endif",
}


class V1Params(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("scores", "lengths", "table", "out", "positions")] + [
        ("score_stride", ctypes.c_int64), ("table_stride", ctypes.c_int64),
        ("page_bits", ctypes.c_uint32), ("k", ctypes.c_uint32),
    ]  # fmt: skip


class V2Params(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("scores", "lengths", "table", "out", "positions", "plan")] + [
        ("score_stride", ctypes.c_int64), ("table_stride", ctypes.c_int64), ("k", ctypes.c_uint32),
        ("page_bits", ctypes.c_uint32), ("cluster_floor", ctypes.c_uint32), ("rows", ctypes.c_uint32),
        ("out_stride", ctypes.c_int64), ("token_lengths", ctypes.c_void_p), ("offsets", ctypes.c_void_p),
        ("pool_bits", ctypes.c_uint32), ("columns", ctypes.c_uint32),
    ]  # fmt: skip


def sources() -> Path:
    """The folder with SGLang's and tvm-ffi's sources, fetched where they are not there yet (`DG_PEER_SOURCES`)."""
    folder = Path(os.environ.get("DG_PEER_SOURCES", cache.folder() / "peers" / PINNED[0]))
    if not (folder / "sglang").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), *PINNED]
        subprocess.run(command, check=True)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                wanted = ("sglang/kernels/jit/", "tvm_ffi/include/")
                archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])
    return folder


@functools.cache
def peer(version: str) -> dict[str, object]:
    """SGLang's kernels of a version, by a part of their mangled names."""
    from cuda.bindings import driver

    folder = sources()
    jit = folder / "sglang/kernels/jit"
    text = (jit / f"csrc/deepseek_v4/topk_{version}.cuh").read_text()
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}{'a' if major >= 9 else ''}"
    source, cubin = (folder / f"{version}.{suffix}" for suffix in ("cu", f"{arch}.cubin"))
    source.write_text(text[: text.index(_HEAD_ENDS)] + _KERNELS[version] + "\n}  // namespace sglang\n")
    command = ["nvcc", "-cubin", f"-arch={arch}", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-w"]
    command += [
        f"-I{jit / 'include'}",
        f"-I{folder / 'tvm_ffi/include'}",
        f"-DSGL_CUDA_ARCH={major * 100 + minor * 10}",
    ]
    subprocess.run([*command, "-o", str(cubin), str(source)], check=True)
    torch.cuda.current_stream().synchronize()
    error, module = driver.cuModuleLoadData(cubin.read_bytes())
    assert not error, error
    _, count = driver.cuModuleGetFunctionCount(module)
    _, functions = driver.cuModuleEnumerateFunctions(count, module)
    found = {driver.cuFuncGetName(function)[1].decode(): function for function in functions}
    for function in found.values():
        largest = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.cuFuncSetAttribute(function, largest, 65540 if version == "v1" else 0)
    return found


def _start(function: object, grid: tuple[int, int], shared: int, parameters: ctypes.Structure) -> None:
    from cuda.bindings import driver

    pointer = ctypes.c_void_p(ctypes.addressof(parameters))
    stream = torch.cuda.current_stream().cuda_stream
    arguments = (*grid, 1, 1024, 1, 1, shared, stream, ctypes.addressof(pointer), 0)
    (error,) = driver.cuLaunchKernel(function, *arguments)
    assert not error, error


def _named(version: str, part: str) -> object:
    return next(function for name, function in peer(version).items() if part in name)


def v1(logits: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> Launch | None:
    if out.shape[1] > 1024:
        return None
    p = V1Params(logits.data_ptr(), lengths.data_ptr(), table.data_ptr(), out.data_ptr(), None)
    p.score_stride, p.table_stride, p.page_bits, p.k = logits.stride(0), table.stride(0), 6, out.shape[1]
    function = _named("v1", "topk_transform_kernel")
    return lambda: _start(function, (len(logits), 1), 65540, p)


def _v2(logits, lengths, table, out) -> V2Params:
    p = V2Params(logits.data_ptr(), lengths.data_ptr(), table.data_ptr(), out.data_ptr(), None, None)
    p.score_stride, p.table_stride, p.k, p.page_bits = logits.stride(0), table.stride(0), out.shape[1], 6
    p.cluster_floor, p.rows, p.out_stride, p.columns = 2**32 - 1, len(logits), out.shape[1], out.shape[1]
    return p


def v2(logits: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> Launch:
    p = _v2(logits, lengths, table, out)
    level = 0 if logits.shape[1] <= 8192 else 1 if logits.shape[1] <= 16384 else 2
    function = _named("v2", f"topk_main_kernelILb1ELi{level}E")
    return lambda: _start(function, (len(logits), 1), 0, p)


def v2_clusters(logits: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> Launch | None:
    if torch.cuda.get_device_capability()[0] not in (9, 10) or len(logits) > 30 or logits.shape[1] <= 32768:
        return None
    p = _v2(logits, lengths, table, out)
    p.cluster_floor = 32768
    function = _named("v2", "topk_small_batch_cluster_kernel")
    return lambda: _start(function, (len(logits), 8), 0, p)


# ---- ours, torch's --------------------------------------------------------------------------------------------------


def ours(logits: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> Launch:
    size = sm120.topk_workspace_bytes(*logits.shape, out.shape[1])
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    return lambda: sm120.topk(logits, lengths, out.shape[1], block_table=table, page=PAGE, out=out, workspace=workspace)


def torch_topk(logits: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> Launch | None:
    if logits.shape[1] < out.shape[1]:
        return None
    values, indices = torch.topk(logits, out.shape[1], sorted=False)
    return lambda: torch.topk(logits, out.shape[1], sorted=False, out=(values, indices))


ALL = {"ours": ours, "v1": v1, "v2": v2, "v2 (clusters)": v2_clusters, "torch": torch_topk}

# ---- measuring ------------------------------------------------------------------------------------------------------


def time(launches: list[Launch], repeats: int = 7) -> float:
    """us a launch: the median over replays of a graph."""
    for start in launches:
        start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for start in launches * (-(-24 // len(launches))):
            start()
    count = len(launches) * (-(-24 // len(launches)))
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # until all of the replay is on its way
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def empty_kernel() -> Launch:
    kernel, device = Kernel("empty", "window.cuh", "", 32, Windows), torch.device("cuda", torch.cuda.current_device())
    return lambda: launch(kernel, device, (1, 1), Windows(), {}, {})


class Problem:
    """Inputs that take turns, out of one buffer of random scores."""

    def __init__(self, rows: int, columns: int, k: int, inputs: int = INPUTS) -> None:
        pool = _pool(rows * columns * inputs)
        self.logits = pool[: rows * columns * inputs].view(inputs, rows, columns)
        self.lengths = torch.full((rows,), columns, dtype=torch.int32, device="cuda")
        pages = -(-columns // PAGE)
        self.table = torch.randperm(rows * pages, device="cuda").int().view(rows, pages)
        self.out = torch.empty((inputs, rows, k), dtype=torch.int32, device="cuda")

    def launches(self, make: Callable) -> list[Launch] | None:
        made = [make(logits, self.lengths, self.table, out) for logits, out in zip(self.logits, self.out)]
        return None if made[0] is None else made

    def check(self) -> None:
        """What was launched last: the sums of the chosen places tell."""
        for logits, out in zip(self.logits[:1], self.out[:1]):
            for row in range(0, len(logits), max(1, len(logits) // 4)):
                columns = reference.topk(logits[row : row + 1].cpu(), [logits.shape[1]], out.shape[1])[0]
                positions = torch.tensor(columns)
                table = self.table[row].cpu()
                expected = table[positions // PAGE].long() * PAGE + positions % PAGE
                assert torch.equal(out[row].cpu().long().sort().values, expected.sort().values), "wrong"


_scores: list[torch.Tensor] = []


def _pool(size: int) -> torch.Tensor:
    if not _scores or _scores[0].numel() < size:
        _scores[:] = []
        _scores.append(torch.randn(size, device="cuda"))
    return _scores[0]


def compare(rows: int, columns: int, k: int, inputs: int = INPUTS) -> dict[str, float]:
    """us by name."""
    problem = Problem(rows, columns, k, inputs)
    times = {}
    for name, make in ALL.items():
        if columns >= k and (launches := problem.launches(make)) is not None:
            problem.out.fill_(-7)
            times[name] = time(launches)
            if name == "ours":
                problem.check()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="k 512 and fewer sizes")
    arguments = parser.parse_args()
    ks, widths = ((512,), COLUMNS[::2]) if arguments.quick else (KS, COLUMNS)
    torch.manual_seed(0)
    _pool(INPUTS * ROWS[-1] * COLUMNS[-1])
    print(f"{torch.cuda.get_device_name()}; an empty kernel {time([empty_kernel()] * 8):.2f} us")
    for k in ks:
        for rows in ROWS:
            for columns in widths:
                if columns > k:
                    _print(rows, columns, k, compare(rows, columns, k))
    for k in ks:
        for columns in (1024, 4096, 16384, 65536):
            if columns > k:
                times = compare(4096, columns, k, 2)
                _print(4096, columns, k, times, f"  ours reads {4096 * columns * 4 / times['ours'] / 1e6:.2f} TB/s")


def _print(rows: int, columns: int, k: int, times: dict[str, float], more: str = "") -> None:
    cells = "  ".join(f"{name} {us:.1f}" for name, us in times.items())
    print(f"{rows:5} x {columns:6}, k {k:4}: {cells}{more}", flush=True)


if __name__ == "__main__":
    main()
