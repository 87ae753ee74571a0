"""What every script needs: the one-line error, checked flags, files that appear whole, a lock.

Nothing here knows of models. Files are written to a temporary name and renamed, so that whatever
happens, a reader finds the old file or the new one, never a half.
"""

import argparse
import contextlib
import ctypes
import errno
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


class UserError(ValueError):
    """A value from outside is wrong. The message says which and what is allowed; `run_script`
    prints it alone."""

# ----------------------------------------------------------------------------- the command line


def run_script(main):
    """Call main(). What a user can mend becomes one line and exit code 2, no traceback."""
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # consoles that are not UTF-8
    # as Ctrl-C: temporary files are removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except UserError as error:
        message = str(error)
    except (OSError, MemoryError, RuntimeError) as error:
        message = trouble(error)
        if not message:
            raise
    message = message.replace("\r", "\\r").replace("\n", "\\n")
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def open_streams():
    """Lead the standard streams that are closed to nowhere, as `2>/dev/null` does: else the next
    files opened would get their numbers, and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed, and with those below open the number that comes next
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def nothing_to_run(about):
    """What a file says that others import: its docstring."""
    print(f"{about}\nNothing to run here: this file is imported. Begin with: python train.py")


def trouble(error):
    """What the system refused, in one line: a file, disk or memory; None for any other error."""
    if isinstance(error, OSError):
        name = error.filename2 or error.filename  # of a rename the file that was to be
        return f"{name}: {error.strerror}" if name else str(error)
    if isinstance(error.__context__, OSError):
        # torch.save on a full disk ends in a RuntimeError of its own
        return trouble(error.__context__)
    text = str(error)
    no_room = "out of memory", "allocate memory", "PytorchStreamWriter"
    if isinstance(error, MemoryError) or any(words in text for words in no_room):
        return f"not enough memory or disk: {first_line(error, 'allocation failed')}"
    return None


def first_line(error, otherwise):
    """The first line of an error's message, or another text where it has none."""
    return (str(error).splitlines() or [otherwise])[0]


LINE_SECONDS = 25  # between two lines of the same work, in a log


class Lines(tqdm):
    """A progress bar where there is no terminal: a plain line now and then, none for what is soon
    done."""

    def __init__(self, *arguments, **options):
        self.closed = threading.Event()
        # a file for what tqdm itself writes at the end
        line = {"bar_format": "{l_bar} {elapsed} so far, {remaining} to go{postfix}",
                "file": io.StringIO()}
        super().__init__(*arguments, **options | line)
        if not self.disable:
            threading.Thread(target=self.report, args=[weakref.ref(self), self.closed],
                             daemon=True).start()

    @staticmethod
    def report(bar, closed):
        """Print lines until the bar is closed. bar: a reference to it that does not keep it."""
        while not closed.wait(LINE_SECONDS):
            with contextlib.suppress(OSError):
                print(bar(), file=sys.stderr, flush=True)

    def display(self, msg=None, pos=None):
        """Draw nothing."""

    def close(self):
        self.closed.set()
        super().close()


def progress_bar(iterable=None, **options):
    """A tqdm bar, of an iterable or to be updated; where there is no terminal, see Lines."""
    return (tqdm if in_terminal() else Lines)(iterable, **{"leave": False} | options)


def in_terminal():
    """Whether somebody sees bars move."""
    return hasattr(sys.stderr, "isatty") and sys.stderr.isatty()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows a script's docstring as it is and raises UserError."""

    def __init__(self, **options):
        super().__init__(usage=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        # "argument --seed: is -1, must ..." becomes "--seed is -1, must ...", as do choices
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        raise UserError(re.sub(r": invalid choice: (.*) \(choose from (.*)\)$",
                               r" is \1, must be one of \2", message))


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number from low to high; above: larger than low.

    >>> number(int, 1)("2e3")
    2000
    """
    limits = f"{'above' if above else 'at least'} {low}"
    if high < math.inf:
        limits = f"at least {low} and at most {high}"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"invalid {kind.__name__} value: {text!r}, must be {limits}") from None
        if kind is int and value.is_integer():
            value = int(value)
        if not math.isfinite(value) or not low <= value <= high or above and value == low:
            raise argparse.ArgumentTypeError(f"is {value}, must be {limits}")
        if not isinstance(value, kind):
            raise argparse.ArgumentTypeError(f"is {value}, must be a whole number, {limits}")
        return value
    return parse


def flag_of(name):
    """The flag of a setting: "--top-k" of "top_k"."""
    return "--" + name.replace("_", "-")


def check_needs(args, **needs):
    """Raise UserError for a flag that does nothing without another one. needs: {name: the other};
    of both, what is not given is None."""
    for name, other in needs.items():
        if getattr(args, name) is not None and getattr(args, other) is None:
            raise UserError(f"{flag_of(name)} does nothing without {flag_of(other)}: give that, "
                            "too, or leave it out")


def check_idle(parser, args, names, why):
    """Raise UserError for the flags among `names` that are given (not at their defaults), since
    they do nothing: why."""
    idle = [flag_of(name) for name in names if getattr(args, name) != parser.get_default(name)]
    if idle:
        raise UserError(f"{why}: leave out {', '.join(idle)}")


def some_path(text):
    """An argparse type: a path, not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty, must name a file or directory")
    return text


def new_file(text):
    """An argparse type: a file that can be written, there already or not. It is asked for before
    the work whose result it is to hold."""
    path = Path(some_path(text))
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"is {text}, which is no file")
    new_directory(path.parent)
    return text


