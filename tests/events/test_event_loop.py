"""What the loop shows at every event, checked against the run itself."""

import pytest
import torch

from lightning_plugins import CancelBatch, Event, EventCallback, GradientAccumulation, MicroBatching, StatisticsRecorder
from lightning_plugins.events.training_loop import TrainingLoop
from tests.support.events_runs import batches, fit, make_regression
from tests.support.training import make_trainer


def in_plain_torch(module, batch):
    """Return the prediction and the loss of a batch with the weights that the module has now."""
    prediction = module.layer(batch[0])
    return prediction.detach(), torch.nn.functional.mse_loss(prediction, batch[1]).detach()


def test_batch_fields_are_those_of_the_batch_at_hand(tmp_path):
    training, validation = list(batches(3)), list(batches(2, seed=2))
    seen = []

    def act(loop, event):
        assert loop.model is loop.trainer.lightning_module
        assert isinstance(loop.optimizers[0], torch.optim.SGD)
        assert (loop.epoch_index, loop.epoch_count) == (loop.trainer.current_epoch, 2)
        data = validation if loop.trainer.validating else training
        if event in {Event.TRAINING_START, Event.VALIDATION_START}:
            assert (loop.batch_index, loop.batch_count) == (None, len(data))
        if event in {Event.BATCH_START, Event.UPDATE_START, Event.INFERENCE_PREDICTION_END, Event.BATCH_END}:
            seen.append((event, loop.batch_index))
            batch = data[loop.batch_index]
            assert loop.batch_count == len(data)
            assert torch.equal(loop.last_input, batch[0])
            assert torch.equal(loop.last_target, batch[1])
        if event is Event.BATCH_START:
            assert loop.last_output is None
            assert loop.last_loss is None
        if event is Event.INFERENCE_PREDICTION_END:
            assert torch.equal(loop.last_output, in_plain_torch(loop.model, batch)[0])
            assert loop.last_loss is None
        if event is Event.UPDATE_START or (event is Event.BATCH_END and data is validation):
            prediction, loss = in_plain_torch(loop.model, batch)  # the weights are those that the step used
            assert torch.equal(loop.last_output, prediction)
            assert torch.equal(loop.last_loss, loss)
            assert not loop.last_output.requires_grad
            loop.kept = loss
        if event is Event.BATCH_END and data is training:
            assert torch.equal(loop.last_loss, loop.kept)

    fit(tmp_path, act)
    assert len(seen) == 2 * 5 * 3  # epochs, batches, events of a batch


def test_the_loss_is_the_users_under_accumulation_and_in_pieces(tmp_path):
    losses = {Event.UPDATE_START: [], Event.BATCH_END: []}

    def act(loop, event):
        if event in losses and not loop.trainer.validating:
            losses[event].append(loop.last_loss.item())

    module = make_regression()
    module.layer.requires_grad_(False)  # so that every batch's loss is known beforehand
    module.extra = torch.nn.Parameter(torch.zeros(()))
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) + 0 * module.extra
    whole = [in_plain_torch(module, batch)[1].item() for batch in batches(7)]
    assert any((torch.tensor(loss) / 7 * 7).item() != loss for loss in whole)  # multiplying back would not do
    fit(tmp_path, act, module=module, epochs=1, training=7, callbacks=[GradientAccumulation(7)])
    assert losses == {Event.UPDATE_START: whole[6:], Event.BATCH_END: whole}  # to the last bit
    losses[Event.BATCH_END].clear()
    fit(tmp_path, act, module=module, epochs=1, training=7, callbacks=[MicroBatching(1)])
    assert losses[Event.BATCH_END] == pytest.approx(whole)


def test_a_step_may_name_its_output_and_target(tmp_path):
    seen = []

    def act(loop, event):
        if event is Event.BATCH_END:
            seen.append((loop.last_output, loop.last_target))

    module = make_regression()
    named = {"logits": torch.ones(3), "target": torch.zeros(3)}
    step = module.training_step
    module.training_step = lambda batch, batch_idx: {"loss": step(batch, batch_idx), **named}
    fit(tmp_path, act, module=module, epochs=1, training=1, validation=0, limit_val_batches=0)
    assert torch.equal(seen[0][0], named["logits"])
    assert torch.equal(seen[0][1], named["target"])


