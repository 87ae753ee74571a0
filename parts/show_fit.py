"""What scaling.py prints and draws of a fit: our numbers beside the published ones."""

import itertools

import numpy as np

from parts import figures
from parts.chance import most_by_chance
from parts.laws import MU, frontier, interval
from parts.tables import column

NEAR_BUDGETS = 1.10  # budgets less apart than this may be meant as one

# What the papers found, printed beside our numbers; SLOPES are the exponents of mu* and D* (§5.2).
SLOPES = {"mu_rec": 0.40, "tokens": 0.78}
PUBLISHED = {
    "phi": "0.46 [0.41, 0.53] in arXiv 2604.21106",
    "training_law": "1.3 % (140M), 0.8 % (370M) in Parcae",
    "unified": "0.85 to 1.31 % in Parcae",
    "given_loss": "0.10 to 0.17 % in Parcae",
}


def notes_on(budgets, optima, noise):
    """Return what a reader of the optima must know of the budgets, a list of texts."""
    notes = []
    alike = sum(budget.left_out for budget in budgets)
    if alike:
        notes.append(f"{alike} runs have the budget, recurrence and seed of another, and are left "
                     "out")
    if noise is None:
        notes.append("no two runs differ in their seed alone, and no parabola leaves anything "
                     "over: nothing is known of the noise, so no intervals")
    near = [f"{low.flops:.3g} and {high.flops:.3g}" for low, high in itertools.pairwise(budgets)
            if high.flops <= NEAR_BUDGETS * low.flops]
    if near:
        more = " ..." if len(near) > 3 else ""
        notes.append(f"budgets of {'; '.join(near[:3])}{more} FLOPs are less than "
                     f"{NEAR_BUDGETS - 1:.0%} apart and count as different: if they are meant "
                     "as one, parabolas through parts of it mislead")
    few = len(budgets) - len(optima)
    if few:
        notes.append(f"{few} of {len(budgets)} budgets have fewer than three recurrences evaluated "
                     "at T = mu_rec: no parabola")
    inside = sum(optimum["inside"] for optimum in optima)
    said = []
    if inside < len(optima):
        said.append(f"{len(optima) - inside} of {len(optima)} budgets have their lowest loss at an "
                    "edge: they bound the power law, and are no points of it")
    if optima and inside < 2:
        said.append(f"{inside} optima inside the recurrences: no exponent (it needs 2)")
    if said:
        notes.append("; ".join(said))
    return [f"isoFLOP: {note}" for note in notes]


# ----------------------------------------------------------------------------- numbers as text


