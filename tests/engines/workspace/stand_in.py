"""A stand-in workspace: the files of a deployed bundle, and jobs whose notebooks run as on Databricks.

The scheduler is the project's own: `Home.start` gives each notebook to `cluster.py`, which runs in the environment of
Apache Spark. The notebooks see only what a deployment copies: no `.git`, no environment, no tests. MLflow's unchanged
client and databricks-sdk call `mlops up`, as they call a workspace."""
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from deployment import deployed_files
from recorder import Recorder
from unity_catalog import USER

from mlops_nb.bundle.load import load_bundle
from mlops_nb.jobs.execute import Outcome

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]


class Workspace:
    "The workspace of one test run."

    def __init__(self, folder: Path, python: Path, target: str = "dev", root: Path = ROOT):
        self.folder, self.target, self.python = folder, target, python
        self.files, self.state = folder / "files", folder / "workspace"
        self.bundle, self.said, self.lock = load_bundle(root=root, target=target), [], threading.Lock()
        self.deployed = load_bundle(root=root, target=target, user=USER, deployed=True)
        self.options = {}  # of the catalog, in every following notebook
        self.settings = self.deployed_settings()
        self.state.mkdir(parents=True)
        excluded = (self.bundle.data.get("sync") or {}).get("exclude", [])
        for name in deployed_files(root, excluded):
            target_file = self.files / name
            target_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target_file)
        self.notebooks = folder / "notebooks"  # in the workspace a notebook is no file
        for file in self.files.rglob("*.ipynb"):
            moved = self.notebooks / file.relative_to(self.files)
            moved.parent.mkdir(parents=True, exist_ok=True)
            file.rename(moved)
        self.before = self.listing()
        self.install(root)
        self.process = self.home = self.calls = None

    def deployed_settings(self) -> dict[str, str]:
        "The values of the job parameter `settings`, as a deployment resolves them."
        return json.loads(self.deployed.variables["settings"]) | {"git_sha": "0123456789abcdef"}

    def install(self, root: Path):
        "Build the wheel from the files of a commit, and install it without its dependencies."
        source = self.folder / "source"
        for name in deployed_files(root, []):
            copy = source / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, copy)
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                 "--no-build-isolation", "--target", self.folder / "wheel", source]
        subprocess.run(words, check=True, capture_output=True, text=True)

    def listing(self) -> list[str]: return sorted(str(file.relative_to(self.files)) for file in self.files.rglob("*"))

    def start_home(self):
        "Start `mlops up`, which answers the workspace's REST calls, with a token of the target for the user."
        commands, state = Path(sys.executable).parent, self.folder / "home_state"
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ} | {
            "MLOPS_STATE": str(state), "PYTHONPATH": str(HERE / "packages"), "STAND_IN_SERVES": "1", "TZ": "UTC",
            "MLOPS_SCHEDULER": "0"}
        words = [commands / "mlops", "up", "token", USER, "-t", self.target]
        made = subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        self.token = made.stdout.strip()
        with (self.folder / "up.log").open("wb") as log:
            self.home = subprocess.Popen([commands / "mlops", "up", "-t", self.target], cwd=ROOT, env=environment,
                                         stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        running, end = state / "workspace/workspace.json", time.monotonic() + 60
        while not running.exists():
            if self.home.poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.folder / "up.log").read_text()[-3000:])
            time.sleep(0.1)
        self.calls = Recorder(json.loads(running.read_text())["host"]).__enter__()

    @property
    def client(self):  # databricks.sdk.WorkspaceClient
        "The workspace, as its user calls it."
        from databricks.sdk import WorkspaceClient
        return WorkspaceClient(host=self.calls.address, token=self.token)

    @property
    def environment(self) -> dict[str, str]:
        "The environment variables of a notebook on classic compute with runtime 18."
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        wheel = self.folder / "wheel"
        return kept | {
            "HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp"), "STAND_IN_STATE": str(self.state),
            "DATABRICKS_RUNTIME_VERSION": "18.0", "STAND_IN_ONLINE_STORE": str(self.folder / "home_state/online.db"),
            "STAND_IN_LAKEHOUSE": str(self.folder / "home_state/lakehouse"),
            "DATABRICKS_HOST": self.calls.address, "DATABRICKS_TOKEN": self.token,
            "PYTHONPATH": f"{HERE / 'packages'}:{wheel}", "PYSPARK_PYTHON": str(self.python), "MPLBACKEND": "Agg",
            "SPARK_CONF_DIR": str(HERE.parent / "spark-conf"), "TZ": "UTC", "GIT_CEILING_DIRECTORIES": str(self.folder)}

    def start(self):
        "Start the workspace's REST calls, and the compute with the project installed from its wheel."
        self.start_home()
        home = self.folder / "home"
        home.mkdir()
        (self.folder / "tmp").mkdir()
        ivy = Path.home() / ".ivy2.5.2"
        if ivy.exists(): (home / ivy.name).symlink_to(ivy)
        with (self.folder / "cluster.log").open("w") as log:
            self.process = subprocess.Popen(
                [self.python, HERE / "cluster.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=self.environment, cwd=self.folder)
        if not self.process.stdout.readline(): raise RuntimeError((self.folder / "cluster.log").read_text()[-3000:])


    def deploy(self):
        "Make the schemas that are resources of the bundle."
        for schema in self.deployed.data["resources"]["schemas"].values():
            self.sql(f"CREATE SCHEMA `{schema['catalog_name']}`.`{schema['name']}`")

    def stop(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait(60)
            self.process.stdout.close()
        if self.home:
            self.calls.__exit__()
            self.home.terminate()
            self.home.wait(60)

    def ask(self, request: dict) -> dict:
        "Send a request to the compute, and return its answer."
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def sql(self, statement: str) -> list:
        "Run a statement as the owner of the workspace, and return its rows."
        return self.ask({"sql": statement, "environment": {}})["rows"]

    def run(self, notebook: str, widgets: dict, values: dict | None = None, **environment) -> dict:
        "Run one notebook, such as nbs/flights/12_setup.ipynb, with its parameters as strings."
        request = {"notebook": str(self.notebooks / notebook), "folder": str((self.files / notebook).parent),
                   "widgets": widgets, "values": values or {}, "environment": environment, **self.options}
        self.calls.notebook = Path(notebook).stem
        result = self.ask(request)
        text = result.get("exit") or result["message"]
        self.said.append((notebook, result["result_state"], result.get("seconds", 0), text))
        return result

    def execute(self, attempt: Path, spec: dict, environment: dict):
        "Start a notebook of a job, as `Home.start` does; `wait` runs it."
        return Execution(self, attempt, spec)


class Execution:
    "One attempt of a task."

    def __init__(self, workspace: Workspace, attempt: Path, spec: dict):
        self.workspace, self.attempt, self.spec = workspace, attempt, spec
        attempt.mkdir(parents=True, exist_ok=True)

    def stop(self): ...

    def wait(self, report) -> Outcome:
        spec, root = self.spec, self.workspace.bundle.root
        own = {name: value if isinstance(value, str) else json.dumps(value)
               for name, value in spec["notebook_parameters"].items()}
        widgets = own | spec["parameters"] | {"settings": json.dumps(self.workspace.settings)}
        result = self.workspace.run(str(Path(spec["notebook"]).relative_to(root)), widgets, spec["values"])
        (self.attempt / "values.json").write_text(json.dumps(result.get("values", {})))
        (self.attempt / "exit.txt").write_text(result.get("exit", ""))
        (self.attempt / "printed.txt").write_text(result.get("printed", "") + result.get("traceback", ""))
        return Outcome(result["result_state"], result["message"])
