"""Who else chooses the k largest of each row, and how each is launched.

    SGLang v1              what SGLang runs on SM120: one block a row, k up to 1,024
    SGLang v2              its newer kernels without clusters, as SM120 gets them
    SGLang v2 (clusters)   for the record: SM90's form, for few long rows
    vLLM persistent        vLLM's decode: blocks of a row meet at a spin barrier
    vLLM per row           vLLM's decode otherwise, and its prefill
    FlashInfer             `top_k_ragged_transform`
    torch                  torch.topk, which takes the whole width and knows no lengths

SGLang's kernels are built by nvcc out of the sources in its wheel, without their host halves; pip fetches the wheel,
pinned by hash, into `DG_PEER_SOURCES` (default: the user's cache folder), never into this repository. They are launched
as SGLang does it: set up while the kernel before still runs (programmatic dependent launch). vLLM's are its compiled
library's, out of the installed package or the wheel that `DG_VLLM_WHEEL` names; FlashInfer builds its own when called.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PAGE = 64
PINS = """\
sglang==0.5.23 --hash=sha256:00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937
apache-tvm-ffi==0.1.15.post2 --hash=sha256:8ecebe749834f6ac0f2693d5964acf9ac75d0bc26e6ba64c46eb7ab00ea50fac
"""
WHEELS = ["--only-binary=:all:", "--python-version=3.11", "--abi=cp311", "--platform=manylinux_2_34_x86_64"]
WHEELS += ["--platform=manylinux_2_28_x86_64"]

Launch = Callable[[], Any]
# Of logits fp32 [rows, columns], lengths int32 [rows], table int32 [rows, pages of 64] and out int32 [rows, k] the call
# to be timed; None where the peer does not do this case.
Bind = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], "Launch | None"]


class Unavailable(RuntimeError):
    """A peer that cannot run here, and why."""


@dataclass(frozen=True)
class Peer:
    bind: Bind
    places: bool = False  # what it writes: places in pages, else positions


# ---- SGLang: building -----------------------------------------------------------------------------------------------

_HOST_HALF = "template <bool kUsePDL>\nstruct TopKKernel"  # and all that follows
_KERNELS = {
    "v1": "template __global__ void topk_transform_kernel<true>(const __grid_constant__ TopKParams);",
    "v2": "".join(
        f"template __global__ void topk_main_kernel<true, {level}, TopKMode::PAGE_TABLE>"
        "(const __grid_constant__ TopKPagedParams);\n"
        for level in (0, 1, 2)
    )
    + "#if SUPPORT_CLUSTER\ntemplate __global__ void topk_small_batch_cluster_kernel"
    "<true, TopKMode::PAGE_TABLE, 8, 2>(const __grid_constant__ TopKPagedParams);\n#endif",
}


def directory() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DG_PEER_SOURCES") or cache / "deep_gemm_peer" / PINS.partition(" ")[0])


def sources() -> Path:
    """The folder with SGLang's and tvm-ffi's sources, fetched where they are not there yet."""
    folder = directory()
    if not (folder / "sglang").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *WHEELS]
        command += [f"--dest={folder}", "--requirement=/dev/stdin"]
        done = subprocess.run(command, input=PINS, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"SGLang's wheel cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        for wheel in sorted(folder.glob("*.whl")):  # SGLang's last: its folder says that all is there
            with zipfile.ZipFile(wheel) as archive:
                wanted = ("sglang/kernels/jit/", "tvm_ffi/include/")
                archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])
            wheel.unlink()
    return folder


def build(version: str, arch: str, kind: str = "cubin") -> bytes:
    """SGLang's kernels of a version for `arch`, as in sm_120a, as cubin or ptx; kept beside the sources."""
    made = directory() / f"{version}.{arch}.{kind}"
    if not made.exists():
        if shutil.which("nvcc") is None:
            raise Unavailable("nvcc, which builds SGLang's kernels, is not installed")
        folder = sources()
        jit = folder / "sglang/kernels/jit"
        text = (jit / f"csrc/deepseek_v4/topk_{version}.cuh").read_text()
        command = ["nvcc", f"-{kind}", f"-arch={arch}", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-w"]
        command += [f"-I{jit / 'include'}", f"-I{folder / 'tvm_ffi/include'}"]
        command += [f"-DSGL_CUDA_ARCH={int(arch[3:].rstrip('af')) * 10}"]
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, binary = Path(work, "kernels.cu"), Path(work, "binary")
            source.write_text(text[: text.index(_HOST_HALF)] + _KERNELS[version] + "\n}  // namespace sglang\n")
            done = subprocess.run([*command, "-o", str(binary), str(source)], capture_output=True, text=True)
            if done.returncode:
                raise Unavailable(f"nvcc does not build SGLang's {version}: {done.stderr.strip().splitlines()[0]}")
            binary.replace(made)
    return made.read_bytes()


# ---- SGLang: launching ----------------------------------------------------------------------------------------------

_THREADS, _V1_SHARED = 1024, 64 * 1024 + 4
_LEVELS = 8192, 16384  # columns that v2's first and second kernel hold in registers; the third streams


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


def _checked(result: tuple) -> Any:
    error, *values = result
    if error:
        raise RuntimeError(f"the driver: {error.name}")
    return values[0] if values else None


@functools.cache
def _functions(version: str) -> dict[str, Any]:
    """SGLang's kernels of a version on the current device, by their mangled names."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability()
    cubin = build(version, f"sm_{major}{minor}{'a' if major >= 9 else ''}")
    torch.cuda.current_stream().synchronize()  # there is a context now
    module = _checked(driver.cuModuleLoadData(cubin))
    functions = _checked(driver.cuModuleEnumerateFunctions(_checked(driver.cuModuleGetFunctionCount(module)), module))
    if version == "v1":
        largest = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for function in functions:
            _checked(driver.cuFuncSetAttribute(function, largest, _V1_SHARED))
    return {_checked(driver.cuFuncGetName(function)).decode(): function for function in functions}


def _launch(version: str, name: str, grid: tuple[int, int], shared: int, parameters: ctypes.Structure) -> Launch:
    from cuda.bindings import driver

    function = next(function for mangled, function in _functions(version).items() if name in mangled)
    pointer = ctypes.c_void_p(ctypes.addressof(parameters))
    overlap, config = driver.CUlaunchAttribute(), driver.CUlaunchConfig()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = _THREADS, 1, 1
    config.sharedMemBytes = shared
    config.attrs, config.numAttrs = [overlap], torch.cuda.get_device_capability() >= (9, 0)

    def call(_=parameters) -> None:
        config.hStream = torch.cuda.current_stream().cuda_stream
        _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointer), 0))

    return call


def sglang_v1(logits, lengths, table, out) -> Launch | None:
    if out.shape[1] > 1024:
        return None
    p = V1Params(logits.data_ptr(), lengths.data_ptr(), table.data_ptr(), out.data_ptr())
    p.score_stride, p.table_stride = logits.stride(0), table.stride(0)
    p.page_bits, p.k = PAGE.bit_length() - 1, out.shape[1]
    return _launch("v1", "topk_transform_kernel", (len(logits), 1), _V1_SHARED, p)


def _v2_params(logits, lengths, table, out) -> V2Params:
    p = V2Params(logits.data_ptr(), lengths.data_ptr(), table.data_ptr(), out.data_ptr())
    p.score_stride, p.table_stride, p.out_stride = logits.stride(0), table.stride(0), out.shape[1]
    p.page_bits, p.k, p.columns, p.rows = PAGE.bit_length() - 1, out.shape[1], out.shape[1], len(logits)
    p.cluster_floor = 2**32 - 1
    return p


def sglang_v2(logits, lengths, table, out) -> Launch | None:
    level = sum(logits.shape[1] > most for most in _LEVELS)
    p = _v2_params(logits, lengths, table, out)
    return _launch("v2", f"topk_main_kernelILb1ELi{level}E", (len(logits), 1), 0, p)


def sglang_v2_clusters(logits, lengths, table, out) -> Launch | None:
    """Clusters of 8 for few rows; for more of them SGLang plans, which is left out."""
    floor = 32768 if len(logits) <= 15 else 65536
    if len(logits) > 30 or logits.shape[1] <= floor:
        return None
    p = _v2_params(logits, lengths, table, out)
    p.cluster_floor = floor
    return _launch("v2", "topk_small_batch_cluster_kernel", (len(logits), 8), 0, p)


# ---- vLLM, FlashInfer, torch ----------------------------------------------------------------------------------------

_VLLM_LIBRARY = "vllm/_C_stable_libtorch.abi3.so"


def load_vllm() -> None:
    """Registers the operators of vLLM's library, without importing vLLM."""
    if wheel := os.environ.get("DG_VLLM_WHEEL"):
        folder = Path(wheel).parent
        if not (folder / _VLLM_LIBRARY).exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(_VLLM_LIBRARY, folder)
    elif (spec := importlib.util.find_spec("vllm")) is not None:
        folder = Path(spec.submodule_search_locations[0]).parent
    else:
        raise Unavailable("it is not installed, and DG_VLLM_WHEEL names no wheel of it")
    torch.ops.load_library(str(folder / _VLLM_LIBRARY))


def vllm_persistent(logits, lengths, table, out) -> Launch | None:
    if out.shape[1] not in (512, 1024, 2048):
        return None
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=logits.device)
    arguments = (logits, lengths, out, workspace, out.shape[1], logits.shape[1])
    return functools.partial(torch.ops._C.persistent_topk, *arguments)


