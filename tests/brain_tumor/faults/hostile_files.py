"""Drills with files of an attacker: spoiled slices, poisoned checkpoints, malicious archives."""

import io
import os
import pickle
import shlex
import stat
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.brain_tumor.data.reader import limit_address_space
from examples.brain_tumor.download.archives import MAX_MEMBER_BYTES, unpack
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.training.checkpoint import read_checkpoint

from .mutations import OUTSIDE, mutate, write_valid, zlib_zeros
from .trial_reader import MEMORY, TrialReader, peak_memory

Counts = dict[str, int]

VALID = 8  # slices, of which every spoiled one is a copy


def in_another_process(function: Callable[..., Counts], *arguments: object) -> Counts:
    """Call a function where no thread of this process and none of its limits matters."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ------------------------------------------------------------------------- hostile .mat files


def mutated_mats(folder: Path, count: int = 1000, seed: int = 0) -> Counts:
    """Read slices that were each spoiled in one way, in a process that may come to grief.

    Args:
        folder: Where they are written, one at a time.
        count: How many.
        seed: Decides how they are spoiled.

    Returns:
        tried; refused, with one line that names the file; read, as a sound slice; failed: a crash,
        a hang, over 1 GiB of memory, another exception or an unsound slice.
    """
    valid = [_valid_slice(folder / OUTSIDE, seed, number) for number in range(VALID)]
    counts = Counter[str]()
    with TrialReader() as reader:
        for number in range(count):
            generator = np.random.default_rng([seed, number])
            path = folder / f"{number}.mat"
            path.write_bytes(valid[number % VALID])
            kind = mutate(path, generator)
            outcome, fault = reader.read(path)
            counts[outcome] += 1
            if outcome == "failed":
                print(f"seed {seed}, file {number} ({kind}): {fault}", file=sys.stderr)
            path.unlink()
    return {"tried": count, **{name: counts[name] for name in ("refused", "read", "failed")}}


def _valid_slice(path: Path, seed: int, number: int) -> bytes:
    write_valid(path, np.random.default_rng([seed, number]))
    return path.read_bytes()


# ----------------------------------------------------------------------- poisoned checkpoints


def poisoned_checkpoints(folder: Path) -> Counts:
    """Read checkpoints that would run a program, or unpack to more than the machine holds.

    Returns:
        tried; refused, with one line that names the file; failed: something was run, it took over
        1 GiB of memory, or it was read.
    """
    return in_another_process(_read_poisoned, folder)


def _read_poisoned(folder: Path) -> Counts:
    canary = folder / "canary"
    before = peak_memory()
    limit_address_space(2 * MEMORY)
    refused = 0
    poisons = write_poisoned(folder, canary)
    for path in poisons:
        try:
            read_checkpoint(path)
            message = "was read"
        except UserError as error:
            message = str(error)
        except BaseException as error:
            message = repr(error)
        sound = message.startswith(f"{path}: ") and len(message.splitlines()) == 1
        if sound and not canary.exists() and peak_memory() - before < MEMORY:
            refused += 1
        else:
            print(f"poisoned checkpoint {path.name}: {message}", file=sys.stderr)
    return {"tried": len(poisons), "refused": refused, "failed": len(poisons) - refused}


def malicious_archives(folder: Path) -> Counts:
    """Unpack zip archives that lead out of the folder, or unpack to far more than slices take.

    Returns:
        tried; refused, with one line that names the file, and nothing written anywhere; failed.
    """
    inner = folder / "inner"
    inner.mkdir()
    archives = write_malicious(folder)
    before = sorted(folder.rglob("*"))
    refused = 0
    for path in archives:
        try:
            unpack(path, inner)
            message = "was unpacked"
        except UserError as error:
            message = str(error)
        except Exception as error:
            message = repr(error)
        sound = message.startswith(f"{path}: ") and len(message.splitlines()) == 1
        if sound and sorted(folder.rglob("*")) == before:
            refused += 1
        else:
            print(f"malicious archive {path.name}: {message}", file=sys.stderr)
    return {"tried": len(archives), "refused": refused, "failed": len(archives) - refused}


def write_malicious(folder: Path) -> list[Path]:
    """Write archives that no one should unpack, each with an honest member before the other."""
    link = zipfile.ZipInfo("1.mat")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    members: dict[str, tuple[str | zipfile.ZipInfo, bytes]] = {
        "parent folder": ("../1.mat", b"content"),
        "parent folder inside": ("a/../../1.mat", b"content"),
        "absolute path": (str(folder / "1.mat"), b"content"),
        "drive": ("C:/1.mat", b"content"),
        "backslash": ("..\\1.mat", b"content"),
        "symbolic link": (link, str(folder).encode()),
        "bomb": ("1.mat", bytes(MAX_MEMBER_BYTES + 1)),
        "name twice": ("a/2.mat", b"content"),
    }
    for name, (member, content) in members.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("2.mat", b"content")
            archive.writestr(member, content)
    whole = (folder / "parent folder.zip").read_bytes()
    cut = folder / "cut off.zip"
    cut.write_bytes(whole[:-30])
    return [*(folder / f"{name}.zip" for name in members), cut]


class _Call:
    """Becomes the result of a call when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def write_poisoned(folder: Path, canary: Path) -> list[Path]:
    """Write checkpoints that no one should read.

    Args:
        folder: Where they are written.
        canary: A folder that exists afterwards if one of them ran anything.

    Returns:
        Their paths.
    """
    payload = _Call(os.mkdir, str(canary))
    nested = {"epoch": 1, "network": {"output.0.weight": [(payload,)]}}
    shell = _Call(os.system, f"mkdir {shlex.quote(str(canary))}")
    honest = {"epoch": 1, "network": {"weight": torch.zeros(4)}}
    writers: dict[str, Callable[[Path], None]] = {
        "payload": lambda path: torch.save(payload, path),
        "nested payload": lambda path: torch.save(nested, path),
        "command": lambda path: torch.save({"epoch": shell}, path),
        "bare pickle": lambda path: path.write_bytes(pickle.dumps(payload, protocol=2)),
        "old format": lambda path: torch.save(nested, path, _use_new_zipfile_serialization=False),
        "huge object": lambda path: torch.save({"epoch": _Call(bytearray, 1 << 50)}, path),
        "huge tensor": lambda path: _rewrite(honest, path, _claim_more),
        "packed pickle": lambda path: _rewrite(honest, path, partial(_pack_zeros, "data.pkl")),
        "packed tensor": lambda path: _rewrite(honest, path, partial(_pack_zeros, "data/0")),
    }
    for name, write in writers.items():
        write(folder / f"{name}.pt")
    return [folder / f"{name}.pt" for name in writers]


def _rewrite(
    contents: object, path: Path, write: Callable[[zipfile.ZipFile, str, bytes], None]
) -> None:
    """Save a checkpoint as torch does, but let `write` add its members to the file."""
    saved = io.BytesIO()
    torch.save(contents, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            write(target, name, source.read(name))


def _claim_more(target: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Let a tensor of 4 numbers have 2^40."""
    four, many = b"K\x04\x85", b"\x8a\x06\0\0\0\0\0\x01\x85"  # how pickle writes (4,), (2^40,)
    target.writestr(name, content.replace(four, many))


def _pack_zeros(name: str, target: zipfile.ZipFile, member: str, content: bytes) -> None:
    """Put 1.25 GiB of zeros in place of the member `name`."""
    if not member.endswith(f"/{name}"):
        target.writestr(member, content)
        return
    info = zipfile.ZipInfo(member)
    target.writestr(info, zlib_zeros(80)[2:-4])  # the bare stream
    info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 80 << 24
