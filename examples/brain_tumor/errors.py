"""The one exception for faults a user can mend."""


class UserError(Exception):
    """Bad input: each argument is one line that names the file (or setting) and the fault."""
