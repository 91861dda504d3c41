"""The loader that a model of the feature engineering client names.

In a notebook only `score_batch` can answer keys. On an endpoint (`STAND_IN_SERVES` is set) the model answers with the
features of the request; the real one looks up those that are missing."""
import os


class _Packaged:
    def predict(self, model_input, params=None):
        raise NotImplementedError("a feature store packaged model is called by FeatureEngineeringClient.score_batch")


class _Served:
    def __init__(self, path):
        import mlflow.pyfunc
        self.model = mlflow.pyfunc.load_model(f"{path}/raw_model")

    def predict(self, model_input, params=None):
        names = self.model.metadata.signature.inputs.input_names()
        return self.model.predict(model_input.reindex(columns=names))


def _load_pyfunc(path): return _Served(path) if os.environ.get("STAND_IN_SERVES") else _Packaged()
