"""How good the model is on the first day of each month, against the heuristic: after `make demo`, `python benchmarks/quality.py`.

Each line is a version of its own, trained with what was known before that day and judged on the four weeks before it. The
parameters were chosen on flights before 2013-04-01; the other lines report, they do not choose."""
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
from mlops_nb.models.intervals import paired_change
from mlops_nb.models.metrics import mean_log_loss

DAYS = [date(2013, month, 1) for month in range(4, 13)]


def judged(rows: pd.DataFrame, day: date, conf: dict) -> dict:
    "The metrics of a version as of a day."
    began = time.perf_counter()
    learning_rows, held_out = learning.split(rows, learning.Periods(day, conf["held_out_days"]))
    learnt = learning.learn(learning_rows, conf)
    prediction = model.probabilities(learnt.booster, learnt.encoding, held_out)
    found = learning.metrics_beside_baseline(held_out, prediction, learnt.threshold, learnt.baseline_threshold, conf["costs"])
    label, baseline = held_out.late_arrival.to_numpy(int), held_out[train.BASELINE].to_numpy()
    lower, least, most = (-part for part in paired_change(label, prediction, baseline, held_out.flight_day.to_numpy(), mean_log_loss))
    return found["model"].to_dict() | {"lower": lower, "least": most, "most": least, "seconds": time.perf_counter() - began}


def main() -> None:
    env = load_env()
    spark = get_spark(env)
    if not tables.exists(spark, env, "airport_recent"): sys.exit("there are no feature tables of the year: run make demo first")
    conf = read_conf(env.root, "train.yml", train.TRAIN_KEYS)
    table = Table(title="log loss against the heuristic, on the four weeks before", title_justify="left", box=None)
    for column in ("as of", "lower by", "95 % of draws", "log loss", "ROC AUC", "calibration error", "cost", "seconds"): table.add_column(column)
    found = {}
    for day in DAYS:
        found[day] = f = judged(learning.labelled_rows(spark, env, day), day, conf)
        table.add_row(str(day), f"{f['lower']:.1%}", f"{f['least']:.1%} to {f['most']:.1%}", f"{f['log_loss']:.4f}", f"{f['roc_auc']:.3f}",
                      f"{f['calibration_error']:.3f}", f"{f['business_cost']:.3f}", f"{f['seconds']:.0f}")
    mean = pd.DataFrame(found).mean(axis=1)
    table.add_row("mean", f"{mean['lower']:.1%}", "", f"{mean['log_loss']:.4f}", f"{mean['roc_auc']:.3f}", f"{mean['calibration_error']:.3f}",
                  f"{mean['business_cost']:.3f}", "")
    Console().print(table)


if __name__ == "__main__": main()
