"""Archives and older files that torch could not have written: other readers could see other bytes in them."""

import io
import pickle as p
import struct
import warnings
import zipfile

import pytest
import torch

from lightning_plugins import average_checkpoints, extract_weights
from lightning_plugins.core.stand_ins import UnreadableError
from lightning_plugins.core.torch_file import load, load_bytes
from tests.support import opcodes as op
from tests.support.damage import bounded

GOOD = op.checkpoint()
VALUES = {"0": op.FOUR}


def patched(content, old, new, count=-1):
    assert old in content
    return content.replace(old, new, count)


def entries(*pairs, compression=zipfile.ZIP_STORED, comment=b""):
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as zipped:
        warnings.simplefilter("ignore")  # of a name twice
        for name, content in pairs:
            zipped.writestr(name, content)
        zipped.comment = comment
    return file.getvalue()


def with_end(content, **changes):
    """Return an archive with other numbers in the record at its end."""
    fields = list(struct.unpack("<4s4H2LH", content[-22:]))
    for place, value in changes.items():
        fields[int(place[1:])] = value(fields[int(place[1:])])
    return content[:-22] + struct.pack("<4s4H2LH", *fields)


def zeros(archive, key):
    """Return an archive whose entry ``key`` is deflated: a few kilobytes for many megabytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            inside = bytes(64 * 2**20) if info.filename.endswith(key) else old.read(info)
            kind = zipfile.ZIP_DEFLATED if info.filename.endswith(key) else zipfile.ZIP_STORED
            new.writestr(info.filename, inside, compress_type=kind)
    return file.getvalue()


def saved():
    """Return an archive of torch's own, which has a directory as large archives have them."""
    file = io.BytesIO()
    torch.save({"w": torch.ones(4)}, file)
    return file.getvalue()


def with_place(content, shift):
    """Return an archive whose large directory is said to lie elsewhere."""
    at = content.rindex(b"PK\x06\x07") + 8
    return content[:at] + struct.pack("<Q", struct.unpack("<Q", content[at : at + 8])[0] + shift) + content[at + 8 :]


SAVED = saved()
WHOLE = op.archive(GOOD, VALUES)
ARCHIVES = {
    "a deflated pickle": op.archive(GOOD, VALUES, compression=zipfile.ZIP_DEFLATED),
    "a pickle of bzip2": op.archive(GOOD, VALUES, compression=zipfile.ZIP_BZIP2),
    "a pickle of lzma": op.archive(GOOD, VALUES, compression=zipfile.ZIP_LZMA),
    "deflated zeros for a pickle": zeros(WHOLE, "data.pkl"),
    "deflated zeros for a tensor": zeros(WHOLE, "data/0"),
    "deflated zeros for a version": zeros(WHOLE, "version"),
    "two pickles": entries(("a/data.pkl", GOOD), ("a/data.pkl", GOOD), ("a/data/0", op.FOUR)),
    "a name cut off by a zero": entries(("a/data.pkl", GOOD), ("a/data/0", op.FOUR), ("a/data.pkl\0x", b"")).replace(
        b"a/data.pklxx", b"a/data.pkl\0x"
    ),
    "no pickle": entries(("a/data/0", op.FOUR)),
    "no tensors": entries(("a/data.pkl", GOOD)),
    "a tensor that is cut off": op.archive(GOOD, {"0": op.FOUR[:-1]}),
    "another folder's pickle": entries(("b/version", "3"), ("a/data.pkl", GOOD), ("a/data/0", op.FOUR)),
    "a comment": entries(("a/data.pkl", GOOD), ("a/data/0", op.FOUR), comment=b"x"),
    "an archive in the comment": entries(("a/data.pkl", GOOD), ("a/data/0", op.FOUR), comment=WHOLE),
    "something before it": b"PK\x03\x04" + WHOLE,
    "another archive before it": WHOLE + WHOLE,
    "something behind it": WHOLE + b"\0",
    "a program": op.archive(GOOD, VALUES, more={"constants.pkl": p.dumps(())}),
    "an encrypted entry": WHOLE[: WHOLE.rindex(b"PK\x01\x02") + 8] + b"\1" + WHOLE[WHOLE.rindex(b"PK\x01\x02") + 9 :],
    "a directory elsewhere": with_end(WHOLE, _6=lambda offset: offset - 4),
    "a longer directory": with_end(WHOLE, _5=lambda length: length + 46),
    "more entries than there are": with_end(WHOLE, _3=lambda n: n + 1, _4=lambda n: n + 1),
    "entries on another disk": with_end(WHOLE, _1=lambda _: 1),
    "sixty thousand entries": with_end(WHOLE, _3=lambda _: 65_535, _4=lambda _: 65_535),
    "the end alone": with_end(WHOLE)[-22:],
    "a start alone": b"PK\x03\x04",
    "no entries": entries(),
    "a large directory without its mark": patched(SAVED, b"PK\x06\x06", b"PK\x06\x00"),
    "a large directory elsewhere": with_place(SAVED, -1),
    "tensors that lie on each other": None,
}


