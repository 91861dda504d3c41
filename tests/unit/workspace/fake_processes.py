"""A model host, workers and a registry that answer at once, at the interfaces that the endpoint manager uses."""
import asyncio
from pathlib import Path

from mlops_nb.errors import MlopsError
from mlops_nb.serving.endpoint_config import RestError
from mlops_nb.workspace.endpoint_store import EndpointStore
from mlops_nb.workspace.endpoint_updates import EndpointManager


class Host:
    "Loads a model at once; `broken` versions fail, and `gate` holds all loads back."

    def __init__(self): self.running, self.started, self.broken, self.gate = {}, 0, {"13"}, None

    async def start(self, folder, target, socket, name, log):
        if self.gate: await self.gate.wait()
        if Path(folder).name in self.broken: raise MlopsError("the model cannot be loaded", "its file is damaged")
        self.started += 1
        self.running[socket] = Path(folder).name
        return {"pid": 1, "seconds": 0.1, "rss": 2**20}

    async def end(self, socket): self.running.pop(socket, None)


class Worker:
    "Does what a worker must do, and refuses what a worker would refuse."

    def __init__(self, index=0):
        self.index, self.generations, self.prepared, self.serving, self.refuse = index, {}, {}, {}, None
        self.is_closed = False
        self.drain = None  # an event that ends the requests to old generations

    async def ask(self, command, **values):
        await asyncio.sleep(0)
        return await getattr(self, f"on_{command}")(**values)

    def close(self): self.is_closed = True

    async def on_prepare(self, endpoint):
        if self.refuse: raise self.refuse
        self.prepared[endpoint["name"], endpoint["generation"]] = endpoint
        return {"fast": {}}

    async def on_switch(self, name, generation):
        old = self.serving.get(name)
        if (name, generation) not in self.prepared: raise MlopsError(f"no prepared generation {generation}")
        self.serving[name] = self.prepared.pop((name, generation))
        if old and self.drain: await self.drain.wait()
        return {"drained": True}

    async def on_discard(self, name, generation): self.prepared.pop((name, generation), None)

    async def on_remove(self, name): self.serving.pop(name, None)

    async def on_retag(self, name, sticky_key, shadow):
        self.serving[name] |= {"sticky_key": sticky_key, "shadow": shadow}


class Workers(list):
    def ready(self): return list(self)

    async def wait(self): return list(self)


class Registry:
    "Versions 1 to 20 exist; each is a folder with its number."

    def __init__(self, folder): self.folder = folder

    def check(self, config, table=""):
        for entity in config.entities:
            if int(entity.entity_version) > 20:
                raise RestError(f"no version {entity.entity_version}", error_code="RESOURCE_DOES_NOT_EXIST")
        if table.startswith("prod."): raise RestError("may not write", error_code="PERMISSION_DENIED")
        return {entity.name: "dev" for entity in config.entities}

    def fetch(self, target, model, number):
        (self.folder / number).mkdir(exist_ok=True)
        return self.folder / number


def make_manager(folder: Path, workers: int = 1) -> EndpointManager:
    "A manager of the endpoints in a folder, which may hold those of an earlier one."
    models = folder / "models"
    models.mkdir(exist_ok=True)
    return EndpointManager(EndpointStore(folder / "workspace.db"), Registry(models), Host(),
                           Workers(map(Worker, range(workers))), folder)


def config(*versions: str, **shares: int) -> dict:
    "A configuration whose entities are named v<version>."
    body = {"served_entities": [{"name": f"v{version}", "entity_name": "dev.flights.late_arrival",
                                 "entity_version": version} for version in versions]}
    routes = [{"served_model_name": name, "traffic_percentage": share} for name, share in shares.items()]
    return body | ({"traffic_config": {"routes": routes}} if routes else {})
