"""From a kernel's source to its launch: compile (NVRTC), keep (memory and disk), launch (driver, or emulator)."""

from .compiler import CompileError, compile_kernel
from .kernel import MOST, Kernel
from .runtime import architecture_of, launch, load

__all__ = ["MOST", "CompileError", "Kernel", "architecture_of", "compile_kernel", "launch", "load"]