def overlapping():
    """Return an archive whose directory gives the same megabyte to a thousand names."""
    storages = {str(n): b"" for n in range(1000)}
    storages["0"] = bytes(2**20)
    content = bytearray(op.archive(GOOD, storages))
    first = None
    place = content.index(b"PK\x01\x02")
    while content[place : place + 4] == b"PK\x01\x02":
        length, more = struct.unpack("<H2x2x", content[place + 28 : place + 34])[0], content[place + 42 : place + 46]
        name = bytes(content[place + 46 : place + 46 + length])
        if name == b"archive/data/0":
            first = bytes(content[place + 16 : place + 28]), more
        elif name.startswith(b"archive/data/") and first:
            content[place + 16 : place + 28], content[place + 42 : place + 46] = first
        place += 46 + length
    return bytes(content)


ARCHIVES["tensors that lie on each other"] = overlapping()


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_torch_could_not_have_written_is_refused(tmp_path, name):
    path = op.write(tmp_path / "1.ckpt", ARCHIVES[name])
    with bounded(10, 1):
        for read in (
            lambda: load(path, trust=False),
            lambda: load_bytes(ARCHIVES[name]),
            lambda: average_checkpoints([path, path.with_name("2.ckpt")]),
            lambda: extract_weights(path, "raw"),
        ):
            with pytest.raises(ValueError, match=r"\w") as caught:
                read()
            assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["a longer directory", "a large directory without its mark", "a large directory elsewhere"]
)
def test_a_directory_that_cannot_be_right_is_not_read(name):
    with pytest.raises(UnreadableError, match="its directory is damaged"):
        load_bytes(ARCHIVES[name])


def test_the_archive_that_the_others_are_made_from_is_taken(tmp_path):
    path = op.write(tmp_path / "1.ckpt", WHOLE)
    assert load(path, trust=False)["state_dict"]["w"].tolist() == [1, 2, 3, 4]
    assert with_end(WHOLE) == WHOLE
    assert load_bytes(WHOLE)["global_step"] == 1
    assert load_bytes(with_place(SAVED, 0))["w"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "content",
    [
        op.legacy(op.tensor((4,), count=2**40)),
        op.legacy(op.tensor((13_500_000_000,), (0,)), storages=struct.pack("<Q", 4) + op.FOUR),
        op.legacy(op.tensor(), keys=["0", "1"], storages=struct.pack("<Q", 4) + op.FOUR),
        op.legacy(op.tensor(), keys=[], storages=struct.pack("<Q", 4) + op.FOUR),
        op.legacy(op.tensor(), magic=5, storages=struct.pack("<Q", 4) + op.FOUR),
        op.legacy(op.tensor(), storages=struct.pack("<Q", 2**40) + op.FOUR),
        op.legacy(op.NESTED_TUPLES + op.NONE),
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
    ],
)
def test_an_old_file_that_lies_is_refused(tmp_path, content):
    path = op.write(tmp_path / "1.pt", content)
    with bounded(10, 1), pytest.raises(ValueError, match=r"1\.pt cannot be read as a checkpoint: "):
        average_checkpoints([path, path.with_name("2.pt")])
    with bounded(10, 1), pytest.raises(UnreadableError):
        load(path, trust=False)


def test_an_old_file_has_room_for_its_storages_behind_its_pickles(tmp_path):
    """What is stored is a length of eight bytes and four numbers: less than seven numbers."""
    path = op.write(tmp_path / "1.pt", op.legacy(op.tensor(count=7), storages=struct.pack("<Q", 4) + op.FOUR))
    with pytest.raises(UnreadableError, match="it is cut off: a tensor is longer than what is stored of it"):
        load(path, trust=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_without_tensors_is_read(tmp_path, zipped):
    torch.save({"global_step": 5}, tmp_path / "1.pt", _use_new_zipfile_serialization=zipped)
    assert load(tmp_path / "1.pt", trust=False) == {"global_step": 5}
