"""LightGBM: gradient-boosted trees with leaf-wise growth"""
import numpy as np
from lightgbm import LGBMClassifier, LGBMRegressor
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OrdinalEncoder

SPACE = {
    "rounds": {"low": 40, "high": 400, "log": True, "default": 100},
    "learning_rate": {"low": 0.01, "high": 0.3, "log": True, "default": 0.1},
    "num_leaves": {"low": 4, "high": 128, "log": True, "default": 31},
    "min_child_samples": {"low": 5, "high": 200, "log": True, "default": 20},
    "colsample_bytree": {"low": 0.3, "high": 1.0, "default": 1.0},
    "reg_lambda": {"low": 0.001, "high": 100.0, "log": True, "default": 0.001},
}
TRUSTED = ["collections.OrderedDict", "collections.defaultdict", "lightgbm.basic.Booster",
           "lightgbm.sklearn.LGBMClassifier",
           "lightgbm.sklearn.LGBMRegressor"]  # types that skops loads in addition to its defaults


class PartialModel:
    "The booster during the fit, with the prediction methods of the finished model."

    def __init__(self, booster, prepare, classes): self.booster, self.prepare, self.classes_ = booster, prepare, classes

    def raw_prediction(self, rows): return self.booster.predict(self.prepare.transform(rows).astype("float64"))

    def predict_proba(self, rows):
        probability = self.raw_prediction(rows)
        return np.column_stack([1 - probability, probability]) if probability.ndim == 1 else probability

    def predict(self, rows):
        if self.classes_ is None: return self.raw_prediction(rows)
        return self.classes_[self.predict_proba(rows).argmax(axis=1)]


def fit(parameters, data, report):
    "Encode categories as numbers and declare them categorical in LightGBM; unseen categories are missing values."
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=float("nan"),
                             encoded_missing_value=float("nan"))
    prepare = ColumnTransformer([("categories", encoder, data.categories), ("numbers", "passthrough", data.numbers)])
    x = prepare.fit_transform(data.train).astype("float64")
    classes = np.unique(data.train_target) if data.kind == "classify" else None
    rounds = parameters["rounds"]
    reported = {max(round(share * rounds), 1) - 1: share for share in (0.1, 0.2, 0.4, 0.6, 0.8)}  # share by iteration

    def report_progress(environment):  # LightGBM's callback; the search can stop a poor trial early
        share = reported.get(environment.iteration)
        if share: report(share, PartialModel(environment.model, prepare, classes))

    model_class = LGBMClassifier if data.kind == "classify" else LGBMRegressor
    settings = {name: value for name, value in parameters.items() if name != "rounds"}
    model = model_class(n_estimators=rounds, random_state=data.seed, n_jobs=data.threads, deterministic=True,
                        force_row_wise=True, verbose=-1, **settings)
    model.fit(x, data.train_target, categorical_feature=list(range(len(data.categories))), callbacks=[report_progress])
    pipeline = Pipeline([("prepare", prepare), ("model", model)])
    report(1.0, pipeline)
    return pipeline
