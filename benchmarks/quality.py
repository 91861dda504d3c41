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

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark
from mlops_nb.env import load_env
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.models.problem_types import loss_change
from mlops_nb.workflow.evaluation import metrics_by_predictor, model_and_baseline, operating_tags
from mlops_nb.workflow.learning import labels_of, learn, predict, read_train
from mlops_nb.workflow.rows import GROUP, labelled_rows
from mlops_nb.workflow.splits import split_of, split_rows

DAYS = [date(2013, month, 1) for month in range(4, 13)]


def evaluate(rows: pd.DataFrame, day: date, conf: dict) -> dict:
    "Train and evaluate a model as of a day; return its metrics."
    began = time.perf_counter()
    training_rows, held_out = split_rows(FLIGHTS, rows, split_of(FLIGHTS, day, conf))
    trained = learn(FLIGHTS, training_rows, conf)
    predictors = model_and_baseline(FLIGHTS, held_out, predict(FLIGHTS, trained, held_out), operating_tags(trained))
    label = labels_of(FLIGHTS, held_out)
    metrics = metrics_by_predictor(FLIGHTS.problem, label, predictors, conf["costs"])
    prediction, baseline = (predictors[name][0] for name in ("model", "baseline"))
    change = loss_change(FLIGHTS.problem, label, prediction, baseline, held_out[GROUP].to_numpy())
    return metrics["model"].to_dict() | {"reduction": -change.value, "least": -change.high, "most": -change.low,
                                         "seconds": time.perf_counter() - began}


def main() -> None:
    env = load_env()
    spark = get_spark(env)
    if not tables.exists(spark, env, "airport_recent"): sys.exit("the feature tables do not exist: run make demo first")
    conf = read_train(FLIGHTS, env.root)
    title = "log loss compared with the heuristic, on the four weeks before"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("as of", "lower by", "95 % interval", "log loss", "ROC AUC", "calibration error", "cost", "seconds"):
        table.add_column(column)
    results = {}
    for day in DAYS:
        m = results[day] = evaluate(labelled_rows(FLIGHTS, spark, env, day), day, conf)
        table.add_row(str(day), f"{m['reduction']:.1%}", f"{m['least']:.1%} to {m['most']:.1%}", f"{m['log_loss']:.4f}",
                      f"{m['roc_auc']:.3f}", f"{m['calibration_error']:.3f}", f"{m['business_cost']:.3f}",
                      f"{m['seconds']:.0f}")
    mean = pd.DataFrame(results).mean(axis=1)
    table.add_row("mean", f"{mean['reduction']:.1%}", "", f"{mean['log_loss']:.4f}", f"{mean['roc_auc']:.3f}",
                  f"{mean['calibration_error']:.3f}", f"{mean['business_cost']:.3f}", "")
    Console().print(table)


if __name__ == "__main__": main()
