"""Print the results of scaling.py: our fits next to the published numbers."""

import itertools

NEAR_BUDGETS = 1.10  # budgets closer than this factor may be meant as one

# Published numbers. SLOPES are the exponents of mu* and D* in "Parcae" (§5.2).
SLOPES = {"mu_rec": 0.40, "tokens": 0.78}
PUBLISHED = {"training": "1.3% (140M), 0.8% (370M)", "unified": "0.85% to 1.31%"}  # in Parcae
PHI = "   published: phi 0.46 [0.41, 0.53] in arXiv 2604.21106"


def notes_on(budgets, optima, noise):
    """Return what a reader must know about the budgets behind the optima, a list of texts."""
    alike = sum(budget.left_out for budget in budgets)
    near = [f"{low.flops:.3g} and {high.flops:.3g}" for low, high in itertools.pairwise(budgets)
            if high.flops <= NEAR_BUDGETS * low.flops]
    few, inside = len(budgets) - len(optima), sum(optimum["inside"] for optimum in optima)
    edges = len(optima) - inside
    notes = {
        f"{alike} runs have the budget, recurrence and seed of another run and are left out": alike,
        "there are no intervals, because the noise of a run is unknown: neither seeds nor "
        "parabolas have residuals": noise is None,
        f"budgets of {'; '.join(near)} FLOPs are less than {NEAR_BUDGETS - 1:.0%} apart and count "
        "as different; if they are meant as one, parabolas through parts mislead": near,
        f"{few} of {len(budgets)} budgets have fewer than three recurrences evaluated at "
        "T = mu_rec, and get no parabola": few,
        f"{edges} of {len(optima)} budgets have their lowest loss at an edge of the recurrences; "
        "they are bounds for the power law, not points of it": edges,
        f"{inside} optima are inside the recurrences tried: no exponent by parabolas, which "
        "needs two": optima and inside < 2,
    }
    return [f"isoFLOP: {note}" for note, holds in notes.items() if holds]


def rounded(value):
    """Return a number as text, "-" for None."""
    return "-" if value is None else f"{value:.3g}"


def span(ci, edges=("", "")):
    """Return an interval as text. edges: "<= " or ">= " for ends at the edge of what was tried."""
    return "[" + ", ".join(edge + rounded(end) for edge, end in zip(edges, ci)) + "]"


def optimum_text(optimum):
    """Return mu* at a budget as text. optimum: from scaling.optimum_of or laws.optimum."""
    found = rounded(optimum["mu_rec"])
    for key in ("at_most", "at_least"):
        if optimum[key]:
            found = f"{key.replace('_', ' ')} {optimum[key]:g}"
    kink = ", a kink of cost" if optimum.get("kink") else ""
    return f"{found} {span(optimum['ci'], optimum['ci_at_edge'])}{kink}"


def gain_text(gain):
    """Return the gain of looping at a budget as text. gain: an entry of chance.gains."""
    mu = ", ".join(f"{mu:g}" for mu in gain["mu_rec"])
    if gain["single"]:
        known = f", +-{(gain['ci'][1] - gain['gain']):.2g}" if None not in gain["ci"] else ""
        return f"{gain['gain']:+.2g} (one pair{known}) with mu_rec {mu}, the best tried"
    return f"{gain['gain']:+.4f} {span(gain['ci'])} with mu_rec {mu}, {len(gain['by_seed'])} pairs"


def report(out):
    """Print the fits next to the published numbers. out: from scaling.fit_table."""
    print(f"\n{out['model']}, {out['runs']} runs, {out['accounting']} FLOPs, [95% intervals]")
    noise, seeds = out["noise"], out["seeds"]
    if noise:
        misfit = ", which include misfit" * (noise["source"] == "parabolas")
        print(f"noise: a run's loss has a standard deviation of {noise['sd']:.2%}, by residuals of "
              f"{noise['source']}{misfit} ({noise['freedom']} degrees of freedom)\n  two runs "
              f"differ by up to {noise['two_runs']:.1%} by noise alone (95% of pairs)")
    if seeds:
        said = ", ".join(f"seed {seed}: {effect:+.2%}" for seed, effect in seeds["effects"].items())
        print(f"seed effects, the same in all runs and removed from all losses: {said}")
        report_misfit("  they are more than noise", seeds["chance"])
    report_optima(out)
    training = {"training": out["training_law"]} if "training_law" in out else {}
    for name, law in (training | out["laws"]).items():
        report_law(name, law, out["looped"])
    for note in out["notes"]:
        print("note:", note)


