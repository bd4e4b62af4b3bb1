"""The report of a reproduction, made from its folder alone: report.md and report.html."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..evaluation.classifiers import Classification, classify, nearest_labels
from ..files import read_json, write_json, write_text
from ..reproduction import plan
from ..reproduction.plan import PAPER_LOSSES, PROPOSED
from ..reproduction.results import FIGURES, SPEED, Reproduction, Result, read_reproduction
from ..training.run_folder import SPLIT
from . import drawing, paper, records, tables, wrong_slices
from .page import to_html, to_markdown

REPORT = "report.md"
PAGE = "report.html"
CLASSIFICATIONS = "classifications.json"
# Networks whose embeddings answer together, each on the split of the proposed training.
TOGETHER = {
    "together: m = 4, 5 and 6": (PROPOSED, "sphereface-m4", "sphereface-m6"),
    "together: the paper's six losses": tuple(PAPER_LOSSES),
}


def write_reproduction_report(folder: Path) -> Path:
    """Draw all figures and write the report of what is finished; return the HTML page's path."""
    reproduction = read_reproduction(folder)
    (folder / FIGURES).mkdir(exist_ok=True)
    text = report_text(reproduction)
    write_text(folder / REPORT, text)
    page = to_html(f"{reproduction.mark}HSADML reproduction report", text, folder)
    write_text(folder / PAGE, page)
    return folder / PAGE


def report_text(reproduction: Reproduction) -> str:
    """Draw all figures and return the report's Markdown."""
    speed = reproduction.folder / SPEED
    return to_markdown(
        "reproduction.md.j2",
        r=reproduction,
        speed=read_json(speed) if speed.is_file() else None,
        classified=classified,
        together=together,
        draw=drawing,
        tables=tables,
        records=records,
        paper=paper,
        plan=plan,
        wrong=wrong_slices,
    )


def classified(reproduction: Reproduction, results: Sequence[Result]) -> list[list[Classification]]:
    """Return for each run the classifiers' answers, which its folder keeps from the last time."""
    return [_classify(reproduction, one) for one in results]


def _classify(reproduction: Reproduction, result: Result) -> list[Classification]:
    path = result.folder / CLASSIFICATIONS
    if result.keeps(CLASSIFICATIONS):
        return [
            Classification(**{**one, "predicted": np.array(one["predicted"])})
            for one in read_json(path)
        ]
    embeddings, slices = result.embeddings(), reproduction.slices
    train, test = slices.sides(result.folder / SPLIT)
    every = classify(
        *(embeddings[train], slices.labels[train]),
        *(embeddings[test], slices.labels[test]),
        groups=slices.patients[train] if result.run.settings.data.split == "patient" else None,
        seed=0,
    )
    write_json(path, [{**vars(one), "predicted": one.predicted.tolist()} for one in every])
    return every


def together(
    reproduction: Reproduction, group: str, results: Sequence[Result]
) -> dict[str, np.ndarray]:
    """Return which test slices several networks get right together, where all are there."""
    every = [one for one in reproduction.results if one.run.group == group and one.has_embeddings]
    runs, joined = {one.run.name: one for one in every}, {}
    for name, trainings in TOGETHER.items():
        # The partners on the same split: the name but for the training.
        partners = [
            [runs.get(one.run.name.replace(PROPOSED, training)) for training in trainings]
            for one in results
        ]
        if all(map(all, partners)):
            joined[name] = np.concatenate([_together(reproduction, own) for own in partners])
    return joined


def _together(reproduction: Reproduction, partners: Sequence[Result]) -> np.ndarray:
    embeddings = np.concatenate([one.embeddings() for one in partners], axis=1)
    train, test = reproduction.slices.sides(partners[0].folder / SPLIT)
    labels = reproduction.slices.labels
    predicted = nearest_labels(embeddings[train], labels[train], embeddings[test])[:, 0]
    return predicted == labels[test]
