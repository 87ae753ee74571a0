"""Every picture of the project, a function each: plain numbers in, a PNG out.

Scripts that have something to show call these. matplotlib, imported here alone, is optional.
"""

import numpy as np

from parts.cli import UserError
from parts.files import whole_file

RED = "C3"


def pyplot():
    """Return matplotlib.pyplot, set to draw into files. Raises UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def panels(n, width, height):
    """Return a figure of so many inches and its n axes side by side, a list."""
    figure, axes = pyplot().subplots(1, n, figsize=(width, height), layout="constrained",
                                     squeeze=False)
    return figure, list(axes[0])


def save(figure, path):
    """Write a figure as PNG, whole or not at all."""
    try:
        with whole_file(path, "wb") as file:
            figure.savefig(file, dpi=150, format="png")
    finally:
        pyplot().close(figure)


def marker(i):
    """Return the marker of the i-th of several things."""
    return "osD^vP*X<>"[i % 10]


def shade(i, n):
    """Return the colour of the i-th of n things that have an order: from dark to light."""
    return pyplot().cm.viridis(0.9 * i / max(n - 1, 1))


def loops_axis(axes, label, which="x"):
    """Put numbers of loops along an axis: each doubling is a step, labels are plain numbers."""
    getattr(axes, f"set_{which}scale")("log", base=2)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_label_text(label)


def cells(axes, shares, texts, lowest):
    """Draw a table (rows, columns) of shares, lowest (white) to 1 (blue), with a text in each."""
    image = axes.imshow(shares, cmap="Blues", vmin=lowest, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        color = "w" if share > 0.4 * lowest + 0.6 else "k"
        axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=7.5,
                  color=color, parse_math=False)
    return image

# ----------------------------------------------------------------------------- models


def trace(path, tokens, tops, probabilities, moved):
    """Draw what each loop would predict (tools/trace.py).

    tokens: the T labels of what is read. tops, probabilities, moved: (loops, T), the likeliest next
    token, its probability, and how far the loop moved the state, |h_t - h_(t-1)| / |h_t|."""
    moved = np.asarray(moved)
    loops, T = moved.shape
    figure, (axes, below) = pyplot().subplots(
        2, 1, figsize=(2 + 0.32 * T, 1.8 + 0.3 * loops), sharex=True, layout="constrained",
        height_ratios=[loops, 3])
    image = cells(axes, np.asarray(probabilities), tops, lowest=0)
    figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    for i in range(T):
        # the loop from which on the prediction stays
        settled = max((t for t in range(1, loops) if tops[t][i] != tops[t - 1][i]), default=0)
        axes.add_patch(pyplot().Rectangle((i - 0.5, settled - 0.5), 1, 1, fill=False, lw=1.5))
    axes.set_yticks(range(loops), range(1, loops + 1))
    axes.set(ylabel="loops", title="What each loop would predict next (box: from here on it stays)")

    # The first loop starts from nothing, so that it moves all of the state: no line for it.
    for t in range(1, loops):
        color = shade(t - 1, loops - 1)
        below.semilogy(moved[t], lw=1, color=color)
        below.text(T - 0.5, moved[t, -1], f" {t + 1}", color=color, fontsize=7, va="center")
    below.set(ylabel="$|h_t - h_{t-1}|$ / $|h_t|$",
              xlabel="token read (lines: loops t = 2, 3, ...)")
    below.set_xticks(range(T), tokens, fontsize=7, parse_math=False)
    save(figure, path)


def memory(path, curves, even):
    """Draw memory of inference against the tokens in the cache (bench.py).

    curves: [(label, tokens, gigabytes, line style)]. even: the tokens at which the looped model
    holds as much as the transformer it stands for; None where it never does."""
    figure, [axes] = panels(1, 6, 4)
    for label, tokens, gigabytes, style in curves:
        axes.loglog(tokens, gigabytes, style, label=label)
    if even:
        axes.axvline(even, color=RED, lw=1, label=f"break-even: {even:,.0f} tokens")
    axes.set(xlabel="tokens in the cache (batch x context)",
             ylabel="weights and KV cache, bfloat16 (GB)",
             title="When has the looped model's cache eaten the weights it saved?")
    axes.legend(framealpha=1, edgecolor="none")
    save(figure, path)


def one_dimension(path, curves):
    """Draw the loop h <- a h + b in one dimension (runs/guide.py).

    curves: [(a, label, h)], h the states after 0, 1, ... loops."""
    figure, [axes] = panels(1, 7.5, 3.8)
    for i, (a, label, h) in enumerate(curves):
        last, color = len(h) - 1, RED if a > 1 else shade(i, len(curves))
        axes.plot(h, f"{marker(i)}-", ms=4, color=color)
        axes.text(last + 0.4, h[-1], label, color=color, va="center")
    axes.set(xlim=(0, 1.5 * last), xticks=range(0, last + 1, 4), xlabel="loops t", ylabel="state h",
             title="h <- a h + 1, from h = 0: what a decides")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines.bottom.set_bounds(0, last)
    save(figure, path)


def fixed_point(path, distances, factor, trained):
    """Draw how fast the state of a trained model goes to its fixed point (runs/guide.py).

    distances: |h_t - h_last| / |h_last| of each token, (tokens, loops), after loops 1, 2, ...
    factor: the mean A_bar, whose powers are the line beside it. trained: mean loops of training."""
    figure, [axes] = panels(1, 8.5, 4.2)
    low, median, high, farthest = np.quantile(distances, [0.05, 0.5, 0.95, 1], axis=0)
    t = np.arange(1, len(median) + 1)
    axes.fill_between(t, low, high, color="0.85")
    labels = {"the farthest token": (farthest, "k:"),
              "the median token\n(grey: 90 % of all)": (median, "k-")}
    for label, (line, style) in labels.items():
        axes.semilogy(t, line, style)
        axes.text(t[-1] + 0.4, line[-1], label, va="center")

    alone = factor ** np.arange(len(t) + 1)  # before the first loop h is 0, at a distance of 1
    axes.semilogy(alone, color=RED)
    bottom, step = max(low.min() / 3, 1e-16), max(1, len(t) // 8)  # float64 rounds at 1e-16
    place = np.abs(np.log(alone / bottom) - 3).argmin()  # low, where there is room
    label = f"if A_bar, {factor:.2f} on average,\nwere all of the loop"
    axes.text(place + 0.4, alone[place], label, color=RED, va="bottom")
    axes.axvline(trained, color="0.6", lw=1, zorder=0)
    axes.text(trained + 0.2, 1.5, f"mean of training: {trained} loops", color="0.4", va="center")
    axes.set(ylim=(bottom, 3), xlim=(0, 1.3 * t[-1]), xticks=range(0, t[-1] + 1, step),
             xlabel="loops t", ylabel="distance |h_t - h_last| / |h_last|",
             title="A trained model: each loop brings the state nearer to its fixed point")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines.bottom.set_bounds(0, t[-1])
    save(figure, path)

# ----------------------------------------------------------------------------- scaling laws


def isoflop(path, budgets, optima, title):
    """Draw loss against mean recurrence at equal FLOPs, and above each budget's lowest point.

    budgets: of tables.budgets_of. optima: as scaling.optimum_of gives them; an
    arrow stands where the lowest loss is at an edge, a star at a bottom inside."""
    figure, (left, right) = panels(2, 10.5, 4.2)
    fitted = {optimum["flops"]: optimum for optimum in optima}
    for i, budget in enumerate(budgets):
        color = shade(i, len(budgets))
        mu, log_loss = np.array([(mu, loss) for mu, seeds in budget.cells.items()
                                 for loss in seeds.values()]).T
        parts = [(mu, log_loss, {"marker": marker(i), "ls": "", "ms": 5, "alpha": 0.7,
                                 "label": f"{budget.flops:.2g} FLOPs"}),
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
    loops_axis(left, "mean recurrence mu_rec in training (loops)")
    loops_axis(right, "mean recurrence mu_rec in training (loops)")
    left.set(ylabel="val loss at T = mu_rec (nats per token)", title=title)
    left.legend(fontsize=8)
    right.set(ylabel="above the lowest mean (%)", ylim=(-1, 4),
              title="Star: optimum; arrow: it is at the edge, or beyond")
    save(figure, path)


def optima(path, points, law):
    """Draw the best recurrence and token count against the budget, by parabola and by law.

    points: as scaling.optimum_of gives them. law: "flops" (n,); "mu_rec" and "tokens", each n times
    (best, low, high); "slopes", the published exponents of both."""
    figure, every = panels(2, 9, 4)
    x, inside = np.array(law["flops"]), [point for point in points if point["inside"]]
    labels = {"mu_rec": "best mean recurrence mu* (loops)", "tokens": "best token count D*"}
    for axes, (name, label) in zip(every, labels.items()):
        best, low, high = np.array(law[name], dtype=float).T  # NaN: no interval
        axes.fill_between(x, low, high, color="0.85", label="95 % of its resamples")
        axes.loglog(x, best, "k-", label="training law")
        middle = len(x) // 2  # only the slope is compared
        published = best[middle] * (x / x[middle]) ** law["slopes"][name]
        axes.loglog(x, published, "k:", label=f"published slope: C^{law['slopes'][name]:.2f}")
        axes.plot([p["flops"] for p in inside], [p[name] for p in inside], "*", ms=12, color=RED,
                  label="parabola")
        axes.set(xlabel="training FLOPs C", ylabel=label)
        if points:
            budgets = [point["flops"] for point in points]
            axes.set_xticks(budgets, [f"{c:.2g}" for c in budgets])
            axes.set_xticks([], minor=True)
    mu = every[0]
    for point in points:
        ends = np.array([point["ci"]], dtype=float).T
        at = point["mu_rec"] or point["at_most"] or point["at_least"]
        if np.isfinite(ends).all():
            mu.errorbar(point["flops"], at, np.abs(ends - at), fmt="none", color=RED, lw=1)
    for key, arrow in (("at_most", "v"), ("at_least", "^")):
        edges = [(point["flops"], point[key]) for point in points if point[key]]
        if edges:
            mu.plot(*zip(*edges), arrow, color=RED,
                    label=f"lowest loss at the edge: {key.replace('_', ' ')} that")
    loops_axis(mu, labels["mu_rec"], "y")
    mu.legend(fontsize=8)
    save(figure, path)

# ----------------------------------------------------------------------------- experiments


def half(path, models):
    """Draw loss against size and against cost (runs/half.py).

    models: dicts: "label"; "parameters"; "flops" of training; "losses" of the seeds; "looped"."""
    figure, both = panels(2, 9, 3.8)
    for axes, key, unit in zip(both, ("parameters", "flops"), (1e3, 1e12)):
        for model in models:
            color, shape = (RED, "o") if model["looped"] else ("0.4", "s")
            x, losses = model[key] / unit, model["losses"]
            axes.plot([x] * len(losses), losses, shape, color=color, alpha=0.7)
            axes.annotate(model["label"], (x, min(losses)), xytext=(0, -8), ha="center", va="top",
                          textcoords="offset points", fontsize=8, color=color)
        axes.margins(0.4, 0.12)  # room for the names
    both[0].set(xlabel="parameters (thousands)", ylabel="val loss (nats per byte)",
                title="What it is worth: parameters")
    both[1].set(xlabel="training FLOPs (1e12)", title="What it costs: FLOPs")
    save(figure, path)


def worth(path, points, f, laws):
    """Draw how many times its parameters a looped model is worth (runs/worth.py).

    points: dicts: "label"; "f", the share of the parameters that loop; "worth"; "ours". laws: {phi:
    worth at each of f}."""
    figure, [axes] = panels(1, 6.5, 4.2)
    for i, (phi, line) in enumerate(laws.items()):
        axes.plot(f, line, color=shade(i, len(laws)), lw=1, label=f"phi = {phi:g}")
    for p in points:
        color, shape = (RED, "o") if p["ours"] else ("k", "s")
        axes.plot(p["f"], p["worth"], shape, color=color)
        # a name stands to the left where another point is to the right
        crowded = any(0 < q["f"] - p["f"] < 0.2 and abs(q["worth"] - p["worth"]) < 0.1
                      for q in points)
        side, shift = ("right", -6) if crowded else ("left", 6)
        axes.annotate(p["label"], (p["f"], p["worth"]), xytext=(shift, 0), ha=side, va="center",
                      fontsize=8, textcoords="offset points", color=color)
    high = max(p["worth"] for p in points)
    axes.set(xlim=(0, 1), ylim=(0.95, 1.25 * high), xlabel="share of the parameters that loop, f",
             ylabel="worth, times its parameters", title="What eight loops are worth")
    axes.legend(fontsize=8, loc="upper left")
    save(figure, path)


def rates(path, groups, looped):
    """Draw loss against learning rate, above each model's lowest (runs/rates.py).

    groups: {title of a panel: {model: {rate: losses of the seeds}}}; looped: the model in red."""
    figure, every = panels(len(groups), 3.2 * len(groups), 3.4)
    for axes, (title, models) in zip(every, groups.items()):
        for i, (name, losses) in enumerate(models.items()):
            means = np.array([np.mean(some) for some in losses.values()])
            axes.semilogx([*losses], means - means.min(initial=np.inf), f"{marker(i)}-", label=name,
                          color=RED if name == looped else None)
        ticks = sorted(set().union(*models.values()))
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.minorticks_off()
        axes.set(xlabel="both learning rates", title=title)
    every[0].set_ylabel("val loss above the model's lowest (nats)")
    every[0].legend(fontsize=8)
    save(figure, path)


def short(path, models):
    """Draw loss against passes over a short text, and against training FLOPs (runs/short.py).

    models: dicts: "label"; "color"; "passes"; "flops" and "losses" of the seeds, for each of
    them."""
    figure, both = panels(2, 9, 3.8)
    for axes, key, unit in zip(both, ("passes", "flops"), (1, 1e12)):
        for model in models:
            x, color = np.divide(model[key], unit), model["color"]
            means = [np.mean(losses) for losses in model["losses"]]
            axes.plot(x, means, color=color, label=model["label"])
            for at, losses in zip(x, model["losses"]):
                axes.plot([at] * len(losses), losses, ".", color=color, alpha=0.7)
    both[0].set(xlabel="passes over the text", ylabel="val loss (nats per byte)",
                title="At equal passes")
    both[1].set(xlabel="training FLOPs (1e12)", title="At equal FLOPs")
    both[0].legend(fontsize=8)
    save(figure, path)


LOOKUP = """Find the last time that this symbol
was there (red); go to what came next.

