"""Write files and directories that appear whole, and JSON without NaN; lock a directory.

A file is written under a temporary name and then renamed: readers find the old file or the new one.
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

# the errors of file systems that lack a system call, as mounted buckets, Lustre and FUSE may
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# the errors of try_lock while another process holds the file, or has just removed it
BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK, errno.ENOENT)


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """Yield an open file that replaces the one at path if the block ends without an error, and is
    removed otherwise. A missing directory is made."""
    path = Path(os.path.realpath(path))  # a link to a file stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp: only the owner could read its files, and chmod fails on mounted buckets
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
    """Write a value as a JSON file, see json_text."""
    write_text(path, json_text(value, indent=1))


def json_text(value, **options):
    """Return a value as JSON text, with null for NaN and infinity. options: for json.dumps."""
    return json.dumps(with_null(value), allow_nan=False, **options)


def with_null(value):
    """Return a value with None in place of each number that is not finite, however deep."""
    if isinstance(value, dict):
        return {key: with_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [with_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def whole_directory(path, check):
    """Yield an empty directory that replaces the one at path if the block ends without an error:
    the old one is moved aside, the new one is moved in, then the old one is removed. check(path)
    raises UserError if the old one must not be replaced."""
    path = Path(os.path.realpath(path))  # a link to a folder stays a link
    if path.is_symlink():
        raise UserError(f"--out {path} is a link to itself (Too many levels of symbolic links)")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is not a directory: choose another name")
    if path == Path.cwd().resolve():
        raise UserError(f"--out {path} is the current directory: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    check(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    new.mkdir()  # not mkdtemp's own directory, which only the owner can read
    try:
        yield new
        with lock(path.parent, patience=60):
            check(path)  # again: hours may have passed since the first check
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
    finally:
        if old.exists() and not path.exists():  # interrupted between the renames
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def lock(directory, patience=0):
    """Hold directory/.lock: one process at a time writes there, and the lock ends with the process.
    Raises UserError that names the holder if the lock is not free within `patience` seconds."""
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
        with contextlib.suppress(OSError):  # Windows cannot remove an open file
            path.unlink()
        file.close()


def try_lock(path):
    """Return the open and locked file at path; None if another process holds it or has just removed
    it. Raises UserError if it cannot be locked, for example on a file system without locks."""
    file = open(path, "a+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(2 ** 30)  # far behind the process id, which others must be able to read
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
