"""Small files that ask for endless work or memory: each is one error, soon and in little memory."""

import contextlib
import pickle as p
import struct

import pytest
import torch

from lightning_plugins import average_checkpoints, extract_weights, select_checkpoints, synthesize_ema
from lightning_plugins.core.safe_unpickler import unpickle
from lightning_plugins.core.stand_ins import UnreadableError
from lightning_plugins.ema.snapshots import SnapshotContents, write_snapshot
from tests.support import opcodes as op
from tests.support.damage import bounded
from tests.support.damaged_cases import command

pytestmark = pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning")
ORDERED, COUNTER = op.name("collections", "OrderedDict"), op.name("collections", "Counter")
KEY = op.NESTED_TUPLES
HUGE = 10**10
# name -> what stands under `callbacks` in a checkpoint, or as an index
ENDLESS = {
    "nested tuples as a key": op.mapping((KEY, op.NONE)),
    "nested tuples in a flat tuple as a key": op.mapping((op.group(op.number(1), KEY), op.NONE)),
    "a tuple of tuples as a key": op.mapping((op.group(op.group(op.number(1))), op.NONE)),
    "a frozen set in a key": op.mapping((op.MARK + op.number(1) + p.FROZENSET, op.NONE)),
    "a very long key": op.mapping((op.group(*[op.number(1)] * 1000), op.NONE)),
    "nested tuples in a set": op.EMPTY_SET + op.MARK + KEY + p.ADDITEMS,
    "nested tuples in a frozen set": op.MARK + KEY + p.FROZENSET,
    "nested tuples in a called set": op.call(op.name("__builtin__", "set"), op.EMPTY_LIST + KEY + op.APPEND),
    "nested tuples in an ordered dictionary": op.call(ORDERED, op.group(op.group(KEY, op.NONE))),
    "nested tuples in a counter": op.call(COUNTER, op.mapping((KEY, op.NONE))),
    "nested tuples in a counter's list": op.call(COUNTER, op.group(op.group(KEY, op.NONE))),
    "a dictionary of DICT": op.MARK + KEY + op.NONE + p.DICT,
    "a billion zeros": op.call(op.name("__builtin__", "bytearray"), op.number(HUGE)),
    "a tensor that is called": op.call(op.name("torch", "Tensor"), op.number(HUGE)),
    "a tensor type that is called": op.call(op.name("torch", "FloatTensor"), op.number(HUGE)),
    "a storage that is called": op.call(op.name("torch", "FloatStorage"), op.number(HUGE)),
    "a tensor that is made": op.name("torch", "Tensor") + op.group(op.number(HUGE)) + op.NEWOBJ,
    "a call behind a tensor's type": op.call(
        op.name("torch._tensor", "_rebuild_from_type_v2"),
        op.name("__builtin__", "bytearray"),
        op.name("torch", "Tensor"),
        op.group(op.number(HUGE)),
        op.EMPTY_DICT,
    ),
    "a meta tensor": op.call(
        op.name("torch._utils", "_rebuild_meta_tensor_no_storage"),
        op.name("torch", "float32"),
        op.group(op.number(2**40)),
        op.group(op.number(1)),
        p.NEWFALSE,
    ),
    "a slow encoding": op.call(op.name("_codecs", "encode"), op.text("a" * 100_000), op.text("idna")),
    "a compressing encoding": op.call(op.name("_codecs", "encode"), op.text("a"), op.text("zlib")),
    "a storage resized by BUILD": op.tensor() + op.group(op.storage(), op.number(0), op.group(), op.group()) + op.BUILD,
    "hooks": op.call(
        op.name("torch._utils", "_rebuild_tensor_v2"),
        op.storage(),
        op.number(0),
        op.group(op.number(4)),
        op.group(op.number(1)),
        p.NEWFALSE,
        op.mapping((op.number(1), op.name("torch", "device"))),
    ),
    "a tensor's own method replaced": op.call(
        op.name("torch._tensor", "_rebuild_from_type_v2"),
        op.name("torch._utils", "_rebuild_tensor_v2"),
        op.name("torch", "Tensor"),
        op.group(op.storage(), op.number(0), op.group(op.number(4)), op.group(op.number(1)), p.NEWFALSE, op.EMPTY_DICT),
        op.mapping((op.text("detach"), op.number(5))),
    ),
    "a dictionary whose items are a number": op.call(ORDERED) + op.mapping((op.text("items"), op.number(5))) + op.BUILD,
    "sizes that overflow": op.tensor((2**62, 2**62), (1, 1)),
    "no elements, but sizes that overflow": op.tensor((2**62, 2**62, 2**63, 0), (1, 1, 1, 1)),
    "a hundred thousand dimensions": op.tensor([1] * 100_000, [1] * 100_000),
    "a stride of nothing": op.tensor((13_500_000_000,), (0,)),
    "strides that go over one another": op.tensor((3, 10**9), (1, 0)),
    "an offset behind the end": op.tensor((1,), (1,), offset=4),
    "a storage longer than what is stored": op.tensor((5,), (1,), count=5),
    "one storage of two lengths": op.group(op.tensor((1,)), op.tensor((1,), count=3)),
    "a storage that is not there": op.tensor(key="1"),
    "a storage outside": op.tensor(key="../../data.pkl"),
    "tensors that overlap": op.EMPTY_LIST
    + op.MARK
    + b"".join(op.tensor((2**20,), (0,)) for _ in range(20_000))
    + op.APPENDS,
    "a million classes": b"".join(op.name("m", f"c{n}") + op.POP for n in range(1_000_000)) + op.NONE,
    "marks": op.MARK * 100_000 + op.NONE,
    "a text of an exabyte": p.BINUNICODE8 + struct.pack("<Q", 2**60) + b"x",
    "a memo of four billion": op.NONE + p.LONG_BINPUT + struct.pack("<I", 2**32 - 1) + op.get(2**32 - 2),
    "digits": p.INT + b"9" * 100_000 + b"\n",
}