From the a at the end, no lookup gives a,
1 lookup c, 2 lookups b: each says only
where to look next, so p take p steps."""


def lookup(axes):
    """Draw two lookups in a string: what each finds is red, where it gets to is black."""
    for i, symbol in enumerate("cbdacda"):
        color = {6: "k", 3: RED, 4: "k", 0: RED, 1: "k"}.get(i, "0.6")
        axes.text(i, 0, symbol, ha="center", va="center", fontsize=16, color=color)
    arrow = {"arrowstyle": "->", "connectionstyle": "arc3,rad=0.6", "color": RED, "lw": 1.5}
    for number, start, end in (("1", 6, 4), ("2", 4, 1)):
        axes.annotate("", (end, 0.35), (start, 0.35), arrowprops=arrow)
        axes.text((start + end) / 2, 1.4, number, color=RED, ha="center")
    axes.text(3, -0.8, LOOKUP, ha="center", va="top", fontsize=10)
    axes.set(xlim=(-1, 7), ylim=(-4, 3), title="A lookup")
    axes.axis("off")


def p_hop(path, hops, loops, looped, once, layers, trained):
    """Draw how many lookups in a row take how many loops (runs/p_hop.py).

    hops: numbers of lookups, p. loops: T at test time. looped: accuracy (p, T). once and layers:
    accuracy (p,) of the layer trained to run once and of eight layers, or None. trained: mean loops
    of training."""
    models = {"trained to\nrun once": once, "looped": looped, "eight\nlayers": layers}
    tables = {name: np.reshape(a, (len(hops), -1)) for name, a in models.items() if a is not None}
    figure = pyplot().figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.2])
    lookup(left.subplots())
    widths = [table.shape[1] for table in tables.values()]
    every = right.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
    for axes, (name, table) in zip(every, tables.items()):
        cells(axes, table, [[f"{100 * share:.0f}" for share in row] for row in table], 0.25)
        axes.invert_yaxis()
        axes.set_xticks([0], [name])
        axes.set_yticks([])
        if name == "looped":
            axes.set_xticks(range(len(loops)), loops)
            axes.set_xlabel("one layer, looped T times at test time")
            end, top = sum(T <= trained for T in loops) - 0.5, len(hops) - 0.45
            axes.axvline(end, color=RED, lw=2)
            axes.text(end, top, f"mean of training: {trained:g} loops", color=RED, ha="center")
    every[0].set_yticks(range(len(hops)), hops)
    every[0].set_ylabel(f"p lookups in a row (trained: {min(hops)} to {max(hops)})")
    right.suptitle("Each further loop brings one more lookup within reach\n"
                   "(right answers in %; guessing gives 25)", fontsize=11)
    save(figure, path)


def stability(path, runs):
    """Draw which injection rule survives which learning rate (runs/stability.py).

    runs: dicts by rising "rate": "rule"; "loss", NaN where it broke off; "loops" and "size", the
    root mean square of the state after so many; "step" and "radius", the spectral radius."""
    rules = list(dict.fromkeys(run["rule"] for run in runs))
    rates = list(dict.fromkeys(run["rate"] for run in runs))
    figure = pyplot().figure(figsize=(4 + 2.5 * len(rules), 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[4, 2.5 * len(rules)])
    loss = left.subplots()
    grid = right.subplots(2, len(rules), sharex="row", sharey="row", squeeze=False)
    for i, (rule, (sizes, radii)) in enumerate(zip(rules, grid.T)):
        mine = [run for run in runs if run["rule"] == rule]
        points = zip(*[(run["rate"], run["loss"]) for run in mine])
        loss.semilogx(*points, f"{marker(i)}-", label=rule)
        for run in mine:
            color = shade(rates.index(run["rate"]), len(rates))
            sizes.semilogy(run["loops"], run["size"], color=color)
            radii.semilogy(run["step"], run["radius"], color=color, label=f"{run['rate']:g}")
        loops_axis(sizes, "loops T")
        sizes.set_title(rule)
        radii.axhline(1, color="0.8", zorder=0)
        radii.set_xlabel("training step")
    grid[0, 0].set_ylabel("state, root mean square")
    grid[1, 0].set_ylabel("spectral radius")
    grid[1, 0].legend(title="learning rate", fontsize=7, loc="upper right")
    loss.set(xlabel="learning rate", ylabel="val loss at T = 8 (nats per byte)",
             title="Final loss (no point: it broke off)")
    loss.legend(title="injection")
    save(figure, path)


def exits(path, rows):
    """Draw what leaving the loop early costs, by rule (runs/exits.py).

    rows: dicts: "rule"; "loops", their mean over tokens; "above", nats more than with all loops;
    "above_error", its standard error. The rule "fixed" gives every token the same loops."""
    figure, [axes] = panels(1, 6, 4)
    for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        mine = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["loops"])
        x, y, error = ([row[key] for row in mine] for key in ("loops", "above", "above_error"))
        label, color = ("all tokens alike", "0.5") if rule == "fixed" else (f"rule: {rule}", None)
        axes.errorbar(x, y, error, marker=marker(i), ms=5, lw=1, capsize=2, label=label,
                      color=color)
    # A first loop that is far off would take all the height.
    high = max(row["above"] for row in rows if row["loops"] >= 2)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set(xlabel="loops a token, mean", ylabel="loss above all loops (nats)",
             ylim=(-0.1 * high, 1.2 * high), title="What does stopping early cost?")
    axes.legend(fontsize=8)
    save(figure, path)


def paper(path, models):
    """Draw the recurrences that the paper found best and those at equal FLOPs (runs/paper.py).

    models: dicts: "model"; "flops" and "mu" of table 6; "rounding", (low, high) of mu; "published"
    and "exact", each (line, low, high), of laws that pick the table's recurrences."""
    figure, every = panels(len(models), 4.5 * len(models), 4)
    counts = {"published": ("0.5", "the paper's FLOPs"), "exact": (RED, "exact FLOPs")}
    for axes, model in zip(every, models):
        for key, (color, label) in counts.items():
            line, low, high = model[key]
            axes.fill_between(model["flops"], low, high, color=color, alpha=0.2, lw=0)
            axes.plot(model["flops"], line, color=color, label=f"laws at equal FLOPs: {label}")
        low, high = model["rounding"]
        axes.errorbar(model["flops"], model["mu"], [model["mu"] - low, high - model["mu"]],
                      fmt="ko", capsize=3, label="table 6, and its grid's rounding")
        axes.set(xscale="log", xlabel="training FLOPs", title=model["model"].upper())
        loops_axis(axes, "best mean recurrence mu*", "y")
    every[0].legend(fontsize=8)
    save(figure, path)

