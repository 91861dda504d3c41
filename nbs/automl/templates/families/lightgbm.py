"""LightGBM: boosted trees that grow leaf by leaf"""
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
           "lightgbm.sklearn.LGBMClassifier", "lightgbm.sklearn.LGBMRegressor"]  # what skops is to load beside scikit-learn


class SoFar:
    "The booster while it learns, asked as the finished model will be."

    def __init__(self, booster, prepare, classes): self.booster, self.prepare, self.classes_ = booster, prepare, classes

    def predict_proba(self, rows):
        found = self.booster.predict(self.prepare.transform(rows).astype("float64"))
        return np.column_stack([1 - found, found]) if found.ndim == 1 else found

    def predict(self, rows):
        if self.classes_ is None: return self.booster.predict(self.prepare.transform(rows).astype("float64"))
        return self.classes_[self.predict_proba(rows).argmax(axis=1)]


def fit(parameters, data, report):
    "Categories become numbers, of which LightGBM knows that they have no order; unseen ones count as missing."
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=float("nan"), encoded_missing_value=float("nan"))
    prepare = ColumnTransformer([("categories", codes, data.categories), ("numbers", "passthrough", data.numbers)])
    x = prepare.fit_transform(data.train).astype("float64")
    classes = np.unique(data.train_target) if data.kind == "classify" else None
    rounds = parameters["rounds"]
    moments = {max(round(share * rounds), 1) - 1: share for share in (0.1, 0.2, 0.4, 0.6, 0.8)}

    def tell(now):  # on the way, so that a hopeless trial can be stopped
        if now.iteration in moments: report(moments[now.iteration], SoFar(now.model, prepare, classes))

    kind = LGBMClassifier if data.kind == "classify" else LGBMRegressor
    model = kind(n_estimators=rounds, random_state=data.seed, n_jobs=data.threads, deterministic=True, force_row_wise=True, verbose=-1,
                 **{name: value for name, value in parameters.items() if name != "rounds"})
    model.fit(x, data.train_target, categorical_feature=list(range(len(data.categories))), callbacks=[tell])
    pipeline = Pipeline([("prepare", prepare), ("model", model)])
    report(1.0, pipeline)
    return pipeline
