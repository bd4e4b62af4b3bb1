"""What predictions are worth: counts, rates, their uncertainty, and comparisons."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import (
    confusion_matrix,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

from ..data.slices import CLASS_NAMES

COLUMNS = ("recall Me", "Gl", "Pt", "accuracy", "F1 Me", "Gl", "Pt", "macro", "micro", "MCC")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a confusion matrix says; per class in the order of the labels."""

    confusion: list[list[int]]  # counts, rows are the truth and columns the prediction
    accuracy: float  # the share of slices classified correctly, in [0, 1]
    accuracy_interval: tuple[float, float]  # Wilson's of 95 %, as if slices were independent
    recall: list[float]  # what the paper calls a class's accuracy
    precision: list[float]
    f1: list[float]
    f1_macro: float  # the mean of the classes' F1
    f1_micro: float  # F1 of the pooled counts, which is the accuracy when every slice has one class
    mcc: float  # Matthews' correlation for many classes (R_K)
    # (TPR + TNR) / 2 of each class against the rest: the area under the ROC "curve" of hard labels,
    # which has one corner. It is what the paper calls AUC.
    label_auc: list[float]


class McNemar(NamedTuple):
    """How two classifiers differ on the same slices."""

    only_first: int  # slices that only the first got right
    only_second: int  # slices that only the second got right
    p: float  # exact two-sided probability of a difference at least as large by chance


class Reliability(NamedTuple):
    """Accuracy against confidence, in bins of equal width."""

    confidence: np.ndarray  # (bins,) mean confidence; NaN in empty bins
    accuracy: np.ndarray  # (bins,) share of right answers; NaN in empty bins
    count: np.ndarray  # (bins,) number of slices
    error: float  # the expected calibration error, in [0, 1]


def measure(
    truth: np.ndarray, predicted: np.ndarray, num_classes: int = len(CLASS_NAMES)
) -> Metrics:
    """Return what answers (n,) are worth, given the truth (n,)."""
    return compute_metrics(confusion_matrix(truth, predicted, labels=range(num_classes)))


def compute_metrics(confusion: np.ndarray) -> Metrics:
    """Return everything that follows from the counts; a ratio without cases counts as 0."""
    truth, predicted = (
        np.repeat(label.ravel(), confusion.ravel()) for label in np.indices(confusion.shape)
    )
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=range(len(confusion)), zero_division=0
    )
    hits, total = int(confusion.trace()), int(confusion.sum())
    others = total - confusion.sum(1)  # of each class, the slices that are not of it
    false_alarms = confusion.sum(0) - confusion.diagonal()
    specificity = np.where(others, 1 - false_alarms / np.maximum(others, 1), 0.0)
    one_class = np.ptp([*truth, *predicted]) == 0  # of which scikit-learn would warn
    return Metrics(
        confusion=confusion.tolist(),
        accuracy=hits / total,
        accuracy_interval=wilson_interval(hits, total),
        recall=recall.tolist(),
        precision=precision.tolist(),
        f1=f1.tolist(),
        f1_macro=float(f1.mean()),
        f1_micro=hits / total,
        mcc=0.0 if one_class else float(matthews_corrcoef(truth, predicted)),
        label_auc=((recall + specificity) / 2).tolist(),
    )


def score_auc(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return each class's area (C,) under the ROC curve against the rest.

    Of labels (n,) and scores (n, C), the higher the surer of that class; NaN for a class without
    cases, or without others.
    """
    return np.array(
        [
            roc_auc_score(truth == label, own) if 0 < np.mean(truth == label) < 1 else np.nan
            for label, own in enumerate(scores.T)
        ]
    )


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion, which behaves near 0 and 1."""
    interval = stats.binomtest(hits, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Compare two classifiers by the slices that only one of them gets right.

    Of booleans (n,), true where each is right, from one run of each on one test set; the same slice
    under several seeds is not several slices.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    total = only_first + only_second
    p = float(stats.binomtest(only_first, total).pvalue) if total else 1.0
    return McNemar(only_first, only_second, p)


def patient_bootstrap(
    correct: np.ndarray, patients: np.ndarray, seed: int = 0, repeats: int = 2000
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the accuracy when patients are drawn anew.

    Slices of one patient are alike, so patients (n,) and not slices, right or not (n,), are the
    independent cases.
    """
    _, group = np.unique(patients, return_inverse=True)
    right, sizes = np.bincount(group, weights=correct), np.bincount(group)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(repeats, len(sizes)))
    accuracies = right[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.percentile(accuracies, [2.5, 97.5])
    return float(low), float(high)


def seed_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the mean and Student's 95 % interval of it; NaN where there is one value alone."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, (math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, (mean - reach, mean + reach)


def majority_vote(
    patients: np.ndarray, predicted: np.ndarray, scores: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Let the slices of each patient vote; a tie goes to the class of the larger summed score.

    Of ids, labels and truth (n,) and scores (n, C), return truth and vote (patients,), in the order
    of the sorted ids.

    Raises:
        ValueError: Slices of one patient differ in their truth.
    """
    ids, first, group = np.unique(patients, return_index=True, return_inverse=True)
    own = truth[first]
    if (truth != own[group]).any():
        differing = patients[truth != own[group]][0]
        raise ValueError(f"truth: the slices of patient {differing} have different labels")
    votes, sums = np.zeros((2, len(ids), scores.shape[1]))
    np.add.at(votes, (group, predicted), 1)
    np.add.at(sums, group, scores)
    leading = votes == votes.max(1, keepdims=True)
    return own, np.where(leading, sums, -np.inf).argmax(1)


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Reliability:
    """Return how often answers of each confidence (n,) in [0, 1] are right, or not (n,).

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, (2) and (3).
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = np.where(count, count, np.nan)
    mean_confidence = np.bincount(place, weights=confidence, minlength=bins) / filled
    accuracy = np.bincount(place, weights=correct, minlength=bins) / filled
    error = np.nansum(count / len(correct) * np.abs(accuracy - mean_confidence))
    return Reliability(mean_confidence, accuracy, count, float(error))


def metrics_row(metrics: Mapping[str, Any]) -> list[str]:
    """Return the fields of `Metrics` as a row of the paper's tables, all cut off as it does."""
    percentages = [*metrics["recall"], metrics["accuracy"]]
    ratios = [*metrics["f1"], metrics["f1_macro"], metrics["f1_micro"], metrics["mcc"]]
    return [
        *(f"{truncated(100 * value, 2):.2f}" for value in percentages),
        *(ratio_text(value) for value in ratios),
    ]


def ratio_text(value: float) -> str:
    """Return a ratio with four digits and no zero before the point, cut off as the paper does."""
    return f"{truncated(value, 4):.4f}".replace("0.", ".", 1)


def truncated(value: float, digits: int) -> float:
    """Cut a number off after some digits."""
    # The small term keeps 0.29 * 100, which is 28.999999999999996, at 29.
    return math.trunc(value * 10**digits + math.copysign(1e-7, value)) / 10**digits
