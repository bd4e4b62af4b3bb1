"""Metrics and their uncertainty, against counts by hand, scipy, scikit-learn and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    roc_auc_score,
)

from examples.brain_tumor.evaluation.metrics import (
    compute_metrics,
    majority_vote,
    mcnemar,
    patient_bootstrap,
    reliability,
    score_auc,
    seed_interval,
    truncated,
    wilson_interval,
)


def test_metrics_of_a_small_matrix_by_hand():
    metrics = compute_metrics(np.array([[3, 1, 0], [0, 2, 0], [1, 0, 3]]))
    assert metrics.confusion == [[3, 1, 0], [0, 2, 0], [1, 0, 3]]
    assert metrics.accuracy == metrics.f1_micro == pytest.approx(8 / 10)
    assert metrics.recall == pytest.approx([3 / 4, 2 / 2, 3 / 4])
    assert metrics.precision == pytest.approx([3 / 4, 2 / 3, 3 / 3])
    assert metrics.f1 == pytest.approx([6 / 8, 4 / 5, 6 / 7])
    assert metrics.f1_macro == pytest.approx((6 / 8 + 4 / 5 + 6 / 7) / 3)
    # R_K (Gorodkin 2004): (8 x 10 - 4 x 4 - 2 x 3 - 4 x 3) / sqrt((100 - 36) (100 - 34))
    assert metrics.mcc == pytest.approx(46 / (64 * 66) ** 0.5)
    assert metrics.label_auc == pytest.approx(
        [(3 / 4 + 5 / 6) / 2, (1 + 7 / 8) / 2, (3 / 4 + 1) / 2]
    )


def test_absent_classes_count_as_nothing():
    metrics = compute_metrics(np.array([[5, 0, 0], [0, 4, 0], [0, 0, 0]]))
    assert metrics.recall == [1.0, 1.0, 0.0]
    assert metrics.f1 == [1.0, 1.0, 0.0]
    assert (metrics.accuracy, metrics.mcc) == (1.0, 1.0)
    assert metrics.label_auc == [1.0, 1.0, 0.5]
    assert compute_metrics(np.array([[5, 0], [0, 0]])).label_auc == [0.5, 0.5]


@settings(deadline=None)  # no clock decides
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_counts_say_what_sklearn_says(pairs):
    truth, predicted = np.array(pairs).T
    metrics = compute_metrics(confusion_matrix(truth, predicted, labels=range(3)))
    if len({*truth, *predicted}) > 1:  # or scikit-learn warns
        assert metrics.mcc == pytest.approx(matthews_corrcoef(truth, predicted))
    micro = f1_score(truth, predicted, labels=range(3), average="micro")
    assert metrics.f1_micro == pytest.approx(micro)
    for label in range(3):
        own = truth == label
        if own.any() and not own.all():
            expected = balanced_accuracy_score(own, predicted == label)
            assert metrics.label_auc[label] == pytest.approx(expected)


def test_auc_of_scores_counts_pairs_in_order():
    truth = np.array([0, 0, 1, 1, 1])
    scores = np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.5, 0.5, 0], [0.1, 0.9, 0], [0.4, 0.2, 0]])
    # class 0: of 6 pairs 0.9 beats 3; 0.4 beats 0.1, ties 0.4, loses to 0.5
    areas = score_auc(truth, scores)
    assert areas[0] == pytest.approx((3 + 1 + 0.5) / 6)
    assert areas[1] == pytest.approx(roc_auc_score(truth == 1, scores[:, 1]))
    assert math.isnan(areas[2])
    assert np.isnan(score_auc(np.zeros(5, int), scores)).all()


def test_wilson_interval_of_the_papers_counts():
    low, high = wilson_interval(908, 920)
    assert (round(100 * low, 2), round(100 * high, 2)) == (97.73, 99.25)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10)[1] == 1.0
    for total in range(1, 200):
        assert wilson_interval(0, total)[0] >= 0
        assert wilson_interval(total, total)[1] <= 1


@settings(deadline=None)  # no clock decides
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_what_a_score_test_accepts(counts):
    """Its ends are where the score is at its limit: |share - p| = z sqrt(p (1 - p) / n)."""
    hits, total = counts
    for end in wilson_interval(hits, total):
        reach = stats.norm.ppf(0.975) * math.sqrt(max(end * (1 - end), 0) / total)
        assert abs(hits / total - end) == pytest.approx(reach, abs=1e-9)


def test_mcnemar_by_hand():
    first = np.array([1] * 50 + [1] * 8 + [0] * 2 + [0] * 5, bool)
    second = np.array([1] * 50 + [0] * 8 + [1] * 2 + [0] * 5, bool)
    test = mcnemar(first, second)
    assert (test.only_first, test.only_second) == (8, 2)
    tail = sum(math.comb(10, k) for k in range(3)) / 2**10
    assert test.p == pytest.approx(2 * tail)
    assert mcnemar(second, first).p == test.p
    assert mcnemar(first, first).p == 1.0


def test_bootstrap_draws_patients_not_slices():
    """Ten patients of 30 slices, all right or all wrong: as uncertain as ten cases."""
    correct = np.repeat(np.arange(10) < 7, 30)
    patients = np.repeat([f"p{i}" for i in range(10)], 30)
    low, high = patient_bootstrap(correct, patients, seed=0)
    drawn = stats.binom(10, 0.7)
    assert low == pytest.approx(drawn.ppf(0.025) / 10, abs=0.051)
    assert high == pytest.approx(drawn.ppf(0.975) / 10, abs=0.051)
    alone = patient_bootstrap(correct, np.arange(300).astype(str), seed=0)
    assert alone[1] - alone[0] < 0.11 < high - low
    assert patient_bootstrap(correct, patients, seed=0) == (low, high)


def test_bootstrap_weighs_patients_by_their_slices():
    low, high = patient_bootstrap(np.array([True] * 9 + [False]), np.array(["a"] * 9 + ["b"]), 0)
    assert (low, high) == (0.0, 1.0)
    correct, patients = np.tile([True] * 9 + [False], 200), np.repeat(np.arange(400), [9, 1] * 200)
    low, high = patient_bootstrap(correct, patients, seed=1)
    assert low < 0.9 < high
    assert high - low < 0.05


def test_interval_over_seeds_is_students():
    values = [0.97, 0.98, 0.96, 0.99]
    mean, interval = seed_interval(values)
    assert mean == pytest.approx(0.975)
    error = stats.sem(values)
    assert interval == pytest.approx(stats.t.interval(0.95, 3, loc=0.975, scale=error))
    mean, interval = seed_interval([0.5])
    assert mean == 0.5
    assert all(map(math.isnan, interval))


def test_majority_vote_and_its_ties():
    patients = np.array(["b", "a", "a", "a", "b", "c"])
    predicted = np.array([1, 0, 2, 2, 2, 0])
    truth = np.array([1, 2, 2, 2, 1, 1])
    scores = np.array([[0, 0.9, 0.1], *[[0, 0, 0]] * 3, [0, 0.1, 0.8], [0.7, 0.6, 0]])
    own, vote = majority_vote(patients, predicted, scores, truth)
    assert own.tolist() == [2, 1, 1]
    assert vote.tolist() == [2, 1, 0]  # b is tied 1 : 2, with sums 1.0 and 0.9
    with pytest.raises(ValueError, match="truth: the slices of patient a"):
        majority_vote(patients, predicted, scores, np.array([1, 2, 0, 2, 1, 1]))


def test_a_tie_is_won_by_the_scores_and_not_by_the_first_class():
    patients, truth = np.array(["a", "a"]), np.array([0, 0])
    scores = np.array([[0.6, 0.5, 0.0], [0.1, 0.4, 0.0]])
    assert majority_vote(patients, np.array([0, 1]), scores, truth)[1].tolist() == [1]


def test_a_tie_is_not_won_by_a_class_without_votes():
    patients, predicted = np.array(["a", "a"]), np.array([0, 1])
    scores = np.array([[0.5, 0.1, 0.9], [0.1, 0.4, 0.9]])
    assert majority_vote(patients, predicted, scores, np.array([0, 0]))[1].tolist() == [0]


def test_reliability_by_hand():
    bins = reliability(np.array([0.95, 0.91, 0.55, 1.0]), np.array([True, False, True, True]), 10)
    assert bins.count.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 3]
    assert bins.confidence[[5, 9]] == pytest.approx([0.55, 2.86 / 3])
    assert bins.accuracy[[5, 9]] == pytest.approx([1.0, 2 / 3])
    assert np.isnan(bins.accuracy[0])
    assert bins.error == pytest.approx(0.25 * 0.45 + 0.75 * (2.86 / 3 - 2 / 3))


def test_sure_and_right_is_calibrated():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.3, 1, 20_000)
    assert reliability(confidence, generator.random(20_000) < confidence).error < 0.02


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (29.0, 2, 29.0),
        (100 * 0.29, 2, 29.0),
        (98.6999, 2, 98.69),
        (0.98699996, 4, 0.9869),
        (-0.12345, 4, -0.1234),
    ],
)
def test_truncation(value, digits, expected):
    assert truncated(value, digits) == expected
