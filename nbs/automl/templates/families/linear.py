"""Linear model: logistic regression, or ridge regression for numbers"""
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

SPACE = {
    "penalty": {"low": 0.0001, "high": 1000.0, "log": True, "default": 1.0},
    "most_categories": {"low": 5, "high": 100, "log": True, "default": 30},
}
TRUSTED = ["numpy.dtype"]  # types that skops loads in addition to its defaults


def fit(parameters, data, report):
    "Standardise numbers, impute the median with an indicator column, and one-hot encode the frequent categories."
    numbers = Pipeline([("fill", SimpleImputer(strategy="median", add_indicator=True)),
                        ("scale", StandardScaler())])
    categories = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=parameters["most_categories"])
    prepare = ColumnTransformer([("categories", categories, data.categories), ("numbers", numbers, data.numbers)])
    if data.kind == "classify": model = LogisticRegression(C=1 / parameters["penalty"], max_iter=2000)
    else: model = Ridge(alpha=parameters["penalty"])
    pipeline = Pipeline([("prepare", prepare), ("model", model)]).fit(data.train, data.train_target)
    report(1.0, pipeline)
    return pipeline