def new_directory(text):
    """An argparse type: a directory that can be written to, there already or not."""
    path = Path(some_path(str(text)))
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"is {text}, but {there} is no directory")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"is {text}, but {there} may not be written to")
    return text


COUNT = number(int, 1, 2 ** 53)
POSITIVE = number(float, 0, above=True)
SEED = number(int, 0, 2 ** 32 - 1)
LOOPS = number(int, 1, 65536)

# ----------------------------------------------------------------------------- files

# what a file system answers that does not offer a call: mounted buckets, Lustre, FUSE
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """Open a file that takes path's place when the block ends well; else no file is left behind.

    Its directory is made where there is none: what took hours to compute is not lost for that."""
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
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


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


def read_json(path):
    """The JSON object in a file, a dict. Raises UserError that names the file."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


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


def patient(check, path, attempts=6):
    """check(path), again where it fails: another process may just be moving what is there."""
    for attempt in range(attempts):
        try:
            return check(path)
        except (UserError, FileNotFoundError):
            if attempt == attempts - 1:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def whole_directory(path, check):
    """Yield an empty temporary directory that takes path's place when the block ends well.

    check(path) raises UserError where what is there must not be replaced. The old directory is
    moved aside, the new one moved in, then the old removed: at any moment one of the two is
    whole."""
    path = Path(os.path.realpath(path))  # a link to a folder stays a link
    patient(check, path)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        yield new
        while new.exists():  # another process may put its own there in between
            patient(check, path)
            # nothing there, or another process was faster
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, old)
            try:
                os.rename(new, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():  # interrupted between the renames
            os.rename(old, path)
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.rmdir()
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if it is still empty


def load_checkpoint(path):
    """What torch.save wrote to path, tensors and plain Python types only. Raises UserError, also
    where a byte has changed since: the archive has sums, which torch.load does not check."""
    try:
        if zipfile.is_zipfile(path):  # older formats are none, and have no sums
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
    """What is wrong, in words, with tensors that are to be loaded: names that are missing or
    unknown, other shapes, and other dtypes, which would be cast without a word.

    expected, weights: {name: tensor}."""
    problems = [f"no {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unknown {name}" for name in sorted(weights.keys() - expected.keys())]
    for name in filter(weights.__contains__, expected):
        wanted, w = expected[name], weights[name]
        plain = w.layout == torch.strided and w.device.type != "meta"
        found = tuple(w.shape) if plain else "no plain tensor"
        if found != tuple(wanted.shape):
            problems.append(f"{name} is {found}, must be {tuple(wanted.shape)}")
        elif w.dtype != wanted.dtype:
            problems.append(f"{name} is {w.dtype}, must be {wanted.dtype}")
    return problems


def fit_weights(model, weights, complaint):
    """Load a state dict. Raises UserError that begins with `complaint` and names every tensor that
    does not fit, see misfits, or differs from another name of the same weights."""
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise UserError(f"{complaint}: they are no state dict of names and tensors")
    problems = misfits(model.state_dict(), weights)
    if problems:
        raise UserError(f"{complaint}: {'; '.join(problems)}")
    names = {}  # {address: the first name there}: a tied head is the embedding
    for name, w in model.state_dict().items():
        first = names.setdefault(w.data_ptr(), name)
        if first != name and not same_values(weights[first], weights[name]):
            raise UserError(f"{complaint}: {first} and {name} are the same weights here, and "
                            "differ there: one would be lost")
    model.load_state_dict(weights)


def same_values(a, b):
    return torch.allclose(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def check_finite(model, path):
    """Raise UserError where a weight of a model that comes from `path` is not finite."""
    for name, w in model.state_dict().items():
        if not w.isfinite().all():
            raise UserError(f"the weights in {path} are damaged: {name} is not finite")


def from_hub(function, repository, *arguments, **options):
    """The path that huggingface_hub's `function` fetches to; it resumes and checks. Raises
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


