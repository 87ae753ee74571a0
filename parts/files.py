"""Files that appear whole, JSON without NaN, checkpoints that are checked, a lock.

Files are written to a temporary name and renamed, so that whatever happens, a reader finds the old
file or the new one, never a half.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from parts.cli import UserError, first_line, in_terminal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# what a file system answers that does not offer a call: mounted buckets, Lustre, FUSE
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """Open a file that takes path's place when the block ends well; else no file is left behind.

    Its directory is made where it is missing: what took hours to compute is not lost for that."""
    path = Path(os.path.realpath(path))  # a link to a file stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp: its files are for the owner alone, and chmod fails on mounted buckets
    temporary = path.with_name(f".{path.name[:40]}.{os.urandom(8).hex()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NOT_OFFERED:
                    raise
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path, value):
    """Write a value as JSON, see json_text."""
    write_text(path, json_text(value, indent=1))


def json_text(value, **options):
    """Return a value as JSON. It has no NaN and no infinity: such a number becomes null."""
    return json.dumps(with_null(value), allow_nan=False, **options)


def with_null(value):
    """Return a value of JSON with None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: with_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [with_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log_line(text):
    """Return a line of a log, JSON in which null stands for a number that is not finite: NaN.
    Raises ValueError."""
    def with_nan(pairs):
        return {key: math.nan if part is None else part for key, part in pairs}
    return json.loads(text, object_pairs_hook=with_nan)


def read_json_lines(path):
    """Return (the lines of a log that are JSON objects, see log_line, and how many are not)."""
    values, bad = [], 0
    for line in filter(None, Path(path).read_bytes().split(b"\n")):
        try:
            value = log_line(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            values.append(value)
        else:
            bad += 1
    return values, bad


def read_json(path):
    """Return the JSON object in a file, a dict. Raises UserError that names the file."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def whole_directory(path, check):
    """Yield an empty temporary directory that takes path's place when the block ends well.

    check(path) raises UserError where what is there must not be replaced. The old directory is
    moved aside, the new one moved in, then the old removed: at any moment one of the two is
    whole."""
    path = Path(os.path.realpath(path))  # a link to a folder stays a link
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent, patience=60):  # another process may be moving its own there
        check(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    new.mkdir()  # mkdtemp's directory is for the owner alone
    try:
        yield new
        with lock(path.parent, patience=60):
            check(path)  # again: hours may have passed
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
    finally:
        if old.exists() and not path.exists():  # interrupted between the renames
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)


def check_place(path):
    """Raise UserError where no directory can be made whole; path: without links."""
    if path.is_symlink():
        raise UserError(f"--out {path} is a link that leads round in a circle (Too many levels of "
                        "symbolic links)")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is not a directory: choose another name")
    if path == Path.cwd().resolve():
        raise UserError(f"--out {path} is the current directory: choose a name of its own")


def load_checkpoint(path):
    """Return what torch.save wrote to path, tensors and plain Python types only. Raises UserError,
    also where a byte has changed since: the archive has sums, which torch.load does not check."""
    try:
        if zipfile.is_zipfile(path):  # the format of before 2020 is not one, and has no sums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"the sum of {damaged} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # whatever a damaged file makes the reader raise
        reason = first_line(error, "it is empty")
        raise UserError(f"{path} is not a checkpoint that can be read: {reason}") from None


def misfits(expected, weights):
    """Return what is wrong, in words, with tensors that are to be loaded: names that are missing or
    unknown, other shapes, and other dtypes, which would be cast without a word.

    expected, weights: {name: tensor}."""
    problems = [f"no {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unknown {name}" for name in sorted(weights.keys() - expected.keys())]
    for name in filter(weights.__contains__, expected):
        wanted, w = expected[name], weights[name]
        plain = w.layout == torch.strided and w.device.type != "meta"
        found = tuple(w.shape) if plain else "not a plain tensor"
        if found != tuple(wanted.shape):
            problems.append(f"{name} is {found}, must be {tuple(wanted.shape)}")
        elif w.dtype != wanted.dtype:
            problems.append(f"{name} is {w.dtype}, must be {wanted.dtype}")
    return problems


def fit_weights(model, weights, complaint):
    """Load a state dict. Raises UserError that begins with `complaint` and names every tensor that
    does not fit, see misfits, or differs from another name of the same weights."""
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise UserError(f"{complaint}: they are not a state dict of names and tensors")
    problems = misfits(model.state_dict(), weights)
    if problems:
        raise UserError(f"{complaint}: {'; '.join(problems)}")
    names = {}  # {address: the first name there}: a tied head is the embedding
    for name, w in model.state_dict().items():
        first = names.setdefault(w.data_ptr(), name)
        if first != name and not torch.allclose(weights[first], weights[name], rtol=0, atol=0,
                                                equal_nan=True):
            raise UserError(f"{complaint}: {first} and {name} are the same weights here, and "
                            "differ there: one would be lost")
    model.load_state_dict(weights)


def check_finite(model, path):
    """Raise UserError where a weight of a model that comes from `path` is not finite."""
    for name, w in model.state_dict().items():
        if not w.isfinite().all():
            raise UserError(f"the weights in {path} are damaged: {name} is not finite")


def from_hub(function, repository, *arguments, **options):
    """Return the path that huggingface_hub's `function` fetches to; it resumes and checks. Raises
    UserError."""
    if not in_terminal():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{repository} is on the Hugging Face hub: "
                        "pip install huggingface_hub") from None
    try:
        return Path(getattr(huggingface_hub, function)(repository, *arguments, **options))
    except Exception as error:  # whatever the network or the hub makes of it
        reason = first_line(error, type(error).__name__)
        raise UserError(f"{repository} was not fetched from the Hugging Face hub: "
                        f"{reason}") from None


@contextlib.contextmanager
def lock(directory, patience=0):
    """Hold directory/.lock: one process at a time writes there. Raises UserError that names the
    holder if it has the lock for `patience` seconds more.

    The system drops the lock with the process, however that ends."""
    path = Path(directory) / ".lock"
    deadline = time.monotonic() + patience
    while not (file := try_lock(path)):
        if time.monotonic() >= deadline:
            holder = path.read_text() if path.exists() else "unknown"
            raise UserError(f"{directory} is in use by process {holder}: wait for it or stop it")
        time.sleep(0.05)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        file.close()


BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK, errno.ENOENT)


def try_lock(path):
    """Return the open file at path, locked; None where another process holds it or just removed
    it. Raises UserError, as on a file system without locks."""
    file = open(path, "a+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(2 ** 30)  # far behind the holder's number, which others read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except OSError as error:
        if error.errno not in BUSY:
            path.unlink(missing_ok=True)
            raise UserError(f"{path} cannot be locked ({error.strerror}): choose a directory on a "
                            "local disk with --out (for a table --table)") from None
    file.close()
    return None