def vllm_per_row(logits, lengths, table, out) -> Launch | None:
    shape = (len(logits), *logits.stride(), out.shape[1])
    if len(logits) < 1024:
        return functools.partial(torch.ops._C.top_k_per_row_decode, logits, 1, lengths, out, *shape)
    starts = torch.zeros_like(lengths)
    return functools.partial(torch.ops._C.top_k_per_row_prefill, logits, starts, lengths, out, *shape)


def load_flashinfer() -> None:
    if importlib.util.find_spec("flashinfer") is None:
        raise Unavailable("it is not installed, and its wheel has no compiled top-k to load without it")
    importlib.import_module("flashinfer.topk")


def flashinfer(logits, lengths, table, out) -> Launch | None:
    from flashinfer.topk import top_k_ragged_transform

    offsets = torch.zeros_like(lengths)
    return lambda: out.copy_(top_k_ragged_transform(logits, offsets, lengths, out.shape[1]))


def torch_topk(logits, lengths, table, out) -> Launch | None:
    if logits.shape[1] < out.shape[1]:
        return None
    values, indices = torch.topk(logits, out.shape[1], sorted=False)

    def call() -> None:
        torch.topk(logits, out.shape[1], sorted=False, out=(values, indices))

    call.indices = indices  # int64, which nobody asked for: copied only where they are looked at
    return call


