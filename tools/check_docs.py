"""Check that what the documents say runs.

    python -m tools.check_docs --quick             no training: scripts, flags, values, links, files
    python -m tools.check_docs --quick docs/guide.md    one document
    python -m tools.check_docs --full ../copy      every command, in a fresh copy; takes hours

--quick parses each command with its script's own parser, prints a line for each fault, and exits
with 1 if there is one. --full runs the commands of the code blocks in order, in a clone of what is
committed, and logs seconds, exit codes and last lines in docs-log.txt there. It does not make the
changes of code that an exercise asks for. SKIP says what is not run, and why.
"""

import argparse
import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import re
import runpy
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict, namedtuple
from pathlib import Path
from unittest import mock

from parts.cli import Parser, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = "README.md docs/guide.md docs/manual.md docs/exercises.md docs/teaching.md " \
    "results/README.md runs/*.sh"

# Not run by --full: (document, what the command matches, why).
SKIP = (
    ("", r"out/parcae|SandyResearch|SOURCE|theirs", "needs weights or a tokenizer of others"),
    ("", r"torchrun|parcae-140m|--jobs 8|commands\.txt", "needs GPUs"),
    ("", r"fineweb|urllib|chinchilla", "needs the network"),
    ("", r"pip download|--find-links|index-url", "needs the network, or wheels fetched before"),
    ("", r"book\.txt|my-notes\.txt|data/mine|eval_data", "needs a file of the reader's own"),
    ("docs/exercises.md", r"^python train\.py *(#.*)?$", "the README has made out/default"),
)

PASSES_ON = {"tools/sweep.py": "train.py"}  # flags that it does not know are for this one
RUNS = re.compile(r"(\$ )?(\w+=\S* +)*(python|bash|pip|torchrun) ")
SETS = re.compile(r"\w+=(\"[^\"]*\"|'[^']*')\s*(#.*)?$")
CODE = re.compile(r"^ *```[^\n]*\n(?P<fenced>.*?)^ *```"  # or four spaces after a blank line
                  r"|(?:\A|(?<=\n\n))(?:    [^\n]*(?:\n|\Z)|\n(?=\n*    ))+", re.M | re.S)
# In a bash that begins with this, a command runs nothing: its words, as bash makes them of
# variables, quotes, loops and pipes, go to stdout, \x1f between them and \x1e at the end.
NOTE_WORDS = r"""
exec 3>&1 >/dev/null
PATH=/nowhere
note() { local IFS=$'\x1f'; printf '%s\x1e' "$*" >&3; }
for name in bash pip torchrun; do eval "$name() { note $name \"\$@\"; }"; done
python() {
    local code
    if [ "${1-}" = - ]; then read -rd '' code; set -- -c "$code"; fi
    note python "$@"
}
"""

# block: it stands in a code block, to be run as it is; else between backticks, perhaps shortened
Command = namedtuple("Command", "line text block")

# ------------------------------------------------------------------------------- reading


def split_markdown(text):
    """Return (the code blocks, each (line number, text); the rest, blank where they were)."""
    blocks = []
    for match in CODE.finditer(text):
        start, end = match.span("fenced" if match["fenced"] is not None else 0)
        blocks.append((text.count("\n", 0, start) + 1, textwrap.dedent(text[start:end])))
    return blocks, CODE.sub(lambda match: "\n" * match[0].count("\n"), text)


@functools.cache
def bash_says(text):
    """Return what bash finds wrong with a text, "" if it can be read to its end."""
    done = subprocess.run(["bash", "-n"], input=text + "\n", capture_output=True, text=True)
    unfinished = "it goes on" if text.endswith("\\") else ""
    return done.stderr.strip().replace("\n", "; ") or unfinished


def block_commands(number, block):
    """Yield the commands of a code block; lines that look like none, as outputs, are left out."""
    lines = block.split("\n")
    if not any(RUNS.match(line) or SETS.match(line) for line in lines):
        return  # a picture, Python, a list of files
    start = 0
    while start < len(lines):
        begun = lines[start]
        if not (RUNS.match(begun) or SETS.match(begun) or re.match("mkdir |for ", begun)):
            start += 1
            continue
        texts = {end: "\n".join(lines[start:end]) for end in range(start + 1, len(lines) + 1)}
        whole = (end for end, text in texts.items() if not bash_says(text))
        end = next(whole, start + 1)
        yield Command(number + start, texts[end].removeprefix("$ ").strip(), True)
        start = end


