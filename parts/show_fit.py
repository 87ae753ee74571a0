"""What scaling.py prints of a fit: our numbers next to the published ones."""

import itertools

NEAR_BUDGETS = 1.10  # budgets less apart than this may be meant as one

# What the papers found, printed next to our numbers; SLOPES are the exponents of mu* and D* (§5.2).
SLOPES = {"mu_rec": 0.40, "tokens": 0.78}
PUBLISHED = {"training": "1.3 % (140M), 0.8 % (370M) in Parcae",
             "unified": "0.85 to 1.31 % in Parcae"}
PHI = "   published: phi 0.46 [0.41, 0.53] in arXiv 2604.21106"


def notes_on(budgets, optima, noise):
    """Return what a reader of the optima must know of the budgets, a list of texts."""
    alike = sum(budget.left_out for budget in budgets)
    near = [f"{low.flops:.3g} and {high.flops:.3g}" for low, high in itertools.pairwise(budgets)
            if high.flops <= NEAR_BUDGETS * low.flops]
    few, inside = len(budgets) - len(optima), sum(optimum["inside"] for optimum in optima)
    edges = len(optima) - inside
    notes = {
        f"{alike} runs have the budget, recurrence and seed of another, and are left out": alike,
        "no two runs differ in their seed alone, and no parabola leaves anything over: nothing is "
        "known of the noise, so no intervals": noise is None,
        f"budgets of {'; '.join(near[:3])} FLOPs are less than {NEAR_BUDGETS - 1:.0%} apart and "
        "count as different: if they are meant as one, parabolas through parts of it "
        "mislead": near,
        f"{few} of {len(budgets)} budgets have fewer than three recurrences evaluated at "
        "T = mu_rec: no parabola": few,
        f"{edges} of {len(optima)} budgets have their lowest loss at an edge: they bound the "
        "power law, and are no points of it": edges,
        f"{inside} optima inside the recurrences: no exponent (it needs 2)": optima and inside < 2,
    }
    return [f"isoFLOP: {note}" for note, holds in notes.items() if holds]


def rounded(value):
    """Return a number as text, "-" for None."""
    return "-" if value is None else f"{value:.3g}"


def span(ci, edges=(False, False)):
    """Return an interval as text; an end that is an edge of what was tried says so."""
    low, high = (rounded(end) for end in ci)
    return f"[{'<= ' if edges[0] else ''}{low}, {'>= ' if edges[1] else ''}{high}]"


def optimum_text(optimum):
    """Return mu* at a budget as text; optimum: of scaling.optimum_of, or of laws.optimum."""
    found = rounded(optimum["mu_rec"])
    for key in ("at_most", "at_least"):
        if optimum[key]:
            found = f"{key.replace('_', ' ')} {optimum[key]:g}"
    kink = ", a kink of cost" if optimum.get("kink") else ""
    return f"{found} {span(optimum['ci'], optimum['ci_at_edge'])}{kink}"


def gain_text(gain):
    """Return what looping gains at a budget as text; gain: of chance.gains."""
    mu = ", ".join(f"{mu:g}" for mu in gain["mu_rec"])
    if gain["single"]:
        known = f", +-{(gain['ci'][1] - gain['gain']):.2g}" if None not in gain["ci"] else ""
        return f"{gain['gain']:+.2g} (one pair{known}) by mu_rec {mu}, the best"
    return f"{gain['gain']:+.4f} {span(gain['ci'])} by mu_rec {mu}, {len(gain['by_seed'])} pairs"


