"""The classifiers that the paper fits on the embeddings of the training slices."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit
from sklearn.svm import SVC

from ..errors import UserError
from .evaluate import cosines

LARGEST_K = 30
VALIDATION = 0.2  # of the training side
TREES = 400  # of the random forest


@dataclass(frozen=True)
class Classification:
    """A classifier's answers."""

    name: str  # what tables call it
    settings: str  # how it was set, to be printed
    predicted: np.ndarray  # (n,) labels
    note: str = ""  # what else must be said; may be empty


def classify(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    groups: np.ndarray | None,
    seed: int,
) -> list[Classification]:
    """Fit the classifiers of the paper's Table 2, and k-NN with a k chosen honestly.

    Embeddings (n, d) and (k, d) are L2-normalised. The test labels are looked at by "k-NN, best k"
    alone, which is the paper's way. `groups` (n,) are the training slices' patients if no patient
    stands on both sides; the validation part then holds whole patients.

    Raises:
        UserError: The training slices are of one class, or too few to set a part of them aside.
    """
    if len(np.unique(train_labels)) < 2:
        raise UserError("training slices: all are of one class, expected two or more")
    neighbours = nearest_labels(train, train_labels, test)
    chosen, best = _validated_k(train, train_labels, groups, seed), _best_k(neighbours, test_labels)
    part = "a fifth of the training patients" if groups is not None else "a fifth of the slices"
    of = f"of 1 to {neighbours.shape[1]}, the best on"
    ties = "the nearer class wins a tie"
    note = "The paper's way: chosen on what it is tested on, so too good by construction."
    results = [
        Classification(f"k-NN, {name}", text, vote(neighbours, k), said)
        for name, k, text, said in (
            ("k = 1", 1, "Euclidean on unit vectors, k = 1", ""),
            ("k validated", chosen, f"k = {chosen}, {of} {part}; {ties}", ""),
            ("best k on the test slices", best, f"k = {best}, {of} the test slices; {ties}", note),
        )
    ]
    features = min(32, train.shape[1])
    forest = RandomForestClassifier(n_estimators=TREES, max_features=features, random_state=seed)
    # Between unit vectors ((1 + cos) / 2)^3; the paper's degree of 256 would be degenerate.
    polynomial = SVC(kernel="poly", degree=3, C=1.0, gamma=0.5, coef0=0.5)
    models = {
        "SVM Gaussian": (SVC(kernel="rbf", C=1.0, gamma="scale"), "C = 1, gamma 1 / (d variance)"),
        "SVM polynomial": (polynomial, "((1 + cos) / 2)^3, C = 1"),
        "random forest": (forest, f"{TREES} trees, max_features {features}, seed {seed}"),
    }
    for name, (model, text) in models.items():
        predicted = model.fit(train, train_labels).predict(test)
        results.append(Classification(name, text, predicted))
    return results


def nearest_labels(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the labels (n, k) of the nearest training slices, the nearest first; k is up to 30."""
    return labels[nearest_rows(train, test, LARGEST_K)]


def nearest_rows(train: np.ndarray, test: np.ndarray, count: int) -> np.ndarray:
    """Return the rows (n, k) of the nearest training slices, the nearest first, at most `count`."""
    near = cosines(torch.from_numpy(test), torch.from_numpy(train))
    return near.argsort(dim=1, descending=True, stable=True)[:, :count].numpy()


def vote(neighbours: np.ndarray, k: int) -> np.ndarray:
    """Return the majority (n,) of the first k labels; of tied classes the one met first."""
    nearest = neighbours[:, :k]
    counts = (nearest[:, :, None] == nearest[:, None, :]).sum(2)  # of each neighbour's class
    return nearest[np.arange(len(nearest)), counts.argmax(1)]


def _best_k(neighbours: np.ndarray, truth: np.ndarray) -> int:
    """Return the k that gives the most right answers; the smallest of several."""
    ks = range(1, neighbours.shape[1] + 1)
    return max(ks, key=lambda k: np.count_nonzero(vote(neighbours, k) == truth))


def _validated_k(
    train: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, seed: int
) -> int:
    """Return the k that is best on a fifth of the training side."""
    method = StratifiedShuffleSplit if groups is None else GroupShuffleSplit
    parts = method(1, test_size=VALIDATION, random_state=seed).split(train, labels, groups)
    try:
        fitted, held = next(parts)
    except ValueError as error:
        raise UserError(f"training slices: too few to choose k on: {error}") from None
    neighbours = nearest_labels(train[fitted], labels[fitted], train[held])
    return _best_k(neighbours, labels[held])
