"""The report of a reproduction, made from its folder alone: report.md and report.html."""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from . import paper, tables
from .classifiers import Classification, classify
from .document import (
    Block,
    Code,
    Figure,
    Heading,
    Items,
    Paragraph,
    Table,
    to_html,
    to_markdown,
)
from .evaluation import probabilities
from .further_figures import (
    Angles,
    plot_angles,
    plot_budget,
    plot_errors,
    plot_reliability,
    plot_roc,
    plot_slice_and_patient,
)
from .metrics import reliability, seed_interval, wilson_interval
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
from .plan import PAPER_LOSSES, PROPOSED, SWAPPED
from .reproduction import DRILLS, SAMPLES, SESSIONS, SPEED
from .results import Result, metrics_of, pooled, read_reproduction, read_slice_table
from .run_folder import (
    ANGLES,
    EMBEDDINGS,
    EPOCHS,
    SPLIT,
    read_json,
    read_rows,
    write_json,
    write_text,
)
from .settings import write_settings

REPORT = "report.md"
PAGE = "report.html"
FIGURES = "figures"
CLASSIFICATIONS = "classifications.json"
TSNE = "tsne.npy"
AIM, SWAPPED_AIM, PATIENT_AIM = 0.9869, 0.9547, 0.96
NOT_A_DEVICE = (
    "Not a medical device: for research and teaching, never for diagnosis or any decision about a "
    "patient."
)


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


def write_reproduction_report(folder: Path) -> Path:
    """Draw all figures and write the report of what is finished so far.

    Args:
        folder: A reproduction's folder.

    Returns:
        The HTML report's path; report.md lies beside it.

    Raises:
        UserError: The folder is no reproduction, or a file of it is damaged.
    """
    report = Report(folder)
    report.figures.mkdir(exist_ok=True)
    sections = (
        _summary,
        _samples_and_pipeline,
        _golden,
        _tables,
        _classifiers,
        _curves,
        _embeddings,
        _scores,
        _patients,
        _beyond,
        _length,
        _bars,
        _speed,
        _faults,
        _deviations,
        _model_card,
        _what_was_run,
    )
    blocks = [block for section in sections for block in section(report)]
    write_text(folder / REPORT, to_markdown(blocks, folder))
    write_text(folder / PAGE, to_html(f"{report.mark}HSADML, reproduced", blocks))
    return folder / PAGE


def _summary(report: Report) -> list[Block]:
    reproduction, budget = report.reproduction, report.reproduction.budget
    total = len(reproduction.results) + len(reproduction.missing)
    blocks: list[Block] = [
        report.heading("HSADML, reproduced", 1),
        Paragraph(NOT_A_DEVICE, warning=True),
    ]
    if reproduction.synthetic:
        text = (
            "SYNTHETIC: the slices are phantoms drawn by a program, not patients. They test that "
            "the method runs and learns; they say nothing about real tumours, and the paper's "
            "numbers do not stand beside them."
        )
        blocks.append(Paragraph(text, warning=True))
    blocks.append(
        Paragraph(
            "HSADML (Verma and Singh) trains MobileNet v1 with SphereFace's angular margin to tell "
            "meningioma, glioma and pituitary tumour apart in slices of brain MRI, and gives a "
            "slice the class of its nearest neighbour. Here its trainings were run anew with the "
            f"budget `{budget.name}`: {budget.epochs} epochs at {budget.image_size} pixels where "
            f"the paper has 275 at 224. {len(reproduction.results)} of {total} runs are finished."
        )
    )
    if budget.name == "small":
        text = (
            "This is what about an hour of two CPU cores gives, a small part of the paper's "
            "training. It shows where the method stands after so little, not where it ends; the "
            "curve of accuracy against length below says how far that is."
        )
        blocks.append(Paragraph(text))
    if reproduction.missing:
        text = f"Not finished: {len(reproduction.missing)} runs: {', '.join(reproduction.missing)}."
        blocks.append(Paragraph(text, warning=True))
    return [*blocks, _aims(report)]


