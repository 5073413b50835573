"""How predictions and targets are read: by types, shapes and values, against scikit-learn, torchmetrics and NumPy."""

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.metrics import accuracy_score, matthews_corrcoef, top_k_accuracy_score

from lightning_plugins.statistics.metric_names import statistic_set
from lightning_plugins.statistics.rows import StatisticsRow, evaluate
from lightning_plugins.statistics.running import PhaseSums

MCC = "matthews_correlation_coefficient"
COUNT, CLASSES = 120, 5


def values_of(batches, metrics=("accuracy", MCC), **options):
    """Return the statistics after batches of (predictions, targets)."""
    sums = PhaseSums(statistic_set(list(metrics)), **options)
    for predictions, targets in batches:
        sums.update(torch.tensor(0.0), predictions, targets)
    row = StatisticsRow("train", 1, 1, 1, 1, 1, 1, None, 0.0, 0.0, sums.state_now())
    evaluate(sums.statistics, [row], task=options.get("task", "auto"))
    running = {name: float(value) for name, value in sums.values_now().items()}
    assert running == pytest.approx({name: row.values[name] for name in running}, nan_ok=True)
    return row.values


def in_pieces(predictions, targets, pieces=4):
    return list(zip(predictions.chunk(pieces), targets.chunk(pieces), strict=True))


@pytest.fixture
def logits():
    return torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(1)) * 2


@pytest.fixture
def labels(logits):
    noise = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(2))
    return (logits + 3 * noise).argmax(1)


def expected(labels, classes):
    labels, classes = np.asarray(labels), np.asarray(classes)
    return {"accuracy": accuracy_score(labels, classes), MCC: matthews_corrcoef(labels, classes)}


def check(found, wanted):
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


# one class for every label


@pytest.mark.parametrize("of", [torch.uint16, torch.uint32, torch.uint64])
def test_class_numbers_may_be_of_types_that_torch_only_stores(logits, labels, of):
    found = values_of(in_pieces(logits, labels.to(of)), ("accuracy", "top5_accuracy", MCC))
    check(found, expected(labels, logits.argmax(1)))
    check(values_of(in_pieces(logits.argmax(1).to(of), labels.to(of))), expected(labels, logits.argmax(1)))
    void = labels.clone()
    void[::3] = 255
    kept = void != 255
    found = values_of(in_pieces(logits, void.to(of)), ignore_index=255)
    check(found, expected(labels[kept], logits.argmax(1)[kept]))


@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16])
def test_one_hot_rows_are_classes(logits, labels, of):
    rows = torch.nn.functional.one_hot(labels, CLASSES).to(of)
    check(values_of(in_pieces(logits, rows)), expected(labels, logits.argmax(1)))
    check(values_of(in_pieces(logits.softmax(1), rows)), expected(labels, logits.argmax(1)))


@pytest.mark.parametrize("of", [torch.float32, torch.float16, torch.bfloat16])
def test_soft_rows_are_their_largest_class(logits, labels, of):
    other = labels.roll(1)
    share = torch.rand(COUNT, 1, generator=torch.Generator().manual_seed(3)) * 0.4 + 0.55
    one_hot = torch.nn.functional.one_hot
    mixed = (share * one_hot(labels, CLASSES) + (1 - share) * one_hot(other, CLASSES)).to(of)  # mixup
    check(values_of(in_pieces(logits, mixed)), expected(labels, logits.argmax(1)))
    smoothed = (one_hot(labels, CLASSES) * 0.9 + 0.1 / CLASSES).to(of)
    check(values_of(in_pieces(logits, smoothed)), expected(labels, logits.argmax(1)))


def test_class_numbers_of_any_type_are_classes(logits, labels):
    wanted = expected(labels, logits.argmax(1))
    for of in (torch.int64, torch.int32, torch.uint8, torch.float32):
        check(values_of(in_pieces(logits, labels.to(of))), wanted)
        check(values_of(in_pieces(logits, labels.to(of).unsqueeze(1))), wanted)
    check(values_of(in_pieces(logits.argmax(1), labels)), wanted)
    check(values_of(in_pieces(logits.argmax(1).unsqueeze(1), labels.unsqueeze(1))), wanted)
    one_hot = torch.nn.functional.one_hot
    check(values_of(in_pieces(one_hot(logits.argmax(1), CLASSES), one_hot(labels, CLASSES))), wanted)


