"""The programs in ``examples/`` as their users run them: a process each, real files, readable refusals."""

import csv
import importlib
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import classification_report, matthews_corrcoef
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plugins import extract_weights
from tests.support import fork_server
from tests.support.snippets import ROOT

pytestmark = pytest.mark.slow  # a process takes seconds to import its libraries
PROGRAMS = ["lenet", "text_classification", "language_model"]
LENET = ["--epochs", "4", "--lr", "0.1", "--batch-size", "16"]
TEXT = ["--epochs", "1", "--lr", "3e-3", "--layers", "1"]
MODEL = ["--epochs", "1", "--width", "32", "--layers", "1", "--context", "64", "--limit-batches", "200"]


def run(folder, name, *arguments):
    return fork_server.program(
        ROOT / "examples" / f"{name}.py", "--accelerator", "cpu", *arguments, folder=folder, timeout=600
    )


def trial(factory, name, arguments):
    """A short run: what it printed, and the folder that it wrote."""
    folder = factory.mktemp(name)
    done = run(folder, name, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search(r"Tip:|Traceback|Warning", done.stdout + done.stderr)
    assert " loss=" in done.stdout  # the progress bar shows the statistics
    (written,) = (folder / "runs").iterdir()
    return done.stdout, written


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    return trial(tmp_path_factory, "lenet", LENET)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return trial(tmp_path_factory, "text_classification", TEXT)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trial(tmp_path_factory, "language_model", MODEL)


@pytest.fixture(scope="module")
def splits():
    """The text classifier's examples to train with, to validate and to test."""
    return importlib.import_module("text_classification").acceptability()


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Call a program in this process, in an empty folder."""

    def main(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()

    monkeypatch.chdir(tmp_path)
    return main


def rows(path, phase):
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["phase"] == phase]


# --- lenet.py ---------------------------------------------------------------------------------------------------------


def test_lenet_learns_and_shows_both_ends_of_its_log(lenet):
    console, written = lenet
    lines = (written / "log.csv").read_text().splitlines()
    shown = [*lines[:4], "...", *lines[-3:]]
    assert "\n".join([f"runs/{written.name}/log.csv, {len(lines)} lines:", *shown]) in console
    assert lines[0] == "epoch,batch,phase,step,lr,loss,accuracy,loss_step,time"
    accuracy = float(re.search(r"^test accuracy ([01]\.\d{4}) on 360 images", console, re.MULTILINE)[1])
    assert accuracy == pytest.approx(float(rows(written / "log.csv", "validation")[-1]["accuracy"]), abs=5e-5)
    assert accuracy > 0.6  # guessing gives 0.1
    assert sorted(path.name for path in written.iterdir()) == ["curves.png", "log.csv"]


def test_lenet_logs_every_batch_of_both_phases(lenet):
    train, validation = (rows(lenet[1] / "log.csv", phase) for phase in ("train", "validation"))
    places = [(epoch, batch) for epoch in range(1, 5) for batch in range(1, 91)]  # 1437 images by 16
    assert [(int(row["epoch"]), int(row["batch"])) for row in train] == places
    assert len(validation) == 4 * 23  # 360 images by 16
    assert {row["lr"] for row in train} == {"0.1"}
    assert float(train[-1]["loss"]) < float(train[89]["loss"]) < math.log(10) + 0.1


def test_lenet_writes_the_layout_of_swift_for_tensorflow(call, capsys):
    call("lenet", "--accelerator", "cpu", "--epochs", "1", "--limit-batches", "2", "--layout", "s4tf")
    (log,) = Path("runs").glob("*/log.csv")
    header, *lines = log.read_text().splitlines()
    assert header == "epoch, batch, loss, accuracy"
    assert [line.split(", ")[:2] for line in lines] == [["1/1", "1/2"], ["1/1", "2/2"]] * 2
    assert header in capsys.readouterr().out


class MNIST:
    """A stand-in with the interface of torchvision's."""

    def __init__(self, root, train, download):
        assert not download
        if not root.exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.data = torch.randint(256, (60, 28, 28), dtype=torch.uint8)
        self.targets = torch.arange(60) % 10


def test_lenet_reads_mnist_where_torchvision_and_the_data_are(call, monkeypatch, capsys):
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(MNIST=MNIST))
    arguments = ("--accelerator", "cpu", "--epochs", "1", "--data", "mnist")
    with pytest.raises(SystemExit, match="2"):
        call("lenet", *arguments)
    assert "needs torchvision, with its data in data: Dataset not found" in capsys.readouterr().err
    Path("data").mkdir()
    call("lenet", *arguments)
    assert re.search(r"^test accuracy [01]\.\d{4} on 60 images", capsys.readouterr().out, re.MULTILINE)