def files(folder, body):
    """Write everything that a checkpoint reader opens with a pickle inside; return the paths."""
    folder.mkdir(exist_ok=True)
    content = op.checkpoint(None, (op.text("callbacks"), op.mapping((op.text("x"), body))))
    yield op.write(folder / "zip.ckpt", op.archive(content, {"0": op.FOUR}))
    old = op.mapping((op.text("state_dict"), op.mapping((op.text("w"), op.tensor()), (op.text("x"), body))))
    yield op.write(folder / "legacy.ckpt", op.legacy(old, storages=struct.pack("<Q", 4) + op.FOUR))
    (folder / "sharded").mkdir(exist_ok=True)
    op.write(folder / "sharded" / ".metadata", op.pickled(body))
    yield folder / "sharded"


def readers(path, folder):
    yield lambda: select_checkpoints(path.parent)
    if path.is_file():
        yield lambda: extract_weights(path, "raw")
        yield lambda: command("inspect", path)
        yield lambda: command(
            "average", path, path.parent / "legacy.ckpt", "--output", folder / "x.ckpt", "--overwrite"
        )


@pytest.mark.parametrize("name", ENDLESS)
def test_a_checkpoint_that_asks_for_endless_work_is_one_line_soon(tmp_path, name):
    for path in files(tmp_path / "files", ENDLESS[name]):
        for read in readers(path, tmp_path):
            # select_checkpoints reads no tensors and opens no index
            with bounded(30, 1.5), contextlib.suppress(ValueError, OSError):
                read()
        with (
            bounded(30, 1.5),
            pytest.raises(ValueError, match=r"cannot be read|needs more|is not a checkpoint") as caught,
        ):
            average_checkpoints([path, path.with_name("nothing.ckpt")])
        assert len(str(caught.value).splitlines()) == 1
        assert "weights_only" not in str(caught.value)
        if path.is_file():
            path.unlink()


def test_operations_are_counted():
    with bounded(60, 1), pytest.raises(UnreadableError, match="its pickle has more than 5000000 operations"):
        unpickle(op.pickled(op.NONE + (op.NONE + op.POP) * 3_000_000))


def test_a_hundred_thousand_names_of_one_tensor_are_refused(tmp_path):
    """Few bytes, many names: what is written for each name would be endless. Some dozens of ties are ordinary."""
    many, few = ({f"{n}": torch.ones(2**18) for n in range(1)} for _ in range(2))
    shared = many["0"]
    torch.save({f"{n}": shared for n in range(100_000)}, tmp_path / "many.ckpt")
    torch.save({f"{n}": few["0"] for n in range(40)}, tmp_path / "few.ckpt")
    torch.save({f"{n}": few["0"] for n in range(40)}, tmp_path / "other.ckpt")
    with bounded(30, 1):
        with pytest.raises(ValueError, match="they overlap"):
            average_checkpoints([tmp_path / "many.ckpt", tmp_path / "few.ckpt"], strict=False)
        assert len(average_checkpoints([tmp_path / "few.ckpt", tmp_path / "other.ckpt"])) == 40


def test_expanded_buffers_are_ordinary(tmp_path):
    state = {"positions": torch.arange(512).expand(8, -1), "mask": torch.zeros(1).expand(1000), "w": torch.ones(3)}
    for name in ("1.pt", "2.pt"):
        torch.save(state, tmp_path / name)
    found = average_checkpoints([tmp_path / "1.pt", tmp_path / "2.pt"])
    assert torch.equal(found["positions"], state["positions"])
    assert torch.equal(found["mask"], state["mask"])


def test_snapshots_with_more_averages_than_any_run_has_are_refused(tmp_path):
    tensor = torch.ones(1)
    sigmas = [0.05 + n / 10**5 for n in range(12_000)]
    write_snapshot(tmp_path, 5, sigmas, SnapshotContents([{"w": tensor}] * 12_000, {}))
    with bounded(30, 1), pytest.raises(ValueError, match="12000 values of `sigma_rels`"):
        synthesize_ema(tmp_path, 0.07)
