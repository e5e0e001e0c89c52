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
    parameters  the struct's mirror, of the same size, which the source asserts
    blocks      that an SM should hold at once: the compiler spends no more registers than that leaves
    follows     starts right behind another kernel of ours and waits for it itself (griddepcontrol): its blocks are set
                up while that one runs, whatever `set_pdl` says
    """

    name: str
    header: str
    body: str
    threads: int
    parameters: type[ctypes.Structure]
    blocks: int = 1
    follows: bool = False

    @property
    def source(self) -> str:
        """The whole translation unit: one include and one function."""
        struct = self.parameters.__name__
        return (
            f'#include "{self.header}"\n\nstatic_assert(sizeof({struct}) == {ctypes.sizeof(self.parameters)}, '
            f'"the launcher packs a different struct");\n\n'
            f'extern "C" __global__ __launch_bounds__({self.threads}, {self.blocks})\n'
            f"void {self.name}(const __grid_constant__ {struct} p) {{\n{self.body}\n}}\n"
        )