def report(out):
    """Print the fits next to the published figures; out: of scaling.fit_table."""
    print(f"\n{out['model']}, {out['runs']} runs, {out['accounting']} FLOPs")
    noise, seeds = out["noise"], out["seeds"]
    if noise:
        print(f"noise of a run: {noise['sd']:.2%} of the loss, from what {noise['source']} leave "
              f"over ({noise['freedom']} degrees of freedom)\n  by chance two single runs differ "
              f"by up to {noise['two_runs']:.1%} (95 %)")
    if seeds:
        said = ", ".join(f"{seed}: {effect:+.2%}" for seed, effect in seeds["effects"].items())
        often = "" if seeds["chance"] is None else f"; chance: {seeds['chance']:.1%} of sweeps"
        print(f"seeds differ in all runs alike, taken out of all losses here: {said}{often}")
    report_optima(out)
    training = {"training": out["training_law"]} if "training_law" in out else {}
    for name, law in (training | out["laws"]).items():
        report_law(name, law, out["looped"])
    for note in out["notes"]:
        print("note:", note)


def report_optima(out):
    """Print the optimum at each budget, by parabola and by law, what looping gains there, and the
    exponents."""
    law = out.get("training_law", {}).get("frontier", {"optima": [], "exponents": {}})
    columns = [{one["flops"]: text(one) for one in found} for text, found in (
        (optimum_text, out["isoflop"]), (optimum_text, law["optima"]), (gain_text, out["gain"]))]
    if not any(columns):
        return
    misfits = {one["flops"]: one["lack_of_fit"] for one in out["isoflop"]}
    print("\n     FLOPs   mu* by parabola [95 %]   by the training law      "
          "gain over mu_rec = 1 [95 %]")
    for flops in sorted(set().union(*columns)):
        by_runs, by_law, gained = (column.get(flops, "-") for column in columns)
        print(f"{flops:10.3g}   {by_runs:24s} {by_law:24s} {gained}")
        report_misfit("             not a parabola: if it were one", misfits.get(flops))
    for name, label in (("mu_rec", "mu*"), ("tokens", "D*")):
        found = {method: of[name] for method, of in (
            ("parabolas", out["power_laws"]), ("the training law", law["exponents"]))
            if of and of[name]["exponent"] is not None}
        print(f"{label} grows as (published: C^{SLOPES[name]:.2f})" if found else
              f"{label}: no exponent")
        for method, of in found.items():
            print(f"    C^{of['exponent']:.2f} {exponent_span(of)}, by {method}")
    if "the training law" in found:
        size = out["training_law"]["far_exponents"]["params"]
        print("    By the law this is the mean slope where mu* > 1 at these budgets: it is no "
              f"power law. Far above,\n    mu* nears C^{size['exponent']:.2f} {span(size['ci'])}.")
    print("    D* = C / cost of a token at mu*: the second follows from the first.\n")


def report_misfit(words, chance):
    """Print what chance.lack_of_fit says, unless noise explains what is left over."""
    if chance is not None and chance < 0.05:
        share = f"{chance:.1%}" if chance >= 0.001 else "less than 0.1%"
        print(f"{words}, the noise of seeds would miss it by so much in {share} of sweeps")


def exponent_span(law):
    """Return the interval of an exponent as text, or why there is none."""
    if law["ci"][0] is not None or "defined" not in law:
        return span(law["ci"])
    if law["defined"] is None:
        return "no interval: nothing is known of the noise"
    return f"not determined: no exponent in {1 - law['defined']:.0%} of resamples"


def report_law(name, law, looped):
    """Print the parameters of a law and its errors, next to the papers'."""
    values = {parameter: rounded(law[parameter]) for parameter in law["ci"]}
    values |= dict.fromkeys(law["undetermined"], "not determined")
    said = [f"{parameter} {value} {span(law['ci'][parameter])}"
            for parameter, value in values.items()]
    print(f"{name} law: {', '.join(said)}{PHI if name == 'worth' else ''}")
    if law["held_out_error"] is not None:
        published = f"   published: {PUBLISHED[name]}" if looped and name in PUBLISHED else ""
        print("  error on the largest budget, fitted without it: "
              f"{law['held_out_error']:.2%}{published}")
    report_misfit("  it is not quite right: if it were right", law.get("lack_of_fit"))
    if "far_exponents" in law and not looped:
        for what, of in law["far_exponents"].items():
            print(f"  best {what} ~ C^{of['exponent']:.3f} {span(of['ci'])}")
