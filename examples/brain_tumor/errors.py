"""The exceptions for faults a user can mend, and how others are put."""


class UserError(Exception):
    """Bad input: each argument is one line that names the file (or setting) and the fault."""


class FormatError(Exception):
    """What is wrong with a file, in one line that does not name it: a UserError will."""


def one_line(error: object) -> str:
    """Return the start of an error's message without its line breaks."""
    return " ".join(str(error).split())[:200]
