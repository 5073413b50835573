"""Tensors without a plain block of numbers: quantized weights as torchao keeps them, sparse ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_plugins import CheckpointAveraging, average_checkpoints
from lightning_plugins.checkpoints import CheckpointError, read_manifest
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.checkpoints_models import (
    NAMESPACES,
    Regressor,
    assert_is_mean,
    float64_mean,
    load_state,
    loader,
    trainer,
    write_files,
)

aten = torch.ops.aten


class Int8(torch.Tensor):
    """Whole numbers and a scale that read as float32, with as few operations as such a kind can have."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32, device=data.device)

    def __init__(self, data, scale):
        self.data_, self.scale_ = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["data_"], inner["scale_"])

    def __repr__(self):
        return "Int8(...)"

    def plain(self):
        return self.data_.float() * self.scale_

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (aten.detach.default, aten.alias.default):
            return cls(args[0].data_, args[0].scale_)
        if function == aten.t.default:
            return cls(args[0].data_.t(), args[0].scale_)
        if function == aten.addmm.default:
            return torch.addmm(args[0], args[1], args[2].plain())
        if function == aten.mm.default:
            return torch.mm(args[0], args[1].plain())
        raise NotImplementedError(f"{function} of a quantized tensor")


def quantized(linear: nn.Linear, *, trainable: bool = False) -> None:
    weight = linear.weight.detach()
    scale = weight.abs().max() / 127
    data = (weight / scale).round().to(torch.int8)
    linear.weight = nn.Parameter(Int8(data, scale), requires_grad=trainable)


torch.serialization.add_safe_globals([Int8])
VALIDATION = {"val_dataloaders": loader(seed=1)}


class Adapted(Regressor):
    """A quantized layer that is frozen below one that is trained."""

    def __init__(self, trainable: bool = False):
        super().__init__()
        quantized(self.net[0], trainable=trainable)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net[2].parameters(), lr=0.05)


@pytest.mark.parametrize("save_top_k", [1, -1])
def test_a_fit_over_a_frozen_quantized_base_gets_its_average(tmp_path, save_top_k):
    averaging = CheckpointAveraging(last=3)
    saving = NAMESPACES["lightning.pytorch"].callbacks.ModelCheckpoint(tmp_path, save_top_k=save_top_k)
    module = Adapted()
    trainer(tmp_path, callbacks=[averaging, saving]).fit(module, loader(), **VALIDATION)
    paths = [tmp_path / file["path"] for file in read_manifest(averaging.path)["files"]]
    state = load_state(averaging.path)
    mean = float64_mean_of_dense(paths)
    assert_is_mean(state, mean)
    assert isinstance(state["net.0.weight"], Int8)
    assert torch.equal(state["net.0.weight"].data_, module.net[0].weight.data_)
    assert set(averaging.scores) == {"average", "best_single"}
    for name in mean:
        module.get_parameter(name).data.copy_(state[name])
    with torch.no_grad():
        losses = [module._loss(batch).item() for batch in VALIDATION["val_dataloaders"]]
    assert averaging.scores["average"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def float64_mean_of_dense(paths):
    states = [load_state(path) for path in paths]
    names = [
        name
        for name, value in states[0].items()
        if type(value) is torch.Tensor and value.layout == torch.strided and value.is_floating_point()
    ]
    return {name: torch.stack([state[name].double() for state in states]).mean(0).numpy() for name in names}


def test_a_trainable_one_is_refused_by_name_before_training(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"cannot average `net\.0\.weight`, a trainable Int8: it has no"
    ):
        trainer(tmp_path, callbacks=[CheckpointAveraging()]).fit(Adapted(trainable=True), loader(), **VALIDATION)
    assert not list(tmp_path.rglob("*.ckpt"))


def files(folder, make):
    """Two checkpoints with one such tensor beside dense ones."""
    return write_files(folder, 2, odd=make)


def test_what_is_the_same_in_all_files_comes_from_the_newest(tmp_path):
    adjacency = torch.sparse_coo_tensor([[0, 1], [1, 0]], [2.0, 3.0], (2, 2), check_invariants=True)
    paths = files(tmp_path, lambda i: adjacency)
    state = average_checkpoints(paths)
    assert torch.equal(state["odd"].to_dense(), adjacency.to_dense())
    assert_is_mean({"a.bias": state["a.bias"]}, {"a.bias": float64_mean_of_dense(paths)["a.bias"]})
    written = average_checkpoints(paths, tmp_path / "out.ckpt")
    assert torch.equal(load_state(written)["odd"].to_dense(), adjacency.to_dense())


ODD = {
    "sparse": lambda i: torch.sparse_coo_tensor([[0]], [1.0 + i], (2,), check_invariants=True),
    "rows": lambda i: (torch.eye(2) * (i + 1)).to_sparse_csr(),
    "quantized": lambda i: Int8(torch.tensor([i], dtype=torch.int8), torch.ones(())),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", ODD)
def test_what_differs_is_refused_by_name_or_left_out(tmp_path, kind):
    paths = files(tmp_path, ODD[kind])
    with pytest.raises(CheckpointError, match=r"`odd` in epoch=0-step=10\.ckpt is .*, which has no mean, and it is an"):
        average_checkpoints(paths, trust=True)
    with pytest.warns(LightningPluginsWarning, match=r"Left out: `odd` in .*which has no mean"):
        state = average_checkpoints(paths, strict=False, trust=True)
    assert "odd" not in state
    assert set(state) == {"a.weight", "a.bias", "count"}


def test_one_that_is_in_one_file_only_is_refused(tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir()
    other.mkdir()
    first = write_files(plain, 1, odd=lambda i: torch.ones(2))[0]
    second = write_files(other, 2, odd=ODD["quantized"])[1]
    for pair in ([first, second], [second, first]):
        with pytest.raises(CheckpointError, match=r"`odd` in epoch=1-step=20\.ckpt is of the kind Int8"):
            average_checkpoints(pair, trust=True)


def test_dense_kinds_are_averaged_whatever_their_class(tmp_path):
    """A subclass of Parameter that only adds attributes, as some libraries have."""

    class Named(nn.Parameter):
        pass

    module = nn.Linear(2, 1)
    module.weight = Named(torch.ones(1, 2))
    for number in range(2):
        module.weight.data.fill_(number)
        torch.save({"state_dict": module.state_dict(), "global_step": number}, tmp_path / f"{number}.ckpt")
    paths = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    assert average_checkpoints(paths, trust=True)["weight"].tolist() == [[0.5, 0.5]]
    assert float64_mean(paths)["weight"].tolist() == [[0.5, 0.5]]
