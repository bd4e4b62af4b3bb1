"""What the paper printed: its tables, what follows from them, and where it contradicts itself.

Verma and Singh, "HSADML: Hyper-Sphere Angular Deep Metric based Learning for Brain Tumor
Classification". Cells are kept as they were printed, in paper.toml.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..evaluation.metrics import compute_metrics, metrics_row, ratio_text
from ..settings import tomllib

ACCURACY = 0.9869  # the proposed training, 70-30: 908 of 920

_PAPER = tomllib.loads((Path(__file__).parent / "paper.toml").read_text(encoding="utf-8"))
BY_TRAINING, CLASSIFIERS, AUCS = (
    {name: row.split() for name, row in _PAPER[table].items()}
    for table in ("by_training", "classifiers", "aucs")
)
CONFUSIONS = {name: tuple(map(tuple, rows)) for name, rows in _PAPER["confusions"].items()}
EXPLANATIONS = _PAPER["explanations"]
DEVIATIONS, CONTRADICTIONS = _PAPER["deviations"], _PAPER["contradictions"]
CITED = _PAPER["cited"]


class Golden(NamedTuple):
    """A row of the paper's beside what our metrics make of its counts."""

    name: str  # the training or classifier, and whether the cells are AUCs
    printed: list[str]  # the paper's cells
    ours: list[str]  # of the counts
    explanation: str  # why they differ; empty where they do not


def golden_check() -> list[Golden]:
    """Return each row of the paper's six tables once, beside our metrics of its counts."""
    printed = {**BY_TRAINING, **CLASSIFIERS}
    rows = []
    for name, confusion in CONFUSIONS.items():
        metrics = compute_metrics(np.array(confusion))
        rows.append((name, printed[name], metrics_row(vars(metrics))))
        if name in AUCS:
            areas = [*metrics.label_auc, float(np.mean(metrics.label_auc))]
            rows.append((f"{name}, AUC", AUCS[name], [ratio_text(area) for area in areas]))
    return [Golden(*row, EXPLANATIONS.get(row[0], "")) for row in rows]
