"""The sections of the report that answer the paper's: its tables and figures, and its faults."""

import numpy as np

from ..evaluation.metrics import seed_interval, wilson_interval
from ..reproduction.plan import PAPER_LOSSES, PROPOSED, SWAPPED
from ..reproduction.results import Result
from ..reproduction.running import SAMPLES
from ..training.run_folder import (
    ANGLES,
    EMBEDDINGS,
    EPOCHS,
    SPLIT,
    read_rows,
)
from . import paper, tables
from .document import (
    Block,
    Items,
    Paragraph,
)
from .further_figures import (
    Angles,
    plot_angles,
)
from .paper_figures import (
    Embedded,
    Score,
    compute_tsne,
    plot_confusions,
    plot_losses,
    plot_samples,
    plot_scores,
    plot_tsne,
)
from .pipeline_figure import plot_pipeline
from .reporting import Report, classifications

TSNE = "tsne.npy"


def samples_and_pipeline(report: Report) -> list[Block]:
    """Figures 1 and 2."""
    blocks: list[Block] = [report.heading("The task and the method")]
    path = report.folder / SAMPLES
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            pictures = {tuple(key.split()): stored[key] for key in stored.files}
        plot_samples(
            report.figure_path("figure1"), pictures, f"{report.mark}slices by class and plane"
        )
        text = "Figure 1: a slice of each class in each plane."
        blocks.append(report.figure("figure1", text))
    proposed = report.first(PROPOSED)
    if proposed:
        settings = proposed.run.settings
        plot_pipeline(
            report.figure_path("figure2"),
            f"{report.mark}HSADML, as it was run",
            image_size=settings.data.image_size,
            pretrained=bool(settings.network.weights),
            margin=settings.loss.margin,
            scale=settings.loss.scale,
        )
        blocks.append(report.figure("figure2", "Figure 2: training above, testing below."))
    return blocks


def golden(report: Report) -> list[Block]:
    """Whether our metrics count as the paper does."""
    if report.reproduction.synthetic:
        return []
    return [
        report.heading("Validation of the metrics"),
        Paragraph(
            "The cells of the paper's tables determine its confusion matrices: a search finds "
            "exactly one for each row, except for misprints. (Twelve fit that of 30-70, with equal "
            "values in every cell.) With these counts the metrics used below reproduce the paper's "
            "rows; the last column explains the exceptions."
        ),
        tables.golden_table(paper.golden_check()),
    ]


def paper_tables(report: Report) -> list[Block]:
    """Tables 1 and 3 to 6."""
    reproduction = report.reproduction
    caption = (
        "Accuracy per class is recall. Means over the seeds, cut off after the last digit like the "
        "paper's. The interval over seeds (t, cut at 100) takes their splits, which share slices, "
        "for independent."
    )
    return [
        report.heading("By slice: tables 1 and 3 to 6"),
        Paragraph(
            "In this split, as in the paper, slices of one patient are in both training and test "
            "set: it measures accuracy on new slices of the same patients."
        ),
        report.heading("Table 1: 70-30 and 30-70", 3),
        tables.paper_table(reproduction, (PROPOSED, SWAPPED), paper.BY_TRAINING, caption),
        report.heading("Table 3: losses", 3),
        tables.paper_table(reproduction, tables.LOSSES, paper.BY_TRAINING, ""),
        report.heading("Table 4: AUC by loss", 3),
        tables.auc_table(reproduction, tables.LOSSES),
        report.heading("Table 5: margins", 3),
        tables.paper_table(reproduction, tables.MARGINS, paper.BY_TRAINING, ""),
        report.heading("Table 6: AUC by margin", 3),
        tables.auc_table(reproduction, tables.MARGINS),
        report.heading("Significance of the differences", 3),
        tables.mcnemar_table(reproduction),
    ]


def classifiers(report: Report) -> list[Block]:
    """Table 2."""
    results = report.with_embeddings("slice")
    if not results:
        return []
    every = [classifications(report, result) for result in results]
    settings = [
        f"{one.name}: {one.settings}{'. ' + one.note if one.note else ''}" for one in every[0]
    ]
    return [
        report.heading("Table 2: classifiers on the embeddings"),
        tables.classifier_table(results, every, report.reproduction.synthetic),
        Paragraph("Settings (of seed 0 where they are chosen from the data):"),
        Items(settings),
    ]


def curves(report: Report) -> list[Block]:
    """Figures 3 and 4."""
    trainings = [name for name in [*PAPER_LOSSES, SWAPPED] if report.first(name)]
    if not trainings:
        return []
    losses = {
        tables.TITLES[name]: [row["loss"] for row in read_rows(report.first(name).folder / EPOCHS)]
        for name in trainings
    }
    confusions = {
        tables.TITLES[name]: np.array(report.first(name).metrics.confusion) for name in trainings
    }
    plot_losses(report.figure_path("figure3"), losses, f"{report.mark}training loss, seed 0")
    plot_confusions(
        report.figure_path("figure4"),
        confusions,
        f"{report.mark}test slices by slice, seed 0, 1-NN",
    )
    return [
        report.heading("Loss curves and confusion matrices"),
        report.figure("figure3", "Figure 3: the training loss of each epoch, seed 0."),
        report.figure("figure4", "Figure 4: confusion matrices by slice, seed 0."),
    ]


