"""The best recurrence at equal FLOPs, read from the runs themselves: parabolas, noise, power laws.

At each budget C the log loss is a parabola in log mu around its lowest point; the bottom is mu*(C),
and D*(C) = C / cost(mu*) follows from it (§5.2 of "Parcae", arXiv 2604.12946). Two things that the
method does not say by itself are said here:

- Where the lowest loss is that of the fewest or of the most loops tried, the optimum is beyond
  them: "at most 1", "at least 16". A parabola through everything would still have its bottom
  inside, and a power law through such bottoms an exponent that the data do not have.
- What is noise: two runs that differ in their seed alone differ by that much.

mu* is held as a logarithm: -inf where it is at most the fewest loops, +inf where at least the most.
"""

import itertools
import math

import numpy as np

from parts.laws import interval
from parts.tables import NEAR_BUDGETS, rows_by_budget, seed_effects

# A parabola is fitted to the recurrences within this factor of the lowest: two on each side, if
# they double. Further away the loss is none.
WINDOW = math.log(4)
RESAMPLES = 1000  # a parabola costs nothing
ENOUGH_SEEDS = 5  # degrees of freedom: with fewer, what parabolas leave over may know more of noise


class Budget:
    """The runs at one budget: mean log losses of its recurrences, and how many seeds each has.

    cells: {mu_rec: {seed: log loss}}; the arrays are (recurrences,). Of runs of the same recurrence
    and seed one counts, the others are `left_out`: the one with most tokens, which is the cheapest
    mu_bwd as in laws.token_cost; if those are equal, the one with the higher loss."""

    def __init__(self, rows):
        self.flops = math.exp(np.mean([math.log(row["flops"]) for row in rows]))
        self.cells, tokens = {}, {}
        # what counts comes last
        for row in sorted(rows, key=lambda row: (row["mu_rec"], row["tokens"], row["val_loss"])):
            self.cells.setdefault(row["mu_rec"], {})[row["seed"]] = math.log(row["val_loss"])
            tokens[row["mu_rec"]] = row["tokens"]
        self.left_out = len(rows) - sum(map(len, self.cells.values()))
        self.tokens = np.array(list(tokens.values()))
        self.mu = np.array(list(self.cells))
        self.log_mu = np.log(self.mu)
        self.seeds = np.array([len(seeds) for seeds in self.cells.values()])
        self.log_loss = np.array([np.mean(list(seeds.values())) for seeds in self.cells.values()])


def budgets_of(rows):
    """[Budget] by rising FLOPs; rows: at T = mu_rec, of one accounting."""
    return [Budget(group) for group in rows_by_budget(rows)]


def bottom(budget, log_loss):
    """(log mu*, parabola [a, b, c], positions of the recurrences that it was fitted to); log_loss:
    (recurrences,).

    No parabola where the lowest loss is at an edge."""
    x, lowest = budget.log_mu, np.argmin(log_loss)
    if lowest == 0:
        return -math.inf, None, []
    if lowest == len(x) - 1:
        return math.inf, None, []
    near = np.flatnonzero(np.abs(x - x[lowest]) <= WINDOW + 1e-9)
    near = np.union1d(near, [lowest - 1, lowest + 1])
    # Means of several seeds count for more. The weights of polyfit are those of unsquared errors.
    a, b, c = np.polyfit(x[near], log_loss[near], 2, w=np.sqrt(budget.seeds[near]))
    if a <= 0 or not x[near[0]] < -b / (2 * a) < x[near[-1]]:
        near = np.array([lowest - 1, lowest, lowest + 1])  # through these it has a bottom inside
        a, b, c = np.polyfit(x[near], log_loss[near], 2)
    return -b / (2 * a), [a, b, c], near


def noise_of(budgets):
    """{"sd" of a run's log loss, "freedom", "source"}: of seeds; of what parabolas leave over where
    seeds are few and parabolas leave more degrees of freedom.

    What a seed does to all runs alike is no noise (see tables.seed_effects). None where there is
    neither source, or no noise at all."""
    by_seeds = left_by_seeds(budgets)
    by_parabolas = np.sum([(0, 0), *map(left_by_parabola, budgets)], axis=0)
    few = by_seeds[1] == 0 or by_seeds[1] < ENOUGH_SEEDS and by_seeds[1] < by_parabolas[1]
    source, (squares, freedom) = ("parabolas", by_parabolas) if few else ("seeds", by_seeds)
    if not squares:
        return None
    return {"sd": math.sqrt(squares / freedom), "freedom": int(freedom), "source": source}


