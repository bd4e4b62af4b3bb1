"""The exceptions for faults a user can mend."""


class UserError(Exception):
    """Bad input: each argument is one line that names the file (or setting) and the fault."""


class FormatError(Exception):
    """What is wrong with a file, in one line that does not name it: a UserError will."""
