"""Random forest: many deep trees, each of which sees other rows and columns"""
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OrdinalEncoder

SPACE = {
    "trees": {"low": 30, "high": 200, "log": True, "default": 100},
    "max_depth": {"low": 3, "high": 20, "default": 12},
    "min_samples_leaf": {"low": 1, "high": 50, "log": True, "default": 3},
    "max_features": {"choices": ["sqrt", 0.3, 0.6, 1.0], "default": "sqrt"},
}
TRUSTED = ["sklearn.tree._tree.Tree"]  # what skops is to load beside what it always trusts


def fit(parameters, data, report):
    "Categories become numbers; rarer and unseen ones share one. Missing values go where they fit best."
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2, max_categories=200)
    prepare = ColumnTransformer([("categories", codes, data.categories), ("numbers", "passthrough", data.numbers)])
    x = prepare.fit_transform(data.train).astype("float64")
    kind = RandomForestClassifier if data.kind == "classify" else RandomForestRegressor
    settings = {name: value for name, value in parameters.items() if name != "trees"}
    model = kind(warm_start=True, random_state=data.seed, n_jobs=data.threads, **settings)
    pipeline = Pipeline([("prepare", prepare), ("model", model)])
    for share in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0):  # goes on from where it was, so that a hopeless trial can be stopped
        model.set_params(n_estimators=max(round(share * parameters["trees"]), 1)).fit(x, data.train_target)
        report(share, pipeline)
    return pipeline
