"""The tables of a reproduction's report: the paper's, and those that it did not print."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..evaluation.classifiers import Classification
from ..evaluation.evaluate import probabilities
from ..evaluation.metrics import (
    COLUMNS,
    Metrics,
    majority_vote,
    mcnemar,
    measure,
    metrics_row,
    patient_bootstrap,
    ratio_text,
    score_auc,
    seed_interval,
    wilson_interval,
)
from ..reproduction.plan import BEYOND, PAPER_LOSSES, PROPOSED, SWAPPED, TITLES
from ..reproduction.results import Reproduction, Result, pooled
from . import paper
from .page import Table, percent

TRAININGS = (*PAPER_LOSSES, SWAPPED)
SPLITS = (PROPOSED, SWAPPED)  # table 1
LOSSES = ("softmax", "modified-softmax", "triplet", PROPOSED)  # tables 3 and 4
MARGINS = ("sphereface-m4", "sphereface-m6", PROPOSED)  # tables 5 and 6
INTERVALS = ("seeds", "95 % over seeds", "Wilson 95 %, seed 0")
SHORT = ("Me", "Gl", "Pt")
VIEWS = {
    1: "the slice alone",
    2: "mirror images averaged",
    3: "mirrored and upside down averaged",
}


def p_text(p: float) -> str:
    """Return a probability with three digits; what is smaller than they show is called so."""
    return f"{p:.3f}".removeprefix("0") if p >= 0.001 else "<.001"


def paper_table(reproduction: Reproduction, trainings: Sequence[str]) -> Table:
    """Return table 1, 3 or 5: per training our row, and beneath it the paper's."""
    rows: list[Sequence[object]] = []
    for training in trainings:
        results, first = reproduction.select("slice", training), reproduction.first(training)
        if results:
            own = first and first.predictions
            drawn = own and patient_bootstrap(own.right, own.patients)
            means = _over_seeds(results, [one.metrics for one in results])
            rows.append([TITLES[training], *means, drawn])
        else:
            rows.append([TITLES[training], *[None] * len(COLUMNS), 0])
        if not reproduction.synthetic:
            rows.append(["the paper", *paper.BY_TRAINING[training], 1])
    return Table(["", *COLUMNS, *INTERVALS, "bootstrap of patients, seed 0"], rows)


def _over_seeds(results: Sequence[Result], every: Sequence[Metrics]) -> list[object]:
    """Return means in the paper's columns, and what stands under `INTERVALS`.

    `every` has the metrics of each of the results.
    """
    _, interval = seed_interval([one.accuracy for one in every])
    seeds = [one.run.settings.training.seed for one in results]
    wilson = every[seeds.index(0)].accuracy_interval if 0 in seeds else None
    means = {name: np.mean([vars(one)[name] for one in every], axis=0) for name in vars(every[0])}
    return [*metrics_row(means), len(every), interval, wilson]


def auc_table(reproduction: Reproduction, trainings: Sequence[str]) -> Table:
    """Return table 4 or 6: the paper's AUC of hard labels, and a true one of scores."""
    rows: list[Sequence[object]] = []
    for training in trainings:
        results = reproduction.select("slice", training)
        cells: list[str | None] = [None] * 8
        if results:
            labels = np.mean([one.metrics.label_auc for one in results], axis=0)
            scores = np.mean([_score_auc(one) for one in results], axis=0)
            cells = [ratio_text(one) for one in (*labels, labels.mean(), *scores, scores.mean())]
        rows.append([TITLES[training], *cells, len(results)])
        if not reproduction.synthetic:
            rows.append(["the paper", *paper.AUCS[training], *[None] * 4, 1])
    columns = [f"{kind} {name}" for kind in ("hard", "score") for name in (*SHORT, "mean")]
    return Table(["", *columns, "seeds"], rows)


def _score_auc(result: Result) -> np.ndarray:
    sure = probabilities(result.predictions.scores, result.run.settings.loss.scale)
    return score_auc(result.predictions.truth, sure)


