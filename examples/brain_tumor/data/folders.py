"""Finding slices in a folder as people have it: the archive's files, or pictures by class."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import printable
from .matlab import CLASS_NAMES, no_formula
from .pictures import PICTURES

SLICE = re.compile(r"(?:0*([1-9][0-9]{0,8})|cvind)\.mat", re.IGNORECASE)
FOLDS_NAME, MARKER_NAME, PLANES_NAME = "cvind.mat", "SYNTHETIC.txt", "planes.csv"
HIDDEN = (".", "__MACOSX")  # what hidden names start with
SIDES = {"train", "training", "test", "testing", "val", "valid", "validation"}  # no classes
# The text that opens a .mat file; its platform marks the file as a phantom.
PHANTOM = b"MATLAB 7.3 MAT-file, Platform: PHANTOM, Created by make-phantoms HDF5 schema 1.00 ."
FOLDS = 0  # the number that is cvind.mat's, for no slice has it
ONE_CLASS = "{}: has pictures of the class {} alone, expected more"
MOST_SHOWN = 20  # files that are named one by one


@dataclass(frozen=True)
class Source:
    """A slice's file."""

    path: Path
    number: int  # of the slice
    name: str  # what it is called in the sum of the images, wherever the folder lies
    label: int | None = None  # of a picture, which its folder tells


@dataclass(frozen=True)
class Found:
    """What a folder holds."""

    sources: Sequence[Source]  # ascending by number
    classes: tuple[str, ...]  # their names, by label
    folds: Path | None  # cvind.mat
    left_out: Sequence[str]  # a line for each file that is no slice


def find_slices(folder: Path) -> Found:
    """Find the slices in a folder and in those below it.

    They are the archive's 1.mat, 2.mat, ... (also 1.MAT, 0001.mat) or, where there are none,
    pictures in a folder for each class, as in `glioma/1.jpg` or `Training/glioma/1.jpg`; beside
    such sides others are left out. Pictures are numbered in the order of their names.

    Raises:
        UserError: There are none, or there are two of one number.
    """
    if folder.is_file():
        raise UserError(f"{folder}: is a file, expected a folder of slices{_hint([folder])}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files, slices, rest = list(visible_files(folder)), {}, []
    for path in files:
        match = SLICE.fullmatch(path.name)
        if match is None:
            rest.append(path)
        elif (other := slices.setdefault(int(match[1] or FOLDS), path)) != path:
            raise UserError(f"{path}: is the same slice as {other}; keep one of them")
    folds = slices.pop(FOLDS, None)
    pictures = [one for one in rest if one.suffix.lower() in PICTURES and one.parent != folder]
    if slices:
        sources = [Source(slices[number], number, f"{number}.mat") for number in sorted(slices)]
        classes, fault = CLASS_NAMES, "is not named like a slice (1.mat, 2.mat, ...)"
    else:
        sources, classes = _pictures(folder, pictures)
        fault = "is not a picture in a folder of its class"
    if not sources:
        alone = {path.parent.name for path in pictures}
        if len(alone) == 1 and not {name.lower() for name in alone} & SIDES:
            raise UserError(ONE_CLASS.format(folder, *alone))
        raise UserError(
            f"{folder}: holds no slices (1.mat, 2.mat, ...), and no pictures in a folder for each "
            f"class{_hint(files)}"
        )
    used = {source.path for source in sources} | {folder / MARKER_NAME, folder / PLANES_NAME}
    left_out = [f"{path}: {fault}" for path in rest if path not in used]
    if sources[0].label is not None:
        left_out += [f"{one}: is a folder without files" for one in _empty_folders(folder, files)]
    return Found(sources, classes, folds, left_out)


def _empty_folders(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return the visible folders in which, and below which, none of the files is."""
    filled, found = {one for path in files for one in (path, *path.parents)}, []
    for top, inside, _ in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith(HIDDEN))
        found += [path for path in map(Path(top).joinpath, inside) if path not in filled]
    return found


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and below it, sorted, without those whose names hide them.

    Links to folders are not followed, for they may lead in a circle: they are yielded like files.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.name.startswith(HIDDEN):
            if entry.is_dir(follow_symlinks=False):
                yield from visible_files(Path(entry.path))
            else:
                yield Path(entry.path)


def is_phantom(path: Path) -> bool:
    """Return whether a file is a phantom by the text that opens it."""
    try:
        if not path.is_file():  # but a pipe, which may wait for ever
            return False
        with path.open("rb") as file:
            return file.read(len(PHANTOM)) == PHANTOM
    except OSError:  # whoever reads the file says what is wrong with it
        return False


def count_listed(folder: Path) -> int:
    """Return how many phantoms were made in a folder: `make_phantoms` lists them at its end."""
    path = folder / PLANES_NAME
    return len(path.read_text(encoding="utf-8").splitlines()) - 1 if path.is_file() else 0


def tell_left_out(folder: Path, lines: Sequence[str]) -> None:
    """Say on standard error which files are left out, and why."""
    if lines:
        head = f"{folder}: left out, {len(lines)} in all:"
        print(*map(printable, [head, *shortened(lines)]), sep="\n", file=sys.stderr)


def shortened(lines: Sequence[str]) -> list[str]:
    """Return the first lines, and how many there are besides."""
    more = [f"  and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
    return [f"  {line}" for line in lines[:MOST_SHOWN]] + more


def _pictures(folder: Path, paths: Sequence[Path]) -> tuple[list[Source], tuple[str, ...]]:
    """Return the pictures that have a class, and the classes."""
    above = {path: {one.lower() for one in path.relative_to(folder).parts[:-1]} for path in paths}
    on_sides = [path for path in paths if above[path] & SIDES]
    class_of = _classes(on_sides) or _classes(paths)
    found = set(class_of.values())
    classes = [*filter(found.__contains__, CLASS_NAMES), *sorted(found.difference(CLASS_NAMES))]
    sources = [
        Source(path, number, _as_text(path.relative_to(folder).as_posix()), classes.index(name))
        for number, (path, name) in enumerate(class_of.items(), start=1)
    ]
    return sources, tuple(classes)


def _classes(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the classes of those pictures that have one: the name of the first own folder."""
    above = os.path.commonpath([path.parent for path in paths]) if paths else ""
    class_of = {}
    for path in paths:
        names = map(str.lower, path.relative_to(above).parts[:-1])
        if own := [name for name in names if name not in SIDES]:
            class_of[path] = no_formula(_as_text(own[0]))
    return class_of


def _as_text(name: str) -> str:
    """Return a name that UTF-8 can write: on Linux any bytes make a file's name."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _hint(files: Iterable[Path]) -> str:
    """Return how to go on with what is not unpacked yet."""
    for path in files:
        if path.suffix.lower() == ".zip":
            unzip = f"python -m zipfile -e '{path}' '{path.with_suffix('')}'"
            return f"; unpack {path.name} first, for instance with: {unzip}"
    return ""
