"""Both sides with another MMA in the place of SM120's, so that a card of another kind runs everything around it.

`mma.sync.m16n8k16.f32.f16.f16.f32` takes operands of exactly the shape of SM120's FP8 and FP4 ones (4, 2 and 4
registers) and is native on SM80 to SM90. It reads the bytes of a row as pairs of fp16; the result has a definition of
its own, whatever the order of k: `sum over pairs of q[pair] * k[pair]`. Block scales play no part in it, but what loads
them stays.

    x1    one of them for each: an interval of 7 clocks of a sub-partition where SM120 has 16, and nearly its latency
    x2    two in a row on the same accumulators: 13 clocks, but twice the latency. The product counts twice
    x2s   one, and beside it a second of the same operands with fp16 sums, which are multiplied by zero and added:
          15.8 clocks and a latency of 32 (SM120: 29 to 34), for one FFMA and two registers more

Intervals were measured on an H100 (25 Nov 2026), latencies are ptxas's own stall counts; `silicon.py` measures both.
The text of both sides' headers is edited in memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peer
import torch
from cuda.bindings import nvrtc

NATIVE = "native"  # the real MMA, on SM120
FORMS = ("x1", "x2", "x2s")
COUNTS = {NATIVE: 1, "x1": 1, "x2": 2, "x2s": 1}  # how often a product counts
GEOMETRY = "sm_120f"  # what ours is configured for, whatever it is compiled for

_D, _A, _B = "{%0, %1, %2, %3}", "{%4, %5, %6, %7}", "{%8, %9}"
_ONE = f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {_D}, {_A}, {_B}, {_D}; "
_BODIES = {
    "x1": _ONE,
    "x2": _ONE + _ONE,
    # ptxas merges two equal instructions, and drops one whose result is dead.
    "x2s": "{ .reg .b32 y0, y1, zero; .reg .f32 y; mov.b32 zero, 0; mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
    f"{{y0, y1}}, {_A}, {_B}, {{zero, zero}}; mov.b32 y, y1; {_ONE}fma.rn.f32 %3, y, 0f00000000, %3; }} ",
}
# Of the MMAs of a tile of ours one looks at its scales, with a store that never happens: else ptxas drops their loads.
_KEEP = (
    ' if constexpr ({0} == 0 && {1} == 0 && {2} == 0) asm volatile("{{ .reg .pred p; .reg .b32 s; xor.b32 s, %0, %1; '
    'setp.eq.b32 p, s, 0xdeadbeef; @p st.shared.b32 [%0], %1; }}" :: "r"({3}), "r"({4}));'
)
_ASM = re.compile(r'(asm\s*(?:volatile)?\s*\(\s*)((?:"(?:[^"\\]|\\.)*"\s*)+)(:.*?\)\s*\);)', re.DOTALL)


def replace_mma(text: str, form: str) -> str:
    """C++ with the MMAs of its asm statements replaced. Operands past the tenth (scales, selectors) stay inputs."""

    def replaced(match: re.Match) -> str:
        start, template, operands = match.groups()
        if "mma.sync.aligned" not in template:
            return match[0]
        more = sorted({int(n) for n in re.findall(r"%(\d+)", template) if int(n) > 9})
        body = _BODIES[form] + ("/* " + " ".join(f"%{n}" for n in more) + " */" if more else "")
        selectors = re.findall(r'"n"\((\w+)\)', operands)
        scales = re.findall(r'"r"\((\w+)\)', operands)[-2:]
        keep = _KEEP.format(*selectors, *scales) if len(selectors) == 3 else ""
        return f'{start}"{body}"{operands}{keep}'

    return text if form == NATIVE else _ASM.sub(replaced, text)


# ---- the peer -------------------------------------------------------------------------------------------------------


def peer_headers(kernel: peer.Kernel, form: str) -> dict[str, str]:
    """The headers of one kernel that differ from those of the wheel, by the names they are included by."""
    include = peer.fetch() / "deep_gemm" / "include"
    edited = {}
    for name in ("common/sm120_utils.cuh", "mma/sm120.cuh", kernel.header):
        text = (include / "deep_gemm" / name).read_text().replace("__CUDA_ARCH__ >= 1200", "__CUDA_ARCH__ >= 900")
        text = text.replace("<const uint32_t*>(smem_sf +", "<const volatile uint32_t*>(smem_sf +")
        edited[f"deep_gemm/{name}"] = replace_mma(text, form)
    return edited


def build_peer(kernel: peer.Kernel, form: str, arch: str = "sm_90a") -> peer.Binary:
    """One kernel of the peer's with the MMA replaced; kept in the peer's folder."""
    return kernel.compile() if form == NATIVE else kernel.compile(arch, peer_headers(kernel, form))


# ---- ours -----------------------------------------------------------------------------------------------------------


class Tree:
    """The package of one source tree, its launchers as they are, its kernels compiled with the MMA replaced.

    Trees live side by side in one process: each is imported under a name of its own.
    """

    def __init__(self, label: str, root: Path | str, arch: str = "sm_90a") -> None:
        package = Path(root) / "sm120" / "deep_gemm" / "sm120"
        name = "deep_gemm_" + re.sub(r"\W", "_", label)
        spec = importlib.util.spec_from_file_location(
            name, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        self.label, self.arch, self.form = label, arch, "x1"
        self.sm120 = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.sm120)
        self.kernels_folder = package / "kernels"
        self.runtime = importlib.import_module(f"{name}.jit.runtime")
        self.reference = importlib.import_module(f"{name}.reference")
        self.cache = importlib.import_module(f"{name}.jit.cache")
        self.runtime._architecture_of_gpu = lambda index: GEOMETRY
        self.runtime.compile_kernel = lambda kernel, arch, target: self.compile(kernel, self.form, target)
        self.runtime.shipped.find = lambda kernel, arch: None
        self._loaded: dict[str, dict] = {}
        self._headers: dict[str, dict[str, str]] = {}

    def use(self, form: str) -> None:
        """From now on calls launch the kernels of `form`."""
        self.form = form
        self.runtime._loaded = self._loaded.setdefault(form, {})

    def source(self, kernel: Any) -> str:
        """The translation unit. SM90 has no loads of 32 bytes."""
        return re.sub(r"(Fp8<\d+, \w+), 32>", r"\1, 16>", kernel.source) if self.arch == "sm_90a" else kernel.source

    def headers(self, form: str) -> dict[str, str]:
        if form not in self._headers:
            files = sorted(self.kernels_folder.rglob("*.cuh"))
            self._headers[form] = {
                str(file.relative_to(self.kernels_folder)): replace_mma(file.read_text(), form) for file in files
            }
        return self._headers[form]

    def compile(self, kernel: Any, form: str, target: str = "cubin") -> bytes:
        arch = GEOMETRY if form == NATIVE else self.arch
        options = [f"--gpu-architecture={arch}", "--std=c++17"]
        source, headers = self.source(kernel), self.headers(form)
        key = self.cache.key(source, target, *options, str(nvrtc.nvrtcVersion()), *headers, *headers.values())
        if (binary := self.cache.get(key)) is None:
            made = peer.build(source, kernel.name, options, headers)
            binary = made.cubin if target == "cubin" else made.ptx.encode()
            self.cache.put(key, binary)
        return binary

    def kernels(self, heads: int, fp4: bool) -> list[Any]:
        """What `warmup` makes ready for a model."""
        found: list[Any] = []
        before = self.runtime._emulated
        self.runtime._emulated = found.append
        try:
            self.sm120.warmup(heads, fp4=fp4, next_n=6, device="cpu")
        finally:
            self.runtime._emulated = before
        return found

    def prepare(self, sizes: Iterable[tuple[int, bool]], forms: Iterable[str], threads: int | None = None) -> int:
        """Compiles all of it at once, into the cache on disk; returns how many kernels."""
        kernels = {kernel for size in sizes for kernel in self.kernels(*size)}
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            jobs = [pool.submit(self.compile, kernel, form) for form in forms for kernel in kernels]
            return len([job.result() for job in jobs])


def number_pairs(values: torch.Tensor) -> torch.Tensor:
    """Float64 [..., pairs]: what the replaced MMA reads out of rows of bytes."""
    return values.view(torch.uint8).view(torch.float16).double()
