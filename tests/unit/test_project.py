"""Rules of the whole project: packaging, the form of its notebooks, and the direction of imports."""
import ast
import configparser
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

import mlops_nb
from mlops_nb.bundle.load import load_bundle
from mlops_nb.bundle.parameters import parameter_cell
from mlops_nb.jobs.tasks import named_secrets, nested_tasks

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
OF_JOBS = sorted({ROOT / t["notebook_task"]["notebook_path"] for job in load_bundle(ROOT).jobs.values()
                  for t in nested_tasks(job) if "notebook_task" in t})


def name_of(path): return str(path.relative_to(ROOT / "nbs"))


def exported(path: Path) -> list[str]:
    "The sources of the cells that become the module."
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [source for source in sources if re.match(r"#\|\s*export", source)]


@cache
def module_of(path: Path) -> str:
    "The module a notebook is exported to, without the package."
    export = re.search(r"#\| default_exp (\S+)", path.read_text().replace("\\n", "\n").replace('"', " "))
    return export.group(1) if export else ""


def imported(path: Path) -> set[str]:
    "Our own modules that a notebook's exported cells import, without the package."
    modules, names = {module_of(p) for p in NOTEBOOKS} - {""}, set()
    for node in ast.walk(ast.parse("\n".join(exported(path)))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlops_nb":
            inner = node.module.partition(".")[2]
            names |= {inner} if inner in modules else {f"{inner}.{alias.name}".lstrip(".") for alias in node.names}
    return {mlops_nb._MODULES.get(name, name) for name in names}  # a name of the package itself stands for its module


TOP_LEVEL = set("""benchmarks conf docs mlops_nb nbs resources template tests .ci .devcontainer .gitattributes .github
    .gitignore .pre-commit-config.yaml CHANGELOG.md CONTRIBUTING.md LICENSE Makefile
    README.md databricks.yml pyproject.toml requirements.lock settings.ini""".split())


def test_no_file_that_a_run_wrote_is_committed():
    "A state beside its usual place, such as a folder with the name of a bucket."
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    assert {name.split("/")[0] for name in names if name} <= TOP_LEVEL


def test_the_wheel_brings_no_pyspark():
    needed = [r for r in metadata.requires("mlops_nb") if "extra ==" not in r]
    owners = {"pyspark", "pyspark-client", "databricks-connect", "pysail"}
    assert needed and not owners & {re.split(r"[^\w-]", r)[0].lower() for r in needed}


def declared() -> set[str]:
    "The distributions that pyproject.toml names, in its dependencies and extras."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}


def third_party(source: str) -> set[str]:
    "The top-level packages that code imports, without Python's own and ours."
    packages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.split(".")[0])
    return packages - set(sys.stdlib_module_names) - {"mlops_nb"}


def test_every_package_that_is_imported_is_declared():
    owners, names = metadata.packages_distributions(), declared()
    modules = [path for path in (ROOT / "mlops_nb").rglob("*.py") if path.name != "_modidx.py"]
    imported_packages = set().union(*(third_party(path.read_text()) for path in modules))
    installed = {package for package in imported_packages if package in owners}  # stores have drivers of their own
    undeclared = {package for package in installed
                  if not {owner.lower().replace("_", "-") for owner in owners[package]} & names}
    assert len(installed) > 20 and not undeclared, f"add to pyproject.toml what brings {', '.join(sorted(undeclared))}"


def test_frames_are_collected_without_the_metrics_of_the_query():
    modules = sorted((ROOT / "mlops_nb").rglob("*.py"))
    collecting = [path.relative_to(ROOT).as_posix() for path in modules if ".toPandas()" in path.read_text()]
    assert collecting == ["mlops_nb/automl/dataset.py", "mlops_nb/data/pandas_frames.py"], "call to_pandas(df) instead"


def test_one_version_everywhere():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert settings["DEFAULT"]["version"] == mlops_nb.__version__ == metadata.version("mlops_nb")


