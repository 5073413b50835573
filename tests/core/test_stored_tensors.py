"""Where a tensor lies is checked to the byte, before anything is read."""

import pytest
import torch

from lightning_plugins.core.mapped_files import MappedFiles
from lightning_plugins.core.stand_ins import (
    Name,
    StandIn,
    StoredStorage,
    StoredTensor,
    UnreadableError,
    called,
    is_foreign,
    is_known,
)
from lightning_plugins.statistics.labels import widest

REBUILD = Name("torch._utils", "_rebuild_tensor_v2")


def rebuilt(nbytes=16, offset=0, shape=(4,), stride=(1,)):
    return called(REBUILD, (StoredStorage("0", torch.float32, nbytes), offset, shape, stride, False, {}))


def test_a_tensor_may_fill_its_storage():
    assert rebuilt() == StoredTensor("0", torch.float32, 0, (4,), (1,))
    assert rebuilt(offset=4, shape=(0,)).shape == (0,)


@pytest.mark.parametrize(
    "lie",
    [
        {"nbytes": 15},
        {"offset": 1},
        {"offset": -1, "shape": (2,)},
        {"offset": 0.0},
        {"offset": True, "shape": (2,)},
        {"shape": (4.0,)},
        {"shape": (True,)},
        {"shape": (-1,)},
        {"shape": (0, 2**63), "stride": (1, 1)},
        {"shape": (2, 2)},
        {"stride": (2,)},
        {"shape": (1,) * 65, "stride": (1,) * 65},
    ],
    ids=str,
)
def test_what_is_no_place_in_the_storage_is_refused(lie):
    with pytest.raises(UnreadableError, match=r"impossible sizes|longer than its storage"):
        rebuilt(**lie)


@pytest.mark.parametrize(
    ("module", "name", "known"),
    [
        ("collections", "OrderedDict", True),
        ("torch", "FloatStorage", True),
        ("torch.cuda", "HalfStorage", True),
        ("torch.storage", "UntypedStorage", True),
        ("torch", "float32", True),
        ("torch", "channels_last", True),
        ("torch", "load", False),
        ("torch", "nothing of that name", False),
        ("torch.storage", "_load_from_bytes", False),
        ("torch.cuda", "float32", False),
        ("os", "FloatStorage", False),
        ("os", "system", False),
        ("builtins", "OrderedDict", False),
    ],
)
def test_what_plain_checkpoints_name(module, name, known):
    assert is_known(Name(module, name)) is known
    assert is_foreign(Name(module, name)) is not known


@pytest.mark.parametrize(
    ("module", "name", "arguments", "made"),
    [
        ("builtins", "set", ([1, "a", (2, 3)],), {1, "a", (2, 3)}),
        ("__builtin__", "set", (), set()),
        ("collections", "OrderedDict", ([("a", 1), ("b", 2)],), {"a": 1, "b": 2}),
        ("collections", "Counter", ({"a": 1},), {"a": 1}),
        ("builtins", "bytearray", (b"ab",), bytearray(b"ab")),
        ("builtins", "bytearray", ("\xe9", "latin-1"), bytearray(b"\xe9")),
        ("builtins", "complex", (1, 2), 1 + 2j),
        ("_codecs", "encode", ("\xe9", "latin1"), b"\xe9"),
        ("torch", "Size", ([2, 3],), (2, 3)),
    ],
)
def test_plain_values_are_made_without_a_call_of_what_is_named(module, name, arguments, made):
    assert called(Name(module, name), arguments) == made


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("builtins", "set", ([[1]],)),
        ("collections", "OrderedDict", ([([1], 2)],)),
        ("builtins", "bytearray", (10**9,)),
        ("_codecs", "encode", ("a", "punycode")),
        ("torch", "Size", ([-1],)),
        ("torch", "Tensor", ()),
    ],
)
def test_calls_that_plain_checkpoints_do_not_make_are_refused(module, name, arguments):
    with pytest.raises(UnreadableError, match=r"^(its pickle|it holds)"):
        called(Name(module, name), arguments)


WITH_ATTRIBUTES = Name("torch._tensor", "_rebuild_from_type_v2")


@pytest.mark.parametrize(
    ("module", "kind", "is_tensor"),
    [("torch", "Tensor", True), ("torch.nn.parameter", "Parameter", True), ("torch.nn.parameter", "Buffer", False)],
)
def test_attributes_make_no_other_thing_of_a_tensor(module, kind, is_tensor):
    arguments = (StoredStorage("0", torch.float32, 16), 0, (4,), (1,), False, {})
    found = called(WITH_ATTRIBUTES, (REBUILD, Name(module, kind), arguments, {"note": "x"}))
    assert found == rebuilt() if is_tensor else (type(found), found.name) == (StandIn, Name(module, kind))
    with pytest.raises(UnreadableError, match="own attributes are replaced"):
        called(WITH_ATTRIBUTES, (REBUILD, Name(module, kind), arguments, {"shape": "x"}))


@pytest.mark.parametrize("position", [0, 3])
def test_a_file_one_byte_short_is_cut_off(tmp_path, position):
    path, values = tmp_path / "tensors", torch.arange(4.0)
    content = bytes(position) + values.numpy().tobytes()
    path.write_bytes(content)
    stored = StoredTensor("0", torch.float32, 0, (4,), (1,))
    assert torch.equal(MappedFiles().tensor(path, position, stored), values)
    path.write_bytes(content[:-1])
    with pytest.raises(UnreadableError, match="it ends before its tensors do"):
        MappedFiles().tensor(path, position, stored)


def test_sums_are_exact_beyond_two_to_the_24th():
    one = torch.tensor([2**24, 1]).sum(dtype=widest(torch.device("cpu")))
    assert one.item() == 2**24 + 1
    assert widest(torch.device("cpu")) is torch.float64
    assert widest(torch.device("mps")) is torch.float32
