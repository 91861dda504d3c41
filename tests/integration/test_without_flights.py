"""The use case flights is one user of the platform: nothing outside needs it, and a copy without it works."""
import json
import subprocess
import zipfile
from pathlib import Path

import generated
import pytest
from states import ROOT

OF_FLIGHTS = ("nbs/flights/", "mlops_nb/flights/", "resources/", "conf/", "tests/unit/flights/")
BUNDLE = """bundle: {name: empty}
variables:
  catalog: {default: "${bundle.target}"}
  schema: {default: mine}
targets: {dev: {default: true}, prod: {}}
"""


def tracked() -> list[str]:
    "The files of the repository, with those that are new."
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def code_of(path: Path) -> str:
    "The code of a module, or of all cells of a notebook."
    if path.suffix == ".py": return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_nothing_outside_flights_imports_or_names_its_modules():
    platform = [name for name in tracked() if name.startswith(("nbs/", "mlops_nb/", "template/"))
                and not name.startswith(OF_FLIGHTS) and name.endswith((".py", ".ipynb"))
                and name not in ("mlops_nb/_modidx.py", "nbs/index.ipynb")]  # lists of all modules and notebooks
    assert len(platform) > 200
    words = ("mlops_nb.flights", "from .flights", "from ..flights", "from mlops_nb import flights", "nbs/flights")
    users = {name: word for name in platform for word in words if word in code_of(ROOT / name)}
    assert users == {}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The repository without flights: its notebooks, modules, jobs and settings, and its line in pyproject.toml."
    folder = tmp_path_factory.mktemp("without") / "platform"
    for name in tracked():
        if name.startswith(OF_FLIGHTS): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    lines = (folder / "pyproject.toml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.strip() != '"mlops_nb.flights",']
    assert len(kept) == len(lines) - 1
    (folder / "pyproject.toml").write_text("".join(kept))
    (folder / "databricks.yml").write_text(BUNDLE)
    return folder


IMPORTS = """
import importlib, pkgutil, mlops_nb
names = [module.name for module in pkgutil.walk_packages(mlops_nb.__path__, "mlops_nb.")]
optional = {"boto3", "azure", "confluent_kafka", "psycopg", "redis"}  # drivers of the extras
for name in names:
    try: importlib.import_module(name)
    except ModuleNotFoundError as error: assert error.name.split(".")[0] in optional, (name, error.name)
print(mlops_nb.__file__, len(names), any("flights" in name for name in names))
"""


@pytest.mark.slow
def test_every_module_of_the_copy_is_imported(copy):
    place, count, has_flights = generated.run_in(copy, "python", "-c", IMPORTS).splitlines()[-1].split()
    assert Path(place).is_relative_to(copy) and int(count) > 120 and has_flights == "False"


@pytest.mark.slow
def test_the_copy_exports_and_its_bundle_is_valid(copy):
    before = {path: path.read_bytes() for path in (copy / "mlops_nb").rglob("*.py") if path.name != "_modidx.py"}
    generated.run_in(copy, "nbdev_export")
    assert [path for path in before if before[path] != path.read_bytes()] == []
    assert "no problem" in generated.run_in(copy, "mlops", "validate")


@pytest.mark.slow
def test_the_tour_of_the_copy_runs(copy):
    assert "Success." in generated.run_in(copy, "nbdev_test", "--path", "nbs/index.ipynb")


@pytest.mark.slow
@pytest.mark.full
def test_the_unit_tests_of_the_platform_pass_in_the_copy(copy):
    "Those of the areas that a use case uses directly; the others take minutes."
    folders = [f"tests/unit/{area}" for area in ("data", "features", "projects", "workflow", "deployment", "models")]
    of_this_project = ("contracts_are_valid", "registering_a", "registers_in", "900_lines", "this_project")
    printed = generated.run_in(copy, "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-k",
                               " and ".join(f"not {name}" for name in of_this_project), *folders)
    assert " passed" in printed and "failed" not in printed


@pytest.mark.slow
def test_the_wheel_of_the_copy_has_no_flights(copy, tmp_path):
    generated.run_in(copy, "uv", "build", "--quiet", "--wheel", "--out-dir", tmp_path, ".")
    wheel, = tmp_path.glob("mlops_nb-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mlops_nb/workflow/use_case.py" in names and not any("flights" in name for name in names)


@pytest.mark.slow
def test_the_copy_makes_a_project(copy, tmp_path):
    frame, folder = generated.made_up("regression", has_time=False), tmp_path / "orders"
    frame.to_csv(generated.data_of(folder), index=False)
    options = generated.options_of(frame, generated.data_of(folder))
    printed = generated.run_in(copy, "mlops", "new", folder, *generated.words_of(options))
    assert "written" in printed and "problem   regression" in printed
    assert "no problem" in generated.run_in(folder, "mlops", "validate")
    assert "SOURCE = TableSource(" in (folder / "orders/use_case.py").read_text()
