"""The error for mistakes that a user can correct."""


class UserError(ValueError):
    """Report a wrong value from outside. The message says which value and what is allowed, and
    `run_script` prints only this message."""


def first_line(error, otherwise):
    """Return the first line of an error's message, or `otherwise` if it has none."""
    return (str(error).splitlines() or [otherwise])[0]
