"""Check that the commands in the documents run, and that links and files exist.

    python -m tools.check_docs --quick                  check commands, links, files; run nothing
    python -m tools.check_docs --quick docs/guide.md    check one document
    python -m tools.check_docs --full ../copy           run the commands in a fresh copy: hours

--quick parses each command with the parser of its script, prints a line for each fault, and exits
with 1 if there is one. --full clones the last commit and runs the commands of the code blocks there
in order, without those in SKIP. docs-log.txt there gets seconds, exit codes and last lines.
"""

import argparse
import ast
import contextlib
import functools
import io
import re
import runpy
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import namedtuple
from pathlib import Path
from unittest import mock

from parts.cli import Parser, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = "README.md docs/*.md results/README.md results/others/README.md runs/*.sh"
SKIP = {  # pattern of commands that --full does not run: the reason
    r"out/parcae|SandyResearch|SOURCE|theirs": "needs another project's weights or tokenizer",
    r"torchrun|parcae-140m|--jobs 8|commands\.txt": "needs GPUs",
    r"fineweb|urllib|chinchilla|pip download|--find-links|index-url": "needs the network",
    r"book\.txt|my-notes\.txt|data/mine|eval_data": "needs a file of the reader's own"}
PASSES_ON = {"tools/sweep.py": "train.py", "runs/arena.py": "train.py",
             "runs/recipe.py": "train.py"}  # script: the one that gets the flags it does not know

QUOTED = r"\"[^\"]*\"|'[^']*'"
RUNS = re.compile(rf"(\w+=({QUOTED}|\S*) +)*(python3?|bash|pip|torchrun) ")
SETS = re.compile(rf"\w+=({QUOTED})\s*(#.*)?$")
BEGINS = re.compile(f"{RUNS.pattern}|{SETS.pattern}|for .*; do")
CODE = re.compile(r"^ *```[^\n]*\n(?P<fenced>.*?)^ *```"  # or four spaces after a blank line
                  r"|(?:\A|(?<=\n\n))(?:    [^\n]*(?:\n|\Z)|\n(?=\n*    ))+", re.M | re.S)
# After these lines, bash does not run commands. It prints their words, after it has expanded
# variables, quotes, loops and pipes: \x1f stands between words and \x1e after a command.
NOTE_WORDS = r"""
exec 3>&1 >/dev/null
PATH=/nowhere
note() { local IFS=$'\x1f'; printf '%s\x1e' "$*" >&3; }
for name in python3 bash pip torchrun; do eval "$name() { note $name \"\$@\"; }"; done
python() {
    local code
    if [ "${1-}" = - ]; then read -rd '' code; set -- -c "$code"; fi
    note python "$@"
}
xargs() {
    until [ "${1-python}" = python ]; do shift; done
    while read -ra words; do "$@" "${words[@]}"; done
}
cd() { :; }
"""

# block: in a code block, not between backticks. setup: the assignments that it may use
Command = namedtuple("Command", "line text block setup")

# ------------------------------------------------------------------------------- reading


def split_markdown(text):
    """Return ([(line number, text)] of the code blocks, the rest, blank where they were)."""
    blocks = []
    for match in CODE.finditer(text):
        start, end = match.span("fenced" if match["fenced"] is not None else 0)
        blocks.append((text.count("\n", 0, start) + 1, textwrap.dedent(text[start:end])))
    return blocks, CODE.sub(lambda match: "\n" * match[0].count("\n"), text)


@functools.cache
def bash_says(text):
    """Return the syntax error that bash finds in a text, "" if the text is complete."""
    done = subprocess.run(["bash", "-n"], input=text + "\n", capture_output=True, text=True)
    return done.stderr or ("it is incomplete" if text.endswith("\\") else "")


