"""A kernel of the tests' own, through the JIT's own classes: sum[i] = a[i] + b[i]."""

import ctypes
from pathlib import Path

import torch

from deep_gemm.sm120.jit import Kernel, compiler, launch

THREADS = 64
HEADER = """
struct AddParams { const float* a; const float* b; float* sum; int count; };
__device__ inline void add(const AddParams& p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.count) p.sum[i] = p.a[i] + p.b[i];
}
"""


class AddParams(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("count", ctypes.c_int32),
    ]


def write_header(folder: Path, text: str = HEADER) -> None:
    """Makes `folder` the place where kernels' headers lie, with ours in it."""
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / "add.cuh"
    if not header.exists() or header.read_text() != text:  # other processes may be reading it
        header.write_text(text)
    compiler.HEADERS = folder


def make_kernel(name: str = "vector_add", body: str = "    add(p);") -> Kernel:
    return Kernel(name, "add.cuh", body, THREADS, AddParams)


def add(kernel: Kernel, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, computed by `kernel` where the tensors are."""
    total = torch.full_like(a, float("nan"))
    parameters = AddParams(a.data_ptr(), b.data_ptr(), total.data_ptr(), len(a))
    launch(kernel, a.device, (-(-len(a) // THREADS), 1), parameters, {"a": a, "b": b}, {"sum": total})
    return total


def adds(kernel: Kernel, device: str = "cpu") -> bool:
    """Whether `kernel` adds two fresh random vectors."""
    a, b = torch.randn(2, 1000, device=device)
    return torch.equal(add(kernel, a, b), a + b)
