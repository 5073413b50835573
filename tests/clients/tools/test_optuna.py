"""Optuna: trials with the techniques, pruned by its callback while the average is in the module."""

import optuna
import pytest
import torch
from optuna_integration import PyTorchLightningPruningCallback

from tests.clients import plain_torch
from tests.clients.comparison import by_plain_torch, rates, windows_of
from tests.clients.fitting import fit
from tests.clients.stack import Stack
from tests.clients.tools import small

EPOCHS, PEAKS = 3, (0.1, 0.02, 1e-4)


class PruneIfWorse(optuna.pruners.BasePruner):
    """Prune a trial as soon as it is worse than another was at that epoch."""

    def prune(self, study, trial):
        others = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
        step = trial.last_step
        known = [other.intermediate_values[step] for other in others if step in other.intermediate_values]
        return any(trial.intermediate_values[step] > value for value in known)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    runs = []

    def objective(trial):
        lr = trial.suggest_categorical("lr", PEAKS)
        path = tmp_path_factory.mktemp("trial")
        stack, watch, module = Stack(path, warmup=2), plain_torch.Watch(), small.Network(lr)
        callbacks = [*stack.callbacks, watch, PyTorchLightningPruningCallback(trial, monitor="val_loss")]
        runs.append((lr, stack, watch, module, trial.number))
        trainer = fit(module, path, callbacks, small.loader(), small.validation(), EPOCHS)
        return trainer.callback_metrics["val_loss"].item()

    made = optuna.create_study(sampler=optuna.samplers.GridSampler({"lr": PEAKS}, seed=0), pruner=PruneIfWorse())
    for lr in PEAKS:
        made.enqueue_trial({"lr": lr})
    made.optimize(objective, n_trials=len(PEAKS))
    return made, runs


def test_a_whole_trial_takes_the_steps_of_plain_torch(study):
    made, runs = study
    lr, stack, watch, module, number = runs[0]
    assert made.trials[number].state == optuna.trial.TrialState.COMPLETE
    small.assert_the_same_steps(stack, watch, module, lr=lr, epochs=EPOCHS)
    last = made.trials[number].intermediate_values[EPOCHS - 1]
    assert last == made.trials[number].value
    assert last == pytest.approx(small.loss_on_validation(stack.ema.average_state_dict()), rel=1e-5)


def test_a_pruned_trial_was_judged_by_the_average_and_leaves_the_trained_weights(study):
    made, runs = study
    pruned = [run for run in runs if made.trials[run[-1]].state == optuna.trial.TrialState.PRUNED]
    assert len(pruned) == 2
    for lr, stack, watch, module, number in pruned:
        reported = made.trials[number].intermediate_values
        assert list(reported) == [0]
        truth = by_plain_torch(
            module,
            watch.initial,
            map(small.join, windows_of(watch.batches, 1)),
            loss_of=small.loss_of,
            optimizer=lambda parameters, lr=lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
            lrs=rates(lr, EPOCHS * small.STEPS)[: small.STEPS],
        )
        # the error was raised in validation: the module is left with the trained weights, not with the average
        assert plain_torch.distance(module.state_dict(), truth["raw"], watch.initial) < 1e-5
        judged = small.loss_on_validation({name: tensor.float() for name, tensor in truth["ema"].items()})
        assert reported[0] == pytest.approx(judged, rel=1e-5)
        assert len(stack.rows("train")) == 7
