"""What every script needs on the command line: checked flags, one-line errors, progress bars."""

import argparse
import io
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from parts.errors import UserError, first_line


def run_script(main):
    """Call main(). An error that a user can fix is printed in one line, with exit code 2."""
    open_streams()
    # end as Ctrl-C does, so that temporary files are removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has stopped reading, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except Exception as error:
        message = trouble(error)
        if message is None:
            raise
        message = message.replace("\r", "\\r").replace("\n", "\\n")
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def open_streams():
    """Open closed standard streams on os.devnull: otherwise the next files that are opened would
    get their numbers, and printed text would be written into them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # it gets the lowest free number
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for consoles that are not UTF-8


def trouble(error):
    """Return a message for an error that a user can fix: a wrong value, or a file, disk space or
    memory that the system refused. Return None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save on a full disk
    if isinstance(error, OSError):
        name = error.filename2 or error.filename  # in a rename, the new name
        return f"{name}: {error.strerror}" if name else str(error)
    no_room = "out of memory", "allocate memory", "PytorchStreamWriter"
    if isinstance(error, MemoryError) or any(words in str(error) for words in no_room):
        return f"not enough memory or disk: {first_line(error, 'allocation failed')}"
    return None


LINE_SECONDS = 25  # between two lines of a progress bar in a log


class Lines(tqdm):
    """Show progress in a log: print a line at most every LINE_SECONDS, so none for short work."""

    def __init__(self, *arguments, **options):
        self.due = time.monotonic() + LINE_SECONDS
        options["bar_format"] = "{l_bar} {elapsed} so far, {remaining} to go{postfix}"
        options["file"] = io.StringIO()  # takes what tqdm itself writes at the end
        super().__init__(*arguments, **options)

    def display(self, msg=None, pos=None):
        """Print a line if LINE_SECONDS have passed since the last one."""
        if time.monotonic() > self.due:
            print(self, file=sys.stderr, flush=True)
            self.due = time.monotonic() + LINE_SECONDS


def progress_bar(iterable=None, **options):
    """Return a tqdm bar, over an iterable or updated by hand; Lines if there is no terminal."""
    bar = tqdm if sys.stderr.isatty() else Lines
    return bar(iterable, **{"leave": False} | options)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows a script's docstring as it is and raises UserError."""

    def __init__(self, **options):
        super().__init__(usage=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        # "argument --seed: is -1, must ..." becomes "--seed is -1, must ..."; choices likewise
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        raise UserError(re.sub(r": invalid choice: (.*) \(choose from (.*)\)$",
                               r" is \1, must be one of \2", message))

    def checked(self, values):
        """Return settings from JSON, a dict, each checked as its flag is. Raises UserError."""
        actions = {action.dest: action for action in self._actions}
        result = {}
        for name, value in values.items():
            action = actions.get(name)
            switch = action and action.nargs == 0  # a flag without a value
            if not action or switch and not isinstance(value, bool):
                self.error(f"{flag_of(name)} cannot be {value!r}")
            words = value if isinstance(value, list) and action.nargs else [value]
            try:
                result[name] = value if switch else self._get_values(action, list(map(str, words)))
            except argparse.ArgumentError as error:
                self.error(str(error))
        return result


def number(kind, low, high=math.inf, above=False):
    """Return an argparse type: a finite number from low to high, as 2e3; if `above`, not low."""
    limits = f"{'above' if above else 'at least'} {low}"
    if high < math.inf:
        limits += f" and at most {high}"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"invalid {kind.__name__} value: {text!r}, must be {limits}") from None
        if kind is int and value.is_integer():
            value = int(value)
        if not low <= value <= high or value == math.inf or above and value == low:
            raise argparse.ArgumentTypeError(f"is {value}, must be {limits}")
        if not isinstance(value, kind):
            raise argparse.ArgumentTypeError(f"is {value}, must be a whole number, {limits}")
        return value
    return parse


def flag_of(name):
    """Return the flag of a setting: "--top-k" for "top_k"."""
    return "--" + name.replace("_", "-")


def check_idle(parser, args, names, why):
    """Raise UserError if flags among `names` are not at their defaults. why: the reason to give."""
    idle = [flag_of(name) for name in names if getattr(args, name) != parser.get_default(name)]
    if idle:
        raise UserError(f"{why}: leave out {', '.join(idle)}")


def some_path(text):
    """Return text if it is a path that is not empty (an argparse type)."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty, must name a file or directory")
    return text


def new_file(text):
    """Return text if it names a file that can be written, existing or new (an argparse type)."""
    path = Path(some_path(text))
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"is {text}, which is not a file")
    check_writable(path.parent, text)
    return text


def new_directory(text):
    """Return text if it names a directory to write to, existing or new (an argparse type)."""
    check_writable(Path(some_path(text)), text)
    return text


def check_writable(path, text):
    """Raise ArgumentTypeError if no files can be written to a directory, existing or new. text:
    what names it or a file in it."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"is {text}, but {there} is not a directory")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"is {text}, but you may not write to {there}")


COUNT = number(int, 1, 2 ** 53)
POSITIVE = number(float, 0, above=True)
SEED = number(int, 0, 2 ** 32 - 1)
LOOPS = number(int, 1, 65536)
