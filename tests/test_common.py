"""What every script does with consoles, pipes and full disks; in processes of their own."""

import argparse
import errno
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import OUR_FILES, ROOT, script

from parts import cli, files, machine
from parts.cli import UserError, new_directory, new_file, progress_bar
from parts.files import lock, whole_directory, whole_file, write_json, write_text
from parts.machine import matmul_peak, pick_device
from parts.reading import load_checkpoint, log_line, read_json

IMPORTS = "import sys; sys.argv = ['x.py']; from parts.cli import *"  # which needs no torch


def python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", f"{IMPORTS}\n{code}"],
        cwd=ROOT,
        capture_output=True,
        **options,
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_is_not_utf8_shows_replacements(encoding):
    done = python(
        "run_script(lambda: print('caf\u00e9 \u4f60\u597d'))",
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (
        done.returncode == 0
        and done.stdout.decode(encoding)
        == ("caf\u00e9" if encoding == "cp1252" else "caf?") + " ??\n"
    )


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    code = "run_script(lambda: [print('line', i) for i in range(100_000)])"
    done = subprocess.run(
        f"{sys.executable} -c \"{IMPORTS}; {code}\""
        " | head -1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("line 0\n", "")


@pytest.mark.parametrize(
    "error, said",
    [
        ("UserError('a\\nb')", b"x.py: error: a\\nb\n"),
        ("OSError(28, 'No space left on device', 'f')", b"f: No space left on device\n"),
        ("MemoryError()", b"not enough memory or disk: allocation failed\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, said):
    done = python(f"def main():\n    raise {error}\nrun_script(main)")
    assert done.returncode == 2 and done.stderr.endswith(said) and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_streams_that_are_closed_lead_to_nowhere(closed, tmp_path):
    def main():
        with open(tmp_path / "f", "w") as file:
            for number, stream in enumerate((sys.stdout, sys.stderr), start=1):
                print("said", file=stream, flush=True)
                os.write(number, b"said")
            if 0 in closed:
                file.write(sys.stdin.read())
            file.write("mine")
        raise UserError("said")

    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number in closed:
                os.close(number)
                setattr(sys, ("stdin", "stdout", "stderr")[number], None)
            cli.run_script(main)
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert (tmp_path / "f").read_text() == "mine"


def test_a_mistake_of_ours_shows_where():
    done = python("run_script(lambda: 1 / 0)")
    assert done.returncode == 1 and b"Traceback" in done.stderr


def test_a_full_disk_leaves_what_was_whole(full_disk, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    for write in (
        lambda file: file.write(bytes(1 << 20)),
        lambda file: torch.save(torch.zeros(1 << 18), file),
    ):
        with pytest.raises((OSError, RuntimeError)), whole_file(path, "wb") as file:
            write(file)
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_peak_of_a_gpu_is_its_own_or_measured(monkeypatch, name, peak):
    def measured(*size, **options):
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "randn", measured)
    if peak:
        assert matmul_peak(torch.device("cuda"), torch.bfloat16) == peak
    else:
        with pytest.raises(InterruptedError):
            matmul_peak(torch.device("cuda"), torch.bfloat16)


def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path):
    """torch.load alone takes it, with other weights."""
    path, weights = tmp_path / "ckpt.pt", torch.arange(4000, dtype=torch.float32)
    torch.save({"model": weights}, path)
    good = path.read_bytes()
    place = good.index(weights[1000:1010].numpy().tobytes())
    for at in (place, place + 4000, len(good) // 2):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        assert not torch.load(path)["model"].equal(weights)
        with pytest.raises(UserError, match="ckpt.pt is not a checkpoint .*: the checksum of "):
            load_checkpoint(path)
    for old in (False, True):  # the format of before 2020 has no sums
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=not old)
        assert load_checkpoint(path)["model"].equal(weights)


def test_progress_in_a_log_is_lines_now_and_then(monkeypatch, capsys):
    """And none for short work, and none after the end."""
    for _ in progress_bar(range(100), desc="short"):
        pass
    monkeypatch.setattr(cli, "LINE_SECONDS", 0.02)
    with progress_bar(total=4, desc="long", postfix="loss 3") as bar:
        for _ in range(3):
            bar.update()
            bar.set_postfix_str("loss 2.5")
            time.sleep(0.15)
            bar.set_postfix_str("loss 2.5")
            bar.set_postfix_str("loss 2.5")
    said = capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == said.out == "" and "\r" not in said.err
    lines = said.err.splitlines()
    assert 3 <= len(lines) <= 4  # one each time, however often the bar is told
    assert lines[-1] == "long:  75%| 00:00 so far, 00:00 to go, loss 2.5"


def test_every_bar_is_one_of_those():
    for path in OUR_FILES:
        assert path.name == "cli.py" or not re.search(r"\btqdm\(|trange", path.read_text()), path


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL"])
def test_a_file_system_without_locks_is_named(code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(getattr(errno, code), "Function not implemented")
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    said = r"^\S+ cannot be locked \(Function not .* local disk with --out"
    with pytest.raises(UserError, match=said), lock(tmp_path, patience=60):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["chmod", "fchmod", "fsync"])
def test_what_a_mounted_bucket_does_not_offer_stops_no_file(name, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")
    monkeypatch.setattr(os, name, refuse)
    write_text(tmp_path / "f", "new")
    with whole_directory(tmp_path / "d", lambda path: None) as new:
        write_text(new / "f", "new")
    assert [path.read_text() for path in tmp_path.rglob("f")] == ["new", "new"]


def test_a_disk_that_fails_does_stop_it(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "f", "new")
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_mode_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "f", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("file")
    with whole_file(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for kind, path, said in ((new_file, tmp_path, "which is not a file"),
                             (new_file, tmp_path / "pipe", "which is not a file"),
                             (new_file, tmp_path / "file" / "x", "file is not a directory"),
                             (new_directory, tmp_path / "file", "file is not a directory"),
                             (new_directory, " ", "is empty")):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            kind(str(path))
    assert new_file(str(tmp_path / "a" / "b")).endswith("b") and new_directory("out") == "out"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["train", "sample", "bench", "runs/draft", "tools/sweep"])
def test_compiling_needs_a_compiler_which_is_said_before_the_work(name, run, tmp_path,
                                                                  monkeypatch):
    flags = {"bench": [], "sample": ["--run", run],
             "runs/draft": ["--run", run, "--out", "out.csv"],
             "tools/sweep": ["--budgets", "1e9", "--recurrences", "2", "--out", "out"]}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = script(f"{name}.py", "--compile", "--device", "cpu",
                  *flags.get(name, ["--out", "out"]), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert "--compile on a CPU needs a C++ compiler" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run", "data"}  # of the fixture


def test_another_compiler_may_be_named_and_a_gpu_needs_triton(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    assert pick_device("cpu", compiled=True) == torch.device("cpu")
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none does not exist: install g.., name another"):
        pick_device("cpu", compiled=True)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="--compile on a GPU needs triton"):
        machine.check_compiler("cuda")


def test_json_has_no_number_that_is_not_finite(tmp_path):
    value = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf, "d": None, 4: True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == {"a": [None, 1.5, [None, 2]],
                                              "b": {"c": None, "d": None, "4": True}}
    assert "NaN" not in (tmp_path / "x.json").read_text()


@pytest.mark.parametrize("written", ["null", "NaN"])  # as runs of before wrote it
def test_null_in_a_log_is_read_as_nan(written):
    line = log_line('{"loss": X, "val_loss": {"1": 2.0, "4": X}}'.replace("X", written))
    assert math.isnan(line["loss"]) and math.isnan(line["val_loss"]["4"])
    assert line["val_loss"]["1"] == 2


def test_every_script_writes_json_by_one_function():
    """parts/files.py's, which writes null for NaN. The other files write no fractions."""
    users = {path.name for path in OUR_FILES
             if "json.dump" in path.read_text()}
    assert users <= {"files.py", "data.py", "tokenizer.py", "sweep.py"}
