"""The parts of a sharded tensor lie inside it, overlap nowhere and leave nothing out, or the directory is refused.

``TORTURE=1`` in the environment tries ten thousand generated divisions, the gate a tenth of that.
"""

import io
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_plugins import average_checkpoints
from lightning_plugins.checkpoints import CheckpointError
from lightning_plugins.core.sharded_directory import ShardedTensors, _Slice, covers
from lightning_plugins.core.stand_ins import UnreadableError
from tests.support import counts
from tests.support.damage import bounded

WHOLE = torch.arange(24.0).view(4, 6)
QUARTERS = [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 3))]


def write(folder, boxes, *, dtype=None, change=None, file="__0_0.distcp"):
    """Write ``WHOLE`` in boxes as torch.distributed.checkpoint does: archives end to end, and an index of them.

    Args:
        folder: The directory.
        boxes: Offsets and sizes of the parts.
        dtype: What the index says that the elements are.
        change: Is given the index before it is written.
        file: Where the parts lie.
    """
    folder.mkdir(exist_ok=True)
    content, storage, chunks = io.BytesIO(), {}, []
    for offsets, sizes in boxes:
        part = WHOLE[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].clone()
        part = part if tuple(part.shape) == sizes else torch.zeros([max(size, 0) for size in sizes])
        begin = content.tell()
        alone = io.BytesIO()
        torch.save(part, alone)
        content.write(alone.getvalue())
        index = MetadataIndex("state_dict.w", torch.Size(offsets))
        storage[index] = _StorageInfo(file, begin, content.tell() - begin)
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    properties = TensorProperties(dtype or WHOLE.dtype)
    tensors = {"state_dict.w": TensorStorageMetadata(properties, WHOLE.shape, chunks)}
    metadata = Metadata(tensors, planner_data={"state_dict.w": ("state_dict", "w")}, storage_data=storage)
    (folder / "__0_0.distcp").write_bytes(content.getvalue())
    if change is not None:
        change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize(
    ("boxes", "runs"),
    [
        ([((0, 0), (4, 6))], [(0, 24)]),
        (QUARTERS, [(0, 24)]),
        (QUARTERS[::-1], [(0, 24)]),
        ([((0, 0), (1, 6)), ((1, 0), (3, 6))], [(0, 6), (6, 24)]),
        ([((2, 0), (2, 6)), ((0, 0), (1, 6)), ((1, 0), (1, 6))], [(0, 6), (6, 12), (12, 24)]),
        ([((0, 0), (4, 1)), ((0, 1), (4, 5))], [(0, 24)]),
        ([((0, 0), (1, 6)), ((1, 0), (3, 2)), ((1, 2), (3, 4))], [(0, 24)]),
        ([((0, 0), (1, 2)), ((0, 2), (1, 4)), ((1, 0), (3, 6))], [(0, 24)]),
        ([((0, 0), (4, 6)), ((4, 0), (0, 6))], [(0, 24)]),
    ],
)
def test_a_division_is_put_together(tmp_path, boxes, runs):
    paths = write(tmp_path / "one", boxes), write(tmp_path / "other", [((0, 0), (4, 6))])
    assert torch.equal(average_checkpoints(paths)["w"], WHOLE)
    found = ShardedTensors(paths[0], {"state_dict"})
    assert found.parts("w") == runs
    for start, stop in ((0, 24), (3, 20), (6, 12), (23, 24), (7, 7)):
        assert torch.equal(found.flat("w", start, stop), WHOLE.flatten()[start:stop])


def test_numbers_without_dimensions_are_read_one_after_the_other(tmp_path):
    numbers = {"a": torch.tensor(3.0), "b": torch.tensor(4, dtype=torch.int64), "c": torch.ones(0, 2)}
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": numbers}, checkpoint_id=tmp_path)
    found = ShardedTensors(tmp_path, {"state_dict"})
    assert {name: found.parts(name) for name in numbers} == {"a": [(0, 1)], "b": [(0, 1)], "c": []}
    for name in (*numbers, *reversed(numbers)):
        assert torch.equal(found.tensor(name), numbers[name])
        assert found.flat(name, 0, 1).tolist() == numbers[name].flatten().tolist()


def test_an_index_without_a_plan_names_its_tensors_by_what_stands_behind_the_first_dot(tmp_path):
    state = {"layer.w": torch.ones(2), "layer._extra_state": 2}
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": state, "epoch": 3}, checkpoint_id=tmp_path)
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    index.planner_data = None
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    found = ShardedTensors(tmp_path, {"state_dict"})
    assert found.extras == {"layer._extra_state": 2}
    assert list(found.specs) == ["layer.w"]
    assert found.tensor("layer.w").tolist() == [1, 1]