def mcnemar_table(reproduction: Reproduction) -> Table:
    """Return, for each other loss and each seed, the slices that only one of the two got right."""
    rows = []
    proposed = {
        one.run.settings.training.seed: one for one in reproduction.select("slice", PROPOSED)
    }
    for training in [one for one in PAPER_LOSSES if one != PROPOSED]:
        for other in reproduction.select("slice", training):
            seed = other.run.settings.training.seed
            if seed in proposed:
                *only, p = mcnemar(proposed[seed].predictions.right, other.predictions.right)
                rows.append([TITLES[training], seed, *only, p_text(p)])
    return Table(["against", "seed", "only m = 5 right", "only the other right", "p"], rows)


def classifier_table(
    results: Sequence[Result], every: Sequence[Sequence[Classification]], synthetic: bool
) -> Table:
    """Return table 2: classifiers on the proposed training's embeddings, means over its seeds.

    `every` has for each of the results the answers of the classifiers.
    """
    truths = [one.predictions.truth for one in results]
    rows: list[Sequence[object]] = []
    for same in zip(*every, strict=True):
        name = same[0].name
        metrics = [measure(truth, one.predicted) for truth, one in zip(truths, same, strict=True)]
        rows.append([name, *_over_seeds(results, metrics)])
        if name in paper.CLASSIFIERS and not synthetic:
            rows.append(["the paper", *paper.CLASSIFIERS[name], 1])
    return Table(["", *COLUMNS, *INTERVALS], rows)


def patient_table(reproduction: Reproduction) -> Table:
    """Return the seven trainings by slice and by patient, side by side."""
    rows = []
    for training in TRAININGS:
        by_slice = reproduction.select("slice", training)
        folds = reproduction.select("patient", training)
        if not by_slice or not folds:
            continue
        mean, interval = seed_interval([fold.metrics.accuracy for fold in folds])
        together = pooled(fold.predictions for fold in folds)
        both = [fold.by_views(2) for fold in folds]
        mirrored = None if None in both else np.mean([one.right.mean() for one in both])
        hits, patients = votes(folds)
        rows.append(
            {
                "": TITLES[training],
                "by slice": np.mean([one.metrics.accuracy for one in by_slice]),
                "seeds": len(by_slice),
                "by patient: mean of the folds": mean,
                "folds": len(folds),
                "95 % over folds": interval,
                "all folds together": together.right.mean(),
                "bootstrap of patients": patient_bootstrap(together.right, together.patients),
                "with mirror images": mirrored,
                "patients right by vote": f"{percent(hits / patients)} ({hits} of {patients})",
                "Wilson 95 %": wilson_interval(hits, patients),
            }
        )
    return Table.of(rows)


def votes(folds: Sequence[Result]) -> tuple[int, int]:
    """Return how many patients the majority of their slices gets right, and how many there are."""
    every = [fold.predictions for fold in folds]
    votes = [majority_vote(one.patients, one.predicted, one.scores, one.truth) for one in every]
    truth, answers = map(np.concatenate, zip(*votes, strict=True))
    return int((truth == answers).sum()), len(truth)


def fold_table(reproduction: Reproduction) -> Table:
    """Return the seven trainings fold by fold, in the paper's columns where folds are pooled."""
    rows = []
    for training in TRAININGS:
        folds = reproduction.select("patient", training)
        if folds:
            metrics = pooled(fold.predictions for fold in folds).metrics
            each = " ".join(percent(fold.metrics.accuracy) for fold in folds)
            rows.append([TITLES[training], *metrics_row(vars(metrics)), each])
    return Table(["", *COLUMNS, "accuracy, fold by fold"], rows)


