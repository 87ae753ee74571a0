"""Does what the documents say run?

    python -m tools.check_docs --quick             no training: scripts, flags, values, links, files
    python -m tools.check_docs --quick docs/guide.md    one document
    python -m tools.check_docs --full ../copy      every command, in a fresh copy; takes hours

--quick parses each command with its script's own parser and prints a line for each fault; it exits
with 1 if there is one. --full runs the commands of the code blocks in order, in a clone of what is
committed, and logs seconds, exit codes and last lines in docs-log.txt there. Changes of code that
an exercise asks for are not made. SKIP says what is not run, and why.
"""

import argparse
import ast
import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from parts.cli import Parser, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = "README.md docs/guide.md docs/manual.md docs/exercises.md docs/teaching.md " \
    "results/README.md runs/*.sh"

# Not run by --full: (document, what the command matches, why).
SKIP = (
    ("", r"out/parcae|SandyResearch|SOURCE|theirs", "needs weights or a tokenizer of others"),
    ("", r"torchrun|parcae-140m|--jobs 8", "needs GPUs"),
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
PLACEHOLDER = re.compile(r"NAME|SOURCE|\.\.\.|[<>*{}\[\]]")  # no file of that name
HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1[^\n]*\n(.*?)\n?\2(?=\n|$)", re.DOTALL)


@dataclass
class Command:
    """block: of a code block, to be run as it is; else between backticks, perhaps shortened."""
    document: str
    line: int
    text: str
    block: bool = True

# ------------------------------------------------------------------------------- reading


def split_markdown(text):
    """(the code blocks, each (line number, text); the rest, blank where they were)."""
    blocks = []
    for match in CODE.finditer(text):
        start, end = match.span("fenced" if match["fenced"] is not None else 0)
        blocks.append((text.count("\n", 0, start) + 1, textwrap.dedent(text[start:end])))
    return blocks, CODE.sub(lambda match: "\n" * match[0].count("\n"), text)


def is_whole(text):
    """Whether bash would read no further line, and what it says where it would."""
    done = subprocess.run(["bash", "-n"], input=text + "\n", capture_output=True, text=True)
    return done.returncode == 0 and not done.stderr and not text.endswith("\\")


def block_commands(document, number, block):
    """The commands of a code block; lines that look like none, as outputs, are left out."""
    commands, lines = [], block.split("\n")
    if not any(RUNS.match(line) or SETS.match(line) for line in lines):
        return []  # a picture, Python, a list of files
    while lines:
        first, text, more = number + block.count("\n") + 1 - len(lines), lines.pop(0), 0
        if not (RUNS.match(text) or SETS.match(text) or re.match(r"mkdir |for \w+ in ", text)):
            continue
        while more < len(lines) and not is_whole(text):
            text += "\n" + lines[more]
            more += 1
        if is_whole(text):
            del lines[:more]
        commands.append(Command(document, first, text.removeprefix("$ ").strip()))
    return commands


def inline_spans(prose):
    """(line number, text) of what stands between backticks; it may go over a line's end."""
    for match in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)*)`", prose):
        yield prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split())


def read_commands(document, text):
    """All commands of a Markdown text, in order."""
    blocks, prose = split_markdown(text)
    commands = [command for number, block in blocks
                for command in block_commands(document, number, block)]
    for number, span in inline_spans(prose):
        if re.match(r"(\w+=\S* +)*(python|bash|torchrun) ", span):
            commands.append(Command(document, number, span, block=False))
    return sorted(commands, key=lambda command: command.line)

# ------------------------------------------------------------------------------- commands


class Found(BaseException):
    """Carries a script's parser out, before the script does any work."""


@functools.cache
def parser_of(script):
    """The parser of a script (path from the root), None where it has none."""
    if "parse_" not in (ROOT / script).read_text(encoding="utf-8"):
        return None

    def stop(parser, *arguments, **options):
        raise Found(parser)

    before = signal.getsignal(signal.SIGTERM)  # run_script sets another
    try:
        with (mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
              mock.patch.object(sys, "argv", [script]),
              contextlib.redirect_stdout(io.StringIO())):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except Found as found:
        return found.args[0]
    finally:
        signal.signal(signal.SIGTERM, before)


def known_flags(script):
    """All flags of a script, those of its sub-commands and what it passes on too."""
    parsers, flags = [parser_of(script)], set()
    while parsers:
        parser = parsers.pop()
        for action in parser._actions if parser else ():
            flags.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return flags | (known_flags(PASSES_ON[script]) if script in PASSES_ON else set())


def check_words(script, words, exact):
    """What is wrong with a script's arguments; exact: they are all there, parse them."""
    if not exact or parser_of(script) is None:
        flags = [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]
        return [f"{script} has no {flag}" for flag in flags if flag not in known_flags(script)]
    try:
        with (contextlib.redirect_stdout(io.StringIO()),
              mock.patch.object(sys, "argv", [script])):
            rest = parser_of(script).parse_known_args(words)[1]
    except UserError as error:
        return [f"{script}: {error}"]
    except SystemExit:  # --help
        return []
    if rest and script in PASSES_ON:
        return check_words(PASSES_ON[script], rest, exact)
    return [f"{script} has no {' '.join(rest)}"] if rest else []


def check_snippet(code):
    """What is wrong with a piece of Python: its syntax, or names that our files do not have."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return [f"Python, line {error.lineno} of the snippet: {error.msg}"]
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
            module = importlib.import_module(node.module)
            faults += [f"{node.module}.py has no {name.name}" for name in node.names
                       if not hasattr(module, name.name)]
    return faults


def expand(text, variables):
    """Variables replaced by their values. Returns (text, the names that have none)."""
    missing = []

    def value(match):
        name, otherwise = match[1] or match[2], match[3]
        if name not in variables and otherwise is None:
            missing.append(name)
        return variables.get(name, otherwise or "")

    return re.sub(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})", value, text), missing


def simple_commands(text):
    """The words of each command between |, && and ;."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands = [[]]
    for word in lexer:
        if word in ("|", "||", "&&", "&", ";", "(", ")"):
            commands.append([])
        elif re.fullmatch(r"[<>&]+", word):
            commands[-1].append("<")
        elif commands[-1][-1:] == ["<"]:
            commands[-1].pop()  # a file that is read or written
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


def check_python(words, exact):
    """What is wrong with the words after `python`."""
    if words[:1] == ["-c"]:
        return check_snippet(words[1])
    if words[:1] == ["-m"]:
        script = words[1].replace(".", "/") + ".py"
        if not (ROOT / script).exists():
            package = words[1].split(".")[0]
            there = package != "runs" and importlib.util.find_spec(package)
            return [] if there else [f"{script} does not exist"]
        words = [script, *words[2:]]
    if words[:1] in ([], ["-"], ["--version"]):
        return []
    if not (ROOT / words[0]).exists():
        return [f"{words[0]} does not exist"]
    return check_words(words[0], words[1:], exact)


def check_bash(script):
    if not (ROOT / script).exists():
        return [f"{script} does not exist"]
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    return [done.stderr.strip().replace("\n", "; ")] if done.returncode else []


def check_simple(words, exact):
    """What is wrong with one command of a line, a list of texts."""
    words = list(words)
    while words and (re.match(r"\w+=", words[0]) or words[0] == "do"):
        words.pop(0)
    name, *rest = words or [""]
    exact = exact and "..." not in rest
    if name == "python":
        return check_python(rest, exact)
    if name == "bash":
        return check_bash(rest[0])
    if name == "torchrun":
        scripts = [i for i, word in enumerate(rest) if word.endswith(".py")]
        return check_python(rest[scripts[0]:], exact) if scripts else ["torchrun runs no script"]
    if name == "pip":
        files = [file for flag, file in zip(rest, rest[1:]) if flag == "-r"]
        return [f"{file} does not exist" for file in files if not (ROOT / file).exists()]
    return []


def check_command(command, variables):
    """What is wrong with a command, a list of texts; remembers what it sets in variables."""
    faults, exact = [], command.block
    if not exact:
        command.text = re.sub(r"[\[\]]", " ", command.text)  # [--what may be left out]
        if re.search("NAME|<", command.text):
            return []
    if not is_whole(command.text):
        return ["bash cannot read this to its end"]
    for heredoc in HEREDOC.finditer(command.text):
        if re.search(r"\bpython\b", command.text[:heredoc.start()]):
            faults += check_snippet(heredoc[3])
    text = HEREDOC.sub("", command.text).replace("\\\n", " ")
    if "python -c" not in text:  # a newline ends a command, but not within quotes
        text = text.replace("\n", " ; ")
    variables.update(re.findall(r"\bfor (\w+) in ([^\s;]+)", text))  # the first round of a loop
    text, missing = expand(text, variables)
    faults += [f"${name} is not set before" for name in missing if exact]
    for words in simple_commands(text):
        if len(words) == 1 and re.match(r"\w+=", words[0]):
            variables.update([words[0].split("=", 1)])
        faults += check_simple(words, exact)
    return faults

# ------------------------------------------------------------------------------- documents


def heading_names(path):
    """The #names by which a Markdown file's headings can be reached."""
    prose = split_markdown(path.read_text(encoding="utf-8"))[1]
    headings = re.findall(r"^#+ +(.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(path, prose):
    """(line, fault) for every relative link to a file or heading that is not there."""
    without_code = re.sub(r"`[^`]*`", lambda span: re.sub(r"[^\n]", "x", span[0]), prose)
    for match in re.finditer(r"\]\(([^)\s]+)\)", without_code):
        number = prose.count("\n", 0, match.start()) + 1
        file, _, name = match[1].partition("#")
        target = path.parent / file if file else path
        if re.match(r"\w+:", match[1]):  # https: and the like
            continue
        if not target.exists():
            yield number, f"link to {file}, which does not exist"
        elif name and target.suffix == ".md" and name not in heading_names(target):
            yield number, f"link to {match[1]}: no such heading"


def check_files(path, prose):
    """(line, fault) for every file named between backticks that is not there."""
    for number, span in inline_spans(prose):
        ours = re.fullmatch(r"(\.\./)?((results|runs|tests)/\S*|[\w./-]+\.(py|sh|md|ipynb))", span)
        if not ours or PLACEHOLDER.search(span) or span.startswith(("out/", "data/")):
            continue
        if not any((folder / span).exists() for folder in (ROOT, path.parent)):
            yield number, f"`{span}` does not exist"


def check_markdown(path):
    """(line, fault) of a Markdown document."""
    text = path.read_text(encoding="utf-8")
    prose, variables = split_markdown(text)[1], {}
    faults = [*check_links(path, prose), *check_files(path, prose)]
    for command in read_commands(path.name, text):
        faults += [(command.line, fault) for fault in check_command(command, variables)]
    return faults


def check_shell(path):
    """(line, fault) of a bash script. Its flags may reach a script through echo and xargs: each
    must be known to one of the scripts that it calls."""
    text = path.read_text(encoding="utf-8")
    faults, flags = [(1, fault) for fault in check_bash(path)], set()
    for match in re.finditer(r"\bpython (-m )?([\w.]+)", re.sub(r"#.*", "", text)):
        script = match[2].replace(".", "/") + ".py" if match[1] else match[2]
        if (ROOT / script).exists():
            flags |= known_flags(script)
        else:
            line = text.count("\n", 0, text.find(match[0])) + 1
            faults.append((line, f"{script} does not exist"))
    for code in re.finditer(r"python -c \"([^\"]*)\"", text):
        line = text.count("\n", 0, code.start()) + 1
        faults += [(line, fault) for fault in check_snippet(code[1])]
    for number, line in enumerate(text.split("\n"), start=1):
        words = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"(^| )#.*", "", line)))
        faults += [(number, f"no script called here has {word}") for word in words - flags]
    return faults


