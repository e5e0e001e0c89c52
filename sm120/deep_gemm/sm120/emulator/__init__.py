"""Runs PTX on the CPU: compiled kernels, lane by lane, in numpy.

    module = Module(ptx_text)
    counters = module.launch("kernel", grid=(8,), block=(256,), params=[x.ctypes.data, n], buffers=[Buffer.of(x, "x")])

`with recording() as launches:` collects the counters of launches made by others, such as deep_gemm's own functions;
`recording(trace=True)` counts sectors and shared-memory wavefronts too, `recording(sanitize=True)` looks for reads of
what nobody wrote, races, and shuffles from lanes that are not there.  Tensor maps are descriptions: TensorMap.

Every access to memory is checked; an error names the PTX line and the first thread at fault.  Read machine.py first
(how threads run), then operands.py (how an instruction becomes a closure), then the instructions in isa/, and
sanitizers.py last.  NVIDIA's own kernels for SM120, which were validated on cards, run here to the right result:
tests/test_calibration.py.
"""

from .counters import Counters, recording
from .errors import EmulatorError
from .isa.asynchronous import TensorMap
from .machine import Module
from .memory import Buffer

__all__ = ["Buffer", "Counters", "EmulatorError", "Module", "TensorMap", "recording"]
