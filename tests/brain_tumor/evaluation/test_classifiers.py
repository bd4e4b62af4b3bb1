"""Classifiers on embeddings: k-NN against scikit-learn's, honest choices, settings as said."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation import classifiers
from examples.brain_tumor.evaluation.classifiers import classify, nearest_labels, vote


def clouds(count, seed, spread=0.6):
    """Unit vectors around three directions, overlapping."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    points = np.eye(3, 8)[labels] + spread * generator.standard_normal((count, 8))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.fixture
def few_trees(monkeypatch):
    monkeypatch.setattr(classifiers, "TREES", 20)


@pytest.fixture(scope="module")
def every():
    train, train_labels = clouds(150, 0)
    test, test_labels = clouds(90, 1)
    found = classify(train, train_labels, test, test_labels, None, seed=0)
    return {one.name: one for one in found}, test_labels


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_votes_are_sklearns_where_nothing_is_tied(k):
    train, labels = clouds(60, 2)
    labels = labels % 2  # odd k and two classes: no ties
    test, _ = clouds(40, 3)
    model = KNeighborsClassifier(n_neighbors=k).fit(train, labels)
    assert vote(nearest_labels(train, labels, test), k).tolist() == model.predict(test).tolist()


def test_a_tie_goes_to_the_nearer_class():
    assert vote(np.array([[2, 0, 2, 0], [0, 1, 1, 0]]), 4).tolist() == [2, 0]
    neighbours = np.array([[2, 0, 0, 2, 1], [1, 2, 2, 1, 1]])
    assert vote(neighbours, 1).tolist() == [2, 1]
    assert vote(neighbours, 3).tolist() == [0, 2]
    assert vote(neighbours, 4).tolist() == [2, 1]
    assert vote(neighbours, 5).tolist() == [2, 1]


def test_table_2_has_its_classifiers_and_their_settings(every):
    found, truth = every
    assert list(found) == [
        "k-NN, k = 1",
        "k-NN, k validated",
        "k-NN, best k on the test slices",
        "SVM Gaussian",
        "SVM polynomial",
        "random forest",
    ]
    for one in found.values():
        assert one.predicted.shape == truth.shape
        assert (one.predicted == truth).mean() > 0.5
    assert "400 trees, max_features 8" in found["random forest"].settings  # as many as there are
    assert "cos) / 2)^3" in found["SVM polynomial"].settings


def test_the_papers_way_is_the_best_of_all_k_and_says_so(every):
    found, truth = every
    best = found["k-NN, best k on the test slices"]
    train, train_labels = clouds(150, 0)
    neighbours = nearest_labels(train, train_labels, clouds(90, 1)[0])
    accuracies = [(vote(neighbours, k) == truth).mean() for k in range(1, 31)]
    assert (best.predicted == truth).mean() == max(accuracies)
    assert max(accuracies) > accuracies[0]  # or the choice would show nothing
    assert "too good" in best.note
    assert "of 1 to 30" in best.settings


def test_models_are_set_as_they_say(few_trees):
    """On classes that overlap so far that other settings give other answers."""
    train, labels = clouds(150, 8, spread=1.0)
    test, truth = clouds(600, 9, spread=1.0)
    found = {one.name: one for one in classify(train, labels, test, truth, None, seed=2)}

    squares = ((test[:, None].astype(float) - train) ** 2).sum(2)
    own = ((train[:, None].astype(float) - train) ** 2).sum(2)
    gamma = 1 / (8 * train.astype(float).var())
    kernels = {
        "SVM Gaussian": lambda squared: np.exp(-gamma * squared),
        "SVM polynomial": lambda squared: (1 - squared / 4) ** 3,  # squared = 2 - 2 cos
    }
    for name, kernel in kernels.items():
        model = SVC(kernel="precomputed", C=1.0).fit(kernel(own), labels)
        assert (model.predict(kernel(squares)) == found[name].predicted).mean() > 0.995
    forest = RandomForestClassifier(20, max_features=8, random_state=2).fit(train, labels)
    assert found["random forest"].predicted.tolist() == forest.predict(test).tolist()

    validated = found["k-NN, k validated"]
    k = int(validated.settings.split()[2].rstrip(","))
    neighbours = nearest_labels(train, labels, test)
    assert validated.predicted.tolist() == vote(neighbours, k).tolist()
    assert "the best on a fifth of the slices" in validated.settings
    best = found["k-NN, best k on the test slices"]
    assert (validated.predicted != best.predicted).any()  # or the one could stand for the other


def test_the_validated_k_does_not_look_at_the_test_slices(few_trees):
    train, train_labels = clouds(150, 0)
    test, test_labels = clouds(90, 1)
    chosen = [
        next(
            one.settings
            for one in classify(train, train_labels, test, labels, None, seed=0)
            if one.name == "k-NN, k validated"
        )
        for labels in (test_labels, (test_labels + 1) % 3)
    ]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("patients", [None, np.repeat(np.arange(30), 5)])
def test_a_fifth_of_the_training_side_validates_k(monkeypatch, few_trees, patients):
    parts = []

    def record(train, labels, test):
        parts.append((train, labels, test))
        return nearest_labels(train, labels, test)

    monkeypatch.setattr(classifiers, "nearest_labels", record)
    train, labels = clouds(150, 3)
    classify(train, labels, train[:9], labels[:9], patients, seed=0)
    (whole, _, _), (fitted, fitted_labels, held) = parts
    assert [len(part) for part in (whole, fitted, held)] == [150, 120, 30]
    every = {row.tobytes() for row in train}
    assert {row.tobytes() for row in fitted} | {row.tobytes() for row in held} == every
    if patients is None:
        classes = np.bincount(fitted_labels) / np.bincount(labels)
        np.testing.assert_allclose(classes, 0.8, atol=0.02)


def test_whole_patients_validate_k_where_patients_do_not_mix(few_trees):
    """Copies of one slice a patient: k = 1 shines on slices, not on unknown patients."""
    points, labels = clouds(40, 4, spread=1.2)
    train, train_labels = np.repeat(points, 8, axis=0), np.repeat(labels, 8)
    patients = np.repeat(np.arange(40), 8)
    test, test_labels = clouds(30, 5)
    ks = {}
    for name, groups in (("slices", None), ("patients", patients)):
        found = classify(train, train_labels, test, test_labels, groups, seed=0)
        ks[name] = int(found[1].settings.split()[2].rstrip(","))
    assert ks["slices"] == 1
    assert ks["patients"] > 8


def test_few_training_slices(few_trees):
    train, labels = clouds(12, 6, spread=0.1)
    test, truth = clouds(9, 7, spread=0.1)
    found = classify(train, labels, test, truth, None, seed=0)
    assert (found[0].predicted == truth).all()
    assert "of 1 to 12" in found[2].settings


@pytest.mark.parametrize(
    ("labels", "patients", "message"),
    [
        ([0] * 10, None, "all are of one class"),
        ([0] * 5 + [1] * 5 + [2], None, "too few to choose k"),  # a class of one slice
        ([0, 0, 1, 1, 2, 2], None, "too few to choose k"),
        ([0] * 5 + [1] * 5, [0] * 10, "too few to choose k"),  # one patient
    ],
)
def test_too_little_to_train_on_is_one_line(labels, patients, message):
    labels = np.array(labels)
    train = np.eye(3, dtype=np.float32)[labels]
    groups = None if patients is None else np.array(patients)
    with pytest.raises(UserError, match=f"training slices: {message}") as error:
        classify(train, labels, train, labels, groups, seed=0)
    assert "\n" not in str(error.value)
