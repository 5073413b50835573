"""Our reader of .safetensors beside the reference implementation: what the one refuses, the other refuses too.

``TORTURE=1`` in the environment tries ten thousand generated headers, the gate a tenth of that.
"""

import json
import random
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lightning_plugins import average_checkpoints
from lightning_plugins.checkpoints import CheckpointError
from lightning_plugins.core.files import write_state_dict
from lightning_plugins.core.safetensors_file import read_header
from lightning_plugins.core.stand_ins import UnreadableError
from tests.support import counts
from tests.support.damage import bounded

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
TEXT = json.dumps(F32)
DEEP = "[" * 200 + "]" * 200
# name -> header (a text is taken as it is), bytes of tensors
EIGHT_BITS = ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]
REFUSED = {
    "an overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12),
    "the same bytes twice": ({"a": F32, "b": F32}, 8),
    "a hole": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, 20),
    "a hole at the beginning": ({"a": {**F32, "data_offsets": [4, 12]}}, 12),
    "bytes behind the tensors": ({"a": F32}, 9),
    "bytes and no tensor": ({}, 1),
    "a tensor that is cut off": ({"a": F32, "b": NEXT}, 15),
    "a size that is not that of the bytes": ({"a": {**F32, "shape": [3]}}, 8),
    "sizes whose product overflows, times zero": ({"a": {**F32, "shape": [2**62, 4, 0], "data_offsets": [0, 0]}}, 0),
    "a name twice, elsewhere": (f'{{"a": {TEXT}, "a": {json.dumps(NEXT)}}}', 16),
    "metadata twice": (f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {TEXT}}}', 8),
    "metadata that are numbers": ({"__metadata__": {"step": 1}, "a": F32}, 8),
    "metadata in metadata": ({"__metadata__": {"step": {}}, "a": F32}, 8),
    "a dtype of no format": ({"a": {**F32, "dtype": "float32"}}, 8),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 8, 8]}}, 8),
    "a size with a decimal point": ('{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', 8),
    "a size with an exponent": ('{"a": {"dtype": "F32", "shape": [2e0], "data_offsets": [0, 8]}}', 8),
    "a truth value for a size": ('{"a": {"dtype": "I8", "shape": [true], "data_offsets": [0, 1]}}', 1),
    "a size beyond the largest": ({"a": {**F32, "shape": [0, 2**63], "data_offsets": [0, 0]}}, 0),
    "a negative zero": ('{"a": {"dtype": "F32", "shape": [0], "data_offsets": [-0, 0]}}', 0),
    "NaN": ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', 8),
    "half a character": (f'{{"\\ud800": {TEXT}}}', 8),
    "a trailing comma": (f'{{"a": {TEXT},}}', 8),
    "a comment": (f'{{"a": {TEXT}}} // x', 8),
    "a list": ("[]", 0),
    "a text": ('"a"', 0),
    "nothing": ("", 0),
    "a deep list where nothing belongs": (f'{{"a": {TEXT[:-1]}, "x": {DEEP}}}}}', 8),
    "the header in another encoding": (json.dumps({"a": F32}).encode("utf-16"), 8),
    "a mark of the encoding": (b"\xef\xbb\xbf" + json.dumps({"a": F32}).encode(), 8),
    "a zero byte behind the header": (json.dumps({"a": F32}).encode() + b"\0", 8),
    "a control character in a name": (b'{"a\nb": %s}' % json.dumps(F32).encode(), 8),
    "bytes that are no text": (b'{"\xff": %s}' % json.dumps(F32).encode(), 8),
}
TAKEN = {
    "an empty name": ({"": F32, "b": NEXT}, 16),
    "no tensors": ({}, 0),
    "no tensors, but metadata": ({"__metadata__": {"": ""}}, 0),
    "empty tensors": ({"a": {**F32, "shape": [0], "data_offsets": [0, 0]}, "b": F32}, 8),
    "the largest size": ({"a": {**F32, "shape": [0, 2**63 - 1], "data_offsets": [0, 0]}}, 0),
    "sixty-four dimensions": ({"a": {"dtype": "F32", "shape": [1] * 64, "data_offsets": [0, 4]}}, 4),
    "a scalar": ({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, 8),
    "another order of names": ({"b": NEXT, "a": F32}, 16),
    "numbers of eight bits": (
        {name: {"dtype": name, "shape": [2], "data_offsets": [2 * n, 2 * n + 2]} for n, name in enumerate(EIGHT_BITS)},
        2 * len(EIGHT_BITS),
    ),
    "unusual names": ({"\x7f\x1b]0;\u202e": F32, "__metadata": NEXT}, 16),
}


def write(path, header, nbytes, length=None):
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(nbytes))
    return path


