"""How sure a reproduction's runs are, each calibrated on what other runs of its kind held out."""

from dataclasses import dataclass

import numpy as np

from ..evaluation.calibration import calibrated, fit_exponent
from ..evaluation.evaluate import Predictions
from ..evaluation.metrics import reliability
from ..reproduction.plan import PROPOSED
from ..reproduction.results import Reproduction, Result, pooled


@dataclass(frozen=True)
class Calibrated:
    """A run's answers with calibrated confidence."""

    exponent: float  # see `fit_exponent`
    slices: int  # how many answers of other runs it was fitted on
    confidence: np.ndarray  # (n,) in [0, 1]
    error: float  # the expected calibration error


def calibrate(reproduction: Reproduction, result: Result) -> Calibrated | None:
    """Return a run's answers, calibrated on what others held out; None where no other did."""
    held = _held_out(reproduction, result)
    if not held:
        return None
    known = pooled(held)
    exponent = fit_exponent(known.scores, known.truth)
    confidence = calibrated(result.predictions.scores, exponent).max(1)
    error = reliability(confidence, result.predictions.right).error
    return Calibrated(exponent, len(known.truth), confidence, error)


def _held_out(reproduction: Reproduction, result: Result) -> list[Predictions]:
    """Return what other runs of a run's kind answered to slices that neither was tested on before.

    These are other seeds or folds, and the search's run of the same recipe: their test slices, but
    for the run's own, are slices of its training side that networks like its own have not seen.
    """
    group = result.run.group
    others = [
        *(one for one in reproduction.select(group, PROPOSED) if one is not result),
        *reproduction.select(f"search-{group}", "search-as-chosen"),
    ]
    parts = []
    for other in others:
        kept = ~np.isin(other.predictions.numbers, result.predictions.numbers)
        if kept.any():
            values = {name: value[kept] for name, value in vars(other.predictions).items()}
            parts.append(Predictions(**values))
    return parts
