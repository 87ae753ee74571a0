"""Start our scripts in processes of their own that need not import torch, which takes seconds.

A server, one for each process that asks, imports it once and forks. What is about the start itself
is tested with real processes."""

import multiprocessing
import os
import runpy
import shlex
import sys
from pathlib import Path

if sys.platform == "win32":  # it cannot fork: each process imports torch
    CONTEXT = multiprocessing.get_context("spawn")
else:
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(["torch._dynamo", "tiktoken", "matplotlib.pyplot", "pytest"])


class Forked(CONTEXT.Process):
    """As subprocess.Popen([python, *words], ...), but output, a file, gets all that is printed.

    before: a function of a module, called first."""

    def __init__(self, words, output=os.devnull, cwd=".", env=None, before=None):
        env = dict(os.environ if env is None else env)
        super().__init__(target=run, args=([*map(str, words)], output, cwd, env, before))
        self.daemon = True  # ends with the process that started it
        self.start()

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        return self.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


def run(words, output, cwd, env, before):
    """Do, in the child, what `python *words` does."""
    import torch

    multiprocessing.current_process()._config["daemon"] = False  # it may start others
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    if before:
        before()
    if words[0] == "-c":
        exec(words[1], {})
    elif words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [os.getcwd()]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).absolute().parent)]
        runpy.run_path(words[0], run_name="__main__")


def run_line(line):
    """Run `python ...`, a line that a notebook gives a shell, and print what it said. Returns its
    exit code."""
    code = Forked(shlex.split(line)[1:], "said.txt").wait()
    print(Path("said.txt").read_text(errors="replace"))
    return code