def test_mnist_without_torchvision_is_one_line_and_status_2_and_leaves_nothing_behind(tmp_path):
    done = run(tmp_path, "lenet", "--data", "mnist")
    assert done.returncode == 2
    assert re.fullmatch(r"lenet\.py: error: --data mnist needs torchvision, with its data in data: .+\n", done.stderr)
    assert (done.stdout, list(tmp_path.iterdir())) == ("", [])


# --- text_classification.py -------------------------------------------------------------------------------------------


def test_text_is_told_from_shuffled_text_better_than_by_guessing(text):
    console, written = text
    found = dict(re.findall(r"^(\S.*?) +(\d\.\d{4} +-?\d\.\d{4})$", console, re.MULTILINE))
    assert found["always the same answer"].split() == ["0.5000", "0.0000"]
    accuracy, correlation = map(float, found["Transformer"].split())
    assert accuracy > 0.6
    assert correlation > 0.2
    names = "best.ckpt confusion-test.png confusion.png curves.png log.csv report-test.txt report.txt"
    assert sorted(path.name for path in written.iterdir()) == names.split()
    assert "Open curves.png" in console
    assert (written / "report-test.txt").read_text().strip() in console


def test_text_is_tested_by_the_checkpoint_that_was_kept(text, splits):
    """Sentence by sentence, without padding, and counted by scikit-learn."""
    program = importlib.import_module("text_classification")
    console, written = text
    network = program.Classifier.load_from_checkpoint(written / "best.ckpt").eval()
    loader = program.loader(splits[2], program.vocabulary(splits[0]), batch_size=1, shuffle=False)
    with torch.no_grad():
        answers = [int(network(tokens).argmax()) for tokens, _ in loader]
    truth = [label for _, label in splits[2]]
    correlation = float(re.search(r"^Transformer .* (-?\d\.\d{4})$", console, re.MULTILINE)[1])
    assert correlation == pytest.approx(matthews_corrcoef(truth, answers), abs=1e-3)
    expected = classification_report(truth, answers, target_names=["shuffled", "intact"])
    assert (written / "report-test.txt").read_text().split() == expected.split()


def test_text_rates_rise_for_ten_steps_and_fall_for_the_rest(text):
    used = [float(row["lr"]) for row in rows(text[1] / "log.csv", "train")]
    steps = len(used)
    falling = [3e-3 * (steps - step) / (steps - 10) for step in range(10, steps)]
    assert used == pytest.approx([3e-3 * step / 10 for step in range(10)] + falling)


def test_text_differs_from_its_pair_by_the_order_of_its_words_alone(splits):
    for examples in splits:
        assert len(examples) > 1000
        for (tokens, label), (moved, other) in zip(examples[::2], examples[1::2], strict=True):
            assert (label, other) == (1, 0)
            assert tokens != moved
            assert Counter(tokens) == Counter(moved)
            marks = [(place, token) for place, token in enumerate(tokens) if not re.match(r"\w", token)]
            assert all(moved[place] == token for place, token in marks)


def test_no_sentence_is_in_two_splits(splits):
    intact = [{" ".join(tokens) for tokens, label in examples if label} for examples in splits]
    assert sum(map(len, intact)) == len(set.union(*intact)) == sum(map(len, splits)) // 2


# --- language_model.py ------------------------------------------------------------------------------------------------


def perplexities(console):
    table = console.split("perplexity of a byte\n")[1].split("\n\n")[0]
    return {name: float(value) for name, value in re.findall(r"^(.+?) +(\d+\.\d\d)$", table, re.MULTILINE)}


def pages(program, context):
    """The paragraphs and the sequences to train with and to validate."""
    parts = program.split(program.help_pages())
    return parts, [program.sequences(part, context) for part in parts]


def test_model_beats_the_frequencies_of_bytes_and_writes(model):
    console, written = model
    found = perplexities(console)
    assert list(found) == ["any byte", "bytes by frequency", "pairs of bytes by frequency", "raw weights", "EMA"]
    assert found["any byte"] == 256
    assert max(found["raw weights"], found["EMA"]) < found["bytes by frequency"]
    assert re.search(r"^It writes:\n\nThe .+?^100 steps\. Written:$", console, re.MULTILINE | re.DOTALL)
    assert sorted(path.name for path in written.iterdir()) == ["curves.png", "last.ckpt", "log.csv", "tensorboard"]
    assert f"Open runs/{written.name}/curves.png" in console


