"""TensorBoard's records (TFRecord): length, checksum of the length, data, checksum of the data.

Most of the cost of a record in plain Python is its checksum, a loop over every byte. Records that are written together
are therefore summed up together: the loop runs once over the bytes' positions, in NumPy for all records at a time.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import numpy as np
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

# with fewer records the plain loop is faster
_FEW = 80
# CRC-32C, bits reversed
_POLYNOMIAL = 0x82F63B78
_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


def frame(records: Sequence[bytes]) -> list[bytes]:
    """Return each of ``records`` as it stands in a file.

    Example:
        >>> frame([b"data"])[0].hex(" ", 4)
        '04000000 00000000 42455204 64617461 8848269e'
    """
    sums = checksums(records) if len(records) >= _FEW else [masked_crc32c(record) for record in records]
    pairs = zip(records, sums, strict=True)
    return [_head(len(record)) + record + _CHECKSUM.pack(checksum) for record, checksum in pairs]


def checksums(records: Sequence[bytes]) -> list[int]:
    """Return the masked CRC-32C of every record.

    Example:
        >>> checksums([b"123456789", b""]) == [masked_crc32c(b"123456789"), masked_crc32c(b"")]
        True
    """
    order = sorted(range(len(records)), key=lambda index: len(records[index]), reverse=True)
    lengths = np.array([len(records[index]) for index in order])
    longest = int(lengths.max(initial=0))
    text = b"".join([records[index].ljust(longest, b"\0") for index in order])
    columns = np.frombuffer(text, np.uint8).reshape(len(records), longest).T.astype(np.uint32)
    # records longer than a position
    unfinished = np.searchsorted(-lengths, -np.arange(longest), side="left")
    crc = np.full(len(records), 0xFFFFFFFF, np.uint32)
    table = _table()
    for column, count in zip(columns, unfinished.tolist(), strict=True):
        part = crc[:count]
        crc[:count] = table[(part ^ column[:count]) & 0xFF] ^ (part >> 8)
    crc ^= 0xFFFFFFFF
    # so that a checksum of a checksum is none
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    found = np.empty(len(records), np.uint32)
    found[order] = masked
    return [int(value) for value in found.tolist()]


@functools.cache
def _table() -> np.ndarray:
    """Return the remainder of every byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ _POLYNOMIAL, table >> 1).astype(np.uint32)
    return table


@functools.lru_cache(maxsize=256)
def _head(length: int) -> bytes:
    packed = _LENGTH.pack(length)
    return packed + _CHECKSUM.pack(masked_crc32c(packed))
