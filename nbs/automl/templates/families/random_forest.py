"""Random forest: many deep trees, each on a random sample of rows and columns"""
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
TRUSTED = ["sklearn.tree._tree.Tree"]  # types that skops loads in addition to its defaults


def fit(parameters, data, report):
    "Encode categories as numbers; rare categories share one, unseen ones are -1 and missing ones are -2."
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2,
                             max_categories=200)
    prepare = ColumnTransformer([("categories", encoder, data.categories), ("numbers", "passthrough", data.numbers)])
    x = prepare.fit_transform(data.train).astype("float64")
    model_class = RandomForestClassifier if data.kind == "classify" else RandomForestRegressor
    settings = {name: value for name, value in parameters.items() if name != "trees"}
    model = model_class(warm_start=True, random_state=data.seed, n_jobs=data.threads, **settings)
    pipeline = Pipeline([("prepare", prepare), ("model", model)])
    for share in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0):  # warm start: the search can stop a poor trial early
        model.set_params(n_estimators=max(round(share * parameters["trees"]), 1)).fit(x, data.train_target)
        report(share, pipeline)
    return pipeline