def report_optima(out):
    """Print the optimum at each budget by both methods, the gain there, and the exponents."""
    law = out.get("training_law", {}).get("frontier", {"optima": [], "exponents": {}})
    columns = [{one["flops"]: text(one) for one in found} for text, found in (
        (optimum_text, out["isoflop"]), (optimum_text, law["optima"]), (gain_text, out["gain"]))]
    if not any(columns):
        return
    misfits = {one["flops"]: one["lack_of_fit"] for one in out["isoflop"]}
    print("\n     FLOPs   mu* by parabola [95%]    by training law [95%]    "
          "gain in val loss over mu_rec = 1 [95%]")
    for flops in sorted(set().union(*columns)):
        by_runs, by_law, gained = (column.get(flops, "-") for column in columns)
        print(f"{flops:10.3g}   {by_runs:24s} {by_law:24s} {gained}")
        report_misfit("             not a parabola", misfits.get(flops))
    for name, label in (("mu_rec", "mu*"), ("tokens", "D*")):
        found = {method: of[name] for method, of in (
            ("parabolas", out["power_laws"]), ("the training law", law["exponents"]))
            if of and of[name]["exponent"] is not None}
        print(f"{label} grows with the budget C as (published: C^{SLOPES[name]:.2f})" if found else
              f"{label}: no exponent")
        for method, of in found.items():
            print(f"    C^{of['exponent']:.2f} {exponent_span(of)}, by {method}")
    if "the training law" in found:
        size = out["training_law"]["far_exponents"]["params"]
        print("    By the law, mu* is not a power law: its exponent is a mean slope where mu* > 1."
              f"\n    At far larger budgets, mu* nears C^{size['exponent']:.2f} {span(size['ci'])}")
    print("    D* follows from mu*: it is C / cost of a token. At a kink of cost, mu* stays.\n")


def report_misfit(words, chance):
    """Print the p-value of chance.lack_of_fit if it is below 5%."""
    if chance is not None and chance < 0.05:
        p = f"p = {chance:.1%}" if chance >= 0.001 else "p < 0.1%"
        print(f"{words}, by an F-test against the noise of seeds: {p}")


def exponent_span(law):
    """Return the interval of an exponent as text, or why there is none."""
    if law["ci"][0] is not None or "defined" not in law:
        return span(law["ci"])
    if law["defined"] is None:
        return "no interval: the noise of a run is unknown"
    return f"not determined: no exponent in {1 - law['defined']:.0%} of resamples"


def report_law(name, law, looped):
    """Print the parameters of a law and its held-out error, next to the published ones."""
    values = {parameter: rounded(law[parameter]) for parameter in law["ci"]}
    values |= dict.fromkeys(law["undetermined"], "not determined")
    said = [f"{parameter} {value} {span(law['ci'][parameter])}"
            for parameter, value in values.items()]
    print(f"{name} law: {', '.join(said)}{PHI if name == 'worth' else ''}")
    if law["held_out_error"] is not None:
        published = f"   published: {PUBLISHED[name]}" if looped and name in PUBLISHED else ""
        print("  mean relative error on the largest budget, held out of the fit: "
              f"{law['held_out_error']:.2%}{published}")
    report_misfit("  the form of the law is not quite right", law.get("lack_of_fit"))
    if "far_exponents" in law and not looped:
        for what, of in law["far_exponents"].items():
            print(f"  best {what} ~ C^{of['exponent']:.3f} {span(of['ci'])}")
