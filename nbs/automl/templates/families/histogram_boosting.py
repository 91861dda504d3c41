"""Histogram gradient boosting: scikit-learn's own boosted trees"""
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OrdinalEncoder

SPACE = {
    "rounds": {"low": 40, "high": 400, "log": True, "default": 100},
    "learning_rate": {"low": 0.01, "high": 0.3, "log": True, "default": 0.1},
    "max_leaf_nodes": {"low": 4, "high": 128, "log": True, "default": 31},
    "min_samples_leaf": {"low": 5, "high": 200, "log": True, "default": 20},
    "l2_regularization": {"low": 0.001, "high": 100.0, "log": True, "default": 0.001},
}
TRUSTED = ["functools.partial", "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
           "sklearn.utils.validation.check_array"]  # types that skops loads in addition to its defaults


def fit(parameters, data, report):
    "Encode the 200 most frequent categories as numbers, others as one number; unseen categories are missing values."
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=float("nan"),
                             encoded_missing_value=float("nan"), max_categories=200)
    prepare = ColumnTransformer([("categories", encoder, data.categories), ("numbers", "passthrough", data.numbers)])
    x = prepare.fit_transform(data.train).astype("float64")
    model_class = HistGradientBoostingClassifier if data.kind == "classify" else HistGradientBoostingRegressor
    settings = {name: value for name, value in parameters.items() if name != "rounds"}
    model = model_class(warm_start=True, early_stopping=False, random_state=data.seed,
                        categorical_features=list(range(len(data.categories))) or None, **settings)
    pipeline = Pipeline([("prepare", prepare), ("model", model)])
    for share in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0):  # warm start: the search can stop a poor trial early
        model.set_params(max_iter=max(round(share * parameters["rounds"]), 1)).fit(x, data.train_target)
        report(share, pipeline)
    return pipeline
