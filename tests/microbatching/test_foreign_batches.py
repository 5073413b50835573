"""Batches and outputs that are no plain tensors run in pieces, too, or the argument that helps is named."""

import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_plugins import GradientAccumulation, MicroBatching, Tokens
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.microbatching.merging import merge
from tests.support.accumulation_runs import Probe, Recorder, batches, fit, loader, make_batch, relative_error
from tests.support.foreign_batches import Encoding, Frame, Graph, Graphs, Output


class Dictionary(Probe):
    """Takes a batch of any kind that has the two fields."""

    def training_step(self, batch, batch_idx):
        return super().training_step({"inputs": batch["inputs"], "labels": batch["labels"]}, batch_idx)


KINDS = {
    "TensorDict": lambda content: Frame(content, [len(content["labels"])]),
    "BatchEncoding": Encoding,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_mapping_is_split_like_its_own(kind):
    data = batches((5, 7, 4), dtype=torch.float64, tokens=False)
    runs = []
    for make, callbacks in ((dict, []), (KINDS[kind], [MicroBatching(2)])):
        recorder = Recorder()
        fit(Dictionary(torch.float64), [*callbacks, recorder], [make(content) for content in data])
        runs.append(recorder.steps)
    for step, expected in zip(*runs, strict=True):
        assert relative_error(step["gradient"], expected["gradient"]) <= 1e-14


class OnGraphs(pl.LightningModule):
    """The mean over graphs of a loss of their summed nodes, in one loop over them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(2, 1).double()
        self.pieces = []

    def training_step(self, batch, batch_idx):
        self.pieces.append(batch.num_graphs)
        sums = torch.stack([self.net(graph.x).sum() for graph in batch.to_data_list()])
        return ((sums - batch.y) ** 2).mean()

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def graphs(count):
    return Graphs([Graph(torch.rand(nodes + 1, 2).double(), float(nodes)) for nodes in range(count)])


def test_graphs_accumulate_and_run_in_pieces():
    data = [graphs(5), graphs(3), graphs(4)]
    runs = []
    for callbacks in ([GradientAccumulation(2)], [GradientAccumulation(2), MicroBatching(2)]):
        recorder, module = Recorder(), OnGraphs()
        fit(module, [*callbacks, recorder], data)
        runs.append(recorder.steps)
    assert module.pieces == [2, 2, 1, 2, 1, 2, 2]
    for step, expected in zip(*runs, strict=True):
        assert relative_error(step["gradient"], expected["gradient"]) <= 1e-13
    by_hand = OnGraphs()
    losses = [((by_hand.net(g.x).sum() - g.y) ** 2) for batch in data[:2] for g in batch.to_data_list()]
    torch.stack(losses).mean().backward()
    truth = {name: parameter.grad for name, parameter in by_hand.net.named_parameters()}
    assert relative_error(runs[1][0]["gradient"], truth) <= 1e-13


class Opaque:
    """A batch that only its owner can take apart."""

    def __init__(self, content):
        self.content = content


class OnOpaque(Probe):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch.content, batch_idx)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def samples(batch):
    return len(batch.content["labels"])


def take_apart(batch, sizes):
    parts = {name: tensor.split(sizes) for name, tensor in batch.content.items()}
    return [Opaque({name: part[index] for name, part in parts.items()}) for index in range(len(sizes))]


def test_a_batch_that_only_you_can_take_apart():
    data = [Opaque(content) for content in batches((5, 7, 4), dtype=torch.float64, tokens=False)]
    runs = []
    for callbacks in (
        [GradientAccumulation(2, count=samples)],
        [MicroBatching(2, count=samples, split=take_apart), GradientAccumulation(2, count=samples)],
        [MicroBatching("auto", count=samples, split=take_apart), GradientAccumulation(2, count=samples)],
    ):
        recorder = Recorder()
        fit(OnOpaque(torch.float64), [*callbacks, recorder], data)
        runs.append(recorder.steps)
    for steps in runs[1:]:
        for step, expected in zip(steps, runs[0], strict=True):
            assert relative_error(step["gradient"], expected["gradient"]) <= 1e-14


def test_nothing_is_counted_while_whole_batches_fit():
    data = [Opaque(content) for content in batches((5, 7), dtype=torch.float32, tokens=False)]
    assert fit(OnOpaque(), [MicroBatching("auto")], data).global_step == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"MicroBatching cannot tell the size of the batch: `count` must .* give `split`, a function"),
        ({"count": samples}, TypeError, r"`batch`, a Opaque, has no rows that could be cut\. Give `split`, a function"),
        (
            {"count": samples, "split": lambda batch, sizes: [batch]},
            ValueError,
            r"`split` must return a piece for each of",
        ),
        (
            {"count": samples, "split": lambda batch, sizes: None},
            TypeError,
            r"`split` must return a list of pieces, got No",
        ),
    ],
    ids=["nothing", "count", "too few", "none"],
)
def test_the_argument_that_helps_is_named(arguments, error, message):
    data = [Opaque(content) for content in batches((5,), dtype=torch.float32, tokens=False)]
    with pytest.raises(error, match=message):
        fit(OnOpaque(), [MicroBatching(2, **arguments)], data)


def test_split_must_be_a_function():
    with pytest.raises(TypeError, match=r"`split` must be None or a function of \(batch, sizes\), got 3\."):
        MicroBatching(2, split=3)


def test_the_batches_of_several_loaders_are_refused():
    batch = {"a": [torch.zeros(4, 6), torch.zeros(4)], "b": [torch.zeros(6, 6), torch.zeros(6)]}
    for callback in (MicroBatching(1), GradientAccumulation(2)):
        with pytest.raises(
            ValueError, match=r"disagree on the number of samples: `batch\['a'\]\[0\]` has 4, .* Count with"
        ):
            fit(Probe(), [callback], [batch])


class ByDivision(Probe):
    """Divides by the number of labels itself, which is 0 in a piece whose labels are all ignored."""

    def training_step(self, batch, batch_idx):
        logits = self.net(batch["inputs"]).flatten(0, 1)
        labels = batch["labels"].flatten()
        losses = cross_entropy(logits, labels, reduction="none")
        return losses[labels != -100].mean()


@pytest.mark.parametrize("module", [Probe, ByDivision])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_sample_without_tokens_contributes_nothing(module, on_device, monkeypatch):
    from lightning_plugins.core import counting

    if on_device:
        monkeypatch.setattr(counting, "as_count", lambda value: torch.as_tensor(value).reshape(()))
    masked = make_batch(3, 4, 0, torch.float64)
    masked["labels"][1] = -100
    runs = []
    for callbacks in ([], [MicroBatching(1, count=Tokens("labels"))]):
        recorder = Recorder()
        fit(module(torch.float64), [*callbacks, recorder], [masked, make_batch(3, 4, 1, torch.float64)])
        runs.append(recorder.steps)
    for step, expected in zip(*runs, strict=True):
        assert relative_error(step["gradient"], expected["gradient"]) <= 1e-14


class Cache:
    """What a language model keeps of its own."""


class Returns(Probe):
    """Returns many things beside its loss."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), **self.extra(len(batch["labels"]))}


class Sees(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs = outputs


UNMERGEABLE = {
    "a cache": lambda samples: Cache(),
    "a distribution": lambda samples: torch.distributions.Normal(torch.zeros(samples), 1.0),
    "a number for each piece": lambda samples: f"{samples} samples at {torch.rand(())}",
    "unequal shapes": lambda samples: torch.zeros(samples + 1),
    "a truth value": lambda samples: torch.tensor(data=True),
    "a tuple of several lengths": lambda samples: tuple(torch.zeros(2) for _ in range(samples + 1)),
    "a tuple with a cache": lambda samples: (1, Cache()),
}


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_outputs_that_cannot_be_merged_are_left_out_with_one_warning(kind):
    sees, module = Sees(), Returns(lambda samples: {"odd": UNMERGEABLE[kind](samples), "rows": torch.zeros(samples)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [MicroBatching(3), sees], batches((8, 8, 7), dtype=torch.float32, tokens=False))
    said = [str(warning.message) for warning in caught if issubclass(warning.category, LightningPluginsWarning)]
    assert len(said) == 1
    assert "MicroBatching leaves out what it cannot merge" in said[0]
    assert "`outputs['odd']" in said[0]
    assert sees.outputs.keys() == {"loss", "rows"}
    assert len(sees.outputs["rows"]) == 7


def test_a_key_of_some_pieces_only_is_left_out():
    sees, module = Sees(), Returns(lambda samples: {"last": torch.zeros(samples)} if samples == 2 else {})
    with pytest.warns(LightningPluginsWarning, match=r"`outputs\['last'\]` must be returned for every piece"):
        fit(module, [MicroBatching(3), sees], batches((8,), dtype=torch.float32, tokens=False))
    assert sees.outputs.keys() == {"loss"}


def test_states_of_a_recurrent_net_stay_two_tensors():
    sees = Sees()
    module = Returns(
        lambda samples: {"hidden": (torch.zeros(samples, 3), torch.ones(samples, 3)), "names": ("a",) * samples}
    )
    fit(module, [MicroBatching(2), sees], batches((8,), dtype=torch.float32, tokens=False))
    assert [tuple(state.shape) for state in sees.outputs["hidden"]] == [(8, 3), (8, 3)]
    assert sees.outputs["names"] == ("a",) * 8


def test_foreign_outputs_are_merged_by_their_fields():
    output = merge(
        [Output(loss=1.0, logits=torch.zeros(2, 3)), Output(loss=4.0, logits=torch.ones(1, 3))], [2 / 3, 1 / 3], [2, 1]
    )
    assert type(output) is Output
    assert (output.loss, output.logits.shape) == (pytest.approx(2.0), (3, 3))
    array = merge([np.zeros((2, 3)), np.ones((1, 3))], [2 / 3, 1 / 3], [2, 1])
    assert type(array) is np.ndarray
    assert array.shape == (3, 3)
    detections = merge(
        [[{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(5, 4)}], [{"boxes": torch.zeros(2, 4)}]],
        [0.5, 0.5],
        [2, 1],
    )
    assert [len(found["boxes"]) for found in detections] == [1, 5, 2]


@pytest.mark.parametrize("found", [0, -1, 2.5, "4", True, float("nan")])
def test_a_size_in_a_checkpoint_is_checked_like_an_argument(found):
    callback = MicroBatching()
    with pytest.raises((TypeError, ValueError), match=r"`state\['size_found'\]` must be"):
        callback.load_state_dict({"version": 1, "size_found": found})
    assert callback.size_found is None
    callback.load_state_dict({"version": 1, "size_found": 4})
    assert callback.size_found == 4


def test_the_loaders_batch_size_decides_what_a_list_holds():
    """The same images as fields would have as many samples as channels."""

    class OnImages(Probe):
        def training_step(self, batch, batch_idx):
            self.pieces = [*getattr(self, "pieces", []), len(batch)]
            return sum(self.net(image.mean((1, 2)).repeat(2)).sum() for image in batch) / len(batch)

    module = OnImages()
    data = torch.utils.data.DataLoader(
        [torch.rand(3, 4 + index, 5) for index in range(11)], batch_size=8, collate_fn=list
    )
    fit(module, [GradientAccumulation(2), MicroBatching(2)], data)
    assert module.pieces == [2, 2, 2, 2, 2, 1]
    with pytest.raises(ValueError, match="can be read in two ways: as 8 samples"):
        fit(OnImages(), [GradientAccumulation(2)], loader([next(iter(data))]))