# ---- are they right -------------------------------------------------------------------------------------------------


def positions_of(places: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """int64 [rows, k]: the positions that places in pages stand for, where each row has pages of its own; -1 where that
    is nothing of the row's."""
    rows, columns = table.shape
    owner = torch.full((int(table.max()) + 1,), -1, dtype=torch.int64, device=table.device)
    owner[table.long()] = torch.arange(rows * columns, device=table.device).view(rows, columns)
    found = owner[(places.long() // PAGE).clamp(0, len(owner) - 1)]
    mine = (places >= 0) & (places < len(owner) * PAGE) & (found >= 0)
    mine &= found // columns == torch.arange(rows, device=table.device)[:, None]
    return torch.where(mine, found % columns * PAGE + places % PAGE, -1)


def distance(logits: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor) -> float:
    """How far the scores at the chosen positions are from the best, relative to the largest logit; infinite if one is
    chosen twice, or lies outside its row. Columns behind a row's length hold nothing larger than what lies before."""
    found = positions.long().sort(dim=1).values
    inside = (found[:, 0] >= 0) & (found[:, -1] < lengths) & (found.diff(dim=1) > 0).all(dim=1)
    if not bool(inside.all()):
        return float("inf")
    got = logits.gather(1, found).sort(dim=1, descending=True).values
    best = logits.topk(positions.shape[1], dim=1).values
    return float((got - best).abs().max() / logits.abs().max())


# ---- who is here ----------------------------------------------------------------------------------------------------


def find() -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that run on the current device by name, and of the others why they do not."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}

    def look(peers: dict[str, Peer], load: Callable[[], Any]) -> None:
        try:
            load()
            found.update(peers)
        except Exception as problem:  # whatever loading someone else's library raises
            cause = problem.__cause__ or problem
            words = f"{type(cause).__name__}: {cause}".partition("\n")[0]
            missing.update(dict.fromkeys(peers, str(problem) if isinstance(problem, Unavailable) else words))

    look({"SGLang v1": Peer(sglang_v1, True)}, lambda: _functions("v1"))
    look({"SGLang v2": Peer(sglang_v2, True)}, lambda: _functions("v2"))
    look({"SGLang v2 (clusters)": Peer(sglang_v2_clusters, True)}, _clusters)
    look({"vLLM persistent": Peer(vllm_persistent), "vLLM per row": Peer(vllm_per_row)}, load_vllm)
    look({"FlashInfer": Peer(flashinfer)}, load_flashinfer)
    found["torch"] = Peer(torch_topk)
    return found, missing


def _clusters() -> None:
    if not any("small_batch_cluster" in name for name in _functions("v2")):
        raise Unavailable("SGLang has no clusters on this card")