def embeddings(report: Report) -> list[Block]:
    """Figures 5 and 6, and the embeddings by angle."""
    blocks: list[Block] = [report.heading("Embeddings")]
    for name, trainings, text in (
        ("figure5", tables.LOSSES, "Figure 5: t-SNE of the test slices by loss, seed 0."),
        ("figure6", tables.MARGINS, "Figure 6: t-SNE of the test slices by margin, seed 0."),
    ):
        firsts = {one: report.first(one) for one in trainings}
        present = {one: run for one, run in firsts.items() if run and run.has_embeddings}
        if present:
            panels = {tables.TITLES[one]: _embedded(report, run) for one, run in present.items()}
            plot_tsne(report.figure_path(name), panels, f"{report.mark}t-SNE, test slices")
            note = " Errors of 1-NN are ringed. Distances in t-SNE are not to be read as angles."
            blocks.append(report.figure(name, text + note))
    proposed = report.first(PROPOSED)
    if proposed and proposed.has_embeddings:
        train, test = report.slices.sides(proposed.folder / SPLIT)
        margin = proposed.run.settings.loss.margin
        plot_angles(
            report.figure_path("angles"),
            _angles(report, proposed, test),
            f"{report.mark}angles to the class centres, {tables.TITLES[PROPOSED]}, seed 0",
            train=_angles(report, proposed, train),
            boundary=lambda theta: margin * theta,
        )
        text = (
            "Angles between embeddings and class centres, by class: to the own centre and to the "
            "nearest other. Test slices strong, training slices faint, errors of 1-NN crossed."
        )
        blocks.append(report.figure("angles", text))
    return blocks


def _embedded(report: Report, result: Result) -> Embedded:
    _, test = report.slices.sides(result.folder / SPLIT)
    path = result.folder / TSNE
    if path.is_file() and path.stat().st_mtime >= (result.folder / EMBEDDINGS).stat().st_mtime:
        points = np.load(path, allow_pickle=False)
    else:
        embeddings = result.embeddings()[test]
        points = compute_tsne(embeddings, seed=0)
        np.save(path, points, allow_pickle=False)
    predictions = result.predictions
    return Embedded(points, predictions.truth, predictions.predicted != predictions.truth)


def _angles(report: Report, result: Result, indices: np.ndarray) -> Angles:
    angles = np.load(result.folder / ANGLES, allow_pickle=False)[indices]
    labels, rows = report.slices.labels[indices], np.arange(len(indices))
    others = angles.copy()
    others[rows, labels] = np.inf
    wrong = dict(
        zip(
            result.predictions.numbers,
            result.predictions.predicted != result.predictions.truth,
            strict=True,
        )
    )
    return Angles(
        target=angles[rows, labels],
        other=others.min(1),
        labels=labels,
        wrong=np.array([wrong.get(number, False) for number in report.slices.numbers[indices]]),
    )


def bars(report: Report) -> list[Block]:
    """Figure 7."""
    if report.reproduction.synthetic:
        return []
    scores = []
    for group, name in (("slice", "by slice, 70-30"), ("patient", "by patient, five folds")):
        results = report.reproduction.select(group, PROPOSED)
        if results:
            mean, interval = seed_interval([one.metrics.accuracy for one in results])
            shown = None if np.isnan(interval[0]) else tables.possible(interval)
            scores.append(Score(f"ours, {name}", mean, shown))
    counts = np.array(paper.CONFUSIONS[PROPOSED])
    own = wilson_interval(counts.trace(), counts.sum())
    scores.append(Score("HSADML, by slice, 70-30", paper.ACCURACY, own, "the paper"))
    for cited in paper.CITED:
        label = f"{cited.name}, {cited.protocol}"
        scores.append(Score(label, cited.accuracy, None, "cited", cited.verified))
    plot_scores(
        report.figure_path("figure7"), scores, "accuracies on this data set: ours, and as published"
    )
    return [
        report.heading("Figure 7: other methods"),
        report.figure(
            "figure7",
            "Figure 7: our accuracies, and others as their authors give them; a hollow mark is a "
            "number from memory. Protocols differ (by slice, by patient, folds), so this is no "
            "ranking. Intervals: ours over seeds or folds (t), the paper's Wilson.",
        ),
        Items(
            [
                f"{one.name}: {100 * one.accuracy:.2f} %, {one.protocol}; {one.source}"
                for one in paper.CITED
            ]
        ),
    ]


def deviations(report: Report) -> list[Block]:
    """What was done otherwise, and where the paper contradicts itself."""
    blocks: list[Block] = [report.heading("Deviations from the paper"), Items(paper.DEVIATIONS)]
    if report.reproduction.synthetic:
        return blocks
    return [
        *blocks,
        report.heading("Contradictions in the paper, and their interpretation"),
        Items(paper.CONTRADICTIONS),
    ]
