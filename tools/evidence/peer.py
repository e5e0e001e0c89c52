"""The peer: NVIDIA's SM120 indexer kernels, from the headers inside SGLang's wheel of DeepGEMM.

    kernel = paged("fp8", heads=64, next_n=2)            what is launched: instantiation, threads, shared memory
    kernel.compile().ptx, .cubin, .name                  built with the NVRTC that builds ours, cached
    launch_paged(q, kv_cache, weights, ..., logits)      how it is launched: grid, parameters, tensor maps

The wheel and the CUDA headers that it includes are fetched by pip, pinned by hash, into `DG_PEER_DIR` (default: the
user's cache folder), never into this repository.  Nothing of them is imported or executed on the host.

Template arguments, geometry and tensor maps are those that the wheel's host code picks on SM120; its kernels assert
most of them.  One block has 8 math warps of 16 keys and 4 warps that issue TMA; it stays on its SM for the whole call.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cuda.bindings import nvrtc

PINS = """\
sgl-deep-gemm==0.2.3.post2 --hash=sha256:d1e3e1421d6624a16f32f2dee35c026d64d2f77799e5c0c5eaba68c27023630c
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649
"""

# What the headers expect of a host compiler and NVRTC does not bring.
PRELUDE = """\
constexpr __device__ int __builtin_ctz(unsigned x) { return x & 1 ? 0 : 1 + __builtin_ctz(x >> 1); }
#include <cuda_device_runtime_api.h>
"""
HEADERS = {"utility": "#include <cuda/std/utility>\nnamespace std { using namespace cuda::std; }\n"}
OPTIONS = ["--std=c++20", "--device-int128", "-default-device", "--disable-warnings"]

MATH_WARPS, TMA_WARPS = 8, 4
THREADS = 32 * (MATH_WARPS + TMA_WARPS)
SPLIT = 128  # keys that a block takes at a time: 16 for each math warp
Q_STAGES = 2
TYPES = {torch.float32: "float", torch.bfloat16: "cutlass::bfloat16_t"}


class PeerUnavailable(RuntimeError):
    """The peer's wheel could not be fetched."""


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled would put into a kernel's 128 opaque bytes. Innermost dimension first, strides in
    bytes. Elements outside `dims` read as zero. FP4 is described as bytes: the kernels only ever use coordinate 0 of
    the innermost dimension, where elements and bytes agree."""

    address: int
    element_bytes: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0  # bytes: 0, 32, 64 or 128


@dataclass(frozen=True)
class Binary:
    name: str
    ptx: str
    cubin: bytes


@dataclass(frozen=True)
class Kernel:
    """One instantiation, with what its launch and a count of its work need."""

    label: str
    header: str
    instance: str
    threads: int = THREADS
    shared_bytes: int = 0
    math_warps: int = MATH_WARPS
    copied_bytes: int = 0  # by TMA into shared memory, for each warp and turn of the key loop

    def compile(self, arch: str = "sm_120f", headers: dict[str, str] | None = None) -> Binary:
        """PTX and cubin, kept beside the headers; `headers` stand in the place of the wheel's."""
        root = fetch()
        source = PRELUDE + f"#include <deep_gemm/{self.header}>\n"
        return kept(root, [PINS], root / "deep_gemm" / "include", source, self.instance, arch, headers)


@dataclass(frozen=True)
class Launch:
    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, int] | TensorMap, ...]  # ("I", 32-bit value), ("Q", pointer) or a tensor map

    @property
    def block(self) -> tuple[int, int, int]:
        return (self.kernel.threads, 1, 1)

    def parameters(self) -> tuple[bytes, dict[int, TensorMap]]:
        """The parameter block as a driver would take it, and the tensor maps by their offsets in it (zeros there)."""
        block, maps = b"", {}
        for argument in self.arguments:
            is_map = isinstance(argument, TensorMap)
            align = 64 if is_map else struct.calcsize(argument[0])
            block += bytes(-len(block) % align)
            if is_map:
                maps[len(block)] = argument
            block += bytes(128) if is_map else struct.pack(*argument)
        return block, maps


def directory() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DG_PEER_DIR") or cache / "deep_gemm_peer")


