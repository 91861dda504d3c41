"""The model's quality compared with the heuristic, on the first day of each month: `python benchmarks/quality.py`.

It needs the tables of `make demo`. Each line is a separate model, trained on facts known before that day and evaluated
on the four weeks before it. The parameters were chosen on flights before 2013-04-01; no later line was used to choose
them."""
import sys
import time
from datetime import date

import pandas as pd
from rich.console import Console
from rich.table import Table

from mlops_nb.conf import read_conf
from mlops_nb.data import tables
from mlops_nb.data.session import get_spark
from mlops_nb.env import load_env
from mlops_nb.flights import learning, model, train
from mlops_nb.models.problem_types import BINARY, loss_change

DAYS = [date(2013, month, 1) for month in range(4, 13)]


def evaluate(rows: pd.DataFrame, day: date, conf: dict) -> dict:
    "Train and evaluate a model as of a day; return its metrics."
    began = time.perf_counter()
    learning_rows, held_out = learning.split(rows, learning.Periods(day, conf["held_out_days"]))
    learnt = learning.learn(learning_rows, conf)
    prediction = model.probabilities(learnt.booster, learnt.encoding, held_out)
    metrics = learning.metrics_beside_baseline(held_out, prediction, learnt.threshold, learnt.baseline_threshold,
                                               conf["costs"])
    label, baseline = held_out.late_arrival.to_numpy(int), held_out[train.BASELINE].to_numpy()
    change = loss_change(BINARY, label, prediction, baseline, held_out.flight_day.to_numpy())
    return metrics["model"].to_dict() | {"reduction": -change.value, "least": -change.high, "most": -change.low,
                                         "seconds": time.perf_counter() - began}


def main() -> None:
    env = load_env()
    spark = get_spark(env)
    if not tables.exists(spark, env, "airport_recent"): sys.exit("the feature tables do not exist: run make demo first")
    conf = read_conf(env.root, "train.yml", train.TRAIN_KEYS)
    title = "log loss compared with the heuristic, on the four weeks before"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("as of", "lower by", "95 % interval", "log loss", "ROC AUC", "calibration error", "cost", "seconds"):
        table.add_column(column)
    results = {}
    for day in DAYS:
        m = results[day] = evaluate(learning.labelled_rows(spark, env, day), day, conf)
        table.add_row(str(day), f"{m['reduction']:.1%}", f"{m['least']:.1%} to {m['most']:.1%}", f"{m['log_loss']:.4f}",
                      f"{m['roc_auc']:.3f}", f"{m['calibration_error']:.3f}", f"{m['business_cost']:.3f}",
                      f"{m['seconds']:.0f}")
    mean = pd.DataFrame(results).mean(axis=1)
    table.add_row("mean", f"{mean['reduction']:.1%}", "", f"{mean['log_loss']:.4f}", f"{mean['roc_auc']:.3f}",
                  f"{mean['calibration_error']:.3f}", f"{mean['business_cost']:.3f}", "")
    Console().print(table)


if __name__ == "__main__": main()
