import contextlib
import io
import json
import runpy
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

# What needs torch imports it where it is used: pytest reads this file once more than it has
# processes that test, before any of them begins.

ROOT = Path(__file__).parent.parent
OUR_FILES = [path for folder in (".", "parts", "tools", "runs")
             for path in sorted(ROOT.glob(f"{folder}/*.py"))]
sys.path.insert(0, str(ROOT))

def pytest_addoption(parser):
    parser.addoption("--config", default="", metavar="NAME=VALUE,...",
                     help="run what must hold for any model alone, with these fields of "
                     "ParcaeConfig in every model: injection=concat,n_head=4")


def pytest_configure(config):
    config.addinivalue_line("markers", "any_config: holds whatever a model's configuration is")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--config"):
        others = [item for item in items if not item.get_closest_marker("any_config")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def config_fields(text):
    """{name: value} of "name=value,...": numbers, true, false and none as JSON has them, else
    text."""
    fields = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            fields[name] = json.loads(value.lower().replace("none", "null"))
        except ValueError:
            fields[name] = value
    return fields


def script(name, *args, stdin=b"", cwd="."):
    """Run a script as from the command line, but in this process: importing torch takes seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, sys.stdin, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv, sys.stdin = [name, *map(str, args)], io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            contextlib.chdir(cwd),
        ):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.stdin, handlers = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models are small: threads cost more than they bring."""
    import torch
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    """Runs measure the machine's peak, half a second each; those in processes of their own do."""
    monkeypatch.setattr("parts.run_directory.matmul_peak", lambda *arguments: 1e11)


def save_run(model, directory, **settings):
    """What other scripts read of a run directory of train.py, but for the tokenizer."""
    import torch
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model": asdict(model.config)} | settings))
    torch.save({"model": model.state_dict()}, directory / "ckpt.pt")


@pytest.fixture
def build(pytestconfig):
    """build(**config) makes a small model whose every weight matters: none is left at zero. What a
    test does not choose comes from --config."""
    import torch

    from model import Parcae, ParcaeConfig
    asked = config_fields(pytestconfig.getoption("--config"))

    def build(seed=0, **kwargs):
        torch.manual_seed(seed)
        base = {
            "vocab_size": 50,
            "block_size": 32,
            "n_embd": 32,
            "n_head": 2,
            "n_prelude": 1,
            "n_recurrent": 2,
            "n_coda": 1,
            "mean_recurrence": 4,
        }
        model = Parcae(ParcaeConfig(**base | asked | kwargs))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("attn.c_proj.weight", "mlp.proj.weight")):
                    p.normal_(std=0.2)
        return model

    return build


def cache_bytes(cache):
    """Return the bytes of all keys and values that a cache has place for."""
    return sum(t.nbytes for pairs in cache.pairs for pair in pairs for t in pair)


@pytest.fixture
def tokens():
    import torch
    return torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 20,000 bytes, as if the disk were full."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def run(build, tmp_path):
    """A run directory with a tokenizer, and the data that it names."""
    from data import prepare
    data = prepare("text", tmp_path / "data", "bytes", [ROOT / "model.py"])
    save_run(build(vocab_size=320), tmp_path / "run", data=str(data))
    (tmp_path / "run" / "tokenizer.json").write_text((data / "tokenizer.json").read_text())
    return tmp_path / "run"