def reference(path):
    """Return what the reference implementation reads: name -> shape and dtype, or ``None`` if it refuses."""
    try:
        with safe_open(path, framework="pt") as opened:
            # not a mapping: it has keys and is none
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def ours(path):
    try:
        found = read_header(path)
    except UnreadableError:
        return None
    return {name: (tensor.shape, tensor.dtype) for name, tensor in found.tensors.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_reference_refuses_is_refused(tmp_path, name):
    path = write(tmp_path / "x.safetensors", *REFUSED[name])
    with bounded(10, 1):
        assert reference(path) is None
        assert ours(path) is None
        with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read as a checkpoint: "):
            average_checkpoints([path, path.with_name("y.safetensors")])


def test_a_name_twice_is_refused_where_the_reference_takes_the_later(tmp_path):
    path = write(tmp_path / "x.safetensors", f'{{"a": {TEXT}, "a": {TEXT}}}', 8)
    assert reference(path) is not None
    assert ours(path) is None


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_reference_takes_is_taken_alike(tmp_path, name):
    path = write(tmp_path / "x.safetensors", *TAKEN[name])
    assert ours(path) == reference(path)
    assert ours(path) is not None


@pytest.mark.parametrize("length", [0, 1, 2**16, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
def test_lengths_that_lie(tmp_path, length):
    path = write(tmp_path / "x.safetensors", {"a": F32}, 8, length)
    with bounded(10, 1):
        assert (reference(path), ours(path)) == (None, None)


def test_a_length_of_eight_bytes_counts_with_its_last_one(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": F32}, 8, len(json.dumps({"a": F32})) + 2**56)
    assert (reference(path), ours(path)) == (None, None)


def test_a_file_that_ends_within_its_header_is_cut_off(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": F32}, 8)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UnreadableError, match=r"^it is cut off, or no"):
        read_header(path)


@pytest.mark.parametrize("size", range(8))
def test_files_too_short_for_a_length(tmp_path, size):
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    assert (reference(tmp_path / "x.safetensors"), ours(tmp_path / "x.safetensors")) == (None, None)


@pytest.mark.parametrize("dimensions", [65, 100_000])
def test_a_hundred_thousand_dimensions_end(tmp_path, dimensions):
    header = {"a": {"dtype": "F32", "shape": [1] * dimensions, "data_offsets": [0, 4]}}
    with bounded(10, 1):
        assert ours(write(tmp_path / "x.safetensors", header, 4)) is None


def test_a_tensor_without_a_name_is_averaged(tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in (1, 3)]
    for number, path in zip((1.0, 3.0), paths, strict=True):
        save_file({"": torch.full((2,), number), "b": torch.zeros(1)}, path)
    assert average_checkpoints(paths)[""].tolist() == [2.0, 2.0]
    assert torch.equal(load_file(average_checkpoints(paths, tmp_path / "out.safetensors"))[""], torch.full((2,), 2.0))


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_the_format_cannot_hold_are_refused_before_a_file_is_there(tmp_path, name):
    with pytest.raises(ValueError, match=r"is no name that \.safetensors can hold"):
        write_state_dict({name: torch.ones(2)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_we_write_the_reference_reads(tmp_path):
    chance = torch.Generator().manual_seed(1)
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    state = {
        f"{kind}/{shape}": (4 * torch.randn(shape, generator=chance)).to(kind)
        for kind in kinds
        for shape in ((), (0, 3), (5,), (2, 3))
    }
    state["view"] = torch.randn(4, 6, generator=chance)[1:, ::2].t()
    state["tied"] = state["view"]
    state["parameter"] = torch.nn.Parameter(torch.randn(3, generator=chance))
    found = load_file(write_state_dict(state, tmp_path / "x.safetensors"))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def generated(chance):
    """Return a header and a number of bytes, right in every part but a few."""
    header, end = {}, 0
    for number in range(chance.choice([0, 1, 1, 2, 3, 5])):
        shape = [chance.choice([0, 1, 2, 3]) for _ in range(chance.choice([0, 1, 2, 4]))]
        kind, width = chance.choice([("F32", 4), ("U8", 1), ("BF16", 2), ("F64", 8), ("BOOL", 1)])
        length = width
        for size in shape:
            length *= size
        header[chance.choice(["a", "", "é", "layer.weight", "__metadata", "b"]) + str(number)] = {
            "dtype": kind,
            "shape": shape,
            "data_offsets": [end, end + length],
        }
        end += length
    if chance.random() < 0.3:
        header["__metadata__"] = {"format": "pt", "step": "5"}
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        end = mutate(header, end, chance)
    return header, max(end, 0)


def mutate(header, end, chance):
    entries = [entry for entry in header.values() if isinstance(entry, dict) and "shape" in entry]
    if not entries or chance.random() < 0.2:
        return end + chance.choice([-1, 1, 8, 100])
    entry = chance.choice(entries)
    odd = [-1, 2**31, 2**63, 2**64, 2**200, 0.5, 1.0, None, True, "1", [], [1], {}, 10**400]
    field = chance.choice(["shape", "data_offsets", "dtype", "extra", "entry", "name", "shift"])
    if field == "shape":
        given = entry["shape"] if isinstance(entry["shape"], list) else []
        entry["shape"] = chance.choice([[*given, chance.choice(odd)], chance.choice(odd)])
    elif field == "data_offsets" and isinstance(entry.get("data_offsets"), list):
        entry["data_offsets"] = chance.choice(
            [entry["data_offsets"][::-1], [*entry["data_offsets"], 1], [chance.choice(odd), 4], chance.choice(odd)]
        )
    elif field == "dtype":
        entry["dtype"] = chance.choice(["F32", "f32", "F4", "", 5, None, "C64", "I128"])
    elif field == "extra":
        entry.pop(chance.choice(list(entry)))
    elif field == "entry":
        header["odd"] = chance.choice(odd)
    elif field == "name":
        header["__metadata__"] = chance.choice([None, [], {"a": 1}, {"a": None}, {"a": "b"}, "x", 3])
    else:
        given = entry.get("data_offsets")
        numbers = [value for value in given if type(value) is int] if isinstance(given, list) else []
        entry["data_offsets"] = [value + chance.choice([1, -1, 4]) for value in numbers]
    return end


def test_generated_headers_are_judged_as_the_reference_judges(tmp_path, record_property):
    """Every file that the reference refuses is refused; what both take is the same; few are taken by it alone."""
    path, cases = tmp_path / "x.safetensors", counts.wanted(1_000, 10_000)
    taken = alone = 0
    with bounded(120, 1):
        for seed in range(cases):
            header, nbytes = generated(random.Random(seed))
            write(path, header, nbytes)
            theirs, found = reference(path), ours(path)
            if theirs is None:
                assert found is None, header
            elif found is None:
                alone += 1
            else:
                assert found == theirs, header
                taken += 1
    counts.record(record_property, "hostile inputs", {"safetensors headers": cases})
    assert taken > cases // 5
    assert alone < cases // 50
