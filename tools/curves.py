"""Draw training curves from the logs of runs in one picture, as an experiment tracker does; print
the last losses.

    python -m tools.curves out/default                            one run: loss and training signals
    python -m tools.curves out/looped out/plain --out both.png    compare the losses of several runs

The panels show loss against training tokens (the same text), FLOPs (the same compute) and seconds.
Lines are the train loss, averaged over a fiftieth of the run. Points are the validation loss at T
loops, the mean recurrence in training. For a single run, a second row shows learning rate, gradient
norm and size of the state. A run may still be training. If runs differ in tokenizer, text or FLOP
accounting, the title of the picture says so. Needs matplotlib.
"""

from pathlib import Path

import numpy as np

from parts import figures
from parts.cli import Parser, UserError, new_file, run_script, some_path
from parts.comparable import say_differences
from parts.reading import read_json, read_json_lines

AXES = ("tokens", "flops", "seconds")
# results/first.csv, seeds 1 to 4
SEEDS_DIFFER = ("(seeds: the default model's gain over the same layer run once has a standard "
                "deviation of 0.003, over two layers of 0.010)")
KEYS = (*AXES, "loss", "lr", "grad_norm")  # what the log has for each step

# ----------------------------------------------------------------------------- reading


def read_run(path):
    """Return what to draw for a run directory, a dict. Raises UserError.

    Its keys: "label"; "folder" of the files; "T", the mean recurrence; KEYS and "smooth" (the loss,
    averaged), an array (steps,) each; "val", the val losses at T loops, {key: list} for AXES and
    "loss"; "last", the last of each; "sizes" of the state, {loops: [(tokens, size)]}."""
    path = folder = Path(path)
    if (path / ".lock").exists() and (path / ".new" / "log.jsonl").exists():
        folder = path / ".new"  # train.py --overwrite, before its first checkpoint
    file = folder / "log.jsonl"
    if not file.exists():
        raise UserError(f"{path} has no log.jsonl: give run directories of train.py")
    model = read_json(folder / "config.json").get("model")
    try:
        T = int(model["mean_recurrence"] if model["n_recurrent"] else 1)
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{folder / 'config.json'} is not from a run of train.py") from None
    label = path.resolve().name.lstrip("_")  # matplotlib hides labels that begin with _
    run = {"label": label, "folder": folder, "T": T, "sizes": {}}

    lines, bad = read_json_lines(file)
    try:
        if bad > 1 and not lines:  # train.py may still be writing a single bad line
            raise ValueError
        steps = [line for line in lines if line["kind"] == "train"]
        run |= {key: np.array([line[key] for line in steps], dtype=float) for key in KEYS}
        points = [line | {"loss": line["val_loss"][str(T)]} for line in lines
                  if str(T) in line.get("val_loss", ())]
        run["val"] = {key: [float(point[key]) for point in points] for key in (*AXES, "loss")}
        run["last"] = {key: values[-1] if points else np.nan for key, values in run["val"].items()}
        for line in lines:
            for loops, size in line.get("state_rms", {}).items():
                point = float(line["tokens"]), float(size)
                run["sizes"].setdefault(int(loops), []).append(point)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file} is not the log of a run of train.py") from None
    if not steps:
        raise UserError(f"{file} has no training step yet")
    return run | {"smooth": smooth(run["loss"])}


def read_runs(paths):
    """Return the runs that read_run makes of paths; runs with the same label get their paths."""
    runs = [read_run(path) for path in paths]
    labels = [run["label"] for run in runs]
    for run, path in zip(runs, paths):
        if labels.count(run["label"]) > 1:
            run["label"] = str(path)
    return runs


