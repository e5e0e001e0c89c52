"""What the launchers hand to the JIT: one kernel, fully specialised."""

import ctypes
from dataclasses import dataclass

MOST = 4096  # kernels that a process meets: a model needs some twenty, so past it something makes them up without end


@dataclass(frozen=True, eq=False)  # an object is equal to itself alone: it is looked up at every launch
class Kernel:
    """One `extern "C"` kernel that takes one struct by value.

    name        of the function; unique among kernels that differ in anything a reader would ask about
    header      the file in `kernels/` that defines it
    body        what follows the include: the instantiation
    threads     of a block
    parameters  the struct's mirror; the kernel's source asserts the same size
    """

    name: str
    header: str
    body: str
    threads: int
    parameters: type[ctypes.Structure]

    @property
    def source(self) -> str:
        """The whole translation unit: one include and one function."""
        return (
            f'#define PARAMS_BYTES {ctypes.sizeof(self.parameters)}\n#include "{self.header}"\n\n'
            f'extern "C" __global__ __launch_bounds__({self.threads}, 1)\n'
            f"void {self.name}(const __grid_constant__ {self.parameters.__name__} p) {{\n{self.body}\n}}\n"
        )