def left_by_seeds(budgets):
    """(squares that the means of cells and the effects of seeds leave over, degrees of freedom)."""
    cells = [cell for budget in budgets for cell in budget.cells.values()]
    squares = sum(len(cell) * np.var(list(cell.values())) for cell in cells)
    _, explained, used = seed_effects(cells)
    return max(squares - explained, 0), sum(map(len, cells)) - len(cells) - used


def seed_differences(budgets, noise):
    """{"effects": {seed: of its log losses}, "chance": how often chance alone makes seeds differ so
    much}; None where they are not known. budgets: their losses as measured."""
    cells = [cell for budget in budgets for cell in budget.cells.values()]
    effects, squares, freedom = seed_effects(cells)
    if not effects:
        return None
    return {"effects": {str(seed): effect for seed, effect in effects.items()},
            "chance": lack_of_fit(squares, freedom, noise)}


def left_by_parabola(budget):
    """(squares that the parabola leaves over, in units of the noise of a single run, degrees of
    freedom)."""
    _, parabola, near = bottom(budget, budget.log_loss)
    if len(near) <= 3:
        return 0.0, 0
    left = budget.log_loss[near] - np.polyval(parabola, budget.log_mu[near])
    return (budget.seeds[near] * left ** 2).sum(), len(near) - 3


def lack_of_fit(squares, freedom, noise, seed=0):
    """How often chance alone, the noise of seeds, leaves so much over of means of runs: the tail of
    an F-test, by draws (numpy has no F distribution but those). Small: the fitted form is wrong.

    squares, freedom: as of left_by_parabola. None where there is nothing to test."""
    if freedom < 1 or noise is None or noise["source"] != "seeds":
        return None
    draws = np.random.default_rng(seed).f(freedom, noise["freedom"], 20_000)
    return float(np.mean(draws >= squares / freedom / noise["sd"] ** 2))


def most_by_chance(noise, runs):
    """By how much of the loss the means of so many runs each differ by chance, 95 % of the time:
    Student's t, since with few degrees of freedom the noise itself is not well known."""
    draws = np.random.default_rng(0).standard_t(noise["freedom"], 100_000)
    return float(np.quantile(np.abs(draws), 0.95) * noise["sd"] * math.sqrt(2 / runs))


def noisy_optima(budgets, noise, resamples, rng):
    """log mu* (resamples, budgets) of the mean losses with the noise of their seeds added once
    more (a parametric bootstrap); the effects of seeds are taken as known."""
    log_mu = np.empty((resamples, len(budgets)))
    for i in range(resamples):
        # How large the noise is, is not known either: chi-squared over its degrees of freedom.
        sd = noise["sd"] * math.sqrt(noise["freedom"] / rng.chisquare(noise["freedom"]))
        for j, budget in enumerate(budgets):
            added = sd / np.sqrt(budget.seeds) * rng.standard_normal(len(budget.mu))
            log_mu[i, j] = bottom(budget, budget.log_loss + added)[0]
    return log_mu


def optimum_of(budget, samples, cost, noise):
    """What --json writes of a budget; samples: log mu* of resamples, perhaps none."""
    log_mu, parabola, near = bottom(budget, budget.log_loss)
    low, high = budget.mu[0], budget.mu[-1]
    optimum = {
        "flops": budget.flops,
        "mu_tried": budget.mu.tolist(),
        "inside": bool(np.isfinite(log_mu)),
        "at_most": low if log_mu == -math.inf else None,
        "at_least": high if log_mu == math.inf else None,
        "mu_rec": None, "ci": [None, None], "ci_at_edge": [False, False],
        "tokens": None, "val_loss": None, "parabola": parabola, "lack_of_fit": None,
        "fitted_to": budget.mu[near].tolist() if parabola else [],
    }
    if optimum["inside"]:
        optimum["mu_rec"] = math.exp(log_mu)
        optimum["tokens"] = budget.flops / float(cost(math.exp(log_mu)))
        optimum["val_loss"] = math.exp(np.polyval(parabola, log_mu))
        optimum["lack_of_fit"] = lack_of_fit(*left_by_parabola(budget), noise)
    if len(samples):
        ends = np.append(np.quantile(samples, [0.025, 0.975], method="nearest"), log_mu)
        ends = np.array([ends.min(), ends.max()])  # it holds its own point
        optimum["ci"] = np.exp(ends.clip(math.log(low), math.log(high))).tolist()
        optimum["ci_at_edge"] = np.isinf(ends).tolist()
    return optimum