def inline_spans(prose):
    """Yield (line number, text) of what stands between backticks; it may go over a line's end."""
    for match in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)*)`", prose):
        yield prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split())


def read_commands(text):
    """Return all commands of a Markdown text, in order."""
    blocks, prose = split_markdown(text)
    commands = [Command(number, span, False)
                for number, span in inline_spans(prose) if RUNS.match(span)]
    for number, block in blocks:
        commands += block_commands(number, block)
    return sorted(commands)

# ------------------------------------------------------------------------------- commands


@functools.cache
def parser_of(script):
    """Return the parser of a script (path from the root), None where it has none."""
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


def known_flags(script):
    """Return all flags of a script, of its sub-commands and of what it passes flags on to."""
    parsers, flags = [parser_of(script)], set()
    while parsers:
        parser = parsers.pop()
        for action in parser._actions if parser else ():
            flags.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return flags | (known_flags(PASSES_ON[script]) if script in PASSES_ON else set())


def check_arguments(script, words, exact):
    """Return what is wrong with a script's arguments; exact: they are all there, parse them."""
    unknown = [word for word in words if re.match("--[a-z]", word)
               and word.split("=")[0] not in known_flags(script)]
    if unknown or not exact or parser_of(script) is None:
        return [f"{script} has no {word}" for word in unknown]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            rest = parser_of(script).parse_known_args(words)[1]
    except UserError as error:
        return [f"{script}: {error}"]
    except SystemExit:  # --help
        return []
    if rest and script in PASSES_ON:
        return check_arguments(PASSES_ON[script], rest, exact)
    return [f"{script} has no {' '.join(rest)}"] if rest else []


def file_of(module):
    return module.replace(".", "/") + ".py"


def check_snippet(code):
    """Return what is wrong with a piece of Python: its syntax, or what it imports."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return [f"Python, line {error.lineno} of the snippet: {error.msg}"]
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            faults += [f"there is no module {name.name}" for name in node.names
                       if not importlib.util.find_spec(name.name.split(".")[0])]
        if isinstance(node, ast.ImportFrom) and (ROOT / file_of(node.module)).exists():
            module = importlib.import_module(node.module)
            faults += [f"{file_of(node.module)} has no {name.name}" for name in node.names
                       if not hasattr(module, name.name)]
    return faults


def check_words(name, rest, exact):
    """Return what is wrong with one command: its name, and the list of its words."""
    if name == "pip":
        files = [file for flag, file in itertools.pairwise(rest) if flag == "-r"]
        return [f"{file} does not exist" for file in files if not (ROOT / file).exists()]
    if name == "torchrun":
        rest = [*itertools.dropwhile(lambda word: not word.endswith(".py"), rest)]
    if rest[:1] in ([], ["--version"]):
        return []
    if rest[0] == "-c":
        return check_snippet(rest[1])
    if rest[0] == "-m":
        folder = rest[1].split(".")[0]
        if not (ROOT / folder).is_dir() and importlib.util.find_spec(folder):
            return []  # a package
        rest = [file_of(rest[1]), *rest[2:]]
    if not (ROOT / rest[0]).exists():
        return [f"{rest[0]} does not exist"]
    return [] if name == "bash" else check_arguments(rest[0], rest[1:], exact)


def check_command(command, setup):
    """Return what is wrong with a command, a list of texts. setup: assignments that go before."""
    text = command.text
    if not command.block:
        text = re.sub(r"[\[\]]", " ", text)  # [--what may be left out]
        if re.search("NAME|<", text):
            return []
    if bash_says(text):
        return ["bash cannot read this to its end"]
    strict = "set -u" if command.block else ""
    with tempfile.TemporaryDirectory() as folder:  # for what commands are sent to
        done = subprocess.run(["bash", "-c", "\n".join([NOTE_WORDS, strict, *setup, text])],
                              cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    faults = [f"${name} is not set before"
              for name in re.findall(r"(\w+): unbound variable", done.stderr)]
    for line in done.stdout.split("\x1e")[:-1]:
        name, *rest = line.split("\x1f")
        faults += check_words(name, rest, command.block and "..." not in rest)
    return list(dict.fromkeys(faults))  # each once, whatever a loop repeats

# ------------------------------------------------------------------------------- documents


def heading_names(path):
    """Return the #names by which a Markdown file's headings can be reached."""
    prose = split_markdown(path.read_text(encoding="utf-8"))[1]
    headings = re.findall(r"^#+ +(.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(path, prose):
    """Yield (line, fault) for every relative link to a file or heading that is not there."""
    without_code = re.sub(r"`[^`]*`", lambda span: re.sub(r"[^\n]", "x", span[0]), prose)
    for match in re.finditer(r"\]\((?!\w+:)([^)\s]+)\)", without_code):  # not https: and the like
        number = prose.count("\n", 0, match.start()) + 1
        file, _, name = match[1].partition("#")
        target = path.parent / file if file else path
        if not target.exists():
            yield number, f"link to {file}, which does not exist"
        elif name and target.suffix == ".md" and name not in heading_names(target):
            yield number, f"link to {match[1]}: no such heading"


def check_files(path, prose):
    """Yield (line, fault) for every file named between backticks that is not there."""
    for number, span in inline_spans(prose):
        ours = re.fullmatch(r"(\.\./)?((results|runs|tests)/\S*|[\w./-]+\.(py|sh|md|ipynb))", span)
        made_up = re.search(r"NAME|SOURCE|\.\.\.|[<>*{}\[\]]|^(out|data)/", span)
        if ours and not made_up and not any((at / span).exists() for at in (ROOT, path.parent)):
            yield number, f"`{span}` does not exist"


def check_markdown(path):
    """Return [(line, fault)] of a Markdown document."""
    text = path.read_text(encoding="utf-8")
    prose, setup = split_markdown(text)[1], []
    faults = [*check_links(path, prose), *check_files(path, prose)]
    for command in read_commands(text):
        faults += [(command.line, fault) for fault in check_command(command, setup)]
        if SETS.match(command.text):
            setup.append(command.text)
    return faults


def check_shell(path):
    """Return [(line, fault)] of a bash script. Its flags may reach a script through echo and xargs:
    each must be known to one of the scripts that it calls."""
    text = path.read_text(encoding="utf-8")
    said = bash_says(text)
    faults, flags = [(1, said)] if said else [], set()
    code = re.sub(r"(^| )#.*", "", text, flags=re.M)
    for match in re.finditer(r"\bpython (-m )?([\w.]+)|\bpython -c \"([^\"]*)\"", code):
        line = code.count("\n", 0, match.start()) + 1
        if match[3]:
            faults += [(line, fault) for fault in check_snippet(match[3])]
            continue
        script = file_of(match[2]) if match[1] else match[2]
        if (ROOT / script).exists():
            flags |= known_flags(script)
        else:
            faults.append((line, f"{script} does not exist"))
    for match in re.finditer(r"(?<![\w-])--[a-z][a-z-]*", code):
        if match[0] not in flags:
            line = code.count("\n", 0, match.start()) + 1
            faults.append((line, f"no script called here has {match[0]}"))
    return faults


def find_documents():
    """Return the paths of the repository's documents."""
    return [path for pattern in DOCUMENTS.split() for path in sorted(ROOT.glob(pattern))]


def check(paths):
    """Return all faults of documents, a line of text each, in order."""
    found = []
    for path in (Path(path).resolve() for path in paths):
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        faults = check_shell(path) if path.suffix == ".sh" else check_markdown(path)
        found += [f"{name}:{line}: {fault}" for line, fault in sorted(faults)]
    return found

# ------------------------------------------------------------------------------- running


def all_commands(paths):
    """Yield (document, command) as --full runs them: code blocks and bash scripts, each once."""
    once = set()
    for path in paths:
        name = str(path.relative_to(ROOT))
        commands = [Command(1, f"bash {name}", True)]
        if path.suffix == ".md":
            commands = read_commands(path.read_text(encoding="utf-8"))
        for command in commands:
            text = re.sub(r" +#.*", "", command.text)
            if command.block and ("$" in text or text not in once):
                once.add(text)
                yield name, command


def run_command(text, setup, folder):
    """Run a command after the assignments of its document. Return (exit code, output)."""
    done = subprocess.run(["bash", "-c", "\n".join(["set -u", *setup, text])], cwd=folder,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.returncode, done.stdout


def run_all(folder, paths):
    """Clone the repository to folder, run every command there. Return how many failed."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"--full {folder} exists, must be a new directory")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    failed, setup = 0, defaultdict(list)  # {document: its assignments}
    with open(folder / "docs-log.txt", "w", encoding="utf-8") as log:
        for document, (line, text, _) in all_commands(paths):
            reasons = [f"skipped: {why}" for name, pattern, why in SKIP
                       if name in document and re.search(pattern, text)]
            code, output, start = 0, "", time.monotonic()
            if not reasons:
                code, output = run_command(text, setup[document], folder)
            if SETS.match(text):
                setup[document].append(text)
            failed += code != 0
            said = [*reasons, f"exit code {code}, {time.monotonic() - start:.0f} s"][0]
            head = f"{document}:{line}: {said}"
            last = [line for line in re.split(r"[\r\n]", output) if line.strip()][-5:]
            log.write("\n".join([head, text, *("    " + line for line in last)]) + "\n\n")
            log.flush()
            print(f"{head}: {text.splitlines()[0]}", flush=True)
    print(f"{failed} commands failed; wrote {folder / 'docs-log.txt'}")
    return failed


def main():
    parser = Parser(description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--quick", action="store_true", help="check without running anything")
    how.add_argument("--full", metavar="DIR", help="run everything in a clone at DIR")
    parser.add_argument("documents", nargs="*", metavar="FILE", help=f"(default: {DOCUMENTS})")
    args = parser.parse_args()
    paths = [Path(name).resolve() for name in args.documents] or find_documents()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if args.full and not path.is_relative_to(ROOT):
            raise UserError(f"{path} is not in this repository, of which --full makes a copy")
    if args.full:
        sys.exit(1 if run_all(args.full, paths) else 0)
    faults = check(paths)
    for fault in faults:
        print(fault)
    print(f"{len(paths)} documents, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    run_script(main)
