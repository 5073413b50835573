"""A training program as the well-known templates have it: everything that it makes is named in configs/."""

from pathlib import Path

import hydra
import lightning.pytorch as pl
import torch


def train(config):
    """Make the parts that the configuration names, and fit."""
    pl.seed_everything(config.seed)
    model = hydra.utils.instantiate(config.model)
    callbacks = [hydra.utils.instantiate(callback) for callback in config.callbacks.values()]
    trainer = hydra.utils.instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(model, hydra.utils.instantiate(config.data.train), hydra.utils.instantiate(config.data.validation))
    return model, trainer


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config):
    _, trainer = train(config)
    loss = float(trainer.callback_metrics["val_loss"])
    torch.save({"val_loss": loss}, Path(config.trainer.default_root_dir) / "result.pt")
    return loss


if __name__ == "__main__":
    main()