def line_through(x, y, low, high):
    """(slope, intercept) of the least squares line through values some of which are but bounds.

    y (n,): -inf says at most low[i], +inf at least high[i]; such a point counts only where the line
    contradicts it. Which those are is tried again until it stays (an active set). All count alike:
    how far an optimum is off depends on its parabola more than on its budget. NaN where fewer than
    two points are values."""
    known = np.isfinite(y)
    if known.sum() < 2:
        return math.nan, math.nan
    target = np.where(y == -math.inf, low, np.where(y == math.inf, high, y))
    used = known
    for _ in range(2 * len(x)):
        slope, intercept = np.polyfit(x[used], target[used], 1)
        line = slope * x + intercept
        contradicted = (y == -math.inf) & (line > low) | (y == math.inf) & (line < high)
        if np.array_equal(used, known | contradicted):
            break
        used = known | contradicted
    return slope, intercept


def power_law(x, y, samples, low, high):
    """Exponent, coefficient and interval, None without two values; samples (resamples, budgets).

    The interval is [None, None] where more than 5 % of the resamples have no exponent: "defined" is
    the share that has one, None without resamples."""
    slope, intercept = line_through(x, y, low, high)
    if not math.isfinite(slope):
        return None
    slopes = np.array([line_through(x, sample, low, high)[0] for sample in samples])
    defined = float(np.isfinite(slopes).mean()) if len(slopes) else None
    return {"exponent": float(slope), "coefficient": math.exp(intercept), "defined": defined,
            "ci": interval(slopes, slope)}


def fit_parabolas(budgets, cost, resamples=RESAMPLES, seed=0):
    """What --json writes of the runs without a law: {"isoflop": the optimum at each budget with
    three recurrences; "power_laws" of these; "noise" of a run; "notes"}.

    cost: a function, mean recurrence -> FLOPs of a token (see laws.token_cost)."""
    noise, notes = noise_of(budgets), []
    alike = sum(budget.left_out for budget in budgets)
    if alike:
        notes.append(f"isoFLOP: {alike} runs have the budget, recurrence and seed of another, and "
                     "are left out")
    if noise is None:
        notes.append("isoFLOP: no two runs differ in their seed alone, and no parabola leaves "
                     "anything over: nothing is known of the noise, so no intervals")
    near = [f"{low.flops:.3g} and {high.flops:.3g}" for low, high in itertools.pairwise(budgets)
            if high.flops <= NEAR_BUDGETS * low.flops]
    if near:
        more = " ..." if len(near) > 3 else ""
        notes.append(f"isoFLOP: budgets of {'; '.join(near[:3])}{more} FLOPs are less than "
                     f"{NEAR_BUDGETS - 1:.0%} apart and count as different: if they are meant "
                     "as one, parabolas through parts of it mislead")
    usable = [budget for budget in budgets if len(budget.mu) >= 3]
    if len(usable) < len(budgets):
        notes.append(f"isoFLOP: {len(budgets) - len(usable)} of {len(budgets)} budgets have fewer "
                     "than three recurrences evaluated at T = mu_rec: no parabola")
    if not usable:
        return {"isoflop": [], "power_laws": {}, "noise": noise, "notes": notes}

    samples = np.empty((0, len(usable)))
    if noise and resamples:
        samples = noisy_optima(usable, noise, resamples, np.random.default_rng(seed))
    optima = [optimum_of(budget, samples[:, j], cost, noise)
              for j, budget in enumerate(usable)]

    edges, said = sum(not optimum["inside"] for optimum in optima), []
    if edges:
        said.append(f"{edges} of {len(optima)} budgets have their lowest loss at an edge: they "
                    "bound the power law, and are no points of it")
    if len(optima) - edges < 2:
        said.append(f"{len(optima) - edges} optima inside the recurrences: no exponent (it needs "
                    "2)")
    if said:
        notes.append(f"isoFLOP: {'; '.join(said)}")
    return {"isoflop": optima, "power_laws": power_laws(usable, samples, cost), "noise": noise,
            "notes": notes}