def smooth(values):
    """Return for each of the values (n,) the mean of a fiftieth of them around it (fewer at the
    ends). Leaves out values that are not finite; NaN where nothing is left."""
    window = np.ones(2 * (len(values) // 100) + 1)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    with np.errstate(invalid="ignore"):  # 0 / 0 where a stretch of steps was skipped
        return sums / np.convolve(finite, window, "same")

# ----------------------------------------------------------------------------- the picture


def picture(path, runs, title):
    """Draw the curves of runs (see read_run); a single run gets a second row, see steering."""
    alone = len(runs) == 1
    rows = 2 if alone else 1
    figure, grid = figures.pyplot().subplots(rows, 3, figsize=(13, 3.9 * rows), squeeze=False,
                                             layout="constrained")
    figure.suptitle(title or None)
    limits = loss_limits(runs)
    for axes, key, same in zip(grid[0], AXES, ("text", "compute", "time")):
        for i, run in enumerate(runs):
            color, val = f"C{i}", run["val"]
            if alone:
                axes.plot(run[key], run["loss"], lw=0.5, color=color, alpha=0.25)
            axes.plot(run[key], run["smooth"], lw=1, color=color,
                      label=f"{run['label']}, T = {run['T']}")
            axes.plot(val[key], val["loss"], "o-", ms=4, lw=0.7, mec="k", color=color)
        axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel=f"training {key}".replace("flops", "FLOPs"), ylim=limits,
                 title="Loss" if alone else f"Loss for the same {same}")
    grid[0, 0].set_ylabel("loss (nats per token)")
    points = "\npoint: val loss at T loops" if any(run["val"]["loss"] for run in runs) else ""
    grid[0, 0].legend(title=f"line: train loss{points}", fontsize=8)
    if alone:
        steering(grid[1], runs[0])
    figures.save(figure, path)


def loss_limits(runs):
    """Return (bottom, top) of the loss axis, cut above, since the first losses are far higher."""
    losses = [np.array([*run["loss"], *run["val"]["loss"]]) for run in runs]
    losses = [some[np.isfinite(some)] for some in losses if np.isfinite(some).any()]
    if not losses:
        return None, None  # no step has a finite loss
    low, high = min(map(min, losses)), max(np.quantile(some, 0.95) for some in losses)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def steering(axes, run):
    """Draw the learning rate, gradient norm and state size of a run against training tokens."""
    axes[0].plot(run["tokens"], run["lr"], lw=1)
    axes[0].set(title="Learning rate (Muon)", ylim=(0, None))
    axes[1].plot(run["tokens"], run["grad_norm"], lw=0.5, color="C0", alpha=0.25)
    axes[1].plot(run["tokens"], smooth(run["grad_norm"]), lw=1, color="C0")
    axes[1].set(title="Norm of the gradient", yscale="log")
    for i, (T, points) in enumerate(sorted(run["sizes"].items())):
        axes[2].plot(*zip(*points), "o-", ms=4, lw=1, color=figures.shade(i, len(run["sizes"])),
                     label=f"T = {T}")
    axes[2].set(title="State after T loops, root mean square")
    if run["sizes"]:  # the model loops, and was evaluated
        axes[2].legend(fontsize=8)
    for panel in axes:
        panel.locator_params(axis="x", nbins=6)
        panel.set(xlabel="training tokens", xlim=axes[0].get_xlim())


def print_losses(runs):
    """Print the last val loss of each run, what it cost, and its difference from the first run."""
    width = max(len(run["label"]) for run in runs)
    print(f"{'run':{width}}    T  val loss       tokens     FLOPs  seconds")
    for run in runs:
        print(f"{run['label']:{width}}  {run['T']:3d}  "
              "{loss:8.4f}  {tokens:11,.0f}  {flops:8.2e}  {seconds:7,.0f}".format(**run["last"]))
    first, *others = runs
    for run in others:
        difference = run["last"]["loss"] - first["last"]["loss"]
        print(f"{run['label']} minus {first['label']}: {difference:+.4f}")
    if others:
        print(SEEDS_DIFFER)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=some_path, metavar="DIR", help="run directories of train.py")
    add("--out", type=new_file, default="out/curves.png", metavar="FILE",
        help="the PNG to write (default: %(default)s)")
    args = parser.parse_args()
    figures.pyplot()  # fail now if matplotlib is missing
    runs = read_runs(args.runs)
    picture(args.out, runs, say_differences(run["folder"] for run in runs))
    print_losses(runs)
    print("wrote", args.out)


if __name__ == "__main__":
    run_script(main)
