"""Trials per minute of an AutoML search that runs notebooks, compared with plain Optuna on the same trials."""
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[1]
TRIALS = 20


def notebooks(folder: Path):
    "Run a search with notebooks; return its summary and its duration in seconds."
    from mlops_nb.automl import summary as automl
    from mlops_nb.env import load_env
    store = f"sqlite:///{folder / 'mlflow.db'}"
    env = replace(load_env("dev", root=ROOT), state=folder, tracking_uri=store, registry_uri=store)
    began = time.perf_counter()
    frame = load_breast_cancer(as_frame=True).frame
    summary = automl.classify(frame, "target", "roc_auc", max_trials=TRIALS, explore=False, env=env)
    return summary, time.perf_counter() - began


def plain(summary) -> float:
    "Return the seconds of a loop that fits the same models on the same rows, without logging."
    import optuna

    from mlops_nb.automl.dataset import SPLIT
    began = time.perf_counter()
    rows = pd.read_parquet(summary.folder / "dataset.parquet")
    part, target = rows.pop(SPLIT), rows.pop("target")
    study = optuna.create_study(storage=f"sqlite:///{summary.folder / 'plain.db'}", direction="maximize")
    is_held_out = part == "validate"
    def score(model): return roc_auc_score(target[is_held_out], model.predict_proba(rows[is_held_out])[:, 1])
    fits = {}
    for trial in sorted(summary.trials, key=lambda t: t.number):
        if trial.family not in fits:
            names = {}
            exec((Path(ROOT, "nbs/automl/templates/families", f"{trial.family}.py")).read_text(), names)
            fits[trial.family] = names["fit"]
        data = SimpleNamespace(kind="classify", train=rows[part == "train"], train_target=target[part == "train"],
                               categories=[], numbers=list(rows), seed=0, threads=1)
        study_trial = study.ask()
        model = fits[trial.family](trial.params, data, lambda share, model: score(model))
        study.tell(study_trial, score(model))
    return time.perf_counter() - began


def rows(folder: Path) -> list[tuple]:
    "Return the rows for the table of benchmarks/run.py."
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # as in the trials
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    summary, notebook_seconds = notebooks(folder)
    ours, optuna_only = (60 * TRIALS / seconds for seconds in (notebook_seconds, plain(summary)))  # trials per minute
    overheads = sorted(t.duration - t.fit_seconds for t in summary.trials if t.state == "COMPLETE")
    median = overheads[len(overheads) // 2]
    return [(f"AutoML, {TRIALS} trials as notebooks", f"{ours:.1f} trials/min",
             f"plain Optuna without logging {optuna_only:.1f}", f"{ours / optuna_only:.2f}", ""),
            ("overhead of a trial, without its fit", f"{median:.1f} s (maximum {overheads[-1]:.1f})", "", "", "6 s")]