def power_laws(budgets, samples, cost):
    """{"mu_rec", "tokens"}: mu* and D* against C; {} without two optima inside."""
    x = np.log([budget.flops for budget in budgets])
    low = np.array([budget.log_mu[0] for budget in budgets])
    high = np.array([budget.log_mu[-1] for budget in budgets])
    log_mu = np.array([bottom(budget, budget.log_loss)[0] for budget in budgets])

    def log_tokens(log_mu):
        return x - np.log(cost(np.exp(log_mu)))

    # Tokens fall as loops rise: "at most so many loops", -inf, is at least so many tokens, +inf,
    # and the bounds change places.
    def log_tokens_or_bound(log_mu):
        return np.where(np.isfinite(log_mu), log_tokens(log_mu.clip(low, high)), -log_mu)

    laws = {
        "mu_rec": power_law(x, log_mu, samples, low, high),
        "tokens": power_law(x, log_tokens_or_bound(log_mu), list(map(log_tokens_or_bound, samples)),
                            log_tokens(high), log_tokens(low)),
    }
    return {name: law for name, law in laws.items() if law}


def gains(budgets, noise):
    """What looping gains over mu_rec = 1 at each budget, in val loss: seeds are pairs.

    Of several recurrences the best by chance looks better than it is. So each seed's pair is that
    of the recurrence that the other seeds gain most by: the mean of these is no higher than what
    the best recurrence gains. Where no recurrence has two pairs it is the best of all: "single",
    and biased upwards. "ci" is by the noise of a run: two or three differences know little of their
    own."""
    result = []
    for budget in budgets:
        gained, unlooped = pairs_of(budget)
        chosen = {seed: best_by_others(gained, seed) for seed in unlooped}
        pairs = [(gained[mu][seed], mu) for seed, mu in chosen.items() if mu]
        singles = [(one, mu) for mu, of_seeds in gained.items() for one in of_seeds.values()]
        if not singles:
            continue
        shown = pairs or [max(singles)]
        gain, ci = float(np.mean([one for one, _ in shown])), [None, None]
        if noise:
            most = most_by_chance(noise, len(shown)) * np.mean(list(unlooped.values()))
            ci = [float(gain - most), float(gain + most)]
        result.append({"flops": budget.flops, "mu_rec": sorted({mu for _, mu in shown}),
                       "gain": gain, "ci": ci, "by_seed": [one for one, _ in shown],
                       "single": not pairs})
    return result


def pairs_of(budget):
    """({mu_rec: {seed: gain over mu_rec = 1}}, {seed: loss at mu_rec = 1})."""
    losses = {mu: {seed: math.exp(loss) for seed, loss in seeds.items()}
              for mu, seeds in budget.cells.items()}
    unlooped = losses.pop(1, {})
    gained = {mu: {seed: unlooped[seed] - loss for seed, loss in seeds.items() if seed in unlooped}
              for mu, seeds in losses.items()}
    return gained, unlooped


def without_a_pair(budgets):
    """How many runs have none to be compared with, of their budget and seed, one of the two with
    mu_rec = 1."""
    alone = 0
    for budget in budgets:
        gained, unlooped = pairs_of(budget)
        paired = {seed for seeds in gained.values() for seed in seeds}
        looped = sum(map(len, budget.cells.values())) - len(unlooped)
        alone += looped - sum(map(len, gained.values())) + len(unlooped.keys() - paired)
    return alone


def best_by_others(gained, seed):
    """The recurrence of this seed that its other seeds gain most by; None where there is none.

    gained: {mu_rec: {seed: gain}}."""
    of_others = {mu: [one for other, one in pairs.items() if other != seed]
                 for mu, pairs in gained.items() if seed in pairs and len(pairs) > 1}
    return max(of_others, key=lambda mu: np.mean(of_others[mu]), default=None)

