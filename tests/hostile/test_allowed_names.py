"""What plain checkpoints may name can do harm as well: attributes set on classes, functions given new defaults.

``TORTURE=1`` in the environment tries ten thousand generated pickles, the gate a tenth of that.
"""

import collections
import os
import pathlib
import pickle as p
import random
import shutil

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata

from lightning_plugins import average_checkpoints, extract_weights, select_checkpoints
from lightning_plugins.checkpoints import CheckpointError
from lightning_plugins.core import safe_unpickler, stand_ins, torch_file
from lightning_plugins.core.safe_unpickler import unpickle
from lightning_plugins.core.stand_ins import Name, StandIn, StoredStorage, StoredTensor, UnreadableError
from tests.support import counts, opcodes as op
from tests.support.audit_events import code_run, listening, outside
from tests.support.damage import bounded
from tests.support.damaged_cases import write_whole_files

pytestmark = pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning")
INDEX = "torch.distributed.checkpoint.metadata"
INDEX_CLASSES = ["Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "TensorProperties"]
# every name that a reader takes, in a checkpoint or in an index
NAMES = [
    *((INDEX, kind) for kind in (*INDEX_CLASSES, "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("pathlib", kind) for kind in ("PosixPath", "WindowsPath", "Path", "PurePath")),
    *((name.module, name.name) for name in stand_ins._CALLS),
    ("torch", "FloatStorage"),
    ("torch.storage", "UntypedStorage"),
    ("torch", "float32"),
]
OBJECTS = [
    *(getattr(pathlib, kind) for kind in ("PosixPath", "WindowsPath", "Path", "PurePath", "PurePosixPath")),
    *(getattr(metadata, kind) for kind in INDEX_CLASSES),
    *(metadata.BytesStorageMetadata, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo),
    *(value for key, value in vars(torch._utils).items() if key.startswith("_rebuild")),
    *(collections.OrderedDict, collections.Counter, torch.Size, torch.nn.Parameter, torch.Tensor, torch.FloatStorage),
    *(torch._tensor._rebuild_from_type_v2, torch.UntypedStorage, torch.storage.TypedStorage, StandIn, StoredStorage),
    *(Name, StoredTensor, os.path.join, torch_file, safe_unpickler, stand_ins, safe_unpickler._Machine),
    *(value for value in vars(stand_ins).values() if callable(value)),
]


def attributes(value):
    """Return what hangs on an object, by identity, tables included."""
    found = {key: id(inner) for key, inner in dict(getattr(value, "__dict__", {})).items()}
    for key in ("__defaults__", "__kwdefaults__", "__code__", "__closure__", "__module__", "__name__"):
        found[key] = id(getattr(value, key, None)) if key.startswith("__c") else repr(getattr(value, key, None))
    tables = [inner for inner in getattr(value, "__dict__", {}).values() if type(inner) is dict]
    return found, [sorted(map(str, table)) for table in tables]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_whole_files(folder)
    return folder


@pytest.fixture
def untouched(tmp_path, whole):
    """Everything that a pickle could reach is afterwards what it was before."""
    before = [attributes(value) for value in OBJECTS]
    precious = tmp_path / "precious"
    precious.write_text("x")
    yield
    for value, then in zip(OBJECTS, before, strict=True):
        assert attributes(value) == then, value
    assert pathlib.Path("a/b").name == "b"
    assert str(pathlib.PurePosixPath("/x")) == "/x"
    assert precious.read_text() == "x"


def abuses(module, attribute):
    """Yield names and pickle bodies: everything that can be tried with one name."""
    it = op.name(module, attribute)
    evil = op.text("/evil")
    slots = op.group(op.NONE, op.mapping((op.text("_str"), evil), (op.text("_drv"), evil)))
    yield "slots of the class", it + slots + op.BUILD
    yield "attributes of the class", it + op.mapping((op.text("__fspath__"), evil)) + op.BUILD
    yield "defaults of the function", it + op.mapping((op.text("__defaults__"), op.group(evil, evil))) + op.BUILD
    yield "defaults as a slot", it + op.group(op.NONE, op.mapping((op.text("__defaults__"), op.NONE))) + op.BUILD
    yield "slots of an object", it + op.EMPTY_TUPLE + op.NEWOBJ + slots + op.BUILD
    yield "slots of what a call gives", it + op.EMPTY_TUPLE + op.REDUCE + slots + op.BUILD
    yield "an attribute of a path", op.call(it, evil) + op.mapping((op.text("_str"), evil)) + op.BUILD
    yield "an item of the class", it + evil + evil + op.SETITEM
    yield "an element of the class", it + evil + op.APPEND
    yield "elements of the class", it + op.MARK + evil + op.APPENDS
    yield "elements of a set that is the class", it + op.MARK + evil + p.ADDITEMS
    yield "a call with no tuple", it + evil + op.REDUCE
    yield "a call of what a call gave", op.call(it) + op.group(evil) + op.REDUCE
    yield "a class made by INST", op.MARK + evil + p.INST + f"{module}\n{attribute}\n".encode()
    yield "a class made by OBJ", op.MARK + it + evil + p.OBJ
    yield "keywords", it + op.group(evil) + op.mapping((op.text("key"), evil)) + p.NEWOBJ_EX
    yield "a million zeros", op.call(it, op.number(10**12))
    yield "an extension", p.EXT1 + b"\x01"
    yield "a text for a storage", p.PERSID + b"storage\n"
    yield "the class for a storage", it + op.BINPERSID
    yield "as a key", op.mapping((it, evil))
    yield (
        "as an argument of a type",
        op.call(op.name("torch._tensor", "_rebuild_from_type_v2"), it, it, op.EMPTY_TUPLE, op.EMPTY_DICT),
    )


def is_plain(value, depth=0):
    """Return whether a result holds nothing but plain values and what stands in for the rest."""
    kinds = (int, float, bool, str, bytes, bytearray, complex, type(None), Name, StoredTensor, StoredStorage)
    if type(value) in kinds or depth > 30:
        return True
    if type(value) is StandIn:
        inner = [*value.items(), value.arguments, value.state]
    elif type(value) in (list, tuple, set, frozenset):
        inner = value
    else:
        inner = value.items() if type(value) is dict else [None, object()]
        if type(value) is not dict:
            return False
    return all(is_plain(one, depth + 1) for one in inner)


def read(content):
    """Return what our unpickler makes of bytes, ``None`` if it refuses; whatever happens, nothing runs."""
    with listening() as events:
        try:
            found = unpickle(content)
        except UnreadableError as error:
            assert len(str(error).splitlines()) == 1, error  # noqa: PT017
            found = None
    ran = [event for event in code_run(events) if event[0] not in ("exec", "marshal.loads")]
    assert not [event for event in ran if event[0] != "import"]
    assert not [event for event in events if event[0] == "pickle.find_class"]
    assert found is None or is_plain(found.content)
    return found


@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_no_use_of_an_allowed_name_changes_anything(untouched, name):
    for _, body in abuses(*name):
        with bounded(10, 1):
            read(op.pickled(body))


@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_no_file_with_such_a_use_changes_anything(untouched, tmp_path, name):
    """The readers of checkpoints and of indices, with all the abuses of a name in files of their own."""
    write_whole = tmp_path / "1.ckpt"
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for _, body in abuses(*name):
        content = op.checkpoint(None, (op.text("hyper_parameters"), body))
        op.write(write_whole, op.archive(content, {"0": op.FOUR}))
        op.write(sharded / ".metadata", op.pickled(body))
        for reader in (
            lambda: average_checkpoints([write_whole, write_whole.with_name("2.ckpt")]),
            lambda: select_checkpoints(tmp_path),
            lambda: extract_weights(write_whole, "raw"),
            lambda: average_checkpoints([sharded, write_whole]),
        ):
            with listening() as events, bounded(10, 1):
                try:
                    reader()
                except (ValueError, OSError) as error:
                    assert len(str(error).splitlines()) == 1  # noqa: PT017
                    assert "weights_only" not in str(error)  # noqa: PT017
            assert outside(events, tmp_path) == []


def test_a_path_in_an_index_is_a_text_and_stays_inside(untouched, tmp_path, whole):
    """An index whose places are made of paths, absolute ones, links and upward ones names nothing outside."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    index = tmp_path / "sharded" / ".metadata"
    good = index.read_bytes()
    outside_file = tmp_path / "__0_0.distcp"
    outside_file.write_bytes((tmp_path / "sharded" / "__0_0.distcp").read_bytes())
    (tmp_path / "sharded" / "link").symlink_to(outside_file)
    for place in (
        "../__0_0.distcp",
        str(outside_file),
        "./__0_0.distcp",
        "link",
        "",
        ".",
        "..",
        "__0_0.distcp/",
        "a\0b",
    ):
        encoded = place.encode()
        old = p.SHORT_BINUNICODE + bytes([12]) + b"__0_0.distcp"
        assert old in good
        index.write_bytes(good.replace(old, p.SHORT_BINUNICODE + bytes([len(encoded)]) + encoded))
        with listening() as events, pytest.raises((CheckpointError, ValueError)):
            average_checkpoints([tmp_path / "sharded", tmp_path / "1.ckpt"], strict=False)
        assert not [e for e in events if e[0] == "open" and e[1][0] == str(outside_file)]


def program(chance):
    """Return a pickle of random operations, most of which find on the stack what they need."""
    names = [op.name(*one) for one in NAMES] + [op.name("os", "system"), op.name("builtins", "getattr")]
    values = [op.text("a"), op.text("/evil"), op.number(5), op.number(2**62), op.NONE, p.NEWTRUE, op.EMPTY_TUPLE]
    values += [op.EMPTY_DICT, op.EMPTY_LIST, op.EMPTY_SET, op.tensor(), op.storage(), op.text("__defaults__")]
    body = b""
    for _ in range(chance.choice([3, 10, 30])):
        body += chance.choice(
            [
                chance.choice(values),
                chance.choice(values),
                chance.choice(names),
                chance.choice(names) + op.group(*chance.choices(values, k=chance.randrange(4))) + op.REDUCE,
                chance.choice(names) + op.EMPTY_TUPLE + op.NEWOBJ,
                op.mapping((chance.choice(values), chance.choice(values))) + op.BUILD,
                op.group(op.NONE, op.mapping((op.text("_str"), op.text("/evil")))) + op.BUILD,
                chance.choice([op.TUPLE1, op.TUPLE2, op.TUPLE3, op.REDUCE, op.BUILD, op.NEWOBJ, op.SETITEM, op.APPEND]),
                chance.choice([op.MARK, op.TUPLE, op.SETITEMS, op.APPENDS, p.LIST, p.DICT, p.FROZENSET, p.ADDITEMS]),
                op.put(chance.randrange(4)),
                op.get(chance.randrange(4)),
                chance.choice([op.POP, op.DUP, p.POP_MARK, op.BINPERSID, p.STACK_GLOBAL, p.NEWOBJ_EX, p.MEMOIZE]),
                bytes([chance.randrange(256)]),
            ]
        )
    return op.pickled(body)


def test_generated_pickles_give_plain_values_or_one_line(untouched, tmp_path, record_property):
    cases, taken = counts.wanted(1_000, 10_000), 0
    path = tmp_path / "x.ckpt"
    with bounded(300, 1):
        for seed in range(cases):
            content = program(random.Random(seed))
            found = read(content)
            if found is not None:
                taken += 1
                # what our unpickler lets pass is then torch's to load
                op.write(path, op.archive(content, {"0": op.FOUR}))
                try:
                    torch_file.load(path, trust=False)
                except UnreadableError as error:
                    assert "weights_only" not in str(error)  # noqa: PT017
    counts.record(record_property, "hostile inputs", {"generated pickles": cases})
    assert taken > cases // 100


def values(chance, depth=0):
    """Return a nested plain value with tensors."""
    kinds = ["int", "text", "float", "none", "bytes", "tensor", "tied"]
    kind = chance.choice([*kinds, "list", "dict", "tuple", "ordered", "set"] if depth < 4 else kinds)
    types = [torch.float32, torch.bfloat16, torch.int16, torch.complex64]
    inner = [values(chance, depth + 1) for _ in range(chance.randrange(4))] if depth < 4 else []
    made = {
        "int": lambda: chance.choice([0, -1, 2**31, 2**70, True]),
        "text": lambda: chance.choice(["", "a", "é\n", "\ud800"]),
        "float": lambda: chance.choice([0.5, float("inf"), 1e-300]),
        "none": lambda: None,
        "bytes": lambda: chance.choice([b"x", b"ab\xff", bytearray(b"x"), 1 + 2j]),
        "tensor": lambda: torch.randn(chance.choice([(), (3,), (0, 2), (2, 3)])).to(chance.choice(types)),
        "tied": lambda: torch.arange(12.0).view(3, 4).t()[1:],
        "list": lambda: inner,
        "tuple": lambda: tuple(inner),
        "dict": lambda: {chance.choice(["a", 5, None, ("a", 1)]): one for one in inner},
        "ordered": lambda: collections.OrderedDict((f"k{n}", one) for n, one in enumerate(inner)),
        "set": lambda: {1, "a"},
    }
    return made[kind]()


def same(ours, theirs):
    """Return whether our reading of a file is torch's."""
    if isinstance(theirs, torch.Tensor):
        return (ours.dtype, ours.shape, ours.stride) == (theirs.dtype, tuple(theirs.shape), theirs.stride())
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and (ours == theirs)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_writes_is_read_as_torch_reads_it(tmp_path, zipped):
    """Our first reading and torch's loading agree on every value, so that what was checked is what is loaded."""
    path = tmp_path / "x.pt"
    for seed in range(60):
        torch.manual_seed(seed)
        content = {"state_dict": values(random.Random(seed)), "parameter": torch.nn.Parameter(torch.ones(2))}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with path.open("rb") as file:
            found = torch_file.Archive(file).found if zipped else torch_file.read_legacy(file)
        assert same(found.content, torch_file.load(path, trust=False)), content
        assert found.foreign == []


ORDINARY = [
    [*(1, -1, 2**31, -(2**70), True, False, None, 0.5, "", "\u00e9" * 300, b"\xff" * 300, 2 + 3j), bytearray(b"ab")],
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [[]], {}, {"a": {"b": 1}}, {1: 2, "c": (None,)}],
    [set(), {1}, {1, "a"}, {"a": {3}, "b": [{4, 5}]}],
    [collections.OrderedDict(a=1, b=[2]), collections.Counter("aab")],
    # what older protocols write as calls of their classes, which torch takes as little
    [frozenset(), frozenset({1, 2}), b"", bytearray()],
]


@pytest.mark.parametrize(
    ("content", "protocol"), [(one, n) for one in ORDINARY for n in range(4 if one is ORDINARY[-1] else 2, 6)]
)
def test_ordinary_values_are_read_as_pickle_reads_them(content, protocol):
    shared = [content, content, {"again": content}]
    found = unpickle(p.dumps(shared, protocol))
    assert found.content == p.loads(p.dumps(shared, protocol))
    assert [*map(type, found.content[0][:12])] == [dict if isinstance(v, dict) else type(v) for v in content[:12]]
    assert found.content[0] is found.content[1] is found.content[2]["again"]
    assert (found.foreign, found.storages) == ([], {})


class Settings:
    """An object of a user's that torch is told to be safe."""

    def __init__(self, width):
        self.width = width


def test_what_the_user_allows_in_torch_is_allowed_here_too(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": Settings(3)}, path)
    with pytest.raises(torch_file.NeedsTrustError, match=rf"it names {Settings.__module__}.Settings"):
        torch_file.load(path, trust=False)
    with torch.serialization.safe_globals([Settings]):
        assert torch_file.load(path, trust=False)["hyper_parameters"].width == 3
        assert extract_weights(path, "raw")["w"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="pass trust=True"):
        extract_weights(path, "raw")
    assert extract_weights(path, "raw", trust=True)["w"].tolist() == [1, 1]
