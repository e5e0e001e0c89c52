"""What can go wrong, as seen from outside (EmulatorError) and from inside an instruction (Fault)."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """PTX that cannot be read or run.  The message names the kernel, the PTX line, and the first offending thread."""


class Fault(Exception):
    """Raised inside an instruction; the machine adds kernel, line, block and thread and raises EmulatorError.

    ``lane`` is the wave-wide number of the first lane at fault, or None where no single lane is to blame.
    """

    def __init__(self, message: str, lane: int | None = None):
        super().__init__(message)
        self.lane = lane
