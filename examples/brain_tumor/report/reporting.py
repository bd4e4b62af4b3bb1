"""What the sections of a reproduction's report share."""

import json
from pathlib import Path

import numpy as np

from ..evaluation.classifiers import Classification, classify
from ..reproduction.plan import PROPOSED
from ..reproduction.results import Result, read_reproduction, read_slice_table
from ..training.run_folder import (
    EMBEDDINGS,
    SPLIT,
    read_json,
    write_json,
)
from .document import (
    Figure,
    Heading,
)

FIGURES = "figures"
CLASSIFICATIONS = "classifications.json"


class Report:
    """What the sections share: the folder's content, the mark of phantoms, where figures go.

    Args:
        folder: The reproduction's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.reproduction = read_reproduction(folder)
        self.folder = folder
        self.figures = folder / FIGURES
        self.mark = "SYNTHETIC: " if self.reproduction.synthetic else ""
        self.slices = read_slice_table(folder)

    def heading(self, text: str, level: int = 2) -> Heading:
        """Return a heading that says if the results are of phantoms."""
        return Heading(f"{self.mark}{text}", level)

    def figure(self, name: str, caption: str) -> Figure:
        """Return the block of a figure that was drawn into `figure_path`."""
        return Figure(self.figure_path(name), f"{self.mark}{caption}")

    def figure_path(self, name: str) -> Path:
        """Return where a figure goes."""
        return self.figures / f"{name}.png"

    def first(self, training: str, group: str = "slice") -> Result | None:
        """Return a training's first run, that of seed 0 or of fold 1, if it is finished."""
        return next(iter(self.reproduction.select(group, training)), None)

    def with_embeddings(self, group: str) -> list[Result]:
        """Return the proposed training's finished runs of a group whose embeddings are there."""
        return [one for one in self.reproduction.select(group, PROPOSED) if one.has_embeddings]


def classifications(report: Report, result: Result) -> list[Classification]:
    """Return the classifiers' answers, which the run's folder keeps from the last time."""
    path = result.folder / CLASSIFICATIONS
    if path.is_file() and path.stat().st_mtime >= (result.folder / EMBEDDINGS).stat().st_mtime:
        return [
            Classification(**{**one, "predicted": np.array(one["predicted"])})
            for one in read_json(path)
        ]
    embeddings = result.embeddings()
    train, test = report.slices.sides(result.folder / SPLIT)
    labels, by_patient = report.slices.labels, result.run.settings.data.split == "patient"
    every = classify(
        embeddings[train],
        labels[train],
        embeddings[test],
        labels[test],
        groups=report.slices.patients[train] if by_patient else None,
        seed=0,
    )
    stored = [{**vars(one), "predicted": one.predicted.tolist()} for one in every]
    write_json(path, json.loads(json.dumps(stored)))
    return every