LOCKED_BYTE = 2 ** 30  # on Windows: far behind the holder's number, which others read


@contextlib.contextmanager
def lock(directory, patience=0):
    """Hold directory/.lock: one process at a time writes there. Raises UserError that names the
    holder if it has the lock for `patience` seconds more.

    The system drops the lock with the process, however that ends."""
    path = Path(directory) / ".lock"
    deadline = time.monotonic() + patience
    while True:
        file = open(path, "a+")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.seek(LOCKED_BYTE)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in NOT_OFFERED:
                file.close()
                path.unlink(missing_ok=True)
                raise UserError(f"{directory} is on a file system without locks "
                                f"({error.strerror}): choose a directory on a local disk with "
                                "--out (for a table --table)") from None
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                file.close()
                raise
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise UserError(f"{directory} is in use by process {holder}: "
                            "wait for it or stop it") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its holder removed it between our two steps
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()

# ----------------------------------------------------------------------------- the machine

# dense FLOP/s in bfloat16, from data sheets; of several names that fit, the first counts
BF16_PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12,
             "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
LESS = ("MIG", "Laptop", "4090 D")  # a slice of a chip, or a smaller chip of the same name
SMALL = 64  # channels of models that one thread trains

CXX = {"darwin": "clang++", "win32": "cl"}  # C++ compilers; elsewhere g++


def pick_device(device="auto", compiled=False):
    """A torch.device; "auto" is cuda, mps or cpu, whichever is there first. Raises UserError, also
    where the model is to be compiled and what that needs is missing."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if device == "auto":
        device = available[0]
    name, _, index = device.partition(":")
    if name not in available or device != name and not index.isdecimal():
        raise UserError(f"--device is {device}, must be auto or one of {', '.join(available)}")
    if name == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {device}, there are {torch.cuda.device_count()} CUDA devices")
    if compiled:
        check_compiler(name)
    return torch.device(device)


def check_compiler(kind):
    """Raise UserError where torch.compile lacks what it needs on a kind of device."""
    cxx = os.environ.get("CXX") or CXX.get(sys.platform, "g++")  # as PyTorch chooses it
    if kind == "cpu" and not shutil.which(cxx):
        raise UserError(f"--compile on a CPU needs a C++ compiler, and {cxx} does not exist: "
                        "install g++, name another compiler in CXX, or leave out --compile")
    if kind == "cuda" and not importlib.util.find_spec("triton"):
        raise UserError("--compile on a GPU needs triton: pip install triton, or leave out "
                        "--compile")


def pick_dtype(device, dtype="auto"):
    """A torch.dtype for activations; "auto" is bfloat16 where the device multiplies it faster, else
    float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":  # measured: some CPUs have bf16 instructions that are the slower ones
        faster = matmul_peak(device, torch.bfloat16, 256) > matmul_peak(device, torch.float32, 256)
    else:
        faster = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if faster else torch.float32


def matmul_peak(device, dtype, size=1024):
    """Return the FLOP/s of large matrix products: the data sheet's where known, else the best of a
    few measured in half a second."""
    if device.type == "cuda":
        name = machine_name(device)
        known = [peak for part, peak in BF16_PEAK.items() if part in name]
        if known and dtype == torch.bfloat16 and not any(word in name for word in LESS):
            return known[0]
        size = 8 * size  # a small product ends before the host has heard of it
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, begin = float("inf"), time.perf_counter()
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        stop = time.perf_counter()
        best = min(best, stop - start)
        if stop - begin > 0.5:
            break
    return 2 * size ** 3 / best


def machine_name(device):
    """The name of a GPU, or of the processor as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def use_threads(channels, asked=None):
    """Compute with the number of threads asked for. With None small models take one, others what
    PyTorch takes: OMP_NUM_THREADS, or a thread for each core.

    One thread rounds alike on any number of cores. It trains the default model at two thirds of
    the speed of two threads on two idle cores; but where other programs hold the cores, two
    threads wait for each other, and one is more than twice as fast."""
    if asked is None and channels <= SMALL:
        asked = 1
    if asked is not None:
        torch.set_num_threads(asked)


def keep_freed_memory():
    """Have glibc keep freed memory: by default it maps and clears every large activation afresh,
    which on a CPU costs more than most element-wise operations."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc; Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD, bytes
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    nothing_to_run(__doc__)
