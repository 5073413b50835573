"""The arithmetic of running statistics, against NumPy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings, strategies as st
from sklearn.metrics import accuracy_score, matthews_corrcoef, top_k_accuracy_score

from lightning_plugins.core.step_outputs import StepSources
from lightning_plugins.statistics.labels import read_batch
from lightning_plugins.statistics.metric_names import statistic_set
from lightning_plugins.statistics.recording import Recording as RunRecording
from lightning_plugins.statistics.rows import StatisticsRow, evaluate
from lightning_plugins.statistics.running import PhaseSums


def value_of(sums, name):
    row = StatisticsRow("train", 1, 1, 1, 1, 1, 1, None, 0.0, 0.0, sums.state_now())
    evaluate(sums.statistics, [row])
    return row.values[name]


def run(metrics, batches):
    """Return the sums after batches of (loss, predictions, targets)."""
    sums = PhaseSums(statistic_set(metrics))
    for loss, predictions, targets in batches:
        sums.update(torch.tensor(loss), predictions, targets)
    return sums


def random_batches(seed, classes, sizes=(16, 3, 7)):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            float(torch.rand((), generator=generator)),
            torch.randn(size, classes, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def joined(batches):
    return (
        torch.cat([predictions for _, predictions, _ in batches]).numpy(),
        torch.cat([targets for *_, targets in batches]).numpy(),
    )


def test_loss_is_the_plain_mean_of_the_batches_losses():
    sums = run([], [(1.0, None, None), (2.0, None, None), (6.0, None, None)])
    assert value_of(sums, "loss") == 3.0


@pytest.mark.parametrize("seed", range(10))
def test_accuracy_and_top5_equal_scikit_learn_over_uneven_batches(seed):
    batches = random_batches(seed, 9)
    scores, labels = joined(batches)
    sums = run(["accuracy", "top5_accuracy"], batches)
    assert value_of(sums, "accuracy") == pytest.approx(accuracy_score(labels, scores.argmax(1)), rel=1e-15)
    expected = top_k_accuracy_score(labels, scores, k=5, labels=range(9))
    assert value_of(sums, "top5_accuracy") == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_matthews_correlation_equals_scikit_learn(seed):
    batches = random_batches(seed, 2)
    scores, labels = joined(batches)
    ours = value_of(run(["matthews_correlation_coefficient"], batches), "matthews_correlation_coefficient")
    assert ours == pytest.approx(matthews_corrcoef(labels, scores.argmax(1)), abs=1e-14)


@pytest.mark.parametrize(
    ("predicted", "labels"), [([1, 1, 1], [0, 1, 1]), ([0, 0], [0, 0]), ([1, 0], [1, 1]), ([1, 1], [1, 1])]
)
def test_matthews_correlation_is_0_when_a_class_is_never_seen_or_predicted(predicted, labels):
    sums = run(["matthews_correlation_coefficient"], [(0.0, torch.tensor(predicted), torch.tensor(labels))])
    assert value_of(sums, "matthews_correlation_coefficient") == 0.0


def test_matthews_correlation_of_many_samples_does_not_overflow():
    # S4TF multiplied integer counts and overflowed at about 1e5 samples
    count = 2**18
    labels = torch.arange(count) % 2
    predicted = torch.where(torch.arange(count) % 8 == 0, 1 - labels, labels)
    ours = value_of(
        run(["matthews_correlation_coefficient"], [(0.0, predicted, labels)] * 4), "matthews_correlation_coefficient"
    )
    assert ours == pytest.approx(matthews_corrcoef(labels.numpy(), predicted.numpy()), abs=1e-12)


def test_perplexity_is_the_exponential_of_the_mean_not_the_mean_of_exponentials():
    sums = run(["perplexity"], [(1.0, None, None), (3.0, None, None)])
    assert value_of(sums, "perplexity") == pytest.approx(math.exp(2.0))


def test_perplexity_of_a_hopeless_loss_is_infinite():
    assert value_of(run(["perplexity"], [(1000.0, None, None)]), "perplexity") == math.inf


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_shows(loss):
    ours = value_of(run([], [(1.0, None, None), (loss, None, None)]), "loss")
    assert repr(ours) == repr(loss)


def test_ties_count_as_correct_in_top5_and_the_first_class_wins_in_accuracy():
    level = torch.zeros(2, 7)
    batch = read_batch(level, torch.tensor([0, 6]))
    assert batch.right.sum() == 1  # argmax is class 0
    assert batch.right_of(5).sum() == 2  # no score is strictly above the label's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_row_with_a_score_that_is_not_finite_is_wrong_in_top5(dtype):
    scores = torch.zeros(5, 7, dtype=dtype)
    scores[0, 3] = math.nan
    scores[1, 3] = math.inf
    scores[2, 3] = -math.inf
    scores[3, 3] = torch.finfo(dtype).max
    assert read_batch(scores, torch.tensor([0, 3, 0, 3, 3])).right_of(5).tolist() == [False] * 3 + [True] * 2


def test_whole_numbers_serve_as_scores():
    assert read_batch(torch.arange(7)[None], torch.tensor([1])).right_of(5).tolist() == [False]
    assert read_batch(torch.arange(7)[None], torch.tensor([2])).right_of(5).tolist() == [True]


def test_five_or_fewer_classes_make_top5_always_correct():
    assert read_batch(torch.randn(4, 5), torch.tensor([0, 1, 2, 3])).right_of(5).sum() == 4


def test_a_label_beyond_the_scores_is_wrong_in_top5_and_crashes_nothing():
    assert read_batch(torch.zeros(2, 7), torch.tensor([7, -1])).right_of(5).sum() == 0


def test_labels_of_minus_100_are_not_counted():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    targets = torch.tensor([0, -100, 0])
    sums = run(["accuracy", "matthews_correlation_coefficient"], [(0.0, logits, targets)])
    assert value_of(sums, "accuracy") == 0.5
    batch = read_batch(logits, targets)
    assert batch.counted.tolist() == [True, False, True]
    # the middle one is predicted to be 1, but ignored
    counts = dict(
        zip(("labels", "right"), run(["accuracy"], [(0.0, logits, targets)]).state()["sums"][1:], strict=True)
    )
    assert counts == {"labels": 2.0, "right": 1.0}


def test_no_label_that_counts_gives_nan():
    assert math.isnan(value_of(run(["accuracy"], [(0.0, torch.zeros(1, 2), torch.tensor([-100]))]), "accuracy"))


@pytest.mark.parametrize(
    ("predictions", "targets"),
    [
        (torch.randn(4, 5, 7), torch.randint(7, (4, 5))),  # a sequence, classes last
        (torch.randn(4, 7, 3, 2), torch.randint(7, (4, 3, 2))),  # a picture, classes second
        (torch.randint(7, (4, 5)), torch.randint(7, (4, 5))),  # class numbers
    ],
)
def test_scores_of_several_dimensions_are_flattened(predictions, targets):
    if predictions.shape == targets.shape:
        classes = predictions
    else:
        classes = predictions.argmax(-1 if predictions.shape[:-1] == targets.shape else 1)
    sums = dict(
        zip(("labels", "right"), run(["accuracy"], [(0.0, predictions, targets)]).state()["sums"][1:], strict=False)
    )
    assert sums == {"labels": targets.numel(), "right": (classes == targets).sum()}


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_logit_is_class_1_from_zero_on(shape):
    # as in S4TF, where the sigmoid of the logit must be at least one half
    logits = torch.tensor([-1.0, -0.1, 0.0, 0.1, 2.0, -3.0]).reshape(shape)
    targets = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert value_of(run(["accuracy"], [(0.0, logits, targets)]), "accuracy") == pytest.approx(4 / 6)


@pytest.mark.parametrize(("predictions", "targets"), [((4, 3), (5,)), ((4, 3, 2), (4,)), ((4,), (4, 2))])
def test_shapes_that_do_not_belong_together_are_named(predictions, targets):
    with pytest.raises(ValueError, match=r"Predictions of shape \(4.* do not belong to targets of shape"):
        read_batch(torch.zeros(predictions), torch.zeros(targets, dtype=torch.long))


def test_top5_of_class_numbers_is_refused():
    with pytest.raises(ValueError, match="`top5_accuracy` needs a score for every class"):
        read_batch(torch.tensor([1]), torch.tensor([1])).right_of(5)


@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_matthews_correlation_of_many_classes_equals_scikit_learn(classes, seed):
    batches = random_batches(seed, classes, sizes=(40, 3, 7))
    scores, labels = joined(batches)
    name = "matthews_correlation_coefficient"
    expected = matthews_corrcoef(labels, scores.argmax(1))
    assert value_of(run([name], batches), name) == pytest.approx(expected, abs=1e-14)
    numbers = [(loss, predictions.argmax(1), targets) for loss, predictions, targets in batches]
    assert value_of(run([name], numbers), name) == pytest.approx(expected, abs=1e-14)


def test_unknown_names_get_the_nearest_one_offered():
    with pytest.raises(ValueError, match=r"'top5_acuracy'; did you mean 'top5_accuracy'\?"):
        statistic_set(["top5_acuracy"])
    with pytest.raises(ValueError, match=r"got 'zzz'\.$"):
        statistic_set(["zzz"])
    with pytest.raises(ValueError, match="must not name 'loss'"):
        statistic_set(["loss"])
    with pytest.raises(ValueError, match="distinct names, got 'accuracy' twice"):
        statistic_set(["accuracy", "accuracy"])
    with pytest.raises(TypeError, match="must hold names or torchmetrics objects, got 3"):
        statistic_set([3])


def test_torchmetrics_objects_are_named_after_their_class_or_their_key():
    accuracy = torchmetrics.classification.MulticlassAccuracy(3)
    assert statistic_set([accuracy]).names == ("loss", "multiclass_accuracy")
    assert statistic_set(accuracy).names == ("loss", "multiclass_accuracy")
    assert statistic_set({"mine": accuracy}).names == ("loss", "mine")
    collection = torchmetrics.MetricCollection([accuracy, torchmetrics.classification.MulticlassF1Score(3)])
    assert statistic_set([collection]).names == ("loss", "multiclass_accuracy", "multiclass_f1_score")
    assert statistic_set(collection).names == ("loss", "multiclass_accuracy", "multiclass_f1_score")


def test_a_torchmetrics_object_runs_and_the_users_own_is_left_alone():
    metric = torchmetrics.classification.MulticlassF1Score(9, average="macro")
    batches = random_batches(3, 9)
    sums = run([metric], batches)
    reference = torchmetrics.classification.MulticlassF1Score(9, average="macro")
    scores, labels = joined(batches)
    assert value_of(sums, "multiclass_f1_score") == pytest.approx(
        float(reference(torch.tensor(scores), torch.tensor(labels)))
    )
    assert metric.update_count == 0


def test_a_torchmetrics_object_that_computes_no_number_is_refused():
    with pytest.raises(TypeError, match=r"one number each, got a tensor of shape \(9, 9\) from 'multiclass_confusion"):
        run([torchmetrics.classification.MulticlassConfusionMatrix(9)], random_batches(0, 9)).state_now()


def test_a_torchmetrics_object_that_refuses_a_batch_is_named():
    with pytest.raises(ValueError, match="'multiclass_accuracy' in `metrics` refused a batch"):
        run([torchmetrics.classification.MulticlassAccuracy(3)], [(0.0, torch.zeros(2, 3), torch.zeros(5).long())])


@pytest.mark.parametrize(
    "metric",
    [torchmetrics.classification.MulticlassF1Score(9), torchmetrics.classification.MulticlassAUROC(9)],
    ids=["sums", "lists"],
)
def test_a_run_split_by_its_state_equals_the_whole_run(metric):
    names = ["accuracy", "top5_accuracy", "perplexity", metric]
    batches = random_batches(5, 9, sizes=(64, 64, 64, 64))
    first = run(names, batches[:2])
    second = PhaseSums(statistic_set(names))
    second.load(first.state(), torch.device("cpu"))
    for loss, predictions, targets in batches[2:]:
        second.update(torch.tensor(loss), predictions, targets)
    whole = run(names, batches)
    for name in whole.statistics.names:
        assert value_of(second, name) == value_of(whole, name)
    assert value_of(first, "loss") != value_of(whole, "loss")


def test_half_precision_losses_are_added_in_double():
    losses = [1 + index / 128 for index in range(100)]
    sums = PhaseSums(statistic_set([]))
    for loss in losses:
        sums.update(torch.tensor(loss, dtype=torch.bfloat16), None, None)
    exact = np.mean([float(torch.tensor(loss, dtype=torch.bfloat16)) for loss in losses])
    assert value_of(sums, "loss") == pytest.approx(exact, rel=1e-15)


def test_a_loss_that_is_changed_in_place_afterwards_was_counted_as_it_was():
    loss = torch.tensor(2.0)
    sums = PhaseSums(statistic_set([]))
    sums.update(loss, None, None)
    loss.mul_(100)
    assert value_of(sums, "loss") == 2.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60), st.data())
def test_accuracy_does_not_depend_on_how_samples_are_cut_into_batches(pairs, data):
    cut = data.draw(st.integers(0, len(pairs)))
    predicted, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    parts = [(0.0, predicted[s], labels[s]) for s in (slice(cut), slice(cut, None)) if predicted[s].numel()]
    whole = run(["accuracy"], [(0.0, predicted, labels)])
    assert value_of(run(["accuracy"], parts), "accuracy") == value_of(whole, "accuracy")
    assert value_of(whole, "accuracy") == pytest.approx(np.mean([p == t for p, t in pairs]))


def test_labels_of_batches_without_a_loss_have_values_while_the_phase_runs():
    sums = PhaseSums(statistic_set(["accuracy"]))
    sums.update(None, torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), torch.tensor([1, 1, 1]))
    assert {name: value.item() for name, value in sums.values_now().items()} == {"accuracy": pytest.approx(2 / 3)}


def test_another_number_of_classes_in_mid_phase_is_refused():
    sums = run(["matthews_correlation_coefficient"], random_batches(1, 3, sizes=(4,)))
    (_, predictions, targets) = random_batches(2, 4, sizes=(4,))[0]
    with pytest.raises(ValueError, match="must be alike"):
        sums.update(torch.tensor(1.0), predictions, targets)


def test_class_numbers_after_scores_are_refused():
    (loss, predictions, targets) = random_batches(2, 4, sizes=(4,))[0]
    sums = run(["accuracy"], [(loss, predictions, targets)])
    with pytest.raises(ValueError, match="read as scores of classes before and as class numbers now"):
        sums.update(torch.tensor(loss), predictions.argmax(1), targets)


def test_rows_beside_rows_of_three_dimensions_have_their_classes_last():
    predictions, targets = torch.rand(2, 3, 5), torch.eye(5)[torch.tensor([[0, 1, 2], [3, 4, 0]])]
    batch = read_batch(predictions, targets)
    assert batch.predictions.tolist() == predictions.reshape(6, 5).tolist()
    assert batch.labels.tolist() == [0, 1, 2, 3, 4, 0]


def test_rows_beside_rows_of_four_dimensions_have_their_classes_second():
    predictions, targets = torch.rand(2, 5, 3, 1), torch.eye(5)[torch.tensor([[[0], [1], [2]], [[3], [4], [0]]])]
    batch = read_batch(predictions, targets.movedim(-1, 1))
    assert batch.predictions.tolist() == [predictions[n, :, row, 0].tolist() for n in range(2) for row in range(3)]
    assert batch.labels.tolist() == [0, 1, 2, 3, 4, 0]


def test_of_several_ranks_one_goes_on_from_the_sums_of_all():
    batches = random_batches(4, 5, sizes=(4, 2))
    ranks = [RunRecording(statistic_set(["accuracy"]), StepSources(None, None, "a test")) for _ in range(2)]
    saved = {"train": run(["accuracy"], batches).state(), "samples": 6, "seconds": 1.5}
    for rank in ranks:
        # what a fit that ended in mid-epoch has left in these processes
        rank.restore(saved, torch.device("cpu"), chief=True)
    for number, rank in enumerate(ranks):
        rank.restore(saved, torch.device("cpu"), chief=not number)
    states = [rank.state() for rank in ranks]
    assert (states[0]["train"], states[0]["samples"]) == (saved["train"], 6)
    assert (states[1]["train"], states[1]["samples"]) == ({"batches": 0, "sums": [], "metrics": {}}, 0)


def test_rows_are_read_together_by_what_the_last_of_them_has_shown():
    sums, rows = PhaseSums(statistic_set(["accuracy"])), []
    for target in (1.0, 2.0):
        sums.update(torch.tensor(1.0), torch.tensor([0.3, 0.8]), torch.tensor([0.0, target]))
        rows.append(StatisticsRow("train", 1, 1, 1, 1, 1, 1, None, 0.0, 0.0, sums.state_now()))
    with pytest.raises(ValueError, match="must be 0 or 1, or between them"):
        evaluate(sums.statistics, rows)
