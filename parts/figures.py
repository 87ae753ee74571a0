"""Figures: shared helpers, and the figures of scaling.py. They take plain numbers and write a PNG.

An experiment's figure is in its script in runs/. Only this file imports matplotlib, which is
optional.
"""

import numpy as np

from parts.cli import UserError
from parts.files import whole_file

RED = "C3"


def pyplot():
    """Return matplotlib.pyplot, set to draw into files. Raise UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def panels(n, width, height):
    """Return a figure, width x height inches, and a list of its n axes side by side."""
    figure, axes = pyplot().subplots(1, n, figsize=(width, height), layout="constrained",
                                     squeeze=False)
    return figure, list(axes[0])


def save(figure, path):
    """Write a figure as a PNG, completely or not at all."""
    try:
        with whole_file(path, "wb") as file:
            figure.savefig(file, dpi=150, format="png")
    finally:
        pyplot().close(figure)


def marker(i):
    """Return the marker of the i-th series."""
    return "osD^vP*X<>hd"[i % 12]


def shade(i, n):
    """Return the colour of the i-th of n ordered series, from dark to light."""
    return pyplot().cm.viridis(0.9 * i / max(n - 1, 1))


def loops_axis(axes, label, which="x"):
    """Make an axis one of loops: a logarithm to base 2, labelled with plain numbers."""
    getattr(axes, f"set_{which}scale")("log", base=2)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_label_text(label)

# ----------------------------------------------------------------------------- scaling laws


def isoflop(path, budgets, optima, title):
    """Draw loss against mean recurrence at equal FLOPs: on the left the loss, on the right how far
    it is above each budget's lowest. budgets: see tables.budgets_of; optima: scaling.optimum_of."""
    figure, (left, right) = panels(2, 10.5, 4.2)
    fitted = {optimum["flops"]: optimum for optimum in optima}
    for i, budget in enumerate(budgets):
        color = shade(i, len(budgets))
        mu, log_loss = np.array([(mu, loss) for mu, seeds in budget.cells.items()
                                 for loss in seeds.values()]).T
        parts = [(mu, log_loss, {"marker": marker(i), "ls": "", "ms": 5, "alpha": 0.7,
                                 "label": f"{budget.flops:.3g} FLOPs"}),
                 (budget.mu, budget.log_loss, {"lw": 0.7, "ls": ":"})]
        lowest, optimum = budget.log_loss.min(), fitted.get(budget.flops)
        if optimum and optimum["inside"]:
            x = np.geomspace(optimum["fitted_to"][0], optimum["fitted_to"][-1], 60)
            best = optimum["mu_rec"], np.log(optimum["val_loss"])
            parts.append((x, np.polyval(optimum["parabola"], np.log(x)), {"lw": 1.5}))
            parts.append((*best, {"marker": "*", "ms": 14, "mec": "k", "zorder": 3}))
        elif optimum:
            edge = budget.mu[budget.log_loss.argmin()]
            arrow = "$\\leftarrow$" if optimum["at_most"] else "$\\rightarrow$"
            parts.append((edge, lowest, {"marker": arrow, "ms": 14, "zorder": 3}))
        for at, values, style in parts:
            left.plot(at, np.exp(values), color=color, **style)
            right.plot(at, 100 * np.expm1(values - lowest), color=color, **style)
    for axes in (left, right):
        loops_axis(axes, "mean recurrence mu_rec in training (loops)")
    left.set(ylabel="val loss at T = mu_rec (nats per token)", title=title)
    left.legend(fontsize=8)
    right.set(ylabel="loss above the lowest mean of its budget (%)", ylim=(-1, 4),
              title="Star: optimum; arrow: optimum at the edge, or beyond")
    save(figure, path)


def optima(path, points, law, slopes):
    """Draw the best recurrence and token count against the budget, by parabola and by law.
    points: from scaling.optimum_of; law: from laws.optimum; slopes: the published exponents."""
    figure, every = panels(2, 9, 4)
    x, inside = np.array([one["flops"] for one in law]), [p for p in points if p["inside"]]
    labels = {"mu_rec": "best mean recurrence mu* (loops)", "tokens": "best token count D*"}
    for axes, (name, label), ci in zip(every, labels.items(), ("ci", "ci_tokens")):
        # None becomes NaN: no interval is drawn
        best, low, high = np.array([(one[name], *one[ci]) for one in law], dtype=float).T
        axes.fill_between(x, low, high, color="0.85", label="95% of its resamples")
        axes.loglog(x, best, "k-", label="training law")
        middle = len(x) // 2  # only slopes are compared: lines cross here
        axes.loglog(x, best[middle] * (x / x[middle]) ** slopes[name], "k:",
                    label=f"published slope: C^{slopes[name]:.2f}")
        axes.plot([p["flops"] for p in inside], [p[name] for p in inside], "*", ms=12, color=RED,
                  label="parabola")
        axes.set(xlabel="training FLOPs C", ylabel=label)
        if points:
            budgets = [point["flops"] for point in points]
            axes.set_xticks(budgets, [f"{c:.3g}" for c in budgets], rotation=30, fontsize=8)
            axes.set_xticks([], minor=True)
    mu = every[0]
    for point in points:
        ends = np.array([point["ci"]], dtype=float).T
        at = point["mu_rec"] or point["at_most"] or point["at_least"]
        mu.errorbar(point["flops"], at, np.abs(ends - at), fmt="none", color=RED, lw=1)
    for key, arrow in (("at_most", "v"), ("at_least", "^")):
        edges = [(point["flops"], point[key]) for point in points if point[key]]
        if edges:
            mu.plot(*zip(*edges), arrow, color=RED,
                    label=f"lowest loss at the edge: {key.replace('_', ' ')} this")
    loops_axis(mu, labels["mu_rec"], "y")
    mu.legend(fontsize=8)
    save(figure, path)
