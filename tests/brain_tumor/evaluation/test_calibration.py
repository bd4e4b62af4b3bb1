"""Calibrated confidence and familiarity: against references, by property, and what is kept."""

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import GroupKFold

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation.calibration import (
    FLOOR,
    Calibration,
    calibrated,
    cross_fit,
    fit_exponent,
    fit_familiarity,
    read_calibration,
)
from examples.brain_tumor.evaluation.metrics import reliability


def made_answers(count, exponent, seed, shrunk=1.0):
    """Cosines (n, 3) and classes drawn with the probabilities that the exponent gives them."""
    random = np.random.default_rng(seed)
    distances = np.exp(random.normal(-4, 1.5, (count, 3)))
    shares = (distances + FLOOR) ** -exponent
    shares /= shares.sum(1, keepdims=True)
    truth = (random.random((count, 1)) > shares.cumsum(1)).sum(1)
    return 1 - shrunk * distances, truth, shares


def test_probabilities_are_powers_of_distances_and_keep_the_nearest_class():
    scores, _, shares = made_answers(500, 1.3, seed=0)
    np.testing.assert_allclose(calibrated(scores, 1.3), shares, rtol=1e-9)
    assert (calibrated(scores, 0.2).argmax(1) == scores.argmax(1)).all()
    equal = calibrated(np.array([[1.0, 1.0, -1.0], [1.0000001, 0.0, 0.0]]), 2.0)
    assert np.isfinite(equal).all()
    assert equal[0, 0] == equal[0, 1] == pytest.approx(0.5)


@pytest.mark.parametrize("exponent", [0.5, 1.5, 3.0])
def test_the_exponent_that_made_the_answers_is_found(exponent):
    scores, truth, _ = made_answers(20_000, exponent, seed=1)
    assert fit_exponent(scores, truth) == pytest.approx(exponent, rel=0.05)


def test_a_fit_on_some_slices_calibrates_others_and_networks_trained_longer():
    known, truth, _ = made_answers(2000, 1.5, seed=2)
    exponent = fit_exponent(known, truth)
    for shrunk in (1.0, 0.5):  # FLOOR alone does not shrink along
        scores, truth, _ = made_answers(5000, 1.5, seed=3, shrunk=shrunk)
        right = scores.argmax(1) == truth
        assert reliability(calibrated(scores, exponent).max(1), right).error < 0.02
        assert reliability(np.ones(len(truth)), right).error > 0.1


def made_features(count, seed):
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 8)) * np.linspace(0.1, 1, 8) + np.arange(8)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_distances_are_scipys():
    train, test = made_features(300, seed=0), made_features(20, seed=1)
    centred = train - train.mean(0)
    inverse = np.linalg.inv(LedoitWolf(assume_centered=True).fit(centred).covariance_)
    expected = [mahalanobis(one, train.mean(0), inverse) ** 2 for one in test]
    np.testing.assert_allclose(fit_familiarity(train).distances(test), expected, rtol=1e-6)


def made_patients(count, slices, seed):
    """Features of patients who differ more than the slices of one do, and the patients."""
    random = np.random.default_rng(seed)
    features = np.repeat(random.normal(size=(count, 30)), slices, axis=0)
    features += 0.2 * random.normal(size=features.shape)
    return features, [f"p{seed}-{patient}" for patient in range(count) for _ in range(slices)]


def test_a_cross_fitted_limit_holds_for_patients_never_seen():
    features, patients = made_patients(200, 5, seed=0)
    unseen, _ = made_patients(2000, 2, seed=99)
    fitted = cross_fit(features, patients, epoch=3)
    assert (fitted.exponent, fitted.epoch) == (None, 3)
    assert 0.03 < fitted.unlike(unseen).mean() < 0.08
    by_slice = cross_fit(features, [str(index) for index in range(1000)], epoch=3)
    assert by_slice.unlike(unseen).mean() > 0.12  # as is that of the slices fitted to
    np.testing.assert_array_equal(
        fitted.familiarity.distances(unseen), fit_familiarity(features).distances(unseen)
    )


@pytest.mark.parametrize("count", [1, 2, 5, 23])
def test_a_cross_fitted_limit_is_that_of_slices_left_out(count):
    features, _ = made_patients(46, 1, seed=0)
    patients = [f"p{index % count}" for index in range(46)]
    groups = np.array(patients) if count > 1 else np.arange(46)
    parts = GroupKFold(min(5, len(set(groups)))).split(features, groups=groups)
    distances = np.concatenate(
        [fit_familiarity(features[kept]).distances(features[left]) for kept, left in parts]
    )
    expected = np.quantile(distances, 0.95)
    assert cross_fit(features, patients, epoch=1).limit == pytest.approx(expected)


def test_what_is_kept_is_read_back_and_damage_refused(tmp_path):
    path = tmp_path / "calibration.npz"
    assert read_calibration(path) is None
    train = made_features(100, seed=0)
    kept = Calibration(1.5, fit_familiarity(train), 20.0, 24)
    kept.write(path)
    found = read_calibration(path)
    assert (found.exponent, found.limit, found.epoch) == (1.5, 20.0, 24)
    np.testing.assert_array_equal(found.unlike(train), kept.unlike(train))
    whole = path.read_bytes()
    place = whole.index(kept.familiarity.mean.tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for damaged in (whole[:-9], b"", flipped):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"calibration\.npz: not readable"):
            read_calibration(path)


def test_a_calibration_on_features_of_the_runs_precision_is_refused(tmp_path):
    path = tmp_path / "calibration.npz"
    Calibration(1.5, fit_familiarity(made_features(100, seed=0)), 20.0, 24).write(path)
    with np.load(path) as file:
        older = {name: file[name] for name in file.files if name != "features"}
    np.savez(path, **older)
    with pytest.raises(UserError, match=r"calibration\.npz: of an older version, .*; evaluate the"):
        read_calibration(path)


@pytest.mark.parametrize("change", [{"exponent": np.nan}, {"limit": np.inf}, {"exponent": -1.0}])
def test_senseless_values_are_refused(tmp_path, change):
    values = {"exponent": 1.5, "limit": 20.0, **change}
    familiarity = fit_familiarity(made_features(100, seed=0))
    Calibration(familiarity=familiarity, epoch=1, **values).write(tmp_path / "calibration.npz")
    with pytest.raises(UserError, match="not readable"):
        read_calibration(tmp_path / "calibration.npz")
