"""A run that was killed near its end and goes on from its last checkpoint still gets its average."""

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import CheckpointAveraging
from lightning_plugins.core.lightning import CallbackOfBoth
from tests.support.checkpoints_models import load_state, loader, model_checkpoint, module_class, sources, trainer


class Death(unified.Callback):
    """An exception at the end of an epoch's validation, after the checkpoint was cut there."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == trainer.max_epochs:
            raise RuntimeError("killed")


class DeathAtTheEnd(CallbackOfBoth):
    """An exception after training, before anything is averaged."""

    def on_train_end(self, trainer, pl_module):
        raise RuntimeError("killed")


def run(folder, *callbacks, validates=True, namespace=unified, **options):
    torch.manual_seed(0)
    module = module_class(namespace)(batch_norm=True)
    averaging = CheckpointAveraging(last=2)
    saving = namespace.callbacks.ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=not validates
    )
    limits = {} if validates else {"limit_val_batches": 0}
    fit = trainer(folder, namespace, callbacks=[*callbacks, averaging, saving], max_epochs=3, **limits)
    fit.fit(module, loader(), loader(seed=1), **options)
    return averaging, fit


def test_a_run_in_which_nothing_is_validated_gets_its_batch_statistics(tmp_path):
    averaging, fit = run(tmp_path, validates=False)
    assert averaging.scores is None
    assert load_state(averaging.path)["net.1.num_batches_tracked"].item() > 0
    assert "_last_val_time" not in vars(fit)


def same_average(one, other):
    states = [load_state(averaging.path) for averaging in (one, other)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0]) and one.scores == other.scores


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_run_that_died_after_its_last_validation_is_averaged_and_compared(tmp_path):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "broken", Death())
    assert not (tmp_path / "broken" / "averaged.ckpt").exists()
    resumed, _ = run(tmp_path / "broken", ckpt_path=tmp_path / "broken" / "epoch=2.ckpt")
    assert same_average(resumed, whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_run_that_died_at_its_very_end_is_averaged_when_nothing_is_left_to_train(tmp_path, namespace):
    whole, _ = run(tmp_path / "whole", validates=False, namespace=namespace)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "broken", DeathAtTheEnd(), validates=False, namespace=namespace)
    assert not (tmp_path / "broken" / "averaged.ckpt").exists()
    resumed, fit = run(
        tmp_path / "broken", validates=False, namespace=namespace, ckpt_path=tmp_path / "broken" / "epoch=2.ckpt"
    )
    assert fit.global_step == 12
    assert same_average(resumed, whole)
    assert "run" not in vars(fit.fit_loop)


def test_a_fit_that_fails_before_it_trains_leaves_the_loop_as_it_was(tmp_path):
    class Fails(unified.Callback):
        def on_sanity_check_start(self, trainer, pl_module):
            assert "run" in vars(trainer.fit_loop)
            raise RuntimeError("killed")

    fit = trainer(tmp_path, callbacks=[CheckpointAveraging(last=2), Fails()])
    with pytest.raises(RuntimeError, match="killed"):
        fit.fit(module_class()(), loader(), loader(seed=1))
    assert "run" not in vars(fit.fit_loop)


@pytest.mark.filterwarnings("error:.*have changed since this run")
def test_the_file_behind_a_link_that_is_resumed_from_is_the_runs_own(tmp_path):
    for epochs in (2, 3):
        averaging = CheckpointAveraging(last=3, compare=False)
        saving = model_checkpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_last="link")
        fit = trainer(tmp_path, callbacks=[averaging, saving], max_epochs=epochs)
        fit.fit(module_class()(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt" if epochs == 3 else None)
    assert (tmp_path / "last.ckpt").is_symlink()
    assert sources(averaging.path) == [tmp_path / f"epoch={epoch}.ckpt" for epoch in range(3)]
