"""A registry in memory, for tests that kill moves of aliases at each of their steps."""
from copy import deepcopy
from types import SimpleNamespace

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST


class Registry:
    "A registry in memory with the client's methods that moves of aliases call: many kills cost little."

    def __init__(self): self.versions, self.aliases = {}, {}

    def create_registered_model(self, name): self.versions[name], self.aliases[name] = {}, {}

    def create_model_version(self, name, source):
        number = str(len(self.versions[name]) + 1)
        self.versions[name][number] = SimpleNamespace(name=name, version=number, tags={}, description=None)

    def get_registered_model(self, name): return SimpleNamespace(name=name, aliases=self.aliases[name])

    def get_model_version(self, name, version): return deepcopy(self.stored(name, version))

    def get_model_version_by_alias(self, name, alias): return deepcopy(self.stored(name, self.aliases[name].get(alias)))

    def stored(self, name, version):
        if version in self.versions[name]: return self.versions[name][version]
        raise MlflowException("it does not exist", error_code=RESOURCE_DOES_NOT_EXIST)

    def set_registered_model_alias(self, name, alias, version):
        self.aliases[name][alias] = self.stored(name, version).version

    def set_model_version_tag(self, name, version, tag, value): self.stored(name, version).tags[tag] = value

    def delete_model_version_tag(self, name, version, tag): del self.stored(name, version).tags[tag]

    def update_model_version(self, name, version, description): self.stored(name, version).description = description

    def delete_model_version(self, name, version):
        del self.versions[name][version]
        self.aliases[name] = {alias: number for alias, number in self.aliases[name].items() if number != version}
