"""The command line: python -m examples.brain_tumor."""

import argparse
import dataclasses
import io
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .files import printable, read_json, read_rows
from .reproduction.plan import BUDGETS
from .settings import (
    PRESETS,
    Settings,
    load_settings,
    override_settings,
    read_settings,
    setting_fields,
)

# A command imports what it runs itself: torch and matplotlib take seconds, and --help and a
# wrong flag need neither.
if TYPE_CHECKING:
    from .data.slices import SliceSet

PROGRAM = "python -m examples.brain_tumor"
ARCHIVE = "https://figshare.com/articles/dataset/brain_tumor_dataset/1512427"
EXAMPLES = f"""\
examples:
  {PROGRAM} demo
      no data needed: makes phantoms, trains for a few minutes, evaluates
  {PROGRAM} train --data data/figshare --out runs/paper --preset paper
      the paper's training on the real slices
  {PROGRAM} train --data data/figshare --out runs/patient --preset paper --split patient --epochs 40
      a flag overrides the preset; here no patient stands on both sides
  {PROGRAM} train --data data/figshare --out runs/paper --resume
      continues an interrupted run with its own settings
  {PROGRAM} evaluate runs/paper runs/patient --data data/figshare --out runs
      a report in each run's folder, and a figure that compares their first steps
  {PROGRAM} download data/figshare --weights data/mobilenet.safetensors
      fetches the real slices and ImageNet weights; again continues what was cut off
  {PROGRAM} reproduce --data data/figshare --weights data/mobilenet.safetensors --out runs/all
      every table and figure of the paper, and the same by patient; with --budget small a first look

data: Jun Cheng's brain tumor dataset, CC BY 4.0,
  {ARCHIVE}

Not a medical device."""