def rounded(value, digits=3):
    """Return a number as text, "-" for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def span(ci, edges=(False, False)):
    """Return an interval as text; an end that is an edge of what was tried says so."""
    low, high = (rounded(end) for end in ci)
    return f"[{'<= ' if edges[0] else ''}{low}, {'>= ' if edges[1] else ''}{high}]"


def value_text(value, ci):
    """Return a number and its interval as text."""
    return f"{rounded(value, 4)} {span(ci)}"


def frontier_text(mu, ci):
    """Return mu* by a law and its interval as text: at an end of what was searched, a bound."""
    bound = "<= " if mu <= MU[0] else ">= " if mu >= MU[-1] else ""
    edges = (ci[0] <= MU[0], ci[1] >= MU[-1]) if None not in ci else (False, False)
    kink = ", a kink of cost" if not bound and rounded(ci[0]) == rounded(ci[1]) != "-" else ""
    return f"{bound}{rounded(mu)} {span(ci, edges)}{kink}"


def optimum_text(optimum):
    """Return mu* at a budget by parabola as text; optimum: of scaling.optimum_of."""
    found = rounded(optimum["mu_rec"])
    if optimum["at_most"]:
        found = f"at most {optimum['at_most']:g}"
    if optimum["at_least"]:
        found = f"at least {optimum['at_least']:g}"
    return f"{found} {span(optimum['ci'], optimum['ci_at_edge'])}"


def gain_text(gain):
    """Return what looping gains at a budget as text; gain: of chance.gains."""
    mu = ", ".join(f"{mu:g}" for mu in gain["mu_rec"])
    if gain["single"]:
        known = f", +-{(gain['ci'][1] - gain['gain']):.2g}" if None not in gain["ci"] else ""
        return f"{gain['gain']:+.2g} (one pair{known}) by mu_rec {mu}, the best"
    pairs = len(gain["by_seed"])
    return f"{gain['gain']:+.4f} {span(gain['ci'])} by mu_rec {mu}, {pairs} pairs"


def chance_text(chance, form):
    """Return what chance.lack_of_fit says as text; form: of what is fitted."""
    share = f"{chance:.1%}" if chance >= 0.001 else "less than 0.1%"
    return f"if it were {form}, the noise of seeds would miss it by so much in {share} of sweeps"

# ----------------------------------------------------------------------------- what is printed


def report(out):
    """Print the fits beside the published figures; out: of scaling.fit_table."""
    print(f"\n{out['model']}, {out['runs']} runs, {out['accounting']} FLOPs")
    noise, seeds = out["noise"], out["seeds"]
    if noise:
        source = {"seeds": "runs that differ in their seed alone",
                  "parabolas": "what the parabolas leave over"}[noise["source"]]
        print(f"noise of a run: {noise['sd']:.2%} of the loss, from {source} ({noise['freedom']} "
              "degrees of freedom)\n  by chance two single runs differ by up to "
              f"{most_by_chance(noise, 1):.1%} (95 %)")
    if seeds:
        said = ", ".join(f"{seed}: {effect:+.2%}" for seed, effect in seeds["effects"].items())
        often = f" (by chance so much in {seeds['chance']:.1%} of sweeps)"
        print(f"seeds differ in all runs alike{often if seeds['chance'] else ''}; taken out of all "
              f"losses here: {said}")
    if out["isoflop"] or out["gain"]:
        report_optima(out)
    if out["isoflop"] or "frontier" in out.get("training_law", {}):
        report_exponents(out)
    report_laws(out)
    for note in out["notes"]:
        print("note:", note)


def report_optima(out):
    """Print the optimum at each budget, by parabola and by law, and what looping gains there."""
    print("\n     FLOPs   mu* by parabola [95 %]   by the training law      "
          "gain over mu_rec = 1 [95 %]")
    frontier = out.get("training_law", {}).get("frontier", {"optima": []})
    parabola_at, gain_at, law_at = ({one["flops"]: one for one in some} for some in
                                    (out["isoflop"], out["gain"], frontier["optima"]))
    for flops in sorted(parabola_at.keys() | gain_at.keys()):
        by_runs = by_law = gained = "-"
        chance = None
        if flops in parabola_at:
            by_runs = optimum_text(parabola_at[flops])
            chance = parabola_at[flops]["lack_of_fit"]
        if flops in law_at:
            by_law = frontier_text(law_at[flops]["mu_rec"], law_at[flops]["ci"])
        if flops in gain_at:
            gained = gain_text(gain_at[flops])
        print(f"{flops:10.3g}   {by_runs:24s} {by_law:24s} {gained}")
        if chance is not None and chance < 0.05:
            print(f"             not a parabola: {chance_text(chance, 'one')}")


def report_exponents(out):
    """Print the exponents of mu* and D* by every method."""
    training = out.get("training_law", {})
    by_law = {out["accounting"]: training.get("frontier", {}).get("exponents", {})}
    by_law |= training.get("other_accounting", {})
    by_law = {f"the training law, {accounting} FLOPs": of for accounting, of in by_law.items()}
    by_law["the same with the effects of seeds left in"] = training.get("with_seed_effects", {})
    for name, label in (("mu_rec", "mu*"), ("tokens", "D*")):
        lines = {method: of[name] for method, of in by_law.items()
                 if of and of[name]["exponent"] is not None}
        far = name == "mu_rec" and lines
        if name in out["power_laws"]:
            lines = {"parabolas": out["power_laws"][name]} | lines
        published = f"published: C^{SLOPES[name]:.2f}"
        print(f"{label} grows as ({published if lines else 'no exponent'})")
        for method, law in lines.items():
            print(f"    C^{law['exponent']:.2f} {exponent_span(law)}, by {method}")
        if far:
            size = training["far_exponents"]["params"]
            print("    By the law this is the mean slope where mu* > 1 at these budgets: it is no "
                  f"power law. Far above,\n    mu* nears C^{size['exponent']:.2f} "
                  f"{span(size['ci'])}.")
    print("    D* = C / cost of a token at mu*: the second follows from the first.\n")


def exponent_span(law):
    """Return the interval of an exponent as text, or why there is none."""
    if law["ci"][0] is not None:
        return span(law["ci"])
    if "defined" not in law:
        return "no interval"
    if law["defined"] is None:
        return "no interval: nothing is known of the noise"
    return f"not determined: no exponent in {1 - law['defined']:.0%} of resamples"


def report_laws(out):
    """Print the laws that were fitted."""
    if "training_law" in out:
        law, looped = out["training_law"], out["looped"]
        report_law("training law", law, PUBLISHED["training_law"] if looped else None)
        if not looped:
            for name, of in law["far_exponents"].items():
                print(f"  best {name} ~ C^{of['exponent']:.3f} {span(of['ci'])}")
    if "unified" in out:
        report_law("unified law", out["unified"], PUBLISHED["unified"])
        error = out["unified"]["held_out_error_given_loss"]
        if error is not None:
            print(f"  ... the loss at T = mu_rec taken as measured: {error:.2%}   "
                  f"published: {PUBLISHED['given_loss']}")
    for name, law in out["laws"].items():
        report_law(f"{name} law", law)
    if out["test_time"]:
        errors = [run["error"] for run in out["test_time"]]
        print(f"test-time law, each recurrence's largest run ({len(errors)}): mean error "
              f"{np.mean(errors):.2%}, largest {max(errors):.2%} (of the losses fitted)")
    if "recurrence_worth" in out:
        worth = out["recurrence_worth"]
        objectives = ", ".join(f"{name} {value:.4g}" for name, value in worth["objective"].items())
        print(f"worth of a recurrence: phi {worth['phi']:.2f} {span(worth['ci'])}, of "
              f"{worth['sizes']} sizes   published: {PUBLISHED['phi']}; objective: {objectives}")


def report_law(label, law, published=None):
    """Print the parameters of a law and its errors; published: the paper's error."""
    said = []
    for name, ci in law["ci"].items():
        value = "not determined" if name in law["undetermined"] else rounded(law[name])
        said.append(f"{name} {value} {span(ci)}")
    print(f"{label}: {', '.join(said)}")
    if law["held_out_error"] is not None:
        beside = f"   published: {published}" if published else ""
        print("  error on the largest budget, fitted without it: "
              f"{law['held_out_error']:.2%}{beside}")
    if law.get("lack_of_fit") is not None and law["lack_of_fit"] < 0.05:
        print(f"  it is not quite right: {chance_text(law['lack_of_fit'], 'right')}")

