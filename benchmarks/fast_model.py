"""One prediction from the body of a request to the body of its answer: the fast model, the package, the exact model."""
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
from comparison_table import print_comparison

NUMBERS, TREES, LEAVES = [f"number_{i}" for i in range(43)], 200, 15
TEXTS = {f"text_{i}": [f"level {j:02}" for j in range(16)] for i in range(4)}
FEATURES = [*TEXTS, *NUMBERS]


def version(folder: Path) -> Path:
    "Save a version as the train job does, of random numbers; return its folder."
    import lightgbm
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    from mlops_nb.models import fitted_model
    random = np.random.default_rng(1)
    rows = random.normal(size=(20_000, len(FEATURES)))
    rows[:, :len(TEXTS)] = random.integers(0, 16, (20_000, len(TEXTS)))
    label = rows[:, 5] + rows[:, 6] * (rows[:, 0] > 8) + random.normal(size=20_000) > 0
    settings = {"objective": "binary", "num_leaves": LEAVES, "verbose": -1, "num_threads": 1}
    booster = lightgbm.train(settings, lightgbm.Dataset(rows, label, categorical_feature=[0, 1, 2, 3]), TREES)
    encoding = {"kind": "lightgbm", "problem": "binary", "features": FEATURES, "categories": TEXTS,
                "calibration": {"slope": 1.0, "intercept": 0.0}}
    files = {"booster": str(folder / "booster.txt"), "encoding": str(folder / "encoding.json")}
    booster.save_model(files["booster"])
    Path(files["encoding"]).write_text(json.dumps(encoding))
    columns = [ColSpec("string" if name in TEXTS else "double", name) for name in FEATURES]
    mlflow.pyfunc.save_model(folder / "model", python_model=fitted_model.__file__, artifacts=files, pip_requirements=[],
                             signature=ModelSignature(Schema(columns)))
    return folder / "model"


def package(folder: Path) -> Callable[[bytes], bytes]:
    "Return what a server of one's own would do: LightGBM's package on NumPy, without a check of the signature."
    from lightgbm import Booster
    booster = Booster(model_file=str(folder / "artifacts/booster.txt"))
    codes = {name: {level: float(i) for i, level in enumerate(levels)} for name, levels in TEXTS.items()}
    def answer(body: bytes) -> bytes:
        split = orjson.loads(body)["dataframe_split"]
        row = dict(zip(split["columns"], split["data"][0], strict=True))
        values = [codes[name].get(row[name], np.nan) if name in codes else row[name] for name in FEATURES]
        return orjson.dumps({"predictions": booster.predict(np.array([values]), num_threads=1).tolist()})
    return answer


def seconds(answer: Callable[[bytes], bytes], body: bytes, count: int) -> float:
    "Return the median time of a call on this processor; other processes of the machine are not counted."
    durations = []
    for _ in range(count):
        began = time.thread_time()
        answer(body)
        durations.append(time.thread_time() - began)
    return statistics.median(durations[count // 10:])


def rows(folder: Path) -> list[tuple]:
    "Return the rows for the table of benchmarks/run.py."
    os.environ.update(OMP_NUM_THREADS="1", MLFLOW_LOGGING_LEVEL="ERROR")
    from mlops_nb.serving.exact_model import ExactModel
    from mlops_nb.serving.fast_model import FastModel
    from mlops_nb.serving.scoring_protocol import parsed_body
    model_folder = version(folder)
    fast, exact = FastModel(model_folder), ExactModel(model_folder)
    data = [[*(levels[3] for levels in TEXTS.values()), *np.linspace(-1, 1, len(NUMBERS)).tolist()]]
    body = orjson.dumps({"dataframe_split": {"columns": FEATURES, "data": data}})
    ours = seconds(lambda text: fast.invoke(parsed_body(text)).body, body, 5000)
    peers = (("LightGBM's package on NumPy", seconds(package(model_folder), body, 2000)),
             ("MLflow's functions (the exact model)", seconds(lambda text: exact.invoke(text).body, body, 50)))
    return [(f"1 row, {len(FEATURES)} features, {TREES} trees", f"{ours * 1e6:.0f} us", f"{name} {peer * 1e6:,.0f} us",
             f"{ours / peer:.3f}", "25 us" if i == 0 else "") for i, (name, peer) in enumerate(peers)]


if __name__ == "__main__": print_comparison(rows)
