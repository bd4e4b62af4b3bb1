"""The report of a reproduction, made from its folder alone: report.md and report.html."""

import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ..evaluation.classifiers import Classification, classify, nearest_labels
from ..reproduction import plan
from ..reproduction.plan import PAPER_LOSSES, PROPOSED
from ..reproduction.results import Result, read_reproduction, read_slice_table
from ..reproduction.running import SPEED
from ..settings import write_settings
from ..training.run_folder import (
    EMBEDDINGS,
    EPOCHS,
    SPLIT,
    read_json,
    read_rows,
    write_json,
    write_text,
)
from . import paper, records, tables, wrong_slices
from .page import to_html, to_markdown

REPORT = "report.md"
PAGE = "report.html"
FIGURES = "figures"
CLASSIFICATIONS = "classifications.json"
# Networks whose embeddings answer together, each on the split of the proposed training.
TOGETHER = {
    "together: m = 4, 5 and 6": (PROPOSED, "sphereface-m4", "sphereface-m6"),
    "together: the paper's six losses": tuple(PAPER_LOSSES),
}


def write_reproduction_report(folder: Path) -> Path:
    """Draw all figures and write the report of what is finished so far.

    Args:
        folder: A reproduction's folder.

    Returns:
        The HTML report's path; report.md lies beside it.

    Raises:
        UserError: The folder is no reproduction, or a file of it is damaged.
    """
    from . import drawing

    report = Report(folder)
    (folder / FIGURES).mkdir(exist_ok=True)
    reproduction = report.reproduction
    text = to_markdown(
        "reproduction.md.j2",
        report=report,
        r=reproduction,
        mark=report.mark,
        synthetic=reproduction.synthetic,
        proposed=report.proposed,
        budget=reproduction.budget,
        settings=reproduction.budget.settings(None),
        speed=read_json(folder / SPEED) if (folder / SPEED).is_file() else None,
        draw=drawing,
        tables=tables,
        records=records,
        paper=paper,
        plan=plan,
        wrong=wrong_slices,
    )
    write_text(folder / REPORT, text)
    write_text(folder / PAGE, to_html(f"{report.mark}HSADML, reproduced", text, folder))
    return folder / PAGE


class Report:
    """What figures and tables share: the folder's content and the mark of phantoms.

    Args:
        folder: The reproduction's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.reproduction = read_reproduction(folder)
        self.folder = folder
        self.mark = "SYNTHETIC: " if self.reproduction.synthetic else ""
        self.slices = read_slice_table(folder)
        self.proposed = self.first(PROPOSED)

    def drawn(self, name: str, title: str) -> tuple[Path, str]:
        """Return where a figure goes, and its title, which says if it is of phantoms."""
        return self.folder / FIGURES / f"{name}.png", f"{self.mark}{title}"

    def first(self, training: str, group: str = "slice") -> Result | None:
        """Return a training's first run, that of seed 0 or of fold 1, if it is finished."""
        return self.reproduction.first(training, group)

    def with_embeddings(self, group: str) -> list[Result]:
        """Return the proposed training's finished runs of a group whose embeddings are there."""
        return [one for one in self.reproduction.select(group, PROPOSED) if one.has_embeddings]

    @property
    def hours(self) -> float:
        """How long all trainings took."""
        logs = [read_rows(one.folder / EPOCHS) for one in self.reproduction.results]
        return sum(row["seconds"] for log in logs for row in log) / 3600

    @property
    def proposed_settings(self) -> str:
        """The proposed training's settings, but for where the weights lay: that is nobody's."""
        settings = self.proposed.run.settings
        name = Path(settings.network.weights).name
        network = dataclasses.replace(settings.network, weights=name)
        return write_settings(dataclasses.replace(settings, network=network)).strip()

    def classifications(self, results: Sequence[Result]) -> list[list[Classification]]:
        """Return for each run the answers of the classifiers."""
        return [classifications(self, one) for one in results]

    def together(self, group: str, results: Sequence[Result]) -> dict[str, np.ndarray]:
        """Return which test slices several networks get right together, where all are there."""
        joined = {}
        for name, trainings in TOGETHER.items():
            parts = [self._together(group, one, trainings) for one in results]
            if all(part is not None for part in parts):
                joined[name] = np.concatenate(parts)
        return joined

    @cached_property
    def _embedded(self) -> dict[Path, Result]:
        return {one.folder: one for one in self.reproduction.results if one.has_embeddings}

    def _together(self, group: str, result: Result, trainings: Sequence[str]) -> np.ndarray | None:
        # The partners on the same split: the name but for the training.
        names = [result.folder.name.replace(PROPOSED, one) for one in trainings]
        partners = [self._embedded.get(result.folder.with_name(name)) for name in names]
        if not all(one is not None and one.run.group == group for one in partners):
            return None
        embeddings = np.concatenate([one.embeddings() for one in partners], axis=1)
        train, test = self.slices.sides(result.folder / SPLIT)
        labels = self.slices.labels
        predicted = nearest_labels(embeddings[train], labels[train], embeddings[test])[:, 0]
        return predicted == labels[test]


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