def test_whole_numbers_in_a_grid_are_class_numbers_or_several_labels():
    predicted, labels = torch.randint(4, (2, 30, 6), generator=torch.Generator().manual_seed(0))
    wanted = expected(labels.flatten(), predicted.flatten())
    check(values_of(in_pieces(predicted, labels)), wanted)
    check(values_of(in_pieces(predicted % 2, labels % 2)), expected(labels.flatten() % 2, predicted.flatten() % 2))
    # one-hot rows until then: each row of a file by what its own phase had shown
    one_hot = [torch.nn.functional.one_hot(numbers[:, 0], 6) for numbers in (predicted, labels)]
    sums, states = PhaseSums(statistic_set(["accuracy", MCC])), []
    for batch in [*in_pieces(*one_hot, 3), (predicted % 2, labels % 2)]:
        sums.update(None, *batch)
        states.append(sums.state_now())
    rows = [StatisticsRow("train", 1, 1, 1, 1, 1, 1, None, 0.0, 0.0, state) for state in states]
    evaluate(sums.statistics, rows)
    check(rows[2].values, expected(labels[:, 0], predicted[:, 0]))
    found, wanted = (torch.cat([one, other % 2]) for one, other in zip(one_hot, (predicted, labels), strict=True))
    check(rows[3].values, expected(wanted.flatten(), found.flatten()))


