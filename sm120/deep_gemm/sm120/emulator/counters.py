"""What a launch did: instructions, bytes, and where they went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import NamedTuple

CLASSES = ("mma", "fp32", "int", "load", "store", "shuffle", "barrier", "branch", "other")
_BY_NAME = {
    "mma": "mma",
    **dict.fromkeys("ld ldu ldmatrix tex".split(), "load"),
    **dict.fromkeys("st stmatrix red atom".split(), "store"),
    **dict.fromkeys("shfl vote match redux movmatrix activemask elect".split(), "shuffle"),
    **dict.fromkeys("bar barrier mbarrier fence membar".split(), "barrier"),
    **dict.fromkeys("bra brx ret exit trap call".split(), "branch"),
    **dict.fromkeys("ex2 lg2 rcp rsqrt sqrt sin cos tanh fma testp copysign".split(), "fp32"),
    **dict.fromkeys(
        "mad sad rem and or xor not shl shr shf lop3 prmt bfe bfi bfind brev clz popc fns szext bmsk dp4a dp2a "
        "mul24 mad24 addc subc madc cnot".split(),
        "int",
    ),
}
_FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"}


def instruction_class(opcode: str) -> str:
    """One of CLASSES for a full opcode such as ``ld.global.v4.b32``."""
    name, *modifiers = opcode.split(".")
    if name == "ld" and modifiers[0] in ("param", "const"):
        return "other"  # an operand from constant memory to the hardware
    if name == "cp":
        return "load" if "async" in modifiers and ("global" in modifiers or "tensor" in modifiers) else "barrier"
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name in ("add", "sub", "mul", "div", "min", "max", "abs", "neg", "setp", "set"):
        return "fp32" if modifiers and modifiers[-1] in _FLOATS else "int"
    return "other"  # moves, conversions, selects, address arithmetic without work, hints


@dataclass
class Counters:
    """Sums over one launch; ``a + b`` adds launches up.

    instructions   warp instructions issued, by full opcode; one whose guard is false in some or all lanes counts, and
                   a warp that diverged counts once for each part that runs it
    threads        the same in threads whose guard was true
    bytes_read     bytes of global memory that lanes asked for, by buffer; bytes_written likewise (atomics: both)
    blocks         blocks run

    With ``trace=True``, else empty:
    block_bytes    bytes of distinct 32-byte sectors read, by buffer: each block counts a sector once (what L1 has read
                   it does not ask for again), TMA at each copy
    warp_bytes     the same where each warp request counts its sectors once (what L1 has to serve)
    requests       warp requests that read global memory, by buffer
    wavefronts     clocks of shared memory, by kind (read, write, atomic, copy: by TMA): it serves 32 banks of 4 bytes
                   at a time, to lanes together that ask for at most 128 bytes; words that share a bank take turns
    """

    instructions: Counter[str] = field(default_factory=Counter)
    threads: Counter[str] = field(default_factory=Counter)
    bytes_read: Counter[str] = field(default_factory=Counter)
    bytes_written: Counter[str] = field(default_factory=Counter)
    block_bytes: Counter[str] = field(default_factory=Counter)
    warp_bytes: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    wavefronts: Counter[str] = field(default_factory=Counter)
    blocks: int = 0

    @property
    def classes(self) -> Counter[str]:
        """Warp instructions by class (CLASSES)."""
        result: Counter[str] = Counter()
        for opcode, count in self.instructions.items():
            result[instruction_class(opcode)] += count
        return result

    def __add__(self, other: Counters) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class _Recording(NamedTuple):
    launches: list[Counters]
    trace: bool
    sanitize: bool


_recordings: ContextVar[tuple[_Recording, ...]] = ContextVar("recordings", default=())


@contextmanager
def recording(trace: bool = False, sanitize: bool = False) -> Iterator[list[Counters]]:
    """Collects the Counters of every launch that this thread finishes inside, in order; recordings may nest.

    ``trace``, ``sanitize``: launches inside run as if ``Module.launch`` had been asked for it.
    """
    launches: list[Counters] = []
    token = _recordings.set((*_recordings.get(), _Recording(launches, trace, sanitize)))
    try:
        yield launches
    finally:
        _recordings.reset(token)


def tracing() -> bool:
    """Has a recording that is open asked for a trace?"""
    return any(recording.trace for recording in _recordings.get())


def sanitizing() -> bool:
    """Has a recording that is open asked for sanitizers?"""
    return any(recording.sanitize for recording in _recordings.get())


def record(counters: Counters) -> None:
    """Adds a launch to the recordings that are open."""
    for recording in _recordings.get():
        recording.launches.append(counters)
