"""The gate's arithmetic on answers that are known, without a model: classes, drops, refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
from rwkv_export.gate import BOUNDS, Bounds, Quality, compare_answers

from rwkv_core.errors import ExportError

RIGHT = np.array([0, 1, 2, 0, 1, 2, 0, 1])


class Answers:
    """A classifier that answers with given logits."""

    def __init__(self, logits):
        self.logits = logits
        images = SimpleNamespace(name="images")
        self.graphs = {"classify": SimpleNamespace(inputs=(images,), state=())}

    def __call__(self, graph, inputs):
        assert (graph, list(inputs)) == ("classify", ["images"])
        return {"logits": self.logits}


@pytest.fixture
def sure():
    """Logits that find every right class."""
    return 4 * np.eye(3, dtype=np.float32)[RIGHT]


@pytest.fixture
def images():
    return np.zeros((len(RIGHT), 3, 4, 4), np.float32)


def measured(before, after, images, labels):
    return compare_answers(Answers(before), Answers(after), images, labels)


def test_the_drop_is_the_share_of_right_answers_that_was_lost(sure, images):
    same = measured(sure, sure, images, RIGHT)
    assert (same.drop, same.top1, same.kl, same.worst_logit) == (0, 1, 0, 0)
    after = sure.copy()
    after[:2] = after[:2, ::-1]  # the first is lost; the second is 1 of 3 and stays
    got = measured(sure, after, images, RIGHT)
    assert (got.drop, got.top1, got.worst_logit) == (1 / 8, 7 / 8, 4)
    # computed apart: -log softmax of a right answer, and of one that lost
    low, high = (np.log(np.exp([4, 0, 0]).sum()) - x for x in (4, 0))
    assert got.loss_before == pytest.approx(low)
    assert got.loss == pytest.approx((7 * low + high) / 8)
    # better than before is no loss
    assert measured(after, sure, images, RIGHT).drop == -1 / 8


@pytest.mark.parametrize("scheme", BOUNDS)
def test_a_lost_class_is_refused_whatever_the_scheme(sure, images, scheme):
    after = sure.copy()
    after[0] = after[0, ::-1]
    broken = BOUNDS[scheme].broken(measured(sure, after, images, RIGHT))
    assert "accuracy 12.50% lower" in broken
    assert BOUNDS[scheme].broken(measured(sure, sure, images, RIGHT)) == []


def test_without_labels_the_rest_is_measured(sure, images):
    quality = measured(sure, sure[::-1], images, None)
    assert np.isnan(quality.loss)
    assert quality.drop == 0
    assert any("top-1" in text for text in Bounds(kl=100.0).broken(quality))


def test_answers_that_are_not_numbers_are_refused(sure, images):
    after = sure.copy()
    after[3, 1] = np.nan
    loose = Bounds(kl=100.0, perplexity_ratio=100.0, top1=0.0, drop=1.0)
    assert loose.broken(measured(sure, after, images, RIGHT)) == ["answers that are not numbers"]


def test_each_bound_refuses_alone():
    fine = {"loss": 1.0, "loss_before": 1.0, "kl": 0.0, "top1": 1.0, "worst_logit": 0.1}
    bounds = Bounds(kl=0.1, worst_logit=1.0)
    assert bounds.broken(Quality(**fine)) == []
    worse = {"loss": 1.1, "kl": 0.2, "top1": 0.9, "worst_logit": 2.0, "greedy": 0.5, "drop": 0.1}
    for name, value in worse.items():
        assert len(bounds.broken(Quality(**{**fine, name: value}))) == 1, name


def test_no_data_is_an_error(sure, images):
    with pytest.raises(ExportError, match=r"quality on data of shape \[0, 3, 4, 4\]"):
        measured(sure, sure, images[:0], RIGHT[:0])