def beyond_table(reproduction: Reproduction) -> Table:
    """Return the losses beyond the paper, a row each, beside the proposed training."""
    rows = []
    for training in (PROPOSED, *BEYOND):
        prefix = "" if training == PROPOSED else "beyond-"
        # The proposed training has more seeds and folds: only what the others have is compared.
        first = reproduction.first(training, f"{prefix}slice")
        by_slice = [first] if first else []
        folds = _tried(reproduction, f"{prefix}patient", training)
        if by_slice or folds:
            rows.append([TITLES[training], *accuracy(by_slice), *accuracy(folds)])
    return Table(["", "by slice, seed 0", "Wilson 95 %", "by patient", "Wilson 95 %"], rows)


def _tried(reproduction: Reproduction, group: str, training: str) -> list[Result]:
    """Return the runs on the folds on which what goes beyond the paper is tried, once all are.

    What is compared has the same test slices then.
    """
    tried = range(1, reproduction.budget.folds + 1)
    runs = {one.run.settings.data.fold: one for one in reproduction.select(group, training)}
    return [runs[fold] for fold in tried] if runs.keys() >= {*tried} else []


def variant_table(reproduction: Reproduction) -> Table:
    """Return what was trained otherwise for unknown patients, beside the proposed training."""
    variants = [one.run.training for one in reproduction.results if one.run.group == "variant"]
    runs = {"as proposed": _tried(reproduction, "patient", PROPOSED)}
    if runs["as proposed"]:
        runs |= {name: _tried(reproduction, "variant", name) for name in variants}
    rights = {
        name: pooled(one.predictions for one in results).right
        for name, results in runs.items()
        if results
    }
    return _compared("trained", rights)


def answer_table(
    results: Sequence[Result],
    every: Sequence[Sequence[Classification]],
    together: Mapping[str, np.ndarray],
) -> Table:
    """Return what other answers from networks of disjoint test sides are worth.

    `every` has for each of the results the answers of the classifiers, `together` for each way to
    join several networks which of all test slices it gets right.
    """
    proposed = pooled(one.predictions for one in results)
    rights = {"k-NN, k = 1, as proposed": proposed.right}
    for views, text in VIEWS.items():
        answers = [one.by_views(views) for one in results]
        own = all(one.run.settings.evaluation.views == views for one in results)
        if not own and None not in answers:
            rights[f"k-NN, k = 1, {text}"] = pooled(answers).right
    for same in list(zip(*every, strict=True))[1:]:
        predicted = np.concatenate([one.predicted for one in same])
        rights[same[0].name] = predicted == proposed.truth
    return _compared("answered", {**rights, **together})


def _compared(title: str, rights: Mapping[str, np.ndarray]) -> Table:
    """Return which answers (n,) are right, in a row for each name; the first is the reference."""
    rows: list[Sequence[object]] = []
    for name, right in rights.items():
        first = next(iter(rights.values()))
        rows.append([name, *share(right), p_text(mcnemar(right, first).p) if rows else None])
    return Table([title, "accuracy", "Wilson 95 %", "McNemar's p against the proposed"], rows)


def accuracy(results: Sequence[Result]) -> list[object]:
    """Return the accuracy of runs with disjoint test sides, and its interval; None of no runs."""
    return share(pooled(one.predictions for one in results).right) if results else [None, None]


def share(own: np.ndarray) -> list[object]:
    """Return the share of what is true, and its interval."""
    return [own.mean(), wilson_interval(int(own.sum()), len(own))]


def golden_table(rows: Sequence[paper.Golden]) -> Table:
    """Return what the paper printed beside what our metrics make of its counts."""
    cells = []
    for name, printed, ours, why in rows:
        training = name.removesuffix(", AUC")
        pairs = zip(printed, ours, strict=True)
        differ = "; ".join(f"{one} / {other}" for one, other in pairs if one != other)
        title = name.replace(training, TITLES.get(training, training), 1)
        cells.append([title, " ".join(printed), " ".join(ours), differ or "alike", why])
    header = ("printed by the paper", "our metrics of its counts", "printed / ours", "why")
    return Table(["", *header], cells)