def _aims(report: Report) -> Table:
    rows = []
    for group, training, name, aim in (
        ("slice", PROPOSED, "by slice, 70-30, mean over the seeds", AIM),
        ("slice", SWAPPED, "by slice, 30-70, mean over the seeds", SWAPPED_AIM),
        (
            "patient",
            PROPOSED,
            "by patient, mean over the folds: what a clinic would see",
            PATIENT_AIM,
        ),
    ):
        accuracies = [one.metrics.accuracy for one in report.reproduction.select(group, training)]
        if accuracies:
            mean, interval = seed_interval(accuracies)
            each = " ".join(tables.percent(accuracy) for accuracy in accuracies)
            cells = [tables.percent(mean), tables.bounds(interval), each]
            if not report.reproduction.synthetic:
                cells += [tables.percent(aim), "reached" if mean >= aim else "missed"]
            rows.append([name, *cells])
    header = ["SphereFace, m = 5, 1-NN", "accuracy", "95 % (t)", "each"]
    aims = [] if report.reproduction.synthetic else ["aim", ""]
    caption = "Aims: the paper's figures by slice, and 96 % by patient." if aims else ""
    return Table([*header, *aims], rows, caption)


def _samples_and_pipeline(report: Report) -> list[Block]:
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
            margin=settings.loss.margin,
            scale=settings.loss.scale,
        )
        blocks.append(report.figure("figure2", "Figure 2: training above, testing below."))
    return blocks


def _golden(report: Report) -> list[Block]:
    if report.reproduction.synthetic:
        return []
    return [
        report.heading("Do our metrics count as the paper does?"),
        Paragraph(
            "Only one set of confusion matrices fits the paper's tables. Fed to the code that "
            "makes every number below, they must print the paper's rows."
        ),
        tables.golden_table(paper.golden_check()),
    ]


