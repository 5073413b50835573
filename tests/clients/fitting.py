"""A module around any network, and a quiet run of it."""

import lightning.pytorch as pl
import torch


class Module(pl.LightningModule):
    """Trains ``net`` for ``loss_of(module, batch)``; SGD with momentum."""

    def __init__(self, net, loss_of, lr):
        super().__init__()
        self.net, self.loss_of, self.lr = net, loss_of, lr

    def forward(self, batch):
        return self.net(batch)

    def training_step(self, batch, batch_idx):
        return self.loss_of(self, batch)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def quiet(path, callbacks, epochs=2, **options):
    """A Trainer that writes into ``path`` and says nothing."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=path,
        callbacks=callbacks,
        **{**silent, **options},
    )


def fit(module, path, callbacks, train, validation=None, epochs=2, **options):
    trainer = quiet(path, callbacks, epochs, **options)
    trainer.fit(module, train, validation)
    return trainer
