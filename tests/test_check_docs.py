"""The check of the documents: ours pass; what is wrong in a made-up one is found, and only that."""

import subprocess

import pytest
from conftest import ROOT, script

from tools import check_docs

GOOD = """# A document

    small="--n-embd 32 --max-steps 10"
    python train.py $small --mean-recurrence 1 \\
        --out out/x && python sample.py    # don't run this

Then `python -m tools.evaluate --recurrence 1 2` and [results](results/README.md), see `model.py`.

```bash
RATES="1e-1 3e-1" STEPS=2 bash runs/stability.sh
for seed in 0 1; do
    python train.py $small --seed $seed --out out/$seed
done
python -m tools.sweep --budgets 1e12 --recurrences 1 2 --n-embd 16
python -m runs.half out/half results | tee half.txt
python - <<'EOF'
from model import Parcae
for T in 1, 4:

    print("$T", T)
EOF
```
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """faults(text): what check finds in a document of that text beside our scripts."""
    def check(text, name="made-up.md"):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / "README.md").write_text("# Results\n")
        (tmp_path / name).write_text(text)
        return check_docs.check([tmp_path / name])
    return check


def test_our_documents_have_no_fault():
    paths = check_docs.find_documents()
    assert {"README.md", "exercises.md", "p_hop.sh"} <= {path.name for path in paths}
    assert check_docs.check(paths) == []


def test_a_good_document_has_no_fault_and_all_its_commands_are_read(faults):
    assert faults(GOOD) == []
    texts = [command.text for command in check_docs.read_commands(GOOD)]
    assert len(texts) == 8 and texts[1].endswith("don't run this") and texts[4].endswith("done")


def test_what_is_no_command_is_left_alone(faults):
    assert faults("""# Made up

    for t in range(4):
        h = block(h)

1. In a list

   ```python
   for t in range(4):
       x="1"
   ```

```
python train.py    # and what it prints
loss 1.2 at T = 4, for all
```

Then `python train.py --resume ...`, `python train.py [--seed 1]`,
`python -m runs.NAME`, `bash runs/<name>.sh`, `out/x.py`.
""") == []


def test_a_fence_in_a_list_is_read(faults):
    assert len(faults("- this\n\n   ```\n   python train.py --nothing\n   ```\n")) == 1


@pytest.mark.parametrize("line, what", [
    ("    python trian.py", "trian.py does not exist"),
    ("    bash runs/nothing.sh", "runs/nothing.sh does not exist"),
    ("    python -m runs.nothing", "runs/nothing.py does not exist"),
    ("    pip install -r requirement.txt", "requirement.txt does not exist"),
    ("    torchrun --nproc-per-node=8 train.py --presets x", "--presets"),
    ("    python train.py --max-steps none", "--max-steps"),
    ("    python train.py $unset", "$unset is not set"),
    ("    python scaling.py predict", "--flops"),
    ("    python scaling.py fit --budgets 1", "--budgets"),
    ("    python -m tools.sweep --budgets 1e12 --recurrences 1 --n-emd 3", "--n-emd"),
    ("    python -c \"from model import Parcel\"", "cannot import name 'Parcel'"),
    ("    python -c \"from parts.cli import Parcer\"", "'Parcer' from 'parts.cli'"),
    ("    python -c \"import common\"", "No module named 'common'"),
    ("    python -c \"for T in 1, 4\"", "line 1 of the snippet"),
    ("    for T in 1 x; do\n      python sample.py --recurrence $T\n    done",
     "--recurrence"),
    ("    python train.py --out \"out/x", "to its end"),
    ("Then `bash runs/nothing.sh` and", "runs/nothing.sh does not exist"),
    ("Then `python scaling.py fit\n--resample 3` and", "--resample"),
    ("[here](results/README.md#nothing)", "no such heading"),
    ("![a picture](results/nothing.png)", "results/nothing.png"),
    ("See `results/nothing.csv`.", "results/nothing.csv"),
])
def test_each_kind_of_fault(faults, line, what):
    found = faults(f"# Made up\n\n{line}\n")
    assert len(found) == 1 and what in found[0]


def test_a_shell_script_is_checked(faults):
    text = (ROOT / "runs/stability.sh").read_text()
    assert faults(text, "s.sh") == []
    found = faults(text.replace("--injection", "--injections"), "s.sh")
    assert len(found) == 1 and "--injections" in found[0]
    assert len(faults(text + "if\n", "s.sh")) == 1
    found = faults(text.replace("python train.py", "python trains.py"), "s.sh")
    assert any("trains.py does not exist" in fault for fault in found)


def test_faults_are_printed_and_exit_with_1(tmp_path):
    (tmp_path / "x.md").write_text("# x\n\n    python train.py --wrong\n")
    done = script("tools/check_docs.py", "--quick", tmp_path / "x.md")
    assert done.returncode == 1 and done.stdout.splitlines()[0].startswith("x.md:3: ")
    done = script("tools/check_docs.py", "--quick", tmp_path / "y.md")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_full_runs_each_command_in_a_clone_and_logs_it(tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(
        "    word=\"made here\"\n    python -c \"print('$word')\" > made.txt\n"
        "    python -c \"raise SystemExit(3)\"\n    torchrun train.py\n"
        "    python -c 1  # twice\n    python -c 1\n"
        "    n=1 python -c \"open('count', 'a').write('x')\"\n    python -c pass\n"
        "\nor `python -c 'print(7)'`\n")
    (root / "docs/guide.md").write_text(
        "    python -c 'print(7)'\n    python -c \"print('$word')\"\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(root)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    monkeypatch.setattr(check_docs, "ROOT", root)
    copy = tmp_path / "copy"
    # the command that exits with 3, and the variable that the second document does not set
    assert check_docs.run_all(copy, check_docs.find_documents()) == 2
    assert (copy / "made.txt").read_text() == "made here\n" and not (root / "made.txt").exists()
    log = (copy / "docs-log.txt").read_text()
    assert "README.md:3: exit code 3" in log and "README.md:4: skipped: needs GPUs" in log
    assert "docs/guide.md:1: exit code 0" in log and "\n    7\n" in log
    assert "docs/guide.md:2: exit code" in log and "unbound variable" in log
    assert log.count("python -c 1") == 1
    assert (copy / "count").read_text() == "x"  # a command with a variable is no assignment
    with pytest.raises(check_docs.UserError):
        check_docs.run_all(copy, check_docs.find_documents())
