"""What a process holds that asks the C library for memory: more than is alive, since blocks leave holes.

A model of glibc's `malloc` as torch uses it on a CPU, in one arena. It explains two things that surprise people: why a
process that trains on a CPU holds up to twice what its tensors take, and why that is so with small layers (adapters,
checkpointing) more than with large ones.

- Torch asks for blocks at multiples of 64 bytes. glibc takes 96 bytes more, and cuts what is over off both ends.
- A block that is given back becomes a hole, together with holes beside it. The next block is cut from the smallest hole
  that is large enough, else from the end of the heap, which only goes back to the system from its end.
- Small things that outlive the block (Python's objects, nodes of autograd's graph) settle in some of those cut ends.
  Such a hole can not grow back by its 96 bytes, and is too small for the next block of the very same size.
- Large blocks that fit nowhere get pages of their own, which go back at once. "Large" is learnt: when such a block is
  given back, later ones up to its size come from the heap, until 32 MiB.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

KIB, MIB = 2**10, 2**20

HEADER, GRAIN, SMALLEST = 8, 16, 32
"""glibc's bytes before a block, multiple of a block's size, and smallest block."""

ALIGNMENT, PAGE = 64, 4 * KIB

SETTLED = 25
"""One cut end in so many is kept by something small. Measured: `benchmarks/memory.py` compares what follows from it."""


@dataclass(frozen=True)
class Event:
    """A block of memory that is asked for (`size` > 0), or given back (`size` < 0). `number` identifies the block."""

    number: int
    size: int


def heap_peak(events: Sequence[Event]) -> int:
    """The most bytes that are held while `events` are served."""
    heap = Heap()
    where: dict[int, Block] = {}
    peak = 0
    for event in events:
        if event.size > 0:
            where[event.number] = heap.take(event.size)
        elif event.number in where:
            heap.give_back(where.pop(event.number))
        peak = max(peak, heap.held)
    return peak


@dataclass(frozen=True)
class Block:
    start: int
    size: int
    own_pages: bool = False


class Heap:
    """Addresses from 0 to `end`, with holes; and blocks that have pages of their own."""

    def __init__(self) -> None:
        self.held = 0
        self._end = self._touched = 0
        self._large, self._slack = 128 * KIB, 128 * KIB
        self._by_size: list[tuple[int, int]] = []
        self._size: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}
        self._cuts = 0

    def take(self, size: int) -> Block:
        """A block of `size` bytes at a multiple of `ALIGNMENT`."""
        needed = max(SMALLEST, _up(size + HEADER, GRAIN))
        asked = needed + ALIGNMENT + SMALLEST
        found = self._cut(asked)
        if found is None:
            block = Block(0, _up(asked, PAGE), own_pages=True)
            self.held += block.size
            return block
        before = -(found + GRAIN) % ALIGNMENT
        before += ALIGNMENT * (0 < before < SMALLEST)
        after = asked - before - needed
        self._leave(found, before)
        if after < SMALLEST:
            return Block(found + before, needed + after)
        self._leave(found + before + needed, after)
        return Block(found + before, needed)

    def give_back(self, block: Block) -> None:
        if not block.own_pages:
            self._free(block.start, block.size)
            return
        self.held -= block.size
        if self._large < block.size <= 32 * MIB:
            self._large, self._slack = block.size, 2 * block.size

    def _cut(self, size: int) -> int | None:
        """Where `size` bytes are taken from: a hole or the end of the heap; None for pages of their own."""
        i = bisect_left(self._by_size, (size, 0))
        if i < len(self._by_size):
            hole, start = self._by_size[i]
            self._forget(start)
            if hole > size:
                self._remember(start + size, hole - size)
            return start
        if size >= self._large and self._touched - self._end < size:
            return None
        start, self._end = self._end, self._end + size
        self._touch(max(self._touched, self._end))
        return start

    def _leave(self, start: int, size: int) -> None:
        """A cut end: a hole, unless something small settles there."""
        self._cuts += size > 0
        if size and self._cuts % SETTLED:
            self._free(start, size)

    def _free(self, start: int, size: int) -> None:
        if start in self._start_by_end:
            before = self._start_by_end[start]
            size += self._forget(before)
            start = before
        if start + size in self._size:
            size += self._forget(start + size)
        if start + size < self._end:
            self._remember(start, size)
            return
        self._end = start
        if self._touched - self._end >= self._slack:
            self._touch(self._end + 128 * KIB)

    def _touch(self, until: int) -> None:
        self.held += until - self._touched
        self._touched = until

    def _remember(self, start: int, size: int) -> None:
        self._size[start] = size
        self._start_by_end[start + size] = start
        insort(self._by_size, (size, start))

    def _forget(self, start: int) -> int:
        size = self._size.pop(start)
        del self._start_by_end[start + size]
        self._by_size.pop(bisect_left(self._by_size, (size, start)))
        return size


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
