"""Memory: global buffers at their real addresses, shared memory per block, local memory per lane.

Every access is checked before any byte moves: inside one region, aligned to its width, allowed to write.  All spaces
answer one question, ``locate``: where do these lanes' bytes lie?  Loads, stores and atomics work on the answer.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from .errors import Fault
from .formats import UNSIGNED
from .lanes import Lanes

# Generic addresses: the top byte names the space, global memory has 0 there.
SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 2 << 56
SHARED_START = 1024  # the first kilobyte belongs to the system, as on the hardware; address 0 is never valid


@dataclass(frozen=True)
class Buffer:
    """A range of host memory that kernels may touch.

    name, writable   as errors and counters call it; False: a store to it is an error
    address, nbytes  first byte and length
    unwritten        holds nothing yet: sanitizers report who reads what the kernel has not written
    owner            keeps the memory alive
    """

    name: str
    address: int
    nbytes: int
    writable: bool = True
    unwritten: bool = False
    owner: object = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, array, name: str, writable: bool = True, unwritten: bool = False) -> Buffer:
        """The span of a numpy array or torch CPU tensor, from its first to its last element whatever its strides.

        Raises RuntimeError for a tensor that is not on the CPU.
        """
        if isinstance(array, np.ndarray):
            address, itemsize = array.ctypes.data, array.itemsize
            shape, strides = array.shape, array.strides
            writable = writable and array.flags.writeable
        else:
            if array.device.type != "cpu":
                raise RuntimeError(f"{name}: the emulator needs a CPU tensor, got one on {array.device}")
            address, itemsize = array.data_ptr(), array.element_size()
            shape, strides = tuple(array.shape), tuple(stride * itemsize for stride in array.stride())
        if 0 in shape:
            return cls(name, address, 0, writable, unwritten, array)
        spans = [(extent - 1) * stride for extent, stride in zip(shape, strides)]
        first, last = sum(span for span in spans if span < 0), sum(span for span in spans if span > 0)
        return cls(name, address + first, last - first + itemsize, writable, unwritten, array)


class Region:
    """Bytes that can be viewed as words of 1 to 8 bytes, alone or in vectors."""

    def __init__(self, name: str, raw: np.ndarray, skew=0, writable=True, counted=True, unwritten=False):
        self.name, self.raw, self.skew = name, raw, skew
        self.writable, self.counted, self.unwritten = writable, counted, unwritten
        self.views: dict[tuple[int, int], np.ndarray] = {}

    def view(self, size: int, count: int = 1) -> np.ndarray:
        """[n] words of ``size`` bytes, or [n, count] vectors of them."""
        view = self.views.get((size, count))
        if view is None:
            usable = len(self.raw) // (size * count) * (size * count)
            view = self.raw[:usable].view(UNSIGNED[8 * size])
            view = self.views[size, count] = view if count == 1 else view.reshape(-1, count)
        return view


class Part(NamedTuple):
    """Some of an access: its byte offsets in a region; ``which`` picks the lanes (None: all)."""

    region: Region
    offsets: np.ndarray
    which: np.ndarray | None


class Access(NamedTuple):
    """What observers (traces, sanitizers) are told, after the checks and before the bytes move.

    ``kind`` read, write or atomic; fetch or copy: a read or write that runs beside its thread (TMA).  ``space`` global,
    shared or local; ``addresses`` [count] in that space, or a scalar for one address of all lanes; ``nbytes`` per lane.
    In bulk copies a lane is there as often as it has words to move.
    """

    kind: str
    space: str
    lanes: Lanes
    addresses: np.ndarray
    nbytes: int
    parts: list[Part]


class Observer(Protocol):
    """Is told of every access to memory."""

    def access(self, wave, access: Access) -> None: ...


class Sanitizer(Observer, Protocol):
    """Is told of registers, shuffles and barriers too; may raise errors.Fault to stop the kernel at this instruction.

    ``lanes`` run the instruction; ``sources`` [lanes.count] are the lanes that a shuffle reads from, told only where
    the warp is not whole.

    ``key`` names a barrier of each block.  Lanes arrive there (``release``; ``copied``: a bulk copy of theirs does), it
    has all that it waits for in some ``blocks`` [blocks] bool (``complete``), lanes pass it (``acquire``).
    """

    def register_read(self, wave, instruction, register, lanes: Lanes) -> None: ...

    def register_write(self, wave, instruction, register, lanes: Lanes) -> None: ...

    def shuffle(self, wave, instruction, lanes: Lanes, sources: np.ndarray) -> None: ...

    def release(self, wave, key: tuple, lanes: Lanes, copied: bool = False) -> None: ...

    def complete(self, wave, key: tuple, blocks: np.ndarray) -> None: ...

    def acquire(self, wave, key: tuple, lanes: Lanes) -> None: ...


def first_lane(lanes: Lanes, bad: np.ndarray) -> int:
    return int(lanes.numbers[int(np.argmax(bad)) if bad.ndim else 0])


def check_aligned(lanes: Lanes, addresses: np.ndarray, nbytes: int, what: str) -> None:
    bad = addresses & addresses.dtype.type(nbytes - 1)
    if bad.any():
        at = int(addresses[np.argmax(bad != 0)]) if addresses.ndim else int(addresses)
        raise Fault(f"{what} of {nbytes} bytes at {at:#x} is not aligned to {nbytes}", first_lane(lanes, bad != 0))


class GlobalMemory:
    """The buffers of a launch; ``hidden`` ones (the kernel's parameters) are not counted as traffic."""

    name = "global"

    def __init__(self, buffers: list[Buffer], hidden: list[Buffer]):
        self.ranges = []
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        for buffer in (*buffers, *hidden):
            if buffer.nbytes:
                # Anchored at a multiple of 32 below, so that every naturally aligned access is a whole word of a view.
                base = buffer.address & ~31
                length = -(-(buffer.address + buffer.nbytes - base) // 32) * 32
                raw = np.frombuffer((ctypes.c_uint8 * length).from_address(base), np.uint8)
                region = Region(buffer.name, raw, base, buffer.writable, buffer not in hidden, buffer.unwritten)
                self.ranges.append((buffer.address, buffer.address + buffer.nbytes, region))

    def locate(self, lanes: Lanes, addresses: np.ndarray, nbytes: int, kind: str) -> list[Part]:
        check_aligned(lanes, addresses, nbytes, f"global {kind}")
        low, high = int(addresses.min()), int(addresses.max()) + nbytes
        for start, end, region in self.ranges:
            if start <= low and high <= end and (region.writable or kind == "read"):
                self._count(region, kind, nbytes * lanes.count)
                return [Part(region, (addresses - np.uint64(region.skew)).view(np.int64), None)]
        return self._scattered(lanes, np.atleast_1d(addresses), nbytes, kind)

    def _scattered(self, lanes: Lanes, addresses: np.ndarray, nbytes: int, kind: str) -> list[Part]:
        """Lanes that go to several buffers, or somewhere they should not."""
        found, left = [], np.ones(len(addresses), bool)
        for start, end, region in self.ranges:
            if region.writable or kind == "read":
                inside = left & (addresses >= np.uint64(start)) & (addresses <= np.uint64(max(end - nbytes, 0)))
                if inside.any():
                    found.append((region, np.flatnonzero(inside)))
                    left &= ~inside
        if left.any():
            raise Fault(self._explain(int(addresses[np.argmax(left)]), nbytes, kind), first_lane(lanes, left))
        for region, which in found:
            self._count(region, kind, nbytes * len(which))
        return [
            Part(region, (addresses[which] - np.uint64(region.skew)).view(np.int64), which) for region, which in found
        ]

    def _count(self, region: Region, kind: str, nbytes: int) -> None:
        if not region.counted:
            return
        if kind != "write":
            self.read[region.name] = self.read.get(region.name, 0) + nbytes
        if kind != "read":
            self.written[region.name] = self.written.get(region.name, 0) + nbytes

    def _explain(self, address: int, nbytes: int, kind: str) -> str:
        access = f"global {kind} of {nbytes} bytes at {address:#x}"
        if not self.ranges:
            return f"{access}: no buffer was handed in"

        def distance(entry) -> int:
            start, end, _ = entry
            return max(start - address, address + nbytes - end, 0)

        start, end, region = min(self.ranges, key=distance)
        where = f"'{region.name}' [{start:#x}, {end:#x})"
        if distance((start, end, region)) == 0:
            return f"{access}: buffer {where} is read-only (offset {address - start})"
        side = f"{start - address} bytes before its start" if address < start else f"{address - end} bytes past its end"
        if start <= address < end:
            side = f"the access starts inside and runs {address + nbytes - end} bytes past its end"
        return f"{access} lies in no buffer; the nearest is {where}: {side}"


class Scratch:
    """Shared memory (one row per block) or local memory (one row per lane), filled with 0xFF: NaN to all who look."""

    def __init__(self, name: str, rows: int, nbytes: int, row: np.ndarray, start: int = 0):
        self.name, self.start, self.end = name, start, start + nbytes
        self.row = row  # [lanes of the wave]
        self.stride = -(-self.end // 128) * 128
        self.region = Region(name, np.full(rows * self.stride, 0xFF, np.uint8))

    def locate(self, lanes: Lanes, addresses: np.ndarray, nbytes: int, kind: str) -> list[Part]:
        check_aligned(lanes, addresses, nbytes, f"{self.name} {kind}")
        addresses = addresses.astype(np.int64)
        bad = (addresses < self.start) | (addresses > self.end - nbytes)
        if bad.any():
            at = int(addresses[np.argmax(bad)]) if addresses.ndim else int(addresses)
            raise Fault(
                f"{self.name} {kind} of {nbytes} bytes at {at & 0xFFFFFFFF:#x} lies outside the "
                f"{self.end - self.start} bytes of {self.name} memory [{self.start:#x}, {self.end:#x})",
                first_lane(lanes, bad),
            )
        return [Part(self.region, addresses + self.row[lanes.index] * self.stride, None)]


# --- what instructions do with the answer ----------------------------------------------------------------------------


def load(wave, space, lanes: Lanes, addresses: np.ndarray, size: int, count: int = 1, kind="read") -> list[np.ndarray]:
    """``count`` words of ``size`` bytes from each lane's address: ``count`` arrays.  ``kind``: see Access."""
    nbytes = size * count
    parts = space.locate(lanes, addresses, nbytes, "read")
    wave.observe(kind, space.name, lanes, addresses, nbytes, parts)
    if parts[0].which is None:
        words = parts[0].region.view(size, count)[parts[0].offsets // nbytes]
    else:
        words = np.empty((len(addresses), count) if count > 1 else len(addresses), UNSIGNED[8 * size])
        for region, offsets, which in parts:
            words[which] = region.view(size, count)[offsets // nbytes]
    return [words] if count == 1 else list(np.ascontiguousarray(words.T))


def store(wave, space, lanes: Lanes, addresses: np.ndarray, values: list[np.ndarray], kind: str = "write") -> None:
    """``values``: one array (or scalar) of words per element of the vector.  The last lane wins a conflict.
    ``kind``: see Access."""
    size, count = values[0].dtype.itemsize, len(values)
    nbytes = size * count
    parts = space.locate(lanes, addresses, nbytes, "write")
    wave.observe(kind, space.name, lanes, addresses, nbytes, parts)
    for region, offsets, which in parts:
        slots = offsets // nbytes
        view = region.view(size, count)
        for element, value in enumerate(values):
            if not slots.ndim and value.ndim:
                value = value[-1]
            elif which is not None and value.ndim:
                value = value[which]
            if count == 1:
                view[slots] = value
            else:
                view[slots, element] = value


def rounds(slots: np.ndarray) -> list[np.ndarray | slice]:
    """Split positions so that no slot comes twice in one round; a slot's lanes keep their order."""
    order = np.argsort(slots, kind="stable")
    ordered = slots[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    if len(starts) == len(slots):
        return [slice(None)]
    lengths = np.diff(np.r_[starts, len(slots)])
    rank = np.arange(len(slots)) - np.repeat(starts, lengths)
    by_rank = np.argsort(rank, kind="stable")
    return [order[chunk] for chunk in np.split(by_rank, np.cumsum(np.bincount(rank))[:-1])]


def atomic(wave, space, lanes: Lanes, addresses: np.ndarray, size: int, update, values: list[np.ndarray]) -> np.ndarray:
    """memory = update(memory, *values) lane after lane; returns what each lane found."""
    addresses = np.broadcast_to(addresses, lanes.count)
    values = [np.broadcast_to(value, lanes.count) for value in values]
    parts = space.locate(lanes, addresses, size, "atomic")
    wave.observe("atomic", space.name, lanes, addresses, size, parts)
    found = np.empty(lanes.count, UNSIGNED[8 * size])
    for region, offsets, which in parts:
        view, slots = region.view(size), offsets // size
        which = np.arange(lanes.count) if which is None else which
        for turn in rounds(slots):
            lane, slot = which[turn], slots[turn]
            found[lane] = old = view[slot]
            view[slot] = update(old, *(value[lane] for value in values))
    return found


class Traffic:
    """The observer behind ``trace=True``: distinct sectors of global memory read, by block and by warp request, and
    wavefronts of shared memory."""

    SECTOR = 32
    BANKS, WORD = 32, 4

    def __init__(self, counters):
        self.counters = counters
        self.touched: dict[str, np.ndarray] = {}  # buffer -> [blocks of the wave, sectors] bool

    def access(self, wave, access: Access) -> None:
        if access.space == "shared":
            self.counters.wavefronts[access.kind] += self._wavefronts(access)
        if access.space != "global" or access.kind in ("write", "copy"):
            return
        numbers = access.lanes.numbers
        for region, offsets, which in access.parts:
            if not region.counted:
                continue
            offsets = np.broadcast_to(offsets, len(numbers) if which is None else len(which))
            lane = numbers if which is None else numbers[which]
            sectors = len(region.raw) // self.SECTOR
            sector = offsets // self.SECTOR
            touched = self.touched.get(region.name)
            if touched is None:
                touched = self.touched[region.name] = np.zeros((wave.blocks, sectors), bool)
            if access.kind == "fetch":  # past L1: what is fetched twice comes from L2 twice
                self.counters.block_bytes[region.name] += self.SECTOR * len(np.unique(sector))
            else:
                touched[wave.block_of[lane], sector] = True
            warp = lane // 32
            self.counters.requests[region.name] += len(np.unique(warp))
            self.counters.warp_bytes[region.name] += self.SECTOR * len(np.unique(warp * sectors + sector))

    def _wavefronts(self, access: Access) -> int:
        """Lanes are served together that ask for at most 128 bytes between them; of each bank one word at a time."""
        lanes, nbytes = access.lanes.numbers, access.nbytes
        together = min(32, self.BANKS * self.WORD // nbytes)
        if access.kind == "copy":  # one lane's words, in their order
            group = np.arange(len(lanes)) // together
        else:
            group = lanes // together
        starts = np.broadcast_to(access.addresses, len(lanes)).astype(np.int64) // self.WORD
        words = starts[:, None] + np.arange(max(1, nbytes // self.WORD))
        distinct = np.unique(np.stack([np.repeat(group, words.shape[1]), words.reshape(-1)]), axis=1)
        banks, turns = np.unique(np.stack([distinct[0], distinct[1] % self.BANKS]), axis=1, return_counts=True)
        longest = np.zeros(banks[0].max() + 1, np.int64)
        np.maximum.at(longest, banks[0], turns)
        return int(longest.sum())

    def finish(self) -> None:
        """The wave is done."""
        for name, touched in self.touched.items():
            self.counters.block_bytes[name] += self.SECTOR * int(np.count_nonzero(touched))
        self.touched.clear()
