"""How sure an answer is, and whether a picture is like any that the network was trained on.

Both are fitted on slices held out of the training side: those trained on are memorised. Where none
were, answers are not calibrated, and the limit of what is unlike is cross-fitted.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import GroupKFold

from ..errors import UserError
from ..files import check_sum, replacing

# Added to every distance, for two slices may be equal. On validation slices every value up to this
# gives the same likelihood, and larger ones a smaller.
FLOOR = 1e-4
FALSE_ALARMS = 0.05  # share of the held-out slices that count as unlike those trained on
PARTS = 5  # of the training side, each held out in turn for its distances alone
# Of MobileNet's blocks, after which the features tell strange pictures: chosen on held-out slices.
# The last features of a network keep what tells its classes apart, and little else: trained on
# phantoms alone they are much the same for noise.
BLOCKS = 5
FEATURES = "float32"  # what they are computed in; older versions kept those of the run's precision


@dataclasses.dataclass(frozen=True)
class Familiarity:
    """The early features of the training slices as a normal distribution.

    They are MobileNet's after `BLOCKS` blocks, averaged over the slice and L2-normalised; the
    covariance is shrunk as Ledoit and Wolf do. The distance of a picture is the squared Mahalanobis
    distance of its features.

    Sources: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks", NeurIPS 2018, arXiv:1807.03888, who use early features too, but a mean of
    each class: these know little of classes; normalised as in Mueller and Hein, "Mahalanobis++",
    ICML 2025, arXiv:2505.18032.
    """

    mean: np.ndarray  # (d,)
    precision: np.ndarray  # (d, d) the inverse of the covariance

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Return the distance (n,) of features (n, d)."""
        offsets = features - self.mean
        return np.einsum("nd,de,ne->n", offsets, self.precision, offsets, optimize=True)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What turns the cosines of a run into probabilities, and tells strange pictures."""

    exponent: float | None  # see `fit_exponent`; None where no slices were held out
    familiarity: Familiarity
    limit: float  # a picture of a larger distance is unlike those trained on
    epoch: int  # how many the network was trained for that it belongs to

    def unlike(self, features: np.ndarray) -> np.ndarray:
        """Return whether pictures (n,) of features (n, d) are unlike those trained on."""
        return self.familiarity.distances(features) > self.limit

    def write(self, path: Path) -> None:
        """Keep it in a file."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            own = {"exponent": self.exponent, "limit": self.limit, "epoch": self.epoch}
            np.savez(file, features=FEATURES, **own, **vars(self.familiarity))


def fit_familiarity(features: np.ndarray) -> Familiarity:
    """Fit the distribution to features (n, d), L2-normalised."""
    fitted = LedoitWolf().fit(features.astype(np.float64))
    return Familiarity(fitted.location_, fitted.get_precision())


def fit_limit(distances: np.ndarray) -> float:
    """Return the distance that so many of held-out slices' distances (n,) exceed."""
    return float(np.quantile(distances, 1 - FALSE_ALARMS))


def cross_fit(features: np.ndarray, patients: Sequence[str], epoch: int) -> Calibration:
    """Return what tells strange pictures, from features (n, d) of the training slices alone.

    The slices that a distribution is fitted to are too near to it. So each fifth of the patients is
    held out in turn, and the limit is that of the distances of all slices, each from a distribution
    fitted to other patients. If there is one patient, slices take the patients' place.
    """
    groups = np.unique(patients, return_inverse=True)[1]
    if not groups.any():
        groups = np.arange(len(features))
    distances = np.empty(len(features))
    parts = GroupKFold(min(PARTS, groups.max() + 1))
    for kept, held in parts.split(features, groups=groups):
        distances[held] = fit_familiarity(features[kept]).distances(features[held])
    return Calibration(None, fit_familiarity(features), fit_limit(distances), epoch)


def fit_exponent(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the exponent that is likeliest, from cosines (n, C) and truth (n,) of unseen slices.

    The probability of a class is proportional to (1 - cosine + `FLOOR`)^-exponent, of the cosine to
    its nearest training slice. So the class of 1-NN stays the most probable, and a network that is
    trained longer, whose distances are all smaller by a factor, has the same probabilities; with a
    softmax of the cosines it would not.
    """

    def loss(logarithm: float) -> float:
        logs = _log_probabilities(scores, np.exp(logarithm))
        return -float(logs[np.arange(len(truth)), truth].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def calibrated(scores: np.ndarray, exponent: float) -> np.ndarray:
    """Return the probability (n, C) of each class from cosines (n, C), see `fit_exponent`."""
    return np.exp(_log_probabilities(scores, exponent))


def read_calibration(path: Path) -> Calibration | None:
    """Return what `Calibration.write` kept, or None without the file."""
    if not path.exists():
        return None
    check_sum(path)
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            mean, precision = file["mean"], file["precision"]
            exponent, limit, epoch = (file[name].item() for name in ("exponent", "limit", "epoch"))
            older = "features" not in file
        sound = precision.shape == mean.shape * 2 and mean.ndim == 1 and exponent > 0
        sound &= all(np.isfinite(one).all() for one in (mean, precision, exponent, limit))
    except Exception:  # a zip file checks its own sums, and damage to it shows in a dozen ways
        sound = False
    if not sound:
        raise UserError(f"{path}: not readable as a calibration; evaluate the run again")
    if older:
        raise UserError(
            f"{path}: of an older version, whose limit of what is unknown is not that of "
            f"{FEATURES} features; evaluate the run again"
        )
    return Calibration(exponent, Familiarity(mean, precision), limit, epoch)


def _log_probabilities(scores: np.ndarray, exponent: float) -> np.ndarray:
    return log_softmax(-exponent * np.log(1 - np.clip(scores, -1, 1) + FLOOR), axis=1)
