"""The error for what a user can mend."""


class UserError(ValueError):
    """A value from outside is wrong. The message says which and what is allowed; `run_script`
    prints it alone."""


def first_line(error, otherwise):
    """Return the first line of an error's message, or another text where it has none."""
    return (str(error).splitlines() or [otherwise])[0]
