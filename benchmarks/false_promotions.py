"""How often the rule of deployment promotes a model that is not better: `python benchmarks/false_promotions.py`.

Two equal models differ by chance from day to day, and the differences of consecutive days are correlated (AR(1)). The
peer is the interval of independent days: 500 draws of single days, percentiles, no correction. Nominal is 2.5 %, one
side of a 95 % interval. The second table repeats promotions under the rule for an old Champion, with Challengers that
are each 0.47 % worse than the Champion."""
import sys

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlops_nb.deployment.comparison import accepted_losses, apply_rule, check_deployment_rule
from mlops_nb.models.day_resampling import (
    MIN_DECISION_DAYS,
    Days,
    Resampled,
    Statistic,
    ratio_statistic,
    relative_change,
    resample,
)
from mlops_nb.models.problem_types import BINARY

SAMPLES = 2000
DRAWS = 2000  # the rule takes 20,000 and more; 2,000 keep the simulation short
LOSS, ROWS = 0.5, 900  # mean log loss, rows per day
SPREAD = 0.01  # standard deviation of a day's difference
OLD_RULE = check_deployment_rule({
    "mode": "compare", "metric": "log_loss", "greater_is_better": False, "min_rows": 1, "min_relative_change": 0.005,
    "confidence": 0.95, "floor": 1.0, "champion_max_age_days": 180, "not_worse_than": 0.01}, BINARY)


def change_of_models(days: int, autocorrelation: float, rng: np.random.Generator, worse: float = 0.0) -> Statistic:
    "The relative change of the log loss from a model to another one that is truly worse by a share."
    noise = rng.normal(size=days + 50)
    for i in range(1, days + 50): noise[i] += autocorrelation * noise[i - 1]
    difference = SPREAD * np.sqrt(1 - autocorrelation**2) * noise[50:]
    old = LOSS + rng.normal(scale=0.05, size=days)
    numbered, ones = Days(days, np.arange(days)), np.full(days, float(ROWS))
    new_sums = ROWS * (old + LOSS * worse + difference)
    return relative_change(ratio_statistic(new_sums, ones, numbered), ratio_statistic(ROWS * old, ones, numbered))


def independent_days(statistic: Statistic, days: int, rng: np.random.Generator) -> Resampled:
    "The peer: 500 draws of single days, and their percentiles."
    drawn = statistic(rng.multinomial(days, np.full(days, 1 / days), size=500))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Resampled(float(statistic(np.ones((1, days)))[0]), float(low), float(high), drawn, 1.0, 0.0)


def blocks_of_days(statistic: Statistic, days: int, rng: np.random.Generator) -> Resampled:
    return resample(statistic, days, DRAWS, seed=int(rng.integers(1 << 31)))


def false_promotions(days: int, autocorrelation: float, samples: int) -> tuple[float, float]:
    "The shares of samples in which the whole interval says better: independent days, blocks of days."
    rng, better = np.random.default_rng(days), np.zeros(2)
    for _ in range(samples):
        statistic = change_of_models(days, autocorrelation, rng)
        better += [method(statistic, days, rng).high < 0 for method in (independent_days, blocks_of_days)]
    return tuple(better / samples)


def after_promotions(times: int, interval, adds_up: bool, rng: np.random.Generator) -> float:
    "The true loss of the Champion after some Challengers that are each 0.47 % worse than the Champion."
    accepted, loss = 0.0, 0.0
    for _ in range(times):
        result = interval(change_of_models(28, 0.4, rng, worse=0.0047), 28, rng)
        bounds = (result.low, result.high)
        if not apply_rule(OLD_RULE, LOSS, result.value, bounds, 200, accepted if adds_up else 0.0)[0]: continue
        accepted = accepted_losses(OLD_RULE, result.value, bounds, accepted)
        loss = (1 + loss) * 1.0047 - 1
    return loss


def main(samples: int = SAMPLES) -> None:
    table = Table("days", "autocorrelation", "independent days", "blocks of days", box=None, title_justify="left",
                  title=f"equal models: share of {samples:,} samples with an interval that is better throughout")
    cases = [(days, rho) for days in (7, 14, 28, 60, 120) for rho in (0.0, 0.2, 0.4, 0.5)]
    over = []
    for days, rho in track(cases, transient=True):
        before, after = false_promotions(days, rho, samples)
        decides = days >= MIN_DECISION_DAYS
        table.add_row(str(days), f"{rho}", f"{before:.1%}", f"{after:.1%}" if decides else "no decision")
        if decides and after > 0.025 + 2 * np.sqrt(0.025 * 0.975 / samples): over.append((days, rho, after))
    rng = np.random.default_rng(1)
    losses = {name: np.mean([after_promotions(12, method, adds_up, rng) for _ in range(max(samples // 40, 10))])
              for name, method, adds_up in (("independent days, no sum", independent_days, False),
                                            ("blocks of days, losses add up", blocks_of_days, True))}
    console = Console()
    console.print(table)
    for name, loss in losses.items(): console.print(f"12 Challengers, each 0.47% worse: {name}: {loss:.1%} worse")
    if over: sys.exit(f"more than the nominal 2.5 % (two standard errors allowed): {over}")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
