"""The model of the C library's allocator: by hand, and against the library itself."""

import json
import platform
import random
import subprocess
import sys

import pytest

from trl.models import heap
from trl.models.heap import KIB, MIB, Event, Heap, heap_peak

REAL = """
import ctypes, json, sys
libc = ctypes.CDLL("libc.so.6")

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc.mallinfo2.restype = Info
libc.free.argtypes = [ctypes.c_void_p]
events = json.load(sys.stdin)
blocks = {number: ctypes.c_void_p() for number, _ in events}

def held():
    info = libc.mallinfo2()
    return info.arena + info.hblkhd

libc.malloc_trim(0)
before, found = held() - libc.mallinfo2().fordblks, []
for number, size in events:
    if size > 0:
        libc.posix_memalign(ctypes.byref(blocks[number]), 64, size)
    else:
        libc.free(blocks[number])
    found.append(held() - before)
print(json.dumps(found))
"""


def served(events: list[Event]) -> list[int]:
    """Bytes that the heap holds after each event."""
    blocks, simulated, held = {}, Heap(), []
    for event in events:
        if event.size > 0:
            blocks[event.number] = simulated.take(event.size)
        else:
            simulated.give_back(blocks.pop(event.number))
        held.append(simulated.held)
    return held


def test_holes_side_by_side_become_one(monkeypatch):
    """A block of 1000 is 1008 with its header, cut from 1104. Where two of them were, one of 1900 fits, of 4000 not."""
    monkeypatch.setattr(heap, "SETTLED", 10**9)
    three = [Event(0, 1000), Event(1, 1000), Event(2, 1000)]
    assert served(three)[0] == 1104
    assert 3 * 1008 <= served(three)[2] <= 3 * 1104
    two_gone = [*three, Event(0, -1000), Event(1, -1000)]
    assert served([*two_gone, Event(3, 1900)])[-1] == served(three)[-1]
    assert served([*two_gone, Event(3, 4000)])[-1] > served(three)[-1] + 4000


def test_a_hole_whose_ends_are_taken_does_not_fit_its_own_size(monkeypatch):
    """With something small at every cut end, a block that is asked for again and again takes new memory each time."""
    monkeypatch.setattr(heap, "SETTLED", 1)
    fence = [Event(99, 100)]
    one = [Event(0, 1000), *fence, Event(0, -1000)]
    assert heap_peak([*one, Event(1, 1000)]) > heap_peak(one) + 1000
    assert heap_peak([*one, Event(1, 900)]) == heap_peak(one)


def test_large_blocks_have_pages_of_their_own_until_one_was_given_back():
    once = [Event(0, 50 * MIB), Event(0, -50 * MIB), Event(1, 60 * MIB), Event(1, -60 * MIB)]
    assert served(once)[1] == served(once)[3] == 0
    assert heap_peak(once) == pytest.approx(60 * MIB, rel=1e-3)
    learnt = [Event(0, MIB), Event(0, -MIB), Event(1, 512 * KIB), Event(2, 100), Event(1, -512 * KIB)]
    assert served(learnt)[1] == 0
    assert served(learnt)[-1] > 512 * KIB, "from the heap now, and something lies above it"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of another C library")
@pytest.mark.parametrize("seed", range(3))
def test_it_holds_what_glibc_holds(monkeypatch, seed):
    """A thousand blocks from 1 KiB to 4 MiB that live for random times: to a tenth of what the library itself says."""
    monkeypatch.setattr(heap, "SETTLED", 10**9)
    rng, alive, events = random.Random(seed), {}, []
    for number in range(1000):
        events.append(Event(number, int(2 ** rng.uniform(10, 22))))
        alive[number] = events[-1].size
        while len(alive) > 20 + 10 * (number % 300 < 100):
            gone = rng.choice(list(alive))
            events.append(Event(gone, -alive.pop(gone)))
    words = json.dumps([(event.number, event.size) for event in events])
    done = subprocess.run([sys.executable, "-c", REAL], input=words, capture_output=True, text=True, check=True)
    real, simulated = json.loads(done.stdout), served(events)
    assert max(simulated) == pytest.approx(max(real), rel=0.1)
    assert sum(simulated) == pytest.approx(sum(real), rel=0.1)