def _tables(report: Report) -> list[Block]:
    reproduction = report.reproduction
    caption = (
        "Accuracy per class is recall. Means over the seeds, cut off after the last digit like the "
        "paper's. The interval over seeds takes their splits, which share slices, for independent."
    )
    return [
        report.heading("By slice: tables 1 and 3 to 6"),
        Paragraph(
            "Slices of one patient stand on both sides of this split, as in the paper: it says how "
            "well slices of known patients are told apart."
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
        report.heading("Are the losses different?", 3),
        tables.mcnemar_table(reproduction),
    ]


def _classifiers(report: Report) -> list[Block]:
    results = report.reproduction.select("slice", PROPOSED)
    if not results:
        return []
    every = [_classifications(report, result) for result in results]
    settings = [
        f"{one.name}: {one.settings}{'. ' + one.note if one.note else ''}" for one in every[0]
    ]
    return [
        report.heading("Table 2: classifiers on the embeddings"),
        tables.classifier_table(report.reproduction, every),
        Paragraph("Settings (of seed 0 where they are chosen from the data):"),
        Items(settings),
    ]


def _classifications(report: Report, result: Result) -> list[Classification]:
    """Return the classifiers' answers, which the run's folder keeps from the last time."""
    path = result.folder / CLASSIFICATIONS
    if path.is_file() and path.stat().st_mtime >= (result.folder / EMBEDDINGS).stat().st_mtime:
        return [
            Classification(**{**one, "predicted": np.array(one["predicted"])})
            for one in read_json(path)
        ]
    embeddings = np.load(result.folder / EMBEDDINGS, allow_pickle=False)
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


def _curves(report: Report) -> list[Block]:
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


def _embeddings(report: Report) -> list[Block]:
    blocks: list[Block] = [report.heading("Embeddings")]
    for name, trainings, text in (
        ("figure5", tables.LOSSES, "Figure 5: t-SNE of the test slices by loss, seed 0."),
        ("figure6", tables.MARGINS, "Figure 6: t-SNE of the test slices by margin, seed 0."),
    ):
        present = {one: report.first(one) for one in trainings if report.first(one)}
        if present:
            panels = {tables.TITLES[one]: _embedded(report, run) for one, run in present.items()}
            plot_tsne(report.figure_path(name), panels, f"{report.mark}t-SNE, test slices")
            note = " Errors of 1-NN are ringed. Distances in t-SNE are not to be read as angles."
            blocks.append(report.figure(name, text + note))
    proposed = report.first(PROPOSED)
    if proposed:
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
        embeddings = np.load(result.folder / EMBEDDINGS, allow_pickle=False)[test]
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


def _scores(report: Report) -> list[Block]:
    proposed = report.first(PROPOSED)
    if not proposed:
        return []
    blocks: list[Block] = [report.heading("How sure is it?")]
    folds = report.reproduction.select("patient", PROPOSED)
    sides = {"by slice, seed 0": ("slice", proposed.predictions)}
    if folds:
        sides["by patient, all folds"] = ("patient", pooled(one.predictions for one in folds))
    scale = proposed.run.settings.loss.scale
    for name, (file, predictions) in sides.items():
        title = f"{report.mark}{tables.TITLES[PROPOSED]}, {name}"
        sure = probabilities(predictions.scores, scale)
        plot_roc(report.figure_path(f"roc-{file}"), predictions.truth, sure, title)
        blocks.append(report.figure(f"roc-{file}", f"ROC, each class against the rest, {name}."))
        bins = reliability(sure.max(1), tables.right(predictions))
        path = report.figure_path(f"reliability-{file}")
        plot_reliability(path, bins.confidence, bins.accuracy, bins.count, bins.error, title)
        text = (
            f"Reliability {name}: the confidence is softmax(s x cosine to the nearest training "
            f"slice of each class), s = {scale:g}, without any calibration; expected calibration "
            f"error {100 * bins.error:.1f} %."
        )
        blocks.append(report.figure(f"reliability-{file}", text))
    return blocks


def _patients(report: Report) -> list[Block]:
    reproduction = report.reproduction
    names = [name for name in PAPER_LOSSES if reproduction.select("patient", name)]
    if not names:
        return []
    blocks: list[Block] = [
        report.heading("By patient: what a clinic would see"),
        Paragraph(
            "The same seven trainings where no patient stands on both sides, by the data set "
            "author's five folds."
        ),
    ]
    if any(patient.startswith("fold") and "-run" in patient for patient in report.slices.patients):
        text = (
            "These slices carry stand-ins for the patient ids (runs of neighbouring slices of one "
            "class and fold): the folds are the author's, but what is called a patient in votes "
            "and bootstraps is such a run."
        )
        blocks.append(Paragraph(text))
    blocks += [tables.patient_table(reproduction), tables.fold_table(reproduction)]
    losses = {tables.TITLES[name]: _ways(report, name) for name in names}
    title = f"{report.mark}by slice and by patient, 1-NN"
    plot_slice_and_patient(report.figure_path("slice-and-patient"), losses, title)
    text = "By slice (Wilson, seed 0), by patient (bootstrap of patients), by vote (Wilson)."
    blocks.append(report.figure("slice-and-patient", text))
    proposed = report.first(PROPOSED)
    folds = reproduction.select("patient", PROPOSED)
    if proposed and folds:
        by_patient = pooled(one.predictions for one in folds)
        confusions = {
            "by slice, seed 0": np.array(proposed.metrics.confusion),
            "by patient, all folds": np.array(metrics_of(by_patient).confusion),
        }
        title = f"{report.mark}kinds of errors, {tables.TITLES[PROPOSED]}"
        plot_errors(report.figure_path("errors"), confusions, title)
        blocks.append(report.figure("errors", "Which errors there are, as shares of all errors."))
        blocks.append(_worst_patients(by_patient))
    return blocks


def _ways(report: Report, training: str) -> dict[str, tuple[float, float, float]]:
    ways = {}
    first = report.first(training)
    if first:
        ways["by slice"] = (first.metrics.accuracy, *first.metrics.accuracy_interval)
    folds = report.reproduction.select("patient", training)
    together = pooled(one.predictions for one in folds)
    accuracy = float(tables.right(together).mean())
    ways["by patient, slices"] = (accuracy, *tables.patient_interval(together))
    hits, total = tables.votes(folds)
    ways["by patient, votes"] = (hits / total, *wilson_interval(hits, total))
    return ways


def _worst_patients(predictions: Any) -> Paragraph:  # noqa: ANN401
    wrong = ~tables.right(predictions)
    patients, counts = np.unique(predictions.patients[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    most = int(np.ceil(0.1 * len(np.unique(predictions.patients))))
    share = counts[order][:most].sum() / max(wrong.sum(), 1)
    return Paragraph(
        f"Errors come in clusters: {wrong.sum()} wrong slices lie with {len(patients)} of "
        f"{len(np.unique(predictions.patients))} patients, and the worst tenth of all patients "
        f"has {100 * share:.0f} % of them. The intervals that draw patients anew allow for that; "
        "Wilson's do not."
    )


def _beyond(report: Report) -> list[Block]:
    folds = report.reproduction.select("patient", PROPOSED)
    every = [_classifications(report, fold) for fold in folds]
    return [
        report.heading("Beyond the paper: other losses, with and without annealing"),
        tables.beyond_table(report.reproduction),
        report.heading("What helps on unknown patients"),
        tables.variant_table(report.reproduction),
        *([tables.answer_table(folds, every)] if folds else []),
    ]


def _length(report: Report) -> list[Block]:
    reproduction = report.reproduction
    runs: dict[float, list[float]] = {}
    for one in [*reproduction.select("slice", PROPOSED), *reproduction.results]:
        if one.run.group == "length" or (one.run.group, one.run.training) == ("slice", PROPOSED):
            runs.setdefault(one.run.settings.training.epochs, []).append(one.metrics.accuracy)
    own = reproduction.budget.epochs
    runs[own] = [one.metrics.accuracy for one in reproduction.select("slice", PROPOSED)]
    runs = {epochs: values for epochs, values in sorted(runs.items()) if values}
    if own not in runs or reproduction.synthetic:
        return []
    title = "accuracy by slice against the length of training"
    plot_budget(report.figure_path("length"), runs, own, paper.ACCURACY, AIM, title)
    return [
        report.heading("Where this budget stands against its own limit"),
        report.figure(
            "length",
            "Accuracy by slice (70-30) against the epochs of training, otherwise the same; the "
            "budget's own length with all its seeds, the others with seed 0.",
        ),
        Table(
            ["epochs", "accuracy of each seed"],
            [
                [f"{epochs:g}", " ".join(map(tables.percent, values))]
                for epochs, values in runs.items()
            ],
        ),
    ]


def _bars(report: Report) -> list[Block]:
    if report.reproduction.synthetic:
        return []
    scores = []
    for group, name in (("slice", "by slice, 70-30"), ("patient", "by patient, five folds")):
        results = report.reproduction.select(group, PROPOSED)
        if results:
            mean, interval = seed_interval([one.metrics.accuracy for one in results])
            low, high = interval
            shown = None if np.isnan(low) else (max(low, 0.0), min(high, 1.0))
            scores.append(Score(f"ours, {name}", mean, shown))
    own = wilson_interval(908, 920)
    scores.append(Score("HSADML, by slice, 70-30", paper.ACCURACY, own, "the paper"))
    for cited in paper.CITED:
        label = f"{cited.name}, {cited.protocol}"
        scores.append(Score(label, cited.accuracy, None, "cited", cited.verified))
    plot_scores(report.figure_path("figure7"), scores, "accuracies on this data set, as published")
    return [
        report.heading("Figure 7: beside other methods"),
        report.figure(
            "figure7",
            "Figure 7: accuracies as their authors give them. Protocols differ (by slice, by "
            "patient, folds), so this is no ranking. Intervals: ours over seeds or folds (t), the "
            "paper's Wilson.",
        ),
        Items(
            [
                f"{one.name}: {100 * one.accuracy:.2f} %, {one.protocol}; {one.source}"
                for one in paper.CITED
            ]
        ),
    ]


def _speed(report: Report) -> list[Block]:
    path = report.folder / SPEED
    if not path.is_file():
        return []
    speed = read_json(path)
    size, step, floor, batch = (speed[key] for key in ("batch_size", "step", "floor", "batch"))
    results = report.reproduction.results
    seconds = sum(row["seconds"] for one in results for row in read_rows(one.folder / EPOCHS))
    return [
        report.heading("Speed"),
        Paragraph(
            f"On {speed['device']} ({speed['threads']} thread(s), {speed['precision']}, "
            f"{speed['image_size']} pixels, batches of {size}): a training step {size / step:.0f} "
            f"images/s, the network's forward and backward pass alone {size / floor:.0f} images/s, "
            f"so a step takes {step / floor:.3f} of that floor; making the batch takes "
            f"{100 * batch / step:.1f} % of a step. Medians of interleaved rounds"
            f"{', process CPU time' if speed['device'] == 'cpu' else ''}. All trainings together "
            f"took {seconds / 3600:.2f} process hours."
        ),
    ]


def _faults(report: Report) -> list[Block]:
    path = report.folder / DRILLS
    if not path.is_file():
        return []
    drills = read_json(path)
    columns = list(dict.fromkeys(key for counts in drills.values() for key in counts))
    rows = [
        [name, *(str(counts.get(column, "-")) for column in columns)]
        for name, counts in drills.items()
    ]
    return [
        report.heading("Faults survived"),
        Paragraph("Drills run on this machine as part of this reproduction."),
        Table(["drill", *columns], rows),
    ]


def _deviations(report: Report) -> list[Block]:
    return [
        report.heading("Deviations from the paper"),
        Items(paper.DEVIATIONS),
        report.heading("Contradictions in the paper, and how they were read"),
        Items(paper.CONTRADICTIONS),
    ]


def _model_card(report: Report) -> list[Block]:
    return [
        report.heading("Model card"),
        Paragraph(NOT_A_DEVICE, warning=True),
        Items(
            [
                "What it is: MobileNet v1 with a 256-d output network, trained with SphereFace; "
                "the answer is the class of the nearest training slice.",
                "Made for: comparing losses, and learning how such a study is done and read.",
                "Not made for: patients. It knows three kinds of tumour and calls a healthy brain, "
                "another disease or a photograph one of the three, often with confidence.",
                "Data: 3064 slices of 233 patients (Jun Cheng, Figshare 1512427, CC BY 4.0), "
                "T1-weighted with contrast agent, from two hospitals in China, 2005 to 2010, each "
                "slice chosen for its tumour. Age, sex and scanners are not recorded, so nothing "
                "is known about how it does on any group."
                if not report.reproduction.synthetic
                else "Data: phantoms drawn by a program from one averaged brain.",
                "By slice, slices of one patient stand on both sides: those accuracies are those "
                "of known patients. By patient is the number to expect, on this data set; another "
                "hospital's slices will be worse.",
                "Neighbouring slices are alike: 3064 slices are not 3064 observations. Wilson's "
                "intervals are too narrow for that reason; those drawn over patients are not.",
                "Nothing was chosen on the test slices but what says so (k, the paper's way).",
            ]
        ),
    ]


def _what_was_run(report: Report) -> list[Block]:
    description, folder = report.reproduction.description, report.folder
    proposed = report.first(PROPOSED)
    facts = [[key, str(value)] for key, value in description.items() if key != "budget"]
    facts += [[f"budget: {key}", str(value)] for key, value in description["budget"].items()]
    facts.append(["report written with", f"Python {platform.python_version()}"])
    sessions = read_rows(folder / SESSIONS) if (folder / SESSIONS).is_file() else []
    header = list(dict.fromkeys(key for one in sessions for key in one))
    blocks: list[Block] = [report.heading("What was run"), Table(["", ""], facts)]
    if sessions:
        rows = [[str(one.get(key, "-")) for key in header] for one in sessions]
        blocks.append(Table(header, rows, "Sessions of `reproduce` on this folder."))
    if proposed:
        # Where the weights lay is nobody's business; their sum is above.
        network = dataclasses.replace(
            proposed.run.settings.network, weights=Path(proposed.run.settings.network.weights).name
        )
        settings = dataclasses.replace(proposed.run.settings, network=network)
        text = "Settings of the proposed training, seed 0; the others differ as their names say."
        blocks += [Paragraph(text), Code(write_settings(settings).strip())]
    splits = [
        [one.run.name, f"{len(split['train'])} / {len(split['test'])}", split["sha256"][:16]]
        for one in report.reproduction.results
        for split in [read_json(one.folder / SPLIT)]
    ]
    blocks.append(Table(["run", "train / test", "SHA-256 of the split"], splits))
    return blocks
