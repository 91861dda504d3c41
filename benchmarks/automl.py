"""Trials per minute of an AutoML search whose trials are notebooks, beside plain Optuna on the same trials in one process."""
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
    "A search of notebooks; its summary, and the seconds it took."
    from mlops_nb.automl import summary as automl
    from mlops_nb.env import load_env
    store = f"sqlite:///{folder / 'mlflow.db'}"
    env = replace(load_env("dev", root=ROOT), state=folder, tracking_uri=store, registry_uri=store)
    began = time.perf_counter()
    summary = automl.classify(load_breast_cancer(as_frame=True).frame, "target", "roc_auc", max_trials=TRIALS, explore=False, env=env)
    return summary, time.perf_counter() - began


def plain(summary) -> float:
    "Seconds of a loop that fits the same families with the same parameters on the same rows, and logs nothing."
    import optuna

    from mlops_nb.automl.dataset import SPLIT
    began = time.perf_counter()
    rows = pd.read_parquet(summary.folder / "dataset.parquet")
    part, target = rows.pop(SPLIT), rows.pop("target")
    study = optuna.create_study(storage=f"sqlite:///{summary.folder / 'plain.db'}", direction="maximize")
    held = part == "validate"
    held_out = lambda model: roc_auc_score(target[held], model.predict_proba(rows[held])[:, 1])
    fits = {}
    for trial in sorted(summary.trials, key=lambda t: t.number):
        if trial.family not in fits:
            names = {}
            exec((Path(ROOT, "nbs/automl/templates/families", f"{trial.family}.py")).read_text(), names)
            fits[trial.family] = names["fit"]
        data = SimpleNamespace(kind="classify", train=rows[part == "train"], train_target=target[part == "train"], categories=[],
                               numbers=list(rows), seed=0, threads=1)
        asked = study.ask()
        model = fits[trial.family](trial.params, data, lambda share, model: held_out(model))
        study.tell(asked, held_out(model))
    return time.perf_counter() - began


def rows(folder: Path) -> list[tuple]:
    "Rows for the table of benchmarks/run.py."
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # as the trials have it
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    summary, ours = notebooks(folder)
    theirs = plain(summary)
    done = [t for t in summary.trials if t.state == "COMPLETE"]
    above = sorted(t.duration - t.fit_seconds for t in done)
    per_minute = [60 * TRIALS / seconds for seconds in (ours, theirs)]
    return [(f"AutoML, {TRIALS} trials as notebooks", f"{per_minute[0]:.1f} trials/min",
             f"plain Optuna, nothing logged {per_minute[1]:.1f}", f"{per_minute[0] / per_minute[1]:.2f}", ""),
            ("a trial above its own fit", f"{above[len(above) // 2]:.1f} s (worst {above[-1]:.1f})", "", "", "6 s")]
