"""Puts pickles together opcode by opcode, and archives entry by entry, as no program of good will writes them."""

import io
import pickle as p
import struct
import zipfile
from pathlib import Path

PROTO = b"\x80\x02"
MARK, STOP, POP, DUP, TUPLE, EMPTY_TUPLE = p.MARK, p.STOP, p.POP, p.DUP, p.TUPLE, p.EMPTY_TUPLE
TUPLE1, TUPLE2, TUPLE3, REDUCE, BUILD, NEWOBJ = p.TUPLE1, p.TUPLE2, p.TUPLE3, p.REDUCE, p.BUILD, p.NEWOBJ
EMPTY_DICT, EMPTY_LIST, EMPTY_SET, NONE = p.EMPTY_DICT, p.EMPTY_LIST, p.EMPTY_SET, p.NONE
SETITEM, SETITEMS, APPEND, APPENDS, BINPERSID = p.SETITEM, p.SETITEMS, p.APPEND, p.APPENDS, p.BINPERSID


def name(module, attribute):
    return p.GLOBAL + f"{module}\n{attribute}\n".encode()


def text(value):
    encoded = value.encode()
    return p.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def number(value):
    if 0 <= value < 2**31:
        return p.BININT + struct.pack("<i", value)
    encoded = p.encode_long(value)
    return p.LONG1 + bytes([len(encoded)]) + encoded


def put(index):
    return p.LONG_BINPUT + struct.pack("<I", index)


def get(index):
    return p.LONG_BINGET + struct.pack("<I", index)


def group(*parts):
    """A tuple of values."""
    return MARK + b"".join(parts) + TUPLE


def mapping(*pairs):
    return EMPTY_DICT + MARK + b"".join(part for pair in pairs for part in pair) + SETITEMS


def call(function, *arguments):
    return function + group(*arguments) + REDUCE


def made(kind, *state):
    """An object without arguments, with attributes where there are some."""
    return kind + EMPTY_TUPLE + NEWOBJ + (mapping(*state) + BUILD if state else b"")


def storage(key="0", count=4, kind="FloatStorage", module="torch"):
    return group(text("storage"), name(module, kind), text(key), text("cpu"), number(count)) + BINPERSID


def tensor(sizes=(4,), strides=(1,), offset=0, **options):
    numbers = [group(*map(number, sizes)), group(*map(number, strides))]
    hooks = call(name("collections", "OrderedDict"))
    function = name("torch._utils", "_rebuild_tensor_v2")
    return call(function, storage(**options), number(offset), *numbers, p.NEWFALSE, hooks)


def shared(start, step, depth=60):
    """A value that holds another twice, which holds another twice, and so on: small, but endless to go through."""
    return start + (put(0) + step) * depth if step else start


NESTED_TUPLES = EMPTY_TUPLE + (put(0) + get(0) + TUPLE2) * 80
NESTED_LISTS = EMPTY_LIST + b"".join(put(n) + EMPTY_LIST + get(n) + APPEND + get(n) + APPEND for n in range(60))


def pickled(body):
    return PROTO + body + STOP


def archive(pickle, storages=None, folder="archive", compression=zipfile.ZIP_STORED, more=None):
    """Return a zip file as torch's: the pickle, and storages by key."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        zipped.writestr(f"{folder}/data.pkl", pickle)
        zipped.writestr(f"{folder}/byteorder", "little")
        for key, content in (storages or {}).items():
            zipped.writestr(f"{folder}/data/{key}", content)
        zipped.writestr(f"{folder}/version", "3\n")
        for inner, content in (more or {}).items():
            zipped.writestr(f"{folder}/{inner}", content)
    return file.getvalue()


def legacy(body, keys=("0",), storages=b"", magic=0x1950A86A20F9469CFC6C):
    """Return a file as torch before 1.6 wrote it."""
    parts = [p.dumps(magic, 2), p.dumps(1001, 2), p.dumps({"little_endian": True}, 2), pickled(body)]
    return b"".join(parts) + p.dumps(list(keys), 2) + storages


def checkpoint(state=None, *more):
    """The pickle of a checkpoint with one tensor, and with more entries."""
    weights = mapping((text("w"), tensor() if state is None else state))
    return pickled(mapping((text("state_dict"), weights), (text("global_step"), number(1)), *more))


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def write(path, content):
    Path(path).write_bytes(content)
    return Path(path)