@functools.cache
def fetch() -> Path:
    """The folder with the pinned packages unpacked."""
    return filled(
        PINS, lambda folder: pip("install", f"--target={folder}", "--platform=manylinux2014_x86_64", pins=PINS)
    )


def filled(pins: str, fill: Callable[[Path], None]) -> Path:
    """The folder of these pins, by `fill` where there is none yet. Safe among processes: the first to finish moves its
    copy in."""
    root = directory() / hashlib.sha256(pins.encode()).hexdigest()[:16]
    if root.exists():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=root.parent))
    try:
        fill(work)
        try:
            work.rename(root)
        except OSError:
            if not root.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def pip(*words: str, pins: str) -> None:
    """`pip words` of wheels alone, each with its hash."""
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    done = subprocess.run([*command, "-r", "/dev/stdin"], input=pins, text=True, capture_output=True)
    if done.returncode:
        raise PeerUnavailable(f"pip could not fetch {pins.split()[0]}:\n{done.stderr}")


def kept(
    root: Path, pins: list[str], include: Path, source: str, instance: str, arch: str, headers: dict[str, str] | None
) -> Binary:
    """One kernel of `source`, which includes from `include` and the CUDA headers; kept in `root`."""
    cuda, headers = fetch() / "nvidia" / "cu13" / "include", HEADERS | (headers or {})
    options = [f"--gpu-architecture={arch}", *OPTIONS]
    key = json.dumps([*pins, source, headers, options, instance, nvrtc.nvrtcVersion()[1:]])
    cached = root / "compiled" / (hashlib.sha256(key.encode()).hexdigest() + ".json")
    if cached.exists():
        entry = json.loads(cached.read_text())
        return Binary(entry["name"], entry["ptx"], base64.b64decode(entry["cubin"]))
    includes = [f"-I{path}" for path in (include, cuda, cuda / "cccl")]
    binary = build(source, instance, options + includes, headers)
    cached.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cached.parent, delete=False) as file:
        json.dump(asdict(binary) | {"cubin": base64.b64encode(binary.cubin).decode()}, file)
    os.replace(file.name, cached)
    return binary


