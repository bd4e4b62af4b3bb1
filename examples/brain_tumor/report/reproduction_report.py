"""The report of a reproduction, made from its folder alone: report.md and report.html."""

import dataclasses
import platform
from pathlib import Path

from ..evaluation.metrics import seed_interval
from ..reproduction.plan import DEVELOPMENT_FOLD, PROPOSED, SWAPPED
from ..reproduction.running import SESSIONS
from ..settings import write_settings
from ..training.run_folder import (
    ENVIRONMENT,
    EPOCHS,
    SPLIT,
    read_json,
    read_rows,
    write_text,
)
from . import further_sections, paper, paper_sections, recipe_sections, tables
from .document import (
    Block,
    Code,
    Items,
    Paragraph,
    Table,
    to_html,
    to_markdown,
)
from .reporting import Report

REPORT = "report.md"
PAGE = "report.html"
SWAPPED_AIM, PATIENT_AIM = 0.9547, 0.96  # by slice, 70-30, the aim is the paper's accuracy
NOT_A_DEVICE = (
    "Not a medical device: for research and teaching, never for diagnosis or any decision about a "
    "patient."
)


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
        recipe_sections.recipe,
        paper_sections.samples_and_pipeline,
        paper_sections.golden,
        paper_sections.paper_tables,
        paper_sections.classifiers,
        paper_sections.curves,
        paper_sections.embeddings,
        further_sections.scores,
        further_sections.patients,
        further_sections.beyond,
        further_sections.length,
        recipe_sections.search,
        paper_sections.bars,
        further_sections.speed,
        further_sections.faults,
        paper_sections.deviations,
        _model_card,
        _what_was_run,
    )
    blocks = [block for section in sections for block in section(report)]
    write_text(folder / REPORT, to_markdown(blocks, folder))
    write_text(folder / PAGE, to_html(f"{report.mark}HSADML, reproduced", blocks))
    return folder / PAGE


def _summary(report: Report) -> list[Block]:
    reproduction, budget = report.reproduction, report.reproduction.budget
    settings = budget.settings(None)
    total = len(reproduction.results) + len(reproduction.missing)
    blocks: list[Block] = [
        report.heading("HSADML, reproduced", 1),
        Paragraph(NOT_A_DEVICE, warning=True),
    ]
    if reproduction.synthetic:
        text = (
            "SYNTHETIC: the slices are simulated phantoms, not patients. They test that the code "
            "runs and learns; they say nothing about real tumours, and are not compared with the "
            "paper's numbers."
        )
        blocks.append(Paragraph(text, warning=True))
    blocks.append(
        Paragraph(
            "HSADML (Verma and Singh) trains MobileNet v1 with SphereFace's angular margin on MRI "
            "slices of meningioma, glioma and pituitary tumour, and classifies a slice by its "
            "nearest neighbour. Here its trainings were repeated with the "
            f"budget `{budget.name}`: {settings.training.epochs} epochs at "
            f"{settings.data.image_size} pixels where the paper has 275 at 224. "
            f"{len(reproduction.results)} of {total} runs are finished."
        )
    )
    if budget.name == "small":
        text = (
            "These are preliminary results of about an hour on two CPU cores, a small part of the "
            "paper's training. Accuracy still increases with the number of epochs, as shown below."
        )
        blocks.append(Paragraph(text))
    if reproduction.missing:
        text = f"Not finished: {len(reproduction.missing)} runs: {', '.join(reproduction.missing)}."
        blocks.append(Paragraph(text, warning=True))
    return [*blocks, _aims(report)]


def _made_by(run: Path) -> str:
    """Return the commit that trained a run, or a dash where it did not say."""
    path = run / ENVIRONMENT
    return read_json(path).get("commit", "-") if path.is_file() else "-"


def _aims(report: Report) -> Table:
    rows = []
    searched = report.reproduction.budget.comparisons
    mark = f" (settings were chosen on fold {DEVELOPMENT_FOLD})" if searched else ""
    for group, training, name, aim in (
        ("slice", PROPOSED, "by slice, 70-30, mean over the seeds", paper.ACCURACY),
        ("slice", SWAPPED, "by slice, 30-70, mean over the seeds", SWAPPED_AIM),
        (
            "patient",
            PROPOSED,
            f"by patient, mean over the folds{mark}",
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
    aims = [] if report.reproduction.synthetic else ["target", ""]
    caption = "Targets: the paper's figures by slice, and 96 % by patient." if aims else ""
    return Table([*header, *aims], rows, caption)


def _model_card(report: Report) -> list[Block]:
    return [
        report.heading("Model card"),
        Paragraph(NOT_A_DEVICE, warning=True),
        Items(
            [
                "What it is: MobileNet v1 with a 256-d output network, trained with SphereFace; "
                "the answer is the class of the nearest training slice.",
                "Intended use: comparing losses, and teaching how such a study is done and read.",
                "Out of scope: patients. It has three classes of tumour and assigns a healthy "
                "brain, another disease or a photograph to one of them, often with high "
                "confidence.",
                "Data: 3064 slices of 233 patients (Jun Cheng, Figshare 1512427, CC BY 4.0), "
                "T1-weighted with contrast agent, from two hospitals in China, 2005 to 2010, each "
                "slice chosen for its tumour. Age, sex and scanners are not recorded, so "
                "performance by group is unknown."
                if not report.reproduction.synthetic
                else "Data: phantoms drawn by a program from one averaged brain.",
                "In the split by slice, slices of one patient are in both training and test set. "
                "The split by patient measures accuracy on new patients of this data set; expect "
                "less on slices of another hospital.",
                "Neighbouring slices are correlated: 3064 slices are not 3064 independent "
                "observations. Wilson's intervals are therefore too narrow; bootstrap intervals "
                "over patients are not.",
                "Nothing was selected on the test slices, except where stated (k, as in the "
                "paper).",
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
    blocks: list[Block] = [report.heading("Runs"), Table(["", ""], facts)]
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
        [
            one.run.name,
            f"{len(split['train'])} / {len(split['test'])}",
            split["sha256"][:16],
            _made_by(one.folder),
            f"{sum(row['seconds'] for row in read_rows(one.folder / EPOCHS)) / 3600:.2f}",
        ]
        for one in report.reproduction.results
        for split in [read_json(one.folder / SPLIT)]
    ]
    header = ["run", "train / test", "SHA-256 of the split", "commit", "hours"]
    blocks.append(Table(header, splits))
    return blocks
