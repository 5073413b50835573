"""Damaged files: what a bad disk, a cut connection or somebody's editor makes of bytes, and how to live with them."""

import contextlib
import random
import resource
import signal
import threading
from pathlib import Path

from tests.support import counts

CASES = counts.wanted(1_000, 10_000)
"""How many damaged files a test run tries, over all formats."""


def damage(data, seed):
    """Return ``data`` with one kind of damage, and a line that says which; the same for the same seed."""
    chance = random.Random(seed)
    return chance.choice(KINDS)(bytearray(data), chance)


def _place(data, chance):
    """Return an index, more often in the first and last bytes, where formats keep what they need most."""
    size = len(data)
    edge = min(size, 400)
    return chance.choice(
        [chance.randrange(size), chance.randrange(edge), size - 1 - chance.randrange(edge)] if size else [0]
    )


def _flipped(data, chance):
    places = [_place(data, chance) for _ in range(chance.choice([1, 1, 1, 2, 8]))]
    for place in places:
        data[place] ^= 1 << chance.randrange(8)
    return bytes(data), f"bits flipped at {places}"


def _cut(data, chance):
    place = _place(data, chance)
    return bytes(data[:place]), f"cut off at {place}"


def _zeroed(data, chance):
    place, length = _place(data, chance), chance.choice([1, 8, 64, 512, 4096])
    data[place : place + length] = bytes(len(data[place : place + length]))
    return bytes(data), f"{length} zeros at {place}"


def _swapped(data, chance):
    length = chance.choice([8, 64, 512])
    one, other = sorted((_place(data, chance), _place(data, chance)))
    block, last = data[one : one + length], data[other : other + length]
    data[one : one + length], data[other : other + length] = last, block
    return bytes(data), f"{length} bytes at {one} and {other} swapped"


def _noisy(data, chance):
    place, length = _place(data, chance), chance.choice([1, 2, 4, 8, 64])
    data[place : place + length] = chance.randbytes(length)
    return bytes(data), f"{length} bytes of noise at {place}"


def _largest(data, chance):
    place = _place(data, chance)
    data[place : place + 8] = b"\xff" * len(data[place : place + 8])
    return bytes(data), f"the largest number at {place}"


def _doubled(data, chance):
    place = _place(data, chance)
    return bytes(data[:place] + data[place // 2 :]), f"a stretch twice at {place}"


def _grown(data, chance):
    return bytes(data) + chance.randbytes(chance.choice([1, 100, 5000])), "rubbish at the end"


def _foreign(data, chance):
    others = [b"", b"\0" * 100, b"not a checkpoint\n", b"PK\x03\x04", chance.randbytes(300)]
    return chance.choice(others), "another file"


KINDS = [_flipped] * 6 + [_cut, _cut, _zeroed, _swapped, _noisy, _noisy, _largest, _doubled, _grown, _foreign]


@contextlib.contextmanager
def bounded(seconds=60, gigabytes=3):
    """Fail where the block hangs or asks for memory that no small file can need."""

    def hangs(signum, frame):
        raise AssertionError(f"no answer in {seconds} seconds")

    assert threading.current_thread() is threading.main_thread()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), limits[1]))
    signal.alarm(seconds)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest
        assert grown < 2**20, f"{grown // 1024} megabytes more"