def test_entries_that_are_no_tensors_lie_as_deep_as_they_did(tmp_path):
    state = {"layer": {"w": torch.ones(2), "extra": 5, "inner": {"extra": 6}}, "epoch": 3}
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": state, "other": {"extra": 7}}, checkpoint_id=tmp_path)
    found = ShardedTensors(tmp_path, {"state_dict"})
    assert found.extras == {"layer": {"extra": 5, "inner": {"extra": 6}}, "epoch": 3}
    assert list(found.specs) == ["layer.w"]


def test_a_state_dict_that_is_one_tensor_has_none_by_name(tmp_path):
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": torch.ones(2), "model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path)
    assert ShardedTensors(tmp_path, {"state_dict"}).specs == {}
    assert list(ShardedTensors(tmp_path, {"state_dict", "model"}).specs) == ["w"]


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (("state_dict", "v"), ["v"]),
        (("state_dict", "layers", 0, "v"), ["layers.0.v"]),
        (("optimizer", "w"), []),
        # no places: the tensor's own name tells
        (("state_dict",), ["w"]),
        (("state_dict", None), ["w"]),
        ("state_dict.v", ["w"]),
    ],
)
def test_a_tensor_is_called_as_the_plan_says(tmp_path, place, names):
    path = write(
        tmp_path / "one", QUARTERS, change=lambda metadata: metadata.planner_data.update({"state_dict.w": place})
    )
    assert list(ShardedTensors(path, {"state_dict"}).specs) == names


def test_a_part_of_a_file_is_read_as_a_file_of_its_own():
    part, alone = _Slice(io.BytesIO(bytes(range(20))), 5, 10), io.BytesIO(bytes(range(5, 15)))
    for move in (
        lambda file: file.read(0),
        lambda file: file.read(3),
        lambda file: file.tell(),
        lambda file: file.seek(-1, io.SEEK_CUR),
        lambda file: file.read(4),
        lambda file: file.seek(-4, io.SEEK_END),
        lambda file: file.read(9),
        lambda file: file.read(1),
        lambda file: file.seek(2),
        lambda file: file.read(None),
        lambda file: file.seek(8),
        lambda file: file.read(),
        lambda file: file.seek(12),
        lambda file: file.read(1),
        lambda file: (file.seekable(), file.readable(), file.writable()),
    ):
        assert move(part) in {move(alone), (True, True, False)}


def places(metadata):
    return metadata.storage_data


def set_chunk(number, **fields):
    def change(metadata):
        chunk = metadata.state_dict_metadata["state_dict.w"].chunks[number]
        for name, value in fields.items():
            object.__setattr__(chunk, name, value)

    return change


def set_place(number, **fields):
    def change(metadata):
        for name, value in fields.items():
            object.__setattr__(list(metadata.storage_data.values())[number], name, value)

    return change


def set_tensor(**fields):
    def change(metadata):
        for name, value in fields.items():
            object.__setattr__(metadata.state_dict_metadata["state_dict.w"], name, value)

    return change


def both(*changes):
    return lambda metadata: [change(metadata) for change in changes]