def test_batches_that_are_no_pairs(tmp_path):
    seen = []
    module = make_regression(training_step=lambda batch, batch_idx: module(batch["x"]).mean())
    callback = EventCallback(lambda loop, event: seen.append((loop.last_input, loop.last_target)), events=["batchEnd"])
    data = [{"x": torch.ones(2, 4), "target": torch.ones(2)}, {"x": torch.ones(2, 4)}]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    make_trainer(tmp_path, callbacks=[callback], limit_val_batches=0).fit(module, loader, batches(1))
    assert [(sorted(given), target is None) for given, target in seen] == [(["target", "x"], False), (["x"], True)]


NORMAL = torch.distributions.Normal(0.0, 1.0)


@pytest.mark.parametrize(
    ("output", "prediction"),
    [
        (torch.ones(2, 3), torch.ones(2, 3)),
        (torch.ones(1), torch.ones(1)),
        ((torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.zeros(2))),
        ({"boxes": torch.ones(2)}, {"boxes": torch.ones(2)}),
        ({"logits": torch.ones(2), "loss": torch.tensor(1.0)}, torch.ones(2)),
        (NORMAL, NORMAL),
        # what a step returns, which under DistributedDataParallel is the module's forward
        (torch.tensor(1.0), None),
        ({"loss": torch.tensor(1.0)}, None),
        (None, None),
    ],
    ids=str,
)
def test_a_prediction_is_what_forward_returns_unless_it_is_a_loss(tmp_path, output, prediction):
    loop = TrainingLoop(make_trainer(tmp_path))
    assert loop.forward_done(output) is (prediction is not None)
    if prediction is NORMAL or prediction is None:
        assert loop.last_output is prediction
    else:
        torch.testing.assert_close(loop.last_output, prediction)


def test_several_validation_loaders_count_each_for_itself(tmp_path):
    seen = []

    def act(loop, event):
        if loop.trainer.validating and event in {Event.VALIDATION_START, Event.BATCH_END}:
            seen.append((loop.batch_index, loop.batch_count))

    module = make_regression()
    module.validation_step = lambda batch, batch_idx, dataloader_idx=0: module.training_step(batch, batch_idx)
    trainer = make_trainer(tmp_path, callbacks=[EventCallback(act)], num_sanity_val_steps=0)
    trainer.fit(module, batches(1), [batches(2), batches(1)])
    assert seen == [(None, None), (0, 2), (1, 2), (0, 1)]


def test_statistics_are_the_recorders_and_leave_cancelled_batches_out(tmp_path):
    shown = []

    def act(loop, event):
        if event is Event.BATCH_START and loop.batch_index == 1:
            raise CancelBatch
        if event is Event.BATCH_END:
            shown.append((loop.trainer.validating, loop.last_loss, loop.last_statistics["loss"]))
        if event in {Event.TRAINING_START, Event.VALIDATION_START}:
            assert loop.last_statistics == {}

    recorder = StatisticsRecorder()
    _, _, trainer = fit(tmp_path, act, callbacks=[recorder], epochs=1)
    for validating, loaded in ((False, 2), (True, 1)):
        phase = [(loss, running) for stage, loss, running in shown if stage is validating]
        losses = [loss for loss, _ in phase if loss is not None]  # a cancelled batch has none
        assert len(losses) == loaded
        assert phase[-1][1] == pytest.approx(torch.stack(losses).mean().item())
        assert phase[1][0] is None
        assert phase[1][1] == phase[0][1]
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(shown[-1][2])


def test_without_a_recorder_statistics_are_what_the_module_logs(tmp_path):
    shown = []
    act = lambda loop, event: shown.append(loop.last_statistics) if event is Event.VALIDATION_END else None  # noqa: E731
    _, _, trainer = fit(tmp_path, act, epochs=1)
    assert shown == [{"val_loss": trainer.callback_metrics["val_loss"].item()}]


def test_the_loops_of_an_endless_fit_have_no_length(tmp_path):
    seen = []
    act = lambda loop, event: seen.append((loop.epoch_count, loop.batch_count)) if event is Event.BATCH_END else None  # noqa: E731

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(list(batches(3)))

    trainer = make_trainer(tmp_path, callbacks=[EventCallback(act)], max_epochs=-1, max_steps=2, limit_val_batches=0)
    trainer.fit(make_regression(), torch.utils.data.DataLoader(Stream(), batch_size=None), batches(1))
    assert seen == [(None, None)] * 2


def test_a_function_may_change_the_run(tmp_path):
    def act(loop, event):
        if event is Event.UPDATE_START:
            loop.optimizers[0].param_groups[0]["lr"] = 0.0

    _, module, _ = fit(tmp_path, act)
    untouched = make_regression()
    assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in module.state_dict().items())
