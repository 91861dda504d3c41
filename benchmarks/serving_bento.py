"""The service that BentoML runs in the benchmark: one row of numbers, scored by LightGBM."""
import os

import bentoml
import lightgbm
import numpy as np


@bentoml.service(workers=1, metrics={"enabled": False})
class Late:
    def __init__(self) -> None:
        self.booster = lightgbm.Booster(model_file=os.environ["BENCHMARK_BOOSTER"])

    @bentoml.api
    def predict(self, rows: list[list[float]]) -> list[float]:
        return self.booster.predict(np.array(rows, dtype="float64"), num_threads=1).tolist()
