"""All techniques in torch_geometric: batches of graphs of several sizes, for a loss over graphs and one over nodes."""

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool

from lightning_plugins import ClassificationReport, MicroBatching, StatisticsRecorder, TensorBoardStatisticsLogger
from tests.clients import plain_torch
from tests.clients.comparison import (
    assert_the_file_holds_both,
    assert_the_logs_are_the_clients,
    assert_the_same_steps,
)
from tests.clients.fitting import Module, fit
from tests.clients.stack import Stack, chart

LR, EPOCHS, NUMBER, BATCH = 0.2, 2, 27, 4


class Network(torch.nn.Module):
    def __init__(self, pooled):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = GCNConv(3, 8), GCNConv(8, 3)
        self.pooled = pooled

    def forward(self, data):
        hidden = self.second(self.first(data.x, data.edge_index).relu(), data.edge_index)
        return global_mean_pool(hidden, data.batch) if self.pooled else hidden


def labels(data, pooled):
    return data.y if pooled else data.of_nodes


def loss_of(module, data):
    return torch.nn.functional.cross_entropy(module(data), labels(data, module.net.pooled))


def graphs(seed=0):
    """Rings of 3 to 8 nodes; the classes are those of the largest feature, of a graph's sum and of a node."""
    draw = torch.Generator().manual_seed(seed)
    for size in torch.randint(3, 9, (NUMBER,), generator=draw).tolist():
        x, nodes = torch.randn(size, 3, generator=draw), torch.arange(size)
        edges = torch.stack([nodes, (nodes + 1) % size])
        yield Data(
            x=x, edge_index=torch.cat([edges, edges.flip(0)], 1), y=x.sum(0).argmax()[None], of_nodes=x.argmax(1)
        )


def join(batches):
    return Batch.from_data_list([graph for batch in batches for graph in batch.to_data_list()])


def loader(seed=0):
    return DataLoader(list(graphs(seed)), batch_size=BATCH)


def count(pooled):
    return "samples" if pooled else (lambda data: data.num_nodes)


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "nodes"])
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("geometric")
    stack, watch = Stack(path, warmup=2, count=count(request.param)), plain_torch.Watch()
    place = next(i for i, callback in enumerate(stack.callbacks) if isinstance(callback, StatisticsRecorder))
    stack.callbacks[place] = StatisticsRecorder(["accuracy"], targets="y" if request.param else "of_nodes")
    report = ClassificationReport(3, targets="y" if request.param else "of_nodes")
    module = Module(Network(request.param), loss_of, LR)
    trainer = fit(module, path, [*stack.callbacks, report, watch], loader(), loader(seed=1), EPOCHS)
    return stack, watch, module, trainer, report


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, module = run[:3]
    assert len(watch.batches) == EPOCHS * 7
    assert_the_same_steps(stack, watch, module, loss_of=loss_of, join=join, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    assert_the_logs_are_the_clients(*run[:2], lr=LR, epochs=EPOCHS)


def test_validation_counts_every_label_of_the_average(run):
    stack, _, module, _, report = run
    with torch.no_grad():  # after the fit the module holds the average
        module.eval()
        pairs = [(module(data).argmax(1), labels(data, module.net.pooled)) for data in loader(seed=1)]
    right = torch.cat([predicted == expected for predicted, expected in pairs])
    assert float(stack.rows("validation")[-1]["accuracy"]) == pytest.approx(float(right.double().mean()))
    counted = report.compute(output_dict=True)
    assert counted["accuracy"] == pytest.approx(float(right.double().mean()))
    assert counted["macro avg"]["support"] == len(right)


def test_the_checkpoint_holds_both_weights(run):
    # the module keeps a function as an attribute, not in its hyper-parameters: the file needs no trust
    assert_the_file_holds_both(run[3].checkpoint_callback.best_model_path, run[0])


def test_pieces_of_a_batch_make_the_same_steps(run, tmp_path):
    stack, watch, module = run[:3]
    pooled = module.net.pooled
    pieces, seen = Stack(tmp_path, warmup=2, count=count(pooled)), plain_torch.Watch()
    callbacks = [pieces.accumulation, pieces.scheduler, pieces.ema, MicroBatching(1, count=count(pooled)), seen]
    fit(Module(Network(pooled), loss_of, LR), tmp_path, callbacks, loader(), epochs=EPOCHS)
    assert seen.losses == pytest.approx(watch.losses, rel=1e-5)
    assert plain_torch.distance(pieces.ema.raw_state_dict(), stack.ema.raw_state_dict(), watch.initial) < 1e-5


def test_samples_are_graphs(tmp_path):
    logger = TensorBoardStatisticsLogger(tmp_path / "tensorboard", axis="samples")
    fit(Module(Network(True), loss_of, LR), tmp_path, [logger], loader(), epochs=EPOCHS)
    assert [place for place, _ in chart(tmp_path / "tensorboard", "train")] == [NUMBER, 2 * NUMBER]
