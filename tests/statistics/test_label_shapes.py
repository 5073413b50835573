"""The shapes that predictions and labels may have, each read as the plain ones are."""

import pytest
import torch

from tests.statistics.test_label_readings import values_of

SIZES = {"n": 4, "l": 3, "h": 2, "w": 6, "c": 5, "1": 1}


def made(predictions, targets):
    """Return scores and labels whose dimensions are called so, ``c`` for the classes, and the share that is right."""
    labelled = targets.replace("1", "")
    generator = torch.Generator().manual_seed(4)
    classes = "c" in predictions
    scores = torch.randn(*(SIZES[name] for name in labelled + "c" * classes), generator=generator)
    labels = torch.randint(5 if classes else 2, [SIZES[name] for name in labelled], generator=generator)
    right = (scores.argmax(-1) == labels) if classes else ((scores >= 0) == labels.bool())
    order = [(labelled + "c").index(name) for name in predictions if name != "1"]
    scores = scores.permute(order).reshape([SIZES[name] for name in predictions])
    return scores, labels.reshape([SIZES[name] for name in targets]), right.double().mean().item()


@pytest.mark.parametrize("task", ["auto", "binary"])
@pytest.mark.parametrize("targets", ["n", "n1", "nl", "nl1", "nhw", "n1hw", "nlhw"])
@pytest.mark.parametrize("where", ["nowhere", "last", "second"])
def test_one_score_for_each_label_may_have_a_dimension_of_size_1_more(targets, where, task):
    plain = targets.replace("1", "")
    predictions = {"nowhere": plain, "last": f"{plain}1", "second": f"n1{plain[1:]}"}[where]
    scores, labels, right = made(predictions, targets)
    assert values_of([(scores, labels)], ["accuracy"], task=task)["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("predictions", "targets"),
    [
        ("nc", "n"),
        ("nc", "n1"),
        ("nlc", "nl"),
        ("nlc", "nl1"),
        ("ncl", "nl"),
        ("ncl", "nl1"),
        ("nhwc", "nhw"),
        ("nchw", "nhw"),
        ("nchw", "n1hw"),
        ("nlhwc", "nlhw"),
        ("nclhw", "nlhw"),
        ("nclhw", "n1lhw"),
    ],
)
@pytest.mark.parametrize("task", ["auto", "multiclass"])
def test_a_score_for_each_class_stands_last_or_second(predictions, targets, task):
    scores, labels, right = made(predictions, targets)
    assert values_of([(scores, labels)], ["accuracy"], task=task)["accuracy"] == pytest.approx(right)


def test_where_both_fit_the_classes_stand_last_and_from_four_dimensions_on_second():
    generator = torch.Generator().manual_seed(6)
    for shape, axis in (((4, 5, 5), -1), ((4, 5, 5, 5), 1)):
        scores = torch.randn(*shape, generator=generator)
        labels = torch.randint(5, shape[:-1], generator=generator)
        wanted = (scores.argmax(axis) == labels).double().mean().item()
        assert values_of([(scores, labels)], ["accuracy"])["accuracy"] == pytest.approx(wanted)


def test_one_sample_without_a_dimension_for_samples_is_one_label():
    scores, label = torch.tensor([0.5, 2.0, 1.0]), torch.tensor(1)
    assert values_of([(scores, label), (scores, label + 1)], ["accuracy"])["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("predictions", "targets"),
    [
        ((4, 3), (5,)),
        ((4, 3), (4, 2)),
        ((4, 3), (3, 4)),
        ((4, 5, 6), (5, 6)),
        ((4, 5, 6), (4, 7)),
        ((4, 6, 5), (5, 6)),
        ((4, 5, 6, 7), (4, 7, 6)),
        ((4, 5, 6, 7), (3, 6, 7)),
        ((4,), (4, 3)),
        ((4,), (5,)),
        ((4, 1), (5,)),
        ((4, 1, 6), (4, 7)),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(predictions, targets):
    with pytest.raises(ValueError, match=r"Predictions of shape \(.*\) do not belong to targets of shape \(.*\): "):
        values_of([(torch.zeros(predictions), torch.zeros(targets).long())], ["accuracy"])