@pytest.mark.parametrize("task", ["auto", "multiclass"])
def test_segmentation_has_its_classes_second(task):
    scores = torch.randn(4, CLASSES, 6, CLASSES, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(CLASSES, (4, 6, CLASSES), generator=torch.Generator().manual_seed(1))
    wanted = expected(masks.flatten(), scores.argmax(1).flatten())
    for targets in (masks, masks.to(torch.uint8), masks.unsqueeze(1)):
        check(values_of(in_pieces(scores, targets), task=task), wanted)
    one_hot = torch.nn.functional.one_hot(masks, CLASSES).movedim(-1, 1)
    check(values_of(in_pieces(scores, one_hot), task=task), wanted)
    # also where last fits as well: [N, C, H, C] beside [N, C, H]
    square = torch.randn(4, 5, 5, 5, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(5, (4, 5, 5), generator=torch.Generator().manual_seed(3))
    check(values_of([(square, labels)], task=task), expected(labels.flatten(), square.argmax(1).flatten()))


def test_volumes_have_their_classes_second_and_texts_last():
    volume = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (2, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    check(values_of([(volume, labels)]), expected(labels.flatten(), volume.argmax(1).flatten()))
    text = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(9, (2, 7), generator=torch.Generator().manual_seed(1))
    check(values_of([(text, tokens)]), expected(tokens.flatten(), text.argmax(-1).flatten()))


# 0 or 1 for every label


@pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 1), (COUNT // 4, 1, 2, 2), (COUNT // 4, 2, 2)])
@pytest.mark.parametrize("of", [torch.float32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("task", ["auto", "binary"])
def test_logits_and_probabilities_are_told_apart(shape, of, task):
    logits = torch.randn(COUNT, generator=torch.Generator().manual_seed(4))
    labels = (torch.rand(COUNT, generator=torch.Generator().manual_seed(5)) < logits.sigmoid()).to(of)
    wanted = expected(labels.numpy().astype(int), (logits >= 0).numpy().astype(int))
    if len(shape) == 3:  # a mask of pixels, whose rows of pixels can look like classes
        logits[:2], labels[:2] = 1.0, 1
        wanted = expected(labels.numpy().astype(int), (logits >= 0).numpy().astype(int))
    for predictions in (logits, logits.sigmoid()):
        check(values_of(in_pieces(predictions.reshape(shape), labels.reshape(shape)), task=task), wanted)
        if shape == (COUNT, 1):
            check(values_of(in_pieces(predictions.reshape(shape), labels), task=task), wanted)
            check(values_of(in_pieces(predictions, labels.reshape(shape)), task=task), wanted)


def test_probabilities_until_a_logit_comes_are_read_as_logits_as_a_whole():
    labels = torch.tensor([1, 1, 0, 0])
    first, second = torch.tensor([0.2, 0.6, 0.3, 0.9]), torch.tensor([3.0, -1.0, -2.0, 0.1])
    assert values_of([(first, labels)])["accuracy"] == 0.5  # 0.6 and 0.3 are on their label's side of 0.5
    both = values_of([(first, labels), (second, labels)])
    assert both["accuracy"] == pytest.approx(accuracy_score([1, 1, 0, 0] * 2, torch.cat([first, second]) >= 0))


def test_two_scores_are_two_classes(labels):
    scores = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(6))
    two = labels % 2
    for task in ("auto", "multiclass", "binary"):
        check(values_of(in_pieces(scores, two), task=task), expected(two, scores.argmax(1)))
    one_hot = torch.nn.functional.one_hot(two, 2)
    check(values_of(in_pieces(scores, one_hot)), expected(two, scores.argmax(1)))


def test_a_batch_of_one_that_was_squeezed_is_one_label():
    batches = [(torch.tensor([1.0, -1.0]), torch.tensor([1, 1])), (torch.tensor(2.0), torch.tensor([1]))]
    assert values_of(batches)["accuracy"] == pytest.approx(2 / 3)


# several labels at once


@pytest.mark.parametrize("task", ["auto", "multilabel"])
@pytest.mark.parametrize("of", [torch.float32, torch.int64, torch.bool])
def test_multi_hot_rows_are_counted_by_entry(logits, task, of):
    rows = (torch.rand(COUNT, CLASSES, generator=torch.Generator().manual_seed(7)) < logits.sigmoid()).to(of)
    predicted = logits >= 0
    metric = torchmetrics.classification.MultilabelAccuracy(CLASSES, average="micro", threshold=0.5)
    coefficient = torchmetrics.classification.MultilabelMatthewsCorrCoef(CLASSES)
    wanted = {
        "accuracy": float(metric(logits.sigmoid(), rows.int())),
        MCC: float(coefficient(predicted.int(), rows.int())),
    }
    assert wanted["accuracy"] == pytest.approx((predicted == rows.bool()).float().mean().item())
    for predictions in (logits, logits.sigmoid()):
        found = values_of(in_pieces(predictions, rows), task=task)
        assert found["accuracy"] == pytest.approx(wanted["accuracy"], rel=1e-6)
        assert found[MCC] == pytest.approx(wanted[MCC], rel=1e-6)


def test_a_single_row_of_several_labels_decides_for_all(logits, labels):
    rows = torch.nn.functional.one_hot(labels, CLASSES)
    rows[7] = torch.tensor([1, 1, 0, 0, 1])
    by_entry = ((logits >= 0) == rows.bool()).double().mean().item()
    assert values_of([(logits, rows)], ["accuracy"])["accuracy"] == pytest.approx(by_entry)


def test_a_task_decides_where_the_values_would_say_otherwise(logits, labels):
    rows = torch.nn.functional.one_hot(labels, CLASSES)
    by_entry = ((logits >= 0) == rows.bool()).double().mean().item()
    assert values_of([(logits, rows)], task="multilabel")["accuracy"] == pytest.approx(by_entry)
    several = rows | torch.nn.functional.one_hot((labels + 1) % CLASSES, CLASSES)
    by_row = (several.argmax(1) == logits.argmax(1)).double().mean().item()
    assert values_of([(logits, several)], task="multiclass")["accuracy"] == pytest.approx(by_row)
    assert values_of([(logits, rows)], task="binary")["accuracy"] == pytest.approx(by_entry)


def test_the_evidence_is_of_the_whole_phase():
    """A batch of rows with one label each, then one with several: all of them are several labels."""
    logits = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 2.0, 3.0]])
    rows = torch.tensor([[1, 0, 0], [0, 1, 0]])
    assert values_of([(logits, rows)])["accuracy"] == 0.5
    several = torch.tensor([[1, 0, 1], [1, 1, 1]])
    assert values_of([(logits, rows), (logits, several)])["accuracy"] == pytest.approx((5 + 4) / 12)


@pytest.mark.parametrize("task", ["auto", "multiclass", "multilabel"])
@pytest.mark.parametrize("predictions", ["logits", "probabilities"])
def test_rows_that_are_evaluated_together_are_those_that_are_evaluated_one_by_one(logits, labels, task, predictions):
    """Every row by what its own phase had shown until then: of one class each at first, of several later."""
    one = torch.nn.functional.one_hot(labels, CLASSES)
    several = one | torch.nn.functional.one_hot((labels + 1) % CLASSES, CLASSES)
    scores = logits if predictions == "logits" else logits.sigmoid()
    batches = [*in_pieces(scores, one, 3), *in_pieces(logits, several, 2)]
    sums, states = PhaseSums(statistic_set(["accuracy", MCC]), task=task), []
    for batch in batches:
        sums.update(torch.tensor(0.0), *batch)
        states.append(sums.state_now())
    together = [StatisticsRow("train", 1, 1, 1, 1, 1, 1, None, 0.0, 0.0, state) for state in states]
    evaluate(sums.statistics, together, task=task)
    for number, row in enumerate(together, 1):
        assert row.values == pytest.approx(values_of(batches[:number], task=task))
    by_entry = [((given >= (0 if predictions == "logits" else 0.5)) == rows.bool()) for given, rows in batches[:3]]
    first = {"auto": accuracy_score(labels, logits.argmax(1)), "multilabel": torch.cat(by_entry).double().mean().item()}
    assert together[2].values["accuracy"] == pytest.approx(first.get(task, first["auto"]))
    assert len({round(row.values[MCC], 9) for row in together}) == len(together)


# what does not count


@pytest.mark.parametrize("kind", ["class numbers", "rows", "soft rows"])
@pytest.mark.parametrize("ignored", [-100, 3])
def test_top5_is_scikit_learns_over_the_labels_that_count(kind, ignored):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(COUNT, 9, generator=generator)
    labels = torch.randint(9, (COUNT,), generator=generator)
    targets = labels if kind == "class numbers" else torch.nn.functional.one_hot(labels, 9)
    if kind == "soft rows":
        targets = targets * 0.8 + 0.2 / 9
    gaps = torch.rand(COUNT, generator=generator) < 0.3
    if kind == "class numbers":
        targets = targets.masked_fill(gaps, ignored)
        gaps = targets == ignored
    else:
        targets[gaps, 2] = ignored if kind == "rows" else torch.nan
    wanted = top_k_accuracy_score(labels[~gaps], logits[~gaps], k=5, labels=range(9))
    found = values_of(in_pieces(logits, targets), ["top5_accuracy"], ignore_index=ignored)
    assert 0.2 < wanted < 0.8
    assert found["top5_accuracy"] == pytest.approx(wanted)


def test_nan_targets_do_not_count(logits, labels):
    gaps = torch.rand(COUNT, generator=torch.Generator().manual_seed(8)) < 0.3
    kept = expected(labels[~gaps], logits[~gaps].argmax(1))
    numbers = labels.float().masked_fill(gaps, torch.nan)
    check(values_of(in_pieces(logits, numbers)), kept)
    rows = torch.nn.functional.one_hot(labels, CLASSES).float()
    rows[gaps] = torch.nan
    check(values_of(in_pieces(logits, rows)), kept)
    score = logits[:, 0]
    ones = (labels == 0).float()
    binary = expected(ones[~gaps], (score >= 0)[~gaps])
    check(values_of(in_pieces(score, ones.masked_fill(gaps, torch.nan))), binary)
    several = (logits + 1 > 0).float()
    missing = torch.rand(COUNT, CLASSES, generator=torch.Generator().manual_seed(9)) < 0.2
    found = values_of(in_pieces(logits, several.masked_fill(missing, torch.nan)))
    assert found["accuracy"] == pytest.approx(((logits >= 0) == several.bool())[~missing].double().mean().item())


@pytest.mark.parametrize("ignored", [-100, 255, 0, 3, None])
def test_ignored_labels_do_not_count(logits, labels, ignored):
    gaps = torch.rand(COUNT, generator=torch.Generator().manual_seed(8)) < 0.3
    numbers = labels if ignored is None else labels.masked_fill(gaps, ignored)
    kept = torch.ones_like(gaps) if ignored is None else numbers != ignored
    wanted = expected(numbers[kept], logits[kept].argmax(1))
    check(values_of(in_pieces(logits, numbers), ignore_index=ignored), wanted)
    top = (logits > logits.gather(1, numbers.clamp(0, CLASSES - 1)[:, None])).sum(1) < 5
    found = values_of(in_pieces(logits, numbers), ["top5_accuracy"], ignore_index=ignored)
    assert found["top5_accuracy"] == pytest.approx(top[kept].double().mean().item())


def test_the_void_of_a_mask_of_bytes_does_not_count():
    scores = torch.randn(2, 200, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(200, (2, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    masks[:, :2] = 255
    masks[0, 3] = 156  # what -100 would be in a byte
    kept = masks != 255
    wanted = accuracy_score(masks[kept], scores.argmax(1)[kept])
    found = values_of([(scores, masks)], ["accuracy"], ignore_index=255)
    assert found["accuracy"] == pytest.approx(wanted)
    counted = PhaseSums(statistic_set(["accuracy"]))
    counted.update(None, scores, masks)
    assert counted.state()["sums"][1] == masks.numel()  # a byte cannot be -100


# what cannot be read


def test_two_readings_that_remain_are_refused_naming_the_task(logits, labels):
    odd = torch.nn.functional.one_hot(labels, CLASSES) * 0.9  # sums of 0.9, and not of 0 and 1
    with pytest.raises(ValueError, match=r"not clear .* Give task='multiclass' or task='multilabel'"):
        values_of([(logits, odd)])
    assert values_of([(logits, odd)], task="multiclass")["accuracy"] == pytest.approx(
        accuracy_score(labels, logits.argmax(1))
    )
    soft = torch.full((2, CLASSES), 1 / CLASSES)
    hot = torch.ones(2, CLASSES)
    with pytest.raises(ValueError, match="Give task='multiclass' or task='multilabel'"):
        values_of([(logits[:2], soft), (logits[:2], hot)])


def test_numbers_that_are_no_labels_are_refused(logits):
    with pytest.raises(ValueError, match="must be 0 or 1, or between them"):
        values_of([(logits[:, 0], logits[:, 1] * 10)])
    with pytest.raises(ValueError, match="must be 0 or 1, or between them"):
        values_of([(logits[:4, 0], torch.tensor([0, 1, 2, 3]))])
    with pytest.raises(ValueError, match="`task` 'multilabel' must be 0 or 1"):
        values_of([(logits, torch.full_like(logits, 3))], task="multilabel")


@pytest.mark.parametrize(
    ("task", "predictions", "message"),
    [
        ("binary", (4, 3), "`task` 'binary' needs one score or two for each label, but the predictions have 3 scores"),
        ("multilabel", (4, 3), "`task` 'multilabel' needs rows of 0 and 1 .* have 3 scores"),
        ("multiclass", (4,), "`task` 'multiclass' needs a score per class .* have one score"),
    ],
)
def test_shapes_that_do_not_fit_the_task_are_refused(task, predictions, message):
    with pytest.raises(ValueError, match=message):
        values_of([(torch.zeros(predictions), torch.zeros(4).long())], task=task)


def test_top5_of_several_labels_is_refused(logits):
    rows = (logits > 0).long()
    for task in ("auto", "multilabel"):
        with pytest.raises(ValueError, match="`top5_accuracy` needs a score for every class, and one class"):
            values_of([(logits, rows)], ["top5_accuracy"], task=task)


def test_batches_of_one_phase_must_be_alike(logits, labels):
    with pytest.raises(ValueError, match="read as scores of classes before and as rows now"):
        values_of([(logits, labels), (logits, torch.nn.functional.one_hot(labels, CLASSES))])


@pytest.mark.parametrize(
    ("tried", "right"),
    [
        ("acc", "did you mean 'accuracy'"),
        ("Accuracy", "did you mean 'accuracy'"),
        ("top-5", "did you mean 'top5_accuracy'"),
        ("top5", "did you mean 'top5_accuracy'"),
        ("mcc", "did you mean 'matthews_correlation_coefficient'"),
        ("ppl", "did you mean 'perplexity'"),
        ("f1", r"torchmetrics\.F1Score\(\.\.\.\)"),
        ("AUROC", r"torchmetrics\.AUROC\(\.\.\.\)"),
        ("precision", r"torchmetrics\.Precision\(\.\.\.\)"),
    ],
)
def test_names_that_users_try_are_answered_with_the_right_one(tried, right):
    with pytest.raises(ValueError, match=right):
        statistic_set([tried])


def test_the_sums_are_wide_enough_for_any_run():
    """A float32 sum stops at 2^24."""
    sums = PhaseSums(statistic_set(["accuracy"]))
    state = {"batches": 2**24, "sums": [float(2**24)] * 3, "reading": "scores of classes", "metrics": {}}
    sums.load({**state, "layout": [["labels", 1], ["right", 1]]}, torch.device("cpu"))
    sums.update(torch.tensor(1.0), torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    assert sums.state()["sums"] == [2.0**24 + 1] * 3