# ----------------------------------------------------------------------------- pictures


def draw(out, table, folder):
    """Write up to four figures, of what was fitted; table: a scaling.Table."""
    drawn = []
    if out["isoflop"]:
        title = f"Equal FLOPs and parameters ({out['model']})"
        if out["seeds"]:
            title = f"Equal FLOPs ({out['model']}), effects of seeds taken out"
        figures.isoflop(folder / "isoflop.png", table.budgets, out["isoflop"], title)
        drawn.append("isoflop")
    if "frontier" in out.get("training_law", {}):
        figures.optima(folder / "optima.png", out["isoflop"], bands(table))
        draw_contours(table, folder / "contours.png")
        drawn += ["optima", "contours"]
    if table.test_time:
        draw_test_time(table.test_time, folder / "test-time.png")
        drawn.append("test-time")
    for name in drawn:
        print("wrote", folder / f"{name}.png")


def bands(table):
    """Return what figures.optima draws of the training law over a range of budgets."""
    fit, size, cost, flops = table.fit, table.rows[0], table.cost, column(table.rows, "flops")
    x = np.geomspace(flops.min() / 1.5, flops.max() * 2, 40)
    result = {"flops": x, "slopes": SLOPES, "mu_rec": [], "tokens": []}
    for c in x:
        best, sampled = frontier(fit, size, cost, c), frontier(fit, size, cost, c, fit.samples)
        for name, (point,), samples in zip(SLOPES, best, sampled):
            ends = (point if end is None else end for end in interval(samples, point))
            result[name].append((point, *ends))
    return result


def draw_contours(table, path):
    """Write the loss that the training law predicts, the runs, and the best choice at a budget."""
    rows, fit = table.rows, table.fit
    mu, tokens, flops = (column(rows, name) for name in ("mu_rec", "tokens", "flops"))
    x = np.geomspace(mu.min(), mu.max(), 60)
    y = np.geomspace(tokens.min(), tokens.max(), 60)
    cells = [rows[0] | {"mu_rec": a, "tokens": b} for b in y for a in x]
    budgets = np.geomspace(flops.min(), flops.max(), 40)
    best = np.array([frontier(fit, rows[0], table.cost, c)[:2] for c in budgets])[..., 0]
    best = best[best[:, 0] <= mu.max()]
    title = f"Val loss by the training law ({table.model}, nats per token)"
    figures.contours(path, (mu, tokens), (x, y, fit.predict(cells).reshape(60, 60)), best.T, title)


def draw_test_time(runs, path):
    """Write loss against loops at test time; runs: of laws.fit_test_time."""
    curves = []
    for data, fit, numbers in runs:
        loops = column(data, "recurrence")
        x = np.geomspace(loops[0], loops[-1], 80)
        curves.append({"mu_rec": numbers["mu_rec"], "T": loops, "loss": column(data, "val_loss"),
                       "fit_T": x,
                       "fit_loss": fit.predict([data[0] | {"recurrence": n} for n in x])})
    figures.test_time(path, curves)

