"""Files and directories that appear whole, JSON without NaN, a lock.

Files are written to a temporary name and renamed: a reader finds the old file or the new one.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

from parts.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# what a file system answers that does not offer a call: mounted buckets, Lustre, FUSE
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# what the lock's system call answers while another process has the file, or has just removed it
BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK, errno.ENOENT)


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """Open a file that takes path's place when the block ends well; else no file is left behind.
    Its directory is made where it is missing."""
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


@contextlib.contextmanager
def whole_directory(path, check):
    """Yield an empty directory that takes path's place when the block ends well: the old one is
    moved aside, the new one in, then the old removed. check(path) raises UserError where what is
    there must not be replaced."""
    path = Path(os.path.realpath(path))  # a link to a folder stays a link
    if path.is_symlink():
        raise UserError(f"--out {path} is a link to itself (Too many levels of symbolic links)")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is not a directory: choose another name")
    if path == Path.cwd().resolve():
        raise UserError(f"--out {path} is the current directory: choose a name of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
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


@contextlib.contextmanager
def lock(directory, patience=0):
    """Hold directory/.lock: one process at a time writes there; the system drops the lock with the
    process. Raises UserError that names the holder if it has the lock for `patience` seconds."""
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
