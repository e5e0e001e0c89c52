"""Sets of lanes: which threads of a wave an instruction runs for.

A wave holds the threads of many blocks side by side; lane = block * lanes-per-block + thread, blocks are padded to
whole warps.  Sets never change; what is derived from them is computed once.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

WARP = 32


class Lanes:
    """A sorted, non-empty set of lanes out of ``size``.

    ``index`` picks the set's lanes out of an array of ``size`` values: a slice where they are contiguous (then picking
    copies nothing), else an array of positions.
    """

    def __init__(self, numbers: np.ndarray, size: int, parent: Lanes | None = None):
        self.size, self.parent = size, parent
        self.count = len(numbers)
        self.numbers = numbers  # int64, ascending
        self.full = self.count == size
        first, last = int(numbers[0]), int(numbers[-1])
        self.index = slice(first, last + 1) if last - first + 1 == self.count else numbers
        self.memo: dict = {}  # what instructions want to remember about this set

    @cached_property
    def mask(self) -> np.ndarray:
        """[size] bool"""
        mask = np.zeros(self.size, bool)
        mask[self.index] = True
        return mask

    @cached_property
    def present(self) -> np.ndarray:
        """[size / 32] uint32: of each warp, the lanes in this set."""
        return ballot(self.mask)

    @cached_property
    def warp(self) -> np.ndarray:
        """[count] the warp of each lane."""
        return self.numbers // WARP

    @cached_property
    def warps(self) -> int:
        """How many warps have a lane here."""
        if isinstance(self.index, slice):
            return (self.index.stop - 1) // WARP - self.index.start // WARP + 1
        return int(np.count_nonzero(self.present))

    @cached_property
    def whole(self) -> bool:
        """Are all warps here complete?"""
        return self.count == self.warps * WARP

    def where(self, condition: np.ndarray) -> Lanes | None:
        """The lanes whose ``condition`` [count] holds: this very set if all do, None if none does."""
        if not condition.ndim:
            return self if condition else None
        if condition.all():
            return self
        chosen = self.numbers[condition]
        return Lanes(chosen, self.size, self) if len(chosen) else None

    def without(self, other: Lanes) -> Lanes | None:
        """The lanes that are not in ``other``."""
        left = self.numbers[~other.mask[self.index]]
        return Lanes(left, self.size, self) if len(left) else None

    def __or__(self, other: Lanes) -> Lanes:
        parent = self.parent
        if parent is not None and parent is other.parent and self.count + other.count == parent.count:
            return parent  # two halves of a branch meet again
        return Lanes(np.flatnonzero(self.mask | other.mask), self.size)


def position_of(number, extent: tuple[int, int, int]) -> tuple:
    """(x, y, z) of a thread in its block, or of a block in its grid, by their numbers: an integer, or an array."""
    x, y, _ = extent
    return number % x, number // x % y, number // (x * y)


def ballot(mask: np.ndarray) -> np.ndarray:
    """[size] bool -> [size / 32] uint32, lane 0 in bit 0."""
    return np.packbits(mask, bitorder="little").view(np.uint32)