def test_model_perplexities_are_those_of_its_checkpoint_byte_by_byte(model):
    """Each sequence alone, so without padding, and each byte once."""
    program = importlib.import_module("language_model")
    console, written = model
    _, (_, validation) = pages(program, 64)
    network = program.GPT.load_from_checkpoint(written / "last.ckpt").eval()
    for name, which in [("raw weights", "raw"), ("EMA", "average")]:
        network.load_state_dict(extract_weights(written / "last.ckpt", which))
        nats = 0.0
        with torch.no_grad():
            for sequence in validation:
                chances = network(sequence[None, :-1])[0].log_softmax(1)
                nats -= float(chances[range(len(chances)), sequence[1:]].double().sum())
        expected = math.exp(nats / sum(len(sequence) - 1 for sequence in validation))
        assert perplexities(console)[name] == pytest.approx(expected, abs=0.006)


def test_model_baseline_is_the_perplexity_of_counted_bytes(model):
    program = importlib.import_module("language_model")
    (train, validation), _ = pages(program, 64)
    counts = Counter(b"".join(part + b"\0" for part in train))
    total = sum(counts.values()) + 256
    text = b"".join(part + b"\0" for part in validation)
    nats = -sum(math.log((counts[byte] + 1) / total) for byte in text) / len(text)
    assert perplexities(model[0])["bytes by frequency"] == pytest.approx(math.exp(nats), abs=0.006)


def test_model_rates_are_noams_and_the_charts_are_there(model):
    (stamp,) = (model[1] / "tensorboard").iterdir()
    charts = {}
    for phase in ("train", "validation"):
        charts[phase] = EventAccumulator(str(stamp / phase)).Reload()
        assert len(charts[phase].Scalars("epoch_perplexity")) == 1
    used = [event.value for event in charts["train"].Scalars("batch_lr")]
    assert used == pytest.approx([0.4 * 32**-0.5 * min(n**-0.5, n * 10**-1.5) for n in range(1, 101)])  # 10 % are 10


def test_sequences_hold_every_byte_once_and_no_paragraph_is_in_two_splits():
    program = importlib.import_module("language_model")
    parts, cut = pages(program, 96)
    assert not set(parts[0]) & set(parts[1])
    for paragraphs, found in zip(parts, cut, strict=True):
        assert {len(sequence) for sequence in found} > {97, 50}  # of many lengths, up to the context and one
        assert max(map(len, found)) == 97
        following = b"".join(bytes(sequence[1:].tolist()) for sequence in found)
        assert following == b"".join(paragraph + b"\0" for paragraph in paragraphs)


def test_model_reads_another_text_and_stops_where_it_writes_an_end(call, capsys, monkeypatch):
    program = importlib.import_module("language_model")
    Path("book.txt").write_text("\n\n".join(f"Paragraph {number} speaks of many things." for number in range(40)))
    following = iter(b"end\0never")
    monkeypatch.setattr(torch, "multinomial", lambda chances, count: torch.tensor([[next(following)]]))
    call("language_model", "--accelerator", "cpu", "--text", "book.txt", *MODEL[:6], "--context", "16")
    out = capsys.readouterr().out
    assert "\nIt writes:\n\nThe end\n" in out
    assert perplexities(out)["pairs of bytes by frequency"] < perplexities(out)["bytes by frequency"] < 40
    assert program.GPT.load_from_checkpoint(next(Path("runs").glob("*/last.ckpt"))).hparams["context"] == 16


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be a finite number above 0, got 0"),
        (["--lr", "nan"], "--lr must be a finite number above 0, got nan"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to 4294967295, got -1"),
        (["--precision", "7-bit"], "Precision '7-bit' is invalid."),
        (["--accelerator", "abacus"], "You selected an invalid accelerator name: `accelerator='abacus'`."),
        (["--accelerator", "cpu", "--output", "taken"], "Not a directory: 'taken/"),
        (["--warmup"], "unrecognized arguments: --warmup"),
    ],
)
def test_bad_arguments_are_named(call, name, arguments, message, capsys):
    refused(call, name, arguments, message, capsys)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lenet", ["--layout", "wide"], "argument --layout: invalid choice: 'wide'"),
        ("text_classification", ["--width", "30"], "--width must be a multiple of 4, the number of heads, got 30"),
        ("language_model", ["--width", "30"], "--width must be a multiple of 4, the number of heads, got 30"),
        ("language_model", ["--text", "no.txt"], "No such file or directory: 'no.txt'"),
        (
            "language_model",
            ["--text", "taken"],
            "--text needs at least 20 paragraphs with blank lines between them, got 0",
        ),
        ("language_model", ["--ema-decay", "2"], "`decay` must"),
        ("language_model", ["--accelerator", "cpu", "--effective-batch-size", "10"], "8 or 12"),
    ],
)
def test_bad_arguments_of_a_program_are_named(call, name, arguments, message, capsys):
    refused(call, name, arguments, message, capsys)


def refused(call, name, arguments, message, capsys):
    Path("taken").touch()
    with pytest.raises(SystemExit, match="2"):
        call(name, *arguments)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{name}.py: error: ")
    assert message in line