PARSER = argparse.ArgumentParser(
    prog=PROGRAM,
    description="HSADML: classify brain tumours in MRI slices by angular-margin embeddings.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
COMMANDS = PARSER.add_subparsers(required=True, metavar="COMMAND")
CLOSED_PIPE = 141  # as a shell has it: 128 and SIGPIPE
AGAIN, CONTINUES = "the same command starts again", "the same command continues"


def argument(*names: str, **options: object) -> tuple[Sequence[str], Mapping[str, Any]]:
    """Return what `add_argument` takes: a path by default, with its default in the help."""
    if "action" not in options and "choices" not in options:
        options.setdefault("type", Path)
    if options.get("default") is not None and "(default" not in str(options["help"]):
        options["help"] = f"{options['help']} (default: %(default)s)"
    return names, options


DATA = argument(
    "--data", required=True, help="folder of .mat slices, or of pictures in a folder for each class"
)
RUN = argument("run_folder", metavar="RUN", help="a run's folder")


def command(
    help: str,
    *arguments: tuple[Sequence[str], Mapping[str, Any]],
    then: str | Callable[[argparse.Namespace], str] = AGAIN,
    epilog: str | None = None,
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[[argparse.Namespace], None]]:
    """Make a function a command, named after it; `then` says how an interrupted one goes on."""

    def add(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
        name = run.__name__.strip("_").replace("_", "-")
        parser = COMMANDS.add_parser(name, help=help, epilog=epilog)
        for names, options in arguments:
            parser.add_argument(*names, **options)
        parser.set_defaults(run=run, then=then)
        return run

    return add


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, given what follows the program's name, and return its exit code.

    It is 0, 2 when the input is at fault, 130 when interrupted, 141 when no one reads the output.
    """
    options = PARSER.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name need not fit the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        options.run(options)
        sys.stdout.flush()
    except UserError as error:
        for fault in error.args:
            print("error:", "\n".join(map(printable, str(fault).splitlines())), file=sys.stderr)
        return 2
    except BrokenPipeError:  # as of `... | head`; what is still to be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except OSError as error:
        what = "" if error.filename is None else f"{error.filename}: "
        print("error:", printable(f"{what}{error.strerror or error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        then = options.then(options) if callable(options.then) else options.then
        print(f"interrupted; {then}", file=sys.stderr)
        return 130
    return 0


@command(
    "make phantoms, train and evaluate: what `make example` runs",
    argument("--out", default=Path("runs"), help="folder for its files"),
    then=CONTINUES,
)
def _demo(options: argparse.Namespace) -> None:
    demo(options.out)


def demo(folder: Path, count: int = 1200, overrides: Mapping[str, object] | None = None) -> None:
    """Make phantoms, train the quick preset on them and evaluate; redo nothing that is there."""
    from .data.phantoms import is_whole, make_phantoms
    from .report.run_report import describe_result, write_report
    from .reproduction.running import complete_run
    from .training.checkpoint import epochs_done
    from .training.run_folder import SETTINGS

    data, run = folder / "phantoms", folder / "demo"
    if not is_whole(data, count):
        print(f"{data}: making {count} synthetic slices (phantoms)")
        make_phantoms(data, count, seed=0, progress=sys.stderr.isatty())
    resume = (run / SETTINGS).is_file()
    settings = read_settings(run / SETTINGS) if resume else load_settings("quick", overrides)
    slices = _load(data, settings)
    if resume and epochs_done(run) == settings.training.epochs:
        print(f"{run}: finished before; evaluating it again. To start afresh, remove the folder.")
    else:
        print(f"{run}: {'resuming the training' if resume else 'training'} (preset quick)")
    complete_run(run, settings, slices)
    report = write_report(run)
    print(f"\n{describe_result(run)}\n\nreport and figures: {report}\nslices: {data}")
    print(f"\nNext, the real slices ({ARCHIVE}, CC BY 4.0, Jun Cheng), unpacked into one folder:")
    print(f"  {_command('train', '--data', 'FOLDER', '--out', folder / 'paper')} --preset paper")


@command(
    "write synthetic slices in the archive's own format",
    argument("out", metavar="OUT", help="folder for the .mat files"),
    argument("--count", type=int, default=1200, help="slices"),
    argument("--seed", type=int, default=0, help="of all random numbers"),
    argument("--size", type=int, default=256, help="pixels a side"),
)
def _make_phantoms(options: argparse.Namespace) -> None:
    from .data.phantoms import make_phantoms

    progress = sys.stderr.isatty()
    make_phantoms(options.out, options.count, options.seed, options.size, progress)
    print(f"{options.out}: {options.count} synthetic slices. Next:")
    print(f"  {_command('train', '--data', options.out, '--out', 'runs/phantoms')}")


@command(
    "copy a reproduction's finished runs, without checkpoints, for `reproduce --merge`",
    argument("out", metavar="OUT", help="the reproduction's folder"),
    argument("folder", metavar="FOLDER", help="where the results go"),
    then=CONTINUES,
)
def _collect(options: argparse.Namespace) -> None:
    from .reproduction.merging import collect

    copied = collect(options.out, options.folder)
    print(f"{options.folder}: {len(copied)} runs copied from {options.out}")


@command(
    "fetch the real slices, and ImageNet weights if asked; checked, unpacked",
    argument("out", metavar="OUT", help="folder for the .mat slices"),
    argument("--weights", help="a file for timm's ImageNet weights too"),
    then=CONTINUES,
)
def _download(options: argparse.Namespace) -> None:
    from .download.sources import download_slices, download_weights

    download_slices(options.out)
    print(f"{options.out}: the data set (Jun Cheng, CC BY 4.0)")
    if options.weights:
        checksum = download_weights(options.weights)
        print(f"{options.weights}: ImageNet weights of timm's layout, SHA-256 {checksum}")


def _resume_train(options: argparse.Namespace) -> str:
    from .training.run_folder import SETTINGS

    if not (options.out / SETTINGS).is_file():  # no run began
        return AGAIN
    command = _command("train", "--data", options.data, "--out", options.out, "--resume")
    return f"continue with: {command}"


@command(
    "train a network into a new run folder, or resume one",
    DATA,
    argument("--out", required=True, help="the run's folder"),
    argument("--preset", choices=PRESETS, default="quick", help="of the settings"),
    argument("--resume", action="store_true", help="continue the run in --out, its own settings"),
    then=_resume_train,
    epilog="A flag overrides the preset's value; the defaults in brackets are the presets'.",
)
def _train(options: argparse.Namespace) -> None:
    from .data.splits import make_split
    from .training.loop import train
    from .training.run_folder import CHECKPOINT, refuse_existing

    if options.resume:
        settings = override_settings(_settings_of(options.out), vars(options))
    else:
        refuse_existing(options.out)
        settings = load_settings(options.preset, vars(options))
    weights = settings.network.weights
    begun = options.resume and (options.out / CHECKPOINT).is_file()  # which has all weights
    if weights and not begun and not Path(weights).is_file():
        raise UserError(
            f"{weights}: no such weights file; name MobileNet's with --weights FILE "
            "(the README says where it is), or train from scratch with --weights ''"
        )
    slices = _load(options.data, settings)
    train(settings, slices, make_split(settings.data, slices), options.out, options.resume)
    print(f"{options.out}: trained. Next:")
    print(f"  {_command('evaluate', options.out, '--data', options.data)}")


def _add_setting_flags(parser: argparse.ArgumentParser) -> None:
    presets = {name: dataclasses.asdict(load_settings(name)) for name in PRESETS}
    groups: dict[str, Any] = {}
    for table, field in setting_fields():
        if table not in groups:
            groups[table] = parser.add_argument_group(f"{table} settings")
        described = ", ".join(f"{name}: {own[table][field.name]}" for name, own in presets.items())
        form: dict[str, Any] = {"type": field.type, "metavar": field.type.__name__.upper()}
        if field.type is bool:
            form = {"action": argparse.BooleanOptionalAction}
        elif field.type is str and field.metadata["limits"]:
            form = {"choices": field.metadata["limits"]}
        groups[table].add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,  # so that only the flags given reach the overrides
            help=f"{field.metadata['help']} [{described}]",
            **form,
        )


_add_setting_flags(COMMANDS.choices["train"])


@command(
    "classify the test slices, write the reports",
    argument("runs", metavar="RUN", nargs="+", help="a run's folder"),
    DATA,
    argument("--out", default=Path(), help="where comparison.png of several runs goes"),
)
def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation.evaluate import evaluate
    from .report.figures.run import plot_early
    from .report.run_report import describe_result, write_report
    from .training.run_folder import SPLIT, STEPS

    for run in options.runs:
        evaluate(run, _slices_of(run, options.data))
        report = write_report(run)
        print(f"{run}\n\n{describe_result(run)}\n\nreport: {report}\n")
    if len(options.runs) > 1:
        options.out.mkdir(parents=True, exist_ok=True)
        figure = options.out / "comparison.png"
        synthetic = any(read_json(run / SPLIT)["synthetic"] for run in options.runs)
        title = f"{'SYNTHETIC: ' if synthetic else ''}first steps of training"
        names = [run.absolute().name for run in options.runs]
        if len(set(names)) < len(names):
            names = map(str, options.runs)
        logs = [read_rows(run / STEPS) for run in options.runs]
        plot_early(figure, title, dict(zip(map(printable, names), logs, strict=True)))
        print(f"comparison of the first steps: {figure}")


@command(
    "train all that the paper's tables and figures need, and write the report",
    DATA,
    argument("--weights", help="MobileNet v1's ImageNet weights; without: from scratch"),
    argument("--out", required=True, help="the reproduction's folder"),
    argument(
        "--budget",
        choices=BUDGETS,
        default="standard",
        help="standard: the docs' recipe, 24 epochs at 224 pixels; small: a first look,"
        " 4 epochs at 128; paper: as the paper has it, 275 at 224",
    ),
    argument(
        "--only",
        type=str,
        metavar="NAMES",
        default="*",
        help="train only runs with such names, for instance 'slice-sphereface-m5-seed*'",
    ),
    argument(
        "--merge",
        metavar="FOLDER",
        help="first take in the finished runs of another reproduction, or of what `collect` made, "
        "of the same slices, weights and settings",
    ),
    argument(
        "--jobs",
        type=int,
        help="trainings side by side (default: one a GPU or, without one, a core)",
    ),
    argument(
        "--minutes",
        type=float,
        help="stop training after so long; the report is of what was finished by then",
    ),
    then=CONTINUES,
    epilog="The same command continues what was cut off, and leaves alone what is finished.",
)
def _reproduce(options: argparse.Namespace) -> None:
    from .report.reproduction_report import write_reproduction_report
    from .reproduction.running import default_jobs, measure, run_plan

    jobs = default_jobs() if options.jobs is None else options.jobs
    if jobs < 1:
        raise UserError(f"--jobs: must be at least 1, not {jobs}")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes: must be above 0 and finite, not {options.minutes}")
    budget = BUDGETS[options.budget]

    failures = run_plan(
        *(options.data, options.weights, options.out, budget, jobs),
        chosen=options.only,
        merged=options.merge,
        minutes=options.minutes,
    )
    measure(options.data, options.weights, options.out, budget)
    print(f"report: {write_reproduction_report(options.out)}")
    if failures:
        raise UserError(f"{len(failures)} runs failed, the first: {failures[0]}")


@command(
    "write a reproduction's report again, from its folder alone",
    argument("out", metavar="OUT", help="the reproduction's folder"),
)
def _report(options: argparse.Namespace) -> None:
    from .report.reproduction_report import write_reproduction_report

    print(f"report: {write_reproduction_report(options.out)}")


@command(
    "classify .mat, PNG, JPEG, TIFF, BMP or DICOM files, with neighbours and Grad-CAM beside them",
    RUN,
    argument("files", metavar="FILE", nargs="+", help="slices to classify, or folders of them"),
    DATA,
    argument("--out", default=Path("answers"), help="folder for the figures"),
)
def _predict(options: argparse.Namespace) -> None:
    from .use.prediction import describe_prediction, predict

    slices = _slices_of(options.run_folder, options.data)
    _, faults = predict(
        *(options.run_folder, options.files, slices, options.out),
        tell=lambda answer: print(describe_prediction(answer), flush=True),
    )
    print(f"figures: {options.out}. Not a medical device.")
    if faults:
        raise UserError(*faults)


@command(
    "try a run on strange pictures, and see whether its Grad-CAM finds the tumours",
    argument("runs", metavar="RUN", nargs="+", help="an evaluated run's folder"),
    DATA,
)
def _examine(options: argparse.Namespace) -> None:
    from .report.run_report import describe_examination, write_report
    from .use.examination import examine

    for run in options.runs:
        examine(run, _slices_of(run, options.data), options.data)
        report = write_report(run)
        print(f"{run}\n\n{describe_examination(run)}\n\nreport: {report}\n")


@command(
    "write a run's network for torch.export and ONNX, compared with itself",
    RUN,
    DATA,
    argument("--out", default=Path("model"), help="folder for the model"),
)
def _export(options: argparse.Namespace) -> None:
    from .use.export import describe_export, export

    slices = _slices_of(options.run_folder, options.data)
    described = export(options.run_folder, slices, options.out)
    for name, differences in described["largest_difference"].items():
        largest = max(differences.values())
        print(f"{options.out / name}: differs from the network by at most {largest:.1e}")
    print(f"{options.out / 'model.json'}: {describe_export(described)}. Not a medical device.")


def _slices_of(run: Path, data: Path) -> "SliceSet":
    return _load(data, _settings_of(run))


def _settings_of(run: Path) -> Settings:
    from .training.run_folder import SETTINGS

    try:
        run.stat()
    except FileNotFoundError:
        raise UserError(f"{run}: no such run") from None
    return read_settings(run / SETTINGS)


def _load(folder: Path, settings: Settings) -> "SliceSet":
    from .reproduction.running import load

    if not folder.exists():
        raise UserError(
            f"{folder}: no such folder; the real slices are at {ARCHIVE} (CC BY 4.0, Jun Cheng), "
            f"synthetic ones come from: {_command('make-phantoms', folder)}"
        )
    return load(folder, settings)


def _command(*arguments: str | Path) -> str:
    return shlex.join([*PROGRAM.split(), *map(str, arguments)])


if __name__ == "__main__":
    sys.exit(main())
