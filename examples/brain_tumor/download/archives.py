"""Unpacking the data set's zip archives, which are not trusted."""

import re
import stat
import zlib
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from ..data.matlab import ARCHIVE_SIZE
from ..errors import UserError
from ..files import replacing

WANTED = re.compile(r"([1-9][0-9]{0,3})\.mat|cvind\.mat")
MAX_MEMBER_BYTES = 64_000_000  # a slice has less than 1 MB
MAX_TOTAL_BYTES = 2_000_000_000  # an archive has 766 slices
ENCRYPTED = 0x1  # a zip member's flag


def unpack(path: Path, folder: Path) -> list[str]:
    """Unpack the slices of an archive into a folder, all of them or none.

    The folders inside the archive are ignored, and so are files that are neither `1.mat` ...
    `3064.mat` nor `cvind.mat`. Every member is read to its end, where its checksum stands, before
    the first one is written. Return the names of the files written.

    Raises:
        UserError: The archive is damaged, or holds what no honest archive does: a path that leads
            elsewhere, a link, an encrypted member, a name twice, or far more than slices take.
    """
    try:
        with ZipFile(path) as archive:
            members = _find_slices(path, archive)
            for member in members.values():
                _content(archive, member)
    except (BadZipFile, EOFError, NotImplementedError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a readable zip archive: {error}") from None
    with ZipFile(path) as archive:
        for name, member in members.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(_content(archive, member))
    return list(members)


def _find_slices(path: Path, archive: ZipFile) -> dict[str, ZipInfo]:
    """Return the members that are slices, by the names under which they are written."""
    members = {}
    for member in archive.infolist():
        _check_member(path, member)
        name = member.filename.rpartition("/")[2]
        match = WANTED.fullmatch(name)
        if match is None or int(match[1] or 1) > ARCHIVE_SIZE:
            continue
        if name in members:
            raise UserError(f"{path}: refused: holds {name} twice")
        members[name] = member
    if not members:
        raise UserError(f"{path}: holds no slices (1.mat to {ARCHIVE_SIZE}.mat)")
    if sum(member.file_size for member in members.values()) > MAX_TOTAL_BYTES:
        raise UserError(f"{path}: refused: would unpack to more than {MAX_TOTAL_BYTES} bytes")
    return members


def _check_member(path: Path, member: ZipInfo) -> None:
    """Raise a UserError for a member that no honest archive of slices holds."""
    name = member.orig_filename  # filename is what zipfile makes of it on this system
    if name.startswith("/") or ".." in name.split("/") or re.search(r"[\\:\0]", name):
        fault = "has a path that leads out of the folder"
    elif stat.S_ISLNK(member.external_attr >> 16):
        fault = "is a symbolic link"
    elif member.flag_bits & ENCRYPTED:
        fault = "is encrypted"
    elif member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        fault = f"has an unknown compression ({member.compress_type})"
    elif member.file_size > MAX_MEMBER_BYTES:
        fault = f"unpacks to {member.file_size} bytes; at most {MAX_MEMBER_BYTES} are accepted"
    else:
        return
    raise UserError(f"{path}: refused: its member {name!r} {fault}")


def _content(archive: ZipFile, member: ZipInfo) -> bytes:
    """Return what a member holds, no more of it than it declares."""
    with archive.open(member) as file:
        return file.read(MAX_MEMBER_BYTES)  # without a limit zipfile would unpack a bomb first
