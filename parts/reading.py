"""Read JSON, logs and checkpoints, and check them before they are used."""

import json
import math
import zipfile
from pathlib import Path

import torch

from parts.errors import UserError, first_line


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


def log_line(text):
    """Return a line of a log, a JSON object in which null stands for NaN. Raises ValueError."""
    def with_nan(pairs):
        return {key: math.nan if part is None else part for key, part in pairs}
    value = json.loads(text, object_pairs_hook=with_nan)
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object")
    return value


def read_json_lines(path):
    """Return (the lines of a log that can be read, see log_line; how many are damaged)."""
    values, bad = [], 0
    for line in filter(None, Path(path).read_bytes().split(b"\n")):
        try:
            values.append(log_line(line))
        except ValueError:
            bad += 1
    return values, bad


def load_checkpoint(path):
    """Return what torch.save wrote to path, if it holds only tensors and plain Python types. Raises
    UserError otherwise, and if a checksum in the file shows that a byte has changed."""
    try:
        if zipfile.is_zipfile(path):  # PyTorch's format before 2020 has no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # a damaged file can raise any error
        reason = first_line(error, "it is empty")
        raise UserError(f"{path} is not a checkpoint that can be read: {reason}") from None


def misfits(expected, weights):
    """Return a list of what is wrong with tensors that are to be loaded, in words: missing and
    unknown names, wrong shapes and dtypes. expected, weights: {name: tensor}."""
    problems = [f"no {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unknown {name}" for name in sorted(weights.keys() - expected.keys(), key=str)]
    for name in sorted(expected.keys() & weights.keys()):
        wanted, w = expected[name], weights[name]
        plain = w.layout == torch.strided and w.device.type != "meta"
        found = tuple(w.shape) if plain else "not a plain tensor"
        if found != tuple(wanted.shape):
            problems.append(f"{name} is {found}, must be {tuple(wanted.shape)}")
        elif w.dtype != wanted.dtype:
            problems.append(f"{name} is {w.dtype}, must be {wanted.dtype}")
    return problems


def fit_weights(model, weights, complaint):
    """Load a state dict. Raises UserError, beginning with `complaint`, that names every tensor that
    does not fit (see misfits) or whose weights differ under two names of one tensor."""
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise UserError(f"{complaint}: they are not a state dict of names and tensors")
    problems = misfits(model.state_dict(), weights)
    if problems:
        raise UserError(f"{complaint}: {'; '.join(problems)}")
    names = {}  # {address: first name}: a tied head shares the embedding
    for name, w in model.state_dict().items():
        first = names.setdefault(w.data_ptr(), name)
        if not torch.allclose(weights[first], weights[name], rtol=0, atol=0, equal_nan=True):
            raise UserError(f"{complaint}: {first} and {name} are one tensor in this model but "
                            "differ in the file: one would be lost")
    model.load_state_dict(weights)


def check_finite(model, path):
    """Raise UserError if a weight of the model, read from `path`, is not finite."""
    for name, w in model.state_dict().items():
        if not w.isfinite().all():
            raise UserError(f"the weights in {path} are damaged: {name} is not finite")
