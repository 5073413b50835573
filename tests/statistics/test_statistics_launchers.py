"""Statistics in processes that Lightning starts itself: pickled (spawn), or inherited (fork, as in notebooks)."""

import json

import pytest

from tests.support import fork_server
from tests.support.meeting_place import MeetingPlace

# The weights stay as they are, so that every number of the run can be computed beside it.
PROGRAM = """
import json, logging, sys, warnings
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
import lightning_plugins as lp

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Fixed(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


if __name__ == "__main__":
    torch.manual_seed(1)
    x, y = torch.randn(24, 4), torch.randint(3, (24,))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy=sys.argv[1], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[
            lp.StatisticsRecorder(["accuracy", "matthews_correlation_coefficient"]),
            lp.CSVStatisticsLogger("log.csv"),
            lp.ClassificationReport(3, path="report.txt"),
        ],
    )
    module = Fixed()
    trainer.fit(module, loader, loader)
    right = float((module(x).argmax(1) == y).double().mean())
    loss = float(cross_entropy(module(x), y))
    metrics = trainer.callback_metrics
    print(json.dumps({
        "accuracy": [float(metrics["val_accuracy"]), right],
        "loss": [float(metrics["val_loss"]), loss],
        "rows": open("log.csv").read().count("\\n"),
        "report": open("report.txt").read().split("accuracy")[1].split()[:2],
    }))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_two_processes_of_lightnings_own_give_the_numbers_of_all_the_data(strategy, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    with MeetingPlace() as place:
        done = fork_server.program(
            tmp_path / "program.py", strategy, folder=tmp_path, timeout=300, environment=place.environment
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["accuracy"][0] == pytest.approx(found["accuracy"][1], abs=1e-6)
    assert found["loss"][0] == pytest.approx(found["loss"][1], abs=1e-6)
    assert found["rows"] == 1 + 3 + 3  # a header, and 24 samples by 4 on two ranks, in both phases
    assert found["report"] == [f"{found['accuracy'][1]:.2f}", "24"]