def build(source: str, instance: str, options: list[str], headers: dict[str, str] = HEADERS) -> Binary:
    """One kernel of `source` by NVRTC; `instance` is its C++ name, `headers` are texts by the names they go by."""

    def check(result):
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC, {instance}: {status.name}")
        return values[0] if values else None

    def read(size, get) -> bytes:
        buffer = bytearray(check(size(program)))
        check(get(program, buffer))
        return bytes(buffer)

    names = [name.encode() for name in headers]
    texts = [text.encode() for text in headers.values()]
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"peer.cu", len(names), texts, names))
    try:
        check(nvrtc.nvrtcAddNameExpression(program, instance.encode()))
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
            raise RuntimeError(f"NVRTC, {instance}: {status.name}\n{log}")
        name = check(nvrtc.nvrtcGetLoweredName(program, instance.encode())).decode()
        ptx = read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0").decode()
        return Binary(name, ptx, read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


# The kernels.  `kind` is "fp8" or "fp4"; a key's values take `_row(kind, dim)` bytes, its scales 4.


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def _row(kind: str, dim: int) -> int:
    return {"fp8": dim, "fp4": dim // 2}[kind]


def _instance(name: str, *arguments) -> str:
    text = [str(a).lower() if isinstance(a, bool) else str(a) for a in arguments]
    return f"deep_gemm::{name}<{', '.join(text)}>"


def paged(
    kind: str,
    heads: int = 64,
    next_n: int = 1,
    *,
    dim: int = 128,
    page: int = 64,
    varlen: bool = False,
    lens_2d: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Kernel:
    """Shared memory: 2 stages of Q, then of (FP4) Q's scales, then of weights, then the Q barriers; after them for
    each group of warps (one page a group) 3 stages of keys, of their scales, and the barriers. Every piece but Q and
    keys is padded to 8 rows. With next_n >= 2 a loop turn serves an atom of two tokens."""
    row, stages = _row(kind, dim), 3
    atom = 2 if varlen or next_n >= 2 else 1
    pad = 8 * row
    per_head = 4 if kind == "fp8" else 8  # bytes beside a head's values: weight, and FP4's scales
    pieces = per_head // 4 * _align(4 * atom * heads, pad)
    q = Q_STAGES * (atom * heads * row + pieces) + _align(16 * Q_STAGES, pad)
    kv = stages * (page * row + _align(4 * page, pad)) + _align(16 * stages, pad)
    name = f"sm120_{kind}_paged_mqa_logits"
    threads = (32 * TMA_WARPS, 32 * MATH_WARPS)
    return Kernel(
        label=f"{kind} paged, {heads} heads, {'varlen' if varlen else f'next_n {next_n}'}",
        header=f"impls/{name}.cuh",
        instance=_instance(
            name, next_n, heads, dim, page, lens_2d, varlen, Q_STAGES, stages, SPLIT, *threads, TYPES[dtype]
        ),
        shared_bytes=q + SPLIT // page * kv + 4,
        copied_bytes=16 * (row + 4),
    )


def ragged(
    kind: str,
    heads: int = 64,
    *,
    dim: int = 128,
    compressed: bool = False,
    num_sms: int = 188,
    dtype: torch.dtype = torch.float32,
) -> Kernel:
    """Shared memory: 2 stages of Q, (FP4) of Q's scales, of weights; 3 (FP4: 5) of keys, of their scales; barriers.
    A loop turn serves 128 / heads query tokens."""
    row, stages = _row(kind, dim), {"fp8": 3, "fp4": 5}[kind]
    block_q = 128 // heads
    per_head = row + (4 if kind == "fp8" else 8)
    name = f"sm120_{kind}_mqa_logits"
    threads = (32 * TMA_WARPS, 32 * MATH_WARPS)
    return Kernel(
        label=f"{kind} ragged, {heads} heads" + (", compressed" if compressed else ""),
        header=f"impls/{name}.cuh",
        instance=_instance(
            name, heads, dim, compressed, block_q, SPLIT, Q_STAGES, stages, num_sms, *threads, TYPES[dtype]
        ),
        shared_bytes=Q_STAGES * block_q * heads * per_head
        + stages * SPLIT * (row + 4)
        + 16 * (Q_STAGES + stages)
        + (4 if kind == "fp8" else 0),
        copied_bytes=16 * (row + 4),
    )


def metadata(batch: int, num_sms: int, *, varlen: bool = False) -> Kernel:
    """One warp; the whole batch's prefix sum in shared memory (varlen: also each atom's first row and length)."""
    aligned = _align(batch, 32)
    return Kernel(
        label=f"metadata, {batch} rows" + (", varlen" if varlen else ""),
        header="scheduler/sm120_paged_mqa_logits.cuh",
        instance=_instance("sched::sm120_paged_mqa_logits_metadata", aligned, SPLIT, num_sms, varlen),
        threads=32,
        shared_bytes=4 * (3 * aligned + 1 if varlen else aligned),
        math_warps=1,
    )


# The launches.  Tensors as in `deep_gemm`'s API; q is a tensor (FP8) or (int8 values, int32 scales).


def _split(q) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    values, scales = q if isinstance(q, tuple) else (q, None)
    return ("fp8" if scales is None else "fp4"), values, scales


def _rows(tensor: torch.Tensor, width: int, box_rows: int, swizzle: int = 0) -> TensorMap:
    """The map of a contiguous tensor seen as rows of `width` elements."""
    size = tensor.element_size()
    return TensorMap(
        tensor.data_ptr(),
        size,
        (width, tensor.numel() // width),
        (size, size * width),
        (width, box_rows),
        swizzle,
    )


def _i(value: int) -> tuple[str, int]:
    return "I", value


def _p(tensor: torch.Tensor | None) -> tuple[str, int]:
    return "Q", 0 if tensor is None else tensor.data_ptr()


def launch_metadata(context_lens: torch.Tensor, schedule: torch.Tensor, indices: torch.Tensor | None = None) -> Launch:
    """Writes `schedule`, int32 [num_sms + 1, 2]: (atom, split of 128 keys) where each slot starts.
    A request has ceil(next_n / 2) atoms of at most two tokens. varlen: neighbouring rows of one sequence pair up,
    and an atom is named by its first row."""
    varlen = indices is not None
    batch, next_n = context_lens.shape if context_lens.dim() == 2 else (len(context_lens), 1)
    arguments = (
        _i(batch),
        _i(next_n),
        ("?", context_lens.dim() == 2),
        _i(-(-next_n // 2)),
        _p(context_lens),
        _p(indices),
        _p(schedule),
    )
    return Launch(metadata(batch, len(schedule) - 1, varlen=varlen), (1, 1, 1), arguments)


def paged_logits(rows: int, max_context_len: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A buffer as the paged kernels want it: they store whole tiles, up to the next multiple of 128 keys."""
    return torch.full((rows, _align(max_context_len, 256)), float("nan"), dtype=dtype)


def launch_paged(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule: torch.Tensor,
    logits: torch.Tensor,
    indices: torch.Tensor | None = None,
) -> Launch:
    """`schedule` is the peer's own (`launch_metadata`), `logits` from `paged_logits`."""
    kind, values, scales = _split(q)
    batch, next_n, heads, row = values.shape
    dim = row if kind == "fp8" else 2 * row
    pages, page = kv_cache.shape[:2]
    varlen = indices is not None
    kernel = paged(
        kind,
        heads,
        next_n,
        dim=dim,
        page=page,
        varlen=varlen,
        lens_2d=context_lens.dim() == 2,
        dtype=logits.dtype,
    )
    atom = 2 if varlen or next_n >= 2 else 1
    start, stride = kv_cache.data_ptr(), kv_cache.stride(0)
    keys = TensorMap(start, 1, (row, page, pages), (1, row, stride), (row, page, 1), swizzle=row)
    key_scales = TensorMap(start + page * row, 4, (page, pages), (4, stride), (page, 1))
    q_maps = [_rows(values, row, atom * heads, swizzle=row)]
    if scales is not None:
        q_maps.append(_rows(scales, heads, atom))
    arguments = (
        _i(batch),
        _i(logits.stride(0)),
        _i(block_table.stride(0)),
        _p(context_lens),
        _p(logits),
        _p(block_table),
        _p(indices),
        _p(schedule),
        *q_maps,
        keys,
        key_scales,
        _rows(weights, heads, atom),
    )
    return Launch(kernel, (len(schedule) - 1, 1, 1), arguments)


def ragged_logits(
    seq_len: int, heads: int, seq_len_kv: int, max_seqlen_k: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A buffer as the ragged kernels want it: whole blocks of rows, and (not compressed) whole tiles of 128 keys."""
    width = _align(max_seqlen_k, 256) if max_seqlen_k else _align(seq_len_kv + 256, 64)
    return torch.full((_align(seq_len, 128 // heads), width), float("nan"), dtype=dtype)


def launch_ragged(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    logits: torch.Tensor,
    max_seqlen_k: int = 0,
    num_sms: int = 188,
    kv_splits: int = 1,
) -> Launch:
    """`logits` from `ragged_logits`. FP8 may share a block of queries among `kv_splits` blocks; FP4 has no such split.
    The host code declares the key scales' row up to the next multiple of 16 bytes; here it ends with the tensor."""
    kind, values, scales = _split(q)
    seq_len, heads, row = values.shape
    keys, key_scales = kv
    kernel = ragged(
        kind,
        heads,
        dim=row if kind == "fp8" else 2 * row,
        compressed=max_seqlen_k > 0,
        num_sms=num_sms,
        dtype=logits.dtype,
    )
    block_q = 128 // heads
    q_maps = [_rows(values, row, block_q * heads, swizzle=row)]
    if scales is not None:
        q_maps.append(_rows(scales, heads, block_q))
    key_scales_map = TensorMap(key_scales.data_ptr(), 4, (len(keys), 1), (4, 0), (SPLIT, 1))
    arguments = (
        _i(seq_len),
        _i(len(keys)),
        _i(max_seqlen_k),
        _i(logits.stride(0)),
        _p(ks),
        _p(ke),
        _p(logits),
        *q_maps,
        _rows(keys, row, SPLIT, swizzle=row),
        key_scales_map,
        _rows(weights, heads, block_q),
    )
    return Launch(kernel, (num_sms, kv_splits, 1), arguments)