LOCKS = [ROOT / "requirements.lock", *(ROOT / "tests").rglob("*.lock"), *ROOT.glob("*/requirements.lock")]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_locks_pin_and_name_no_address(lock):
    lines = lock.read_text().splitlines()
    assert all("==" in line for line in lines if line.strip()) and not any("://" in line for line in lines)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory) -> Path:
    "A folder with the notebooks of the jobs as nbdev_clean leaves them."
    folder = tmp_path_factory.mktemp("cleaned")
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, folder)
    for path in OF_JOBS:
        copy = folder / "nbs" / name_of(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", folder / "nbs"], cwd=folder, check=True)
    return folder / "nbs"


@pytest.mark.parametrize("path", OF_JOBS, ids=name_of)
def test_nbdev_clean_keeps_the_parameters_tag(path, cleaned):
    copy = cleaned / name_of(path)
    assert parameter_cell(copy) == parameter_cell(path) != ""
    assert copy.read_text() == path.read_text(), "not clean: run nbdev_clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_has_the_form_that_readers_expect(path):
    cells = json.loads(path.read_text())["cells"]
    first = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "markdown"
    assert re.match(r"# .+\n\n> .+", first), "a title, and one line on its purpose"
    if path in OF_JOBS: assert "[Results of this run](#Run)" in first, "the first cell of a job links to its results"
    assert not any(c.get("outputs") for c in cells), "outputs belong to runs"
    functions = [n for s in exported(path) for n in ast.walk(ast.parse(s)) if isinstance(n, ast.FunctionDef)]
    long = [function.name for function in functions if function.end_lineno - function.lineno >= 30]
    assert not long, f"functions that are too long: {long}"
    if module := module_of(path):
        folder = path.parent.relative_to(ROOT / "nbs")
        assert module == ".".join((*folder.parts, path.stem.partition("_")[2])), "module and notebook have one name"


def areas() -> list[set[str]]:
    "The areas, and the modules at the root, in the order of the table in nbs/index.ipynb."
    table = next(source for cell in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
                 if "| area |" in (source := "".join(cell["source"])))
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    return [set(re.findall(r"`(\S+)`", cell)) for cell in first]


def test_an_area_imports_only_from_areas_above_it():
    ranks = {name: rank for rank, names in enumerate(areas()) for name in names}
    rooms = {}  # module -> the rank of its area, its number in the area
    for path in NOTEBOOKS:
        area, (number, _, name) = path.parent.relative_to(ROOT / "nbs").as_posix(), path.stem.partition("_")
        if number.isdigit() and module_of(path):  # a job whose functions are all the platform's exports nothing
            rooms[module_of(path)] = (ranks[name if area == "." else area], int(number))
    assert set(rooms) == {module for path in NOTEBOOKS if (module := module_of(path))}
    assert len(set(rooms.values())) == len(rooms), "two notebooks of an area share a number"
    for path in NOTEBOOKS:
        if (module := module_of(path)) not in rooms: continue
        for other in imported(path) - {module}:  # a function that is sent to workers imports its own module
            assert rooms[other] < rooms[module], f"{module} imports {other}, which stands after it"


def test_the_package_itself_has_what_users_import_and_loads_nothing_before():
    for name, module in mlops_nb._MODULES.items():
        room = importlib.import_module(f"mlops_nb.{module}")
        assert getattr(mlops_nb, name) is (room if module.endswith(name) else getattr(room, name))
    assert set(mlops_nb.__all__) == set(mlops_nb._MODULES) <= set(dir(mlops_nb))
    with pytest.raises(ImportError, match="cannot import name 'lod_env'"): exec("from mlops_nb import lod_env")
    code = ("import sys, mlops_nb\nheavy = {'mlflow', 'pandas', 'pyspark'}\n"
            "print([name for name in sys.modules if name.startswith('mlops_nb.') or name in heavy])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_pages_import_and_link_what_exists(page):
    text = page.read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec("\n".join(ast.unparse(node) for node in imports), {})
    for target in re.findall(r"\]\(([^)#:]+)\)", text): assert (page.parent / target).exists(), target


def test_only_the_jobs_that_publish_name_the_secrets_of_the_online_store(monkeypatch):
    "Tasks that load a version, which can run any code, get no secret: the other tasks of `demo` are jobs of their own."
    monkeypatch.delenv("MLOPS_ONLINE_STORE", raising=False)
    address = "postgresql://me@host/db?password=secrets/online/postgres"
    jobs = load_bundle(ROOT, variables={"online_store": address}).jobs
    named = {key: secrets for key, job in jobs.items() if (secrets := named_secrets(job))}
    assert named == {"features": {("online", "postgres")}, "demo": {("online", "postgres")}}
    own = [task["task_key"] for task in jobs["demo"]["tasks"] if "notebook_task" in task]
    assert own == ["publish"]
    monkeypatch.setenv("MLOPS_ONLINE_STORE", "redis://host?password=secrets/online/redis")
    assert {key for key, job in jobs.items() if ("online", "redis") in named_secrets(job)} == {*named}