LIES = {
    "a part is missing": (QUARTERS[:3], None),
    "a part comes twice": ([*QUARTERS, QUARTERS[0]], None),
    "two parts overlap, the sum is right": ([QUARTERS[0], QUARTERS[0], *QUARTERS[2:]], None),
    "a row overlaps, another is missing": ([((0, 0), (2, 6)), ((1, 0), (2, 6))], None),
    "a part is outside": (QUARTERS, set_chunk(3, offsets=[2, 4])),
    "a part begins before the tensor": (QUARTERS, set_chunk(0, offsets=[-2, 0])),
    "a part of negative size": (QUARTERS, set_chunk(0, sizes=[-2, -3])),
    "a part of other dimensions": (QUARTERS, set_chunk(0, sizes=[6], offsets=[0])),
    "sizes that are no numbers": (QUARTERS, set_chunk(0, sizes=["2", 3])),
    "truth values for sizes": (QUARTERS, set_chunk(0, sizes=[True, 3])),
    "a part is wider in the index": ([((0, 0), (2, 6)), ((2, 0), (2, 6))], set_chunk(0, sizes=[2, 5])),
    "no parts": ([], None),
    "a larger tensor": (QUARTERS, set_tensor(size=torch.Size([4, 7]))),
    "a tensor of a terabyte": (
        [((0, 0), (4, 6))],
        both(set_tensor(size=torch.Size([2**19, 2**19])), set_chunk(0, sizes=[2**19, 2**19])),
    ),
    "another dtype": (QUARTERS, set_tensor(properties=TensorProperties(torch.int32))),
    "a dtype of the same width": (QUARTERS, set_tensor(properties=TensorProperties(torch.complex64))),
    "a dtype that is none": (QUARTERS, set_tensor(properties=TensorProperties("float32"))),
    "two parts in one place": (QUARTERS, set_place(1, offset=0)),
    "a place that is a fraction": (QUARTERS, set_place(0, offset=0.0)),
    "a truth value for a place": (QUARTERS, set_place(0, offset=False)),
    "a length beyond all files": (QUARTERS, set_place(3, length=2**63)),
    "a place before the file": (QUARTERS, set_place(0, offset=-8)),
    "a place behind the file": (QUARTERS, set_place(3, offset=10**9)),
    "a place of negative length": (QUARTERS, set_place(3, length=-1)),
    "a place that is too short": (QUARTERS, set_place(3, length=10)),
    "a place that is a number": (QUARTERS, set_place(3, relative_path=5)),
    "a place of another part": (
        [((0, 0), (1, 6)), ((1, 0), (3, 6))],
        lambda metadata: metadata.storage_data.update(
            dict(zip(list(metadata.storage_data), list(metadata.storage_data.values())[::-1], strict=True))
        ),
    ),
    "no place": (QUARTERS, lambda metadata: places(metadata).popitem()),
    "transformed": (QUARTERS, set_place(0, transform_descriptors=["zstd"])),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_lies_is_refused(tmp_path, name):
    boxes, change = LIES[name]
    path = write(tmp_path / "one", boxes, change=change)
    write(tmp_path / "other", boxes, change=change)
    with bounded(20, 1), pytest.raises(CheckpointError) as caught:
        average_checkpoints([path, tmp_path / "other"])
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def division(chance, shape):
    """Cut a tensor into boxes by random cuts, and break some of the divisions."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(chance.choice([0, 1, 3, 8])):
        offsets, sizes = boxes.pop(chance.randrange(len(boxes)))
        d = chance.randrange(len(shape)) if shape else None
        if d is None:
            boxes.append((offsets, sizes))
            continue
        cut = chance.randint(0, sizes[d])
        first = (*sizes[:d], cut, *sizes[d + 1 :])
        other = (*sizes[:d], sizes[d] - cut, *sizes[d + 1 :])
        boxes += [(offsets, first), ((*offsets[:d], offsets[d] + cut, *offsets[d + 1 :]), other)]
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        number = chance.randrange(len(boxes))
        offsets, sizes = boxes[number]
        kind = chance.choice(["twice", "missing", "moved", "resized", "another"])
        if kind == "twice":
            boxes.append(boxes[number])
        elif kind == "missing" and len(boxes) > 1:
            boxes.pop(number)
        elif kind == "moved":
            boxes[number] = tuple(at + chance.choice([-1, 0, 1]) for at in offsets), sizes
        elif kind == "resized":
            boxes[number] = offsets, tuple(size + chance.choice([-1, 0, 1]) for size in sizes)
        else:
            boxes[number] = boxes[chance.randrange(len(boxes))]
    chance.shuffle(boxes)
    return boxes


def counted(shape, boxes):
    """Return whether every element lies in one box and every box inside, by counting."""
    filled = np.zeros(shape, int)
    for offsets, sizes in boxes:
        if any(at < 0 or size < 0 or at + size > whole for at, size, whole in zip(offsets, sizes, shape, strict=True)):
            return False
        filled[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] += 1
    return bool((filled == 1).all())


def test_generated_divisions_are_judged_by_counting(record_property):
    cases = counts.wanted(1_000, 10_000)
    right = 0
    for seed in range(cases):
        chance = random.Random(seed)
        shape = tuple(chance.choice([1, 2, 3, 5]) for _ in range(chance.randrange(4)))
        boxes = division(chance, shape)
        expected = counted(shape, boxes)
        assert covers(shape, boxes) == expected, (shape, boxes)
        right += expected
    counts.record(record_property, "hostile inputs", {"divisions of a tensor": cases})
    assert cases // 4 < right < cases - cases // 4


def test_many_parts_are_looked_at_soon_and_endless_ones_refused():
    rows = 100_000
    with bounded(20, 1):
        assert covers((rows, 8), [((row, 0), (1, 8)) for row in range(rows)])
        assert not covers((rows, 8), [((row - row % 2, 0), (1, 8)) for row in range(rows)])
        with pytest.raises(UnreadableError, match="more parts than can be checked"):
            covers((2,) * 40, [((0,) * 40, (1,) * 40)])