def inline_spans(prose):
    """Yield (line number, text) of each span between backticks, which may contain line ends."""
    for match in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)*)`", prose):
        yield prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split())


def read_commands(text):
    """Return the commands in a Markdown text, in order, without the output shown between them."""
    blocks, prose = split_markdown(text)
    commands, setup = [], []
    for number, block in blocks:
        lines = block.split("\n")
        while lines:
            n = 1  # lines that the command takes
            if BEGINS.match(lines[0]):
                texts = {n: "\n".join(lines[:n]) for n in range(1, len(lines) + 1)}
                n = next((n for n in texts if not bash_says(texts[n])), 1)
                commands.append(Command(number, texts[n].strip(), True, [*setup]))
                if SETS.match(texts[n]):
                    setup.append(texts[n])
            lines, number = lines[n:], number + n
    commands += [Command(number, span, False, setup)
                 for number, span in inline_spans(prose) if RUNS.match(span)]
    return sorted(commands)

# ------------------------------------------------------------------------------- commands


@functools.cache
def parser_of(script):
    """Return the parser of a script, a path relative to ROOT; None if it has no parser."""
    if "parse_" not in (ROOT / script).read_text(encoding="utf-8"):
        return None
    parsers = []

    def stop(parser, *arguments, **options):
        parsers.append(parser)
        sys.exit()  # before the script does any work

    with (mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
          contextlib.suppress(SystemExit)):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return parsers[0]


def check_arguments(script, words):
    """Return the faults in a script's arguments."""
    parser, rest = parser_of(script), words
    if parser:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                rest = parser.parse_known_args(words)[1]
        except UserError as error:
            return [f"{script}: {error}"]
        except SystemExit:  # --help
            return []
    if rest and script in PASSES_ON:
        return check_arguments(PASSES_ON[script], rest)
    flags = [word for word in rest if word.startswith("--")]
    return [f"{script} has no {' '.join(flags or rest)}"] if rest else []


def check_snippet(code):
    """Return the faults in a piece of Python: of its syntax, or imports that do not exist."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return [f"Python, line {error.lineno} of the snippet: {error.msg}"]
    faults = []
    for node in ast.walk(tree):
        start = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
        for name in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            try:
                exec(f"{start} {name.name}", {})
            except ImportError as error:
                faults.append(str(error))
    return faults


def check_words(name, *rest):
    """Return the faults in one command, given as its name and its other words."""
    if name == "pip":
        files = re.findall(r"-r (\S+)", " ".join(rest))
        return [f"{file} does not exist" for file in files if not (ROOT / file).exists()]
    while name == "torchrun" and rest and not rest[0].endswith(".py"):
        rest = rest[1:]
    if not rest or rest[0] in ("-V", "--version"):
        return []
    if rest[0] == "-c":
        return check_snippet(rest[1])
    if rest[0] == "-m":
        if rest[1] in ("pip", "pytest", "venv"):
            return []
        rest = [rest[1].replace(".", "/") + ".py", *rest[2:]]
    if not (ROOT / rest[0]).exists():
        return [f"{rest[0]} does not exist"]
    return [] if name == "bash" else check_arguments(rest[0], rest[1:])


def check_command(command):
    """Return the faults in a Command, a list of texts."""
    if not command.block and re.search(r"NAME|SOURCE|[<\[]|\.\.\.", command.text):
        return []  # not complete
    if bash_says(command.text):
        return ["bash cannot read this to its end"]
    texts = [NOTE_WORDS, "set -u" * command.block, *command.setup, command.text]
    with tempfile.TemporaryDirectory() as folder:  # for the files that > writes
        done = run_bash(texts, folder, stderr=subprocess.PIPE)
    faults = [f"${name} is not set before"
              for name in re.findall(r"(\w+): unbound variable", done.stderr)]
    for line in done.stdout.split("\x1e")[:-1]:
        faults += check_words(*line.split("\x1f"))
    return list(dict.fromkeys(faults))  # a loop repeats its faults


def run_bash(texts, folder, stderr):
    """Run texts as one bash script in a folder; stderr: see subprocess.run."""
    return subprocess.run(["bash", "-c", "\n".join(texts)], cwd=folder, stderr=stderr, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, errors="replace")

# ------------------------------------------------------------------------------- documents


def heading_names(path):
    """Return the names that links to a Markdown file's headings use after "#"."""
    prose = split_markdown(path.read_text(encoding="utf-8"))[1]
    headings = re.findall(r"^#+ +(.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_names(path, prose):
    """Yield (line, fault) for each relative link whose file or heading does not exist, and for each
    file name between backticks that does not exist."""
    without_code = re.sub(r"`[^`]*`", lambda span: re.sub(r"[^\n]", "x", span[0]), prose)
    for match in re.finditer(r"\]\((?!\w+:)([^)\s]+)\)", without_code):  # not https: and the like
        number = prose.count("\n", 0, match.start()) + 1
        file, _, name = match[1].partition("#")
        target = path.parent / file if file else path
        if not target.exists():
            yield number, f"link to {file}, which does not exist"
        elif name and target.suffix == ".md" and name not in heading_names(target):
            yield number, f"link to {match[1]}: no such heading"
    for number, span in inline_spans(prose):
        ours = re.fullmatch(r"(\.\./)?((results|runs|tests)/\S*|[\w./-]+\.(py|sh|md|ipynb))", span)
        made_up = re.search(r"NAME|SOURCE|\.\.\.|[<>*{}\[\]]|^(out|data)/", span)
        if ours and not made_up and not any((at / span).exists() for at in (ROOT, path.parent)):
            yield number, f"`{span}` does not exist"


def find_documents():
    """Return the paths of the repository's documents."""
    return [path for pattern in DOCUMENTS.split() for path in sorted(ROOT.glob(pattern))]


def check(paths):
    """Return the faults of documents, a line of text each. A bash script counts as one command."""
    lines = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        faults, commands = [], [Command(1, text, True, [])]
        if path.suffix != ".sh":
            faults, commands = [*check_names(path, split_markdown(text)[1])], read_commands(text)
        for command in commands:
            faults += [(command.line, fault) for fault in check_command(command)]
        lines += [f"{name_of(path)}:{line}: {fault}" for line, fault in sorted(faults)]
    return lines


def name_of(path):
    """Return a document's path in the repository, or its file name if it is outside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name

# ------------------------------------------------------------------------------- running


def run_all(folder, paths):
    """Clone the repository to folder and run there, each once, the commands of code blocks and the
    bash scripts. Return how many failed."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"--full {folder} exists, must be a new directory")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    failed, once = 0, set()
    with open(folder / "docs-log.txt", "w", encoding="utf-8") as log:
        for path in paths:
            commands = [Command(1, f"bash {name_of(path)}", True, [])]
            if path.suffix != ".sh":
                commands = read_commands(path.read_text(encoding="utf-8"))
            for command in commands:
                bare = re.sub(r" +#.*", "", command.text)
                if not command.block or ("$" not in bare and bare in once):
                    continue
                once.add(bare)
                code, said, output = run_command(command, folder)
                failed += code != 0
                head = f"{name_of(path)}:{command.line}: {said}"
                print(head, command.text, output, sep="\n", file=log, flush=True)
                print(f"{head}: {command.text.splitlines()[0]}", flush=True)
    print(f"{failed} commands failed; wrote {folder / 'docs-log.txt'}")
    return failed


def run_command(command, folder):
    """Run a command in a folder. Return (exit code, a summary, the last lines of its output)."""
    for pattern, why in SKIP.items():
        if re.search(pattern, command.text):
            return 0, f"skipped: {why}", ""
    start = time.monotonic()
    done = run_bash(["set -u", *command.setup, command.text], folder, stderr=subprocess.STDOUT)
    lines = [line for line in re.split(r"[\r\n]", done.stdout) if line.strip()]
    said = f"exit code {done.returncode}, {time.monotonic() - start:.0f} s"
    return done.returncode, said, "".join(f"    {line}\n" for line in lines[-5:])


def main():
    parser = Parser(description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--quick", action="store_true", help="check and run nothing")
    how.add_argument("--full", metavar="DIR", help="run the commands in a clone at DIR")
    parser.add_argument("documents", nargs="*", metavar="FILE", help=f"(default: {DOCUMENTS})")
    args = parser.parse_args()
    paths = [Path(name).resolve() for name in args.documents] or find_documents()
    if args.full:
        sys.exit(1 if run_all(args.full, paths) else 0)
    faults = check(paths)
    print(*faults, f"{len(paths)} documents, {len(faults)} faults", sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    run_script(main)