def find_documents():
    """The repository's documents, paths; those that are not there (yet) are left out."""
    return [path for pattern in DOCUMENTS.split() for path in sorted(ROOT.glob(pattern))]


def check(paths):
    """All faults of documents, a line of text each, in order."""
    found = []
    for path in map(Path, paths):
        path = path.resolve()
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        faults = check_shell(path) if path.suffix == ".sh" else check_markdown(path)
        found += [f"{name}:{line}: {fault}" for line, fault in sorted(faults)]
    return found

# ------------------------------------------------------------------------------- running


def all_commands(paths):
    """What --full runs, in order: the code blocks, then the bash scripts, each once."""
    once = set()
    for path in paths:
        name = str(path.relative_to(ROOT))
        commands = [Command(name, 1, f"bash {name}")]
        if path.suffix == ".md":
            commands = read_commands(name, path.read_text(encoding="utf-8"))
        for command in commands:
            text = re.sub(r" +#.*", "", command.text)
            if command.block and ("$" in text or text not in once):
                once.add(text)
                yield command


def run_command(command, setup, folder):
    """Run a command after the assignments of its document. Returns (exit code, output)."""
    done = subprocess.run(["bash", "-c", "\n".join(["set -u", *setup, command.text])],
                          cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.returncode, done.stdout


def run_all(folder, paths):
    """Clone the repository to folder, run every command there. Returns how many failed."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"--full {folder} exists, must be a new directory")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    failed, setup, document = 0, [], None
    with open(folder / "docs-log.txt", "w", encoding="utf-8") as log:
        for command in all_commands(paths):
            if command.document != document:
                document, setup = command.document, []
            reasons = [why for name, pattern, why in SKIP
                       if name in command.document and re.search(pattern, command.text)]
            code, output, start = 0, "", time.monotonic()
            if not reasons:
                code, output = run_command(command, setup, folder)
            if SETS.match(command.text):
                setup.append(command.text)
            seconds = time.monotonic() - start
            said = f"skipped: {reasons[0]}" if reasons else f"exit code {code}, {seconds:.0f} s"
            failed += code != 0
            head = f"{command.document}:{command.line}: {said}"
            last = [line for line in re.split(r"[\r\n]", output) if line.strip()][-5:]
            log.write("\n".join([head, command.text, *("    " + line for line in last)]) + "\n\n")
            log.flush()
            print(f"{head}: {command.text.split(chr(10))[0]}", flush=True)
    print(f"{failed} commands failed; wrote {folder / 'docs-log.txt'}")
    return failed


def main():
    parser = Parser(description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--quick", action="store_true", help="check without running anything")
    how.add_argument("--full", metavar="DIR", help="run everything in a clone at DIR")
    parser.add_argument("documents", nargs="*", metavar="FILE",
                        help=f"(default: {DOCUMENTS})")
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
    texts = [path.read_text(encoding="utf-8") for path in paths if path.suffix == ".md"]
    commands = sum(len(read_commands("", text)) for text in texts)
    print(f"{len(paths)} documents, {commands} commands, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    run_script(main)
