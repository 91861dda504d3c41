"""Bad commits to a project: each is refused by a check with its name, and mended by what the check says."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import generated
import pytest
from states import ROOT
from typer.testing import CliRunner

from mlops_nb.commands.app import app
from mlops_nb.commands.check import COMMIT_CHECKS, result_of
from mlops_nb.commits.checked_files import checked_files
from mlops_nb.commits.clean_notebooks import notebook_fault
from mlops_nb.commits.secrets_in_files import kinds_of_secrets

pytestmark = pytest.mark.usefixtures("no_settings")
NOTEBOOK, MODULE = "nbs/01_use_case.ipynb", "team_shop/use_case.py"
PACKAGE = "team_shop"  # a name of its own: the check of the bundle imports the package into the process of the tests
TOKEN = "dapi" + 2 * "0123456789abcdef"  # in parts: the checks of this repository read this file, too
HOOKS = ("notebooks-clean", "export-current", "code", "secrets", "bundle")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    "A new project with one commit, whose environment is that of the tests. Read-only."
    folder = tmp_path_factory.mktemp("commits") / PACKAGE
    with pytest.MonkeyPatch.context() as patch: generated.write(folder, generated.made_up("binary", False), patch)
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    generated.commit(folder)
    return folder


@pytest.fixture
def shop(written, tmp_path) -> Path:
    "A copy of the project, to be spoilt."
    return Path(shutil.copytree(written, tmp_path / PACKAGE, symlinks=True))


def run(project: Path, *words: str, code: int | None = 0) -> str:
    "Run a command in a project as Ann Smith and return its output."
    people = {f"GIT_{role}_{part}": text for role in ("AUTHOR", "COMMITTER")
              for part, text in (("NAME", "Ann Smith"), ("EMAIL", "ann@example.org"))}
    process = subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=300,
                             env=generated.environment_of(project) | people)
    assert code is None or process.returncode == code, process.stdout + process.stderr
    return process.stdout + process.stderr


def make(project: Path, target: str, code: int = 0) -> str:
    "Run a target of the project's Makefile; the environment counts as installed."
    if not shutil.which("make"): pytest.skip("make is not installed: apt-get install make")
    (project / ".venv/.ready").touch()
    return run(project, "make", target, code=code)


def edit_notebook(project: Path, change, name: str = NOTEBOOK) -> None:
    "Change the cells of a notebook, and write it as nbdev does."
    notebook = json.loads((project / name).read_text())
    change(notebook["cells"])
    (project / name).write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def code_cell(source: str, **parts) -> dict:
    return {"cell_type": "code", "id": "c0ffee00", "metadata": {}, "execution_count": None, "outputs": [],
            "source": source.splitlines(keepends=True)} | parts


def edited_by_hand(project: Path) -> None:
    with (project / MODULE).open("a") as module: module.write("\nEDITED = True\n")


def with_an_error_output(project: Path) -> None:
    error = {"output_type": "error", "ename": "KeyError", "evalue": "'visits'", "traceback": ["KeyError: 'visits'"]}
    edit_notebook(project, lambda cells: cells.append(code_cell("1 / 0", outputs=[error], execution_count=7)))


def with_a_secret_in_a_cell(project: Path) -> None:
    edit_notebook(project, lambda cells: cells.append(code_cell(f'print("a")\ntoken = "{TOKEN}"')))


def with_a_secret_in_an_output(project: Path) -> None:
    output = {"output_type": "stream", "name": "stdout", "text": ["connected\n", f"with {TOKEN}\n"]}
    edit_notebook(project, lambda cells: cells.append(code_cell("show()", outputs=[output])))


def with_a_broken_bundle(project: Path) -> None:
    path = project / "resources/train.job.yml"
    text = path.read_text()
    assert "depends_on: [{task_key: train}]" in text
    path.write_text(text.replace("depends_on: [{task_key: train}]", "depends_on: [{task_key: trian}]", 1))


def with_badly_formatted_code(project: Path) -> None:
    imports = "#| eval: false\nimport sys\nimport os\nprint(os.sep, sys.path)"
    edit_notebook(project, lambda cells: cells.append(code_cell(imports)))


def with_a_module_outside_of_the_wheel(project: Path) -> None:
    (project / "team_shop/pages").mkdir()
    (project / "team_shop/pages/page.py").write_text("TITLE = 'Shop'\n")


BAD_COMMITS = [  # how it is made, the check that refuses it, what it names, what mends it
    (edited_by_hand, "export-current", f"{MODULE} is not what {NOTEBOOK} exports: edit the notebook", "make tidy"),
    (with_an_error_output, "notebooks-clean", f"{NOTEBOOK} has an error output (KeyError) and execution", "make tidy"),
    (with_a_secret_in_a_cell, "secrets", "source, line 2 contains a secret: Databricks token", "revoke it"),
    (with_a_secret_in_an_output, "secrets", "outputs, line 2 contains a secret: Databricks token", "revoke it"),
    (with_a_broken_bundle, "bundle", "did you mean 'train'", "mlops validate -t TARGET"),
    (with_badly_formatted_code, "code", "I001 [*] Import block is un-sorted", "make tidy"),
    (with_a_module_outside_of_the_wheel, "wheel", "team_shop/pages/page.py is not in the wheel", "[tool.setuptools]"),
]


@pytest.mark.parametrize(("spoil", "check", "fault", "mend"), BAD_COMMITS, ids=[row[0].__name__ for row in BAD_COMMITS])
def test_a_bad_commit_is_refused_by_a_check_that_says_what_mends_it(shop, spoil, check, fault, mend):
    spoil(shop)
    refusal = result_of(check, checked_files(shop))
    assert any(fault in line for line in refusal.faults) and mend in refusal.mend, refusal
    assert TOKEN not in "\n".join(refusal.faults)


@pytest.mark.slow
def test_a_new_project_passes_and_is_not_changed(written, shop):
    before = generated.contents(shop)
    assert {name: result_of(name, checked_files(shop)) for name in COMMIT_CHECKS} == dict.fromkeys(COMMIT_CHECKS)
    after = generated.contents(shop)
    assert [name for name in after if after[name] != before.get(name) and not name.startswith("dist/")] == []


@pytest.mark.slow
def test_the_command_lists_all_that_is_wrong_and_make_tidy_mends_it(shop, monkeypatch):
    "Edits that are not committed stay as they are until they are mended."
    for spoil in (edited_by_hand, with_an_error_output, with_badly_formatted_code): spoil(shop)
    before = generated.contents(shop)
    monkeypatch.chdir(shop)
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 1 and result.output.count("  mend: make tidy") == 3
    assert "3 of 6 checks failed: notebooks-clean, export-current, code" in result.output
    assert {name: text for name, text in generated.contents(shop).items() if not name.startswith("dist/")} == before
    make(shop, "tidy")
    checks = [word for name in ("notebooks-clean", "export-current", "code") for word in ("--only", name)]
    result = CliRunner().invoke(app, ["check", *checks])
    assert result.exit_code == 0 and result.output.count(" ok ") == 3, result.output
    assert "EDITED" not in (shop / MODULE).read_text()
    assert '"import os\\n",\n    "import sys' in (shop / NOTEBOOK).read_text()


def test_only_the_given_files_are_checked(shop, monkeypatch):
    for spoil in (with_a_secret_in_a_cell, with_an_error_output): spoil(shop)
    monkeypatch.chdir(shop)
    assert CliRunner().invoke(app, ["check", "--only", "secrets", "README.md"]).exit_code == 0
    assert CliRunner().invoke(app, ["check", "--only", "secrets", NOTEBOOK]).exit_code == 1
    assert CliRunner().invoke(app, ["check", "--only", "notebooks-clean", "nbs/02_ingest.ipynb"]).exit_code == 0


SECRETS = {  # in parts, as above
    "Private Key": "-----BEGIN RSA " + "PRIVATE KEY-----", "AWS Access Key": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub Token": "ghp_" + 36 * "a", "GitHub fine-grained token": "github_pat_" + 22 * "a",
    "Slack Token": "xoxb-" + "123456789012-abcdefghijkl", "Databricks token": f"DATABRICKS_TOKEN={TOKEN}-2",
    "Azure Storage Account access key": "AccountKey=" + 86 * "a" + "==",
    "password in a URL": "redis://:" + "Xk8!1@host"}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_of_each_kind_are_recognized(kind):
    assert kind in kinds_of_secrets(f"value = '{SECRETS[kind]}'")


@pytest.mark.parametrize("text", [
    "password = os.environ['MLOPS_SECRET_MAIL_TOKEN']", "url: postgresql://me@host/db?password=secrets/online/postgres",
    "http://me:password@host", "https://${user}:${password}@host", "dapi", "d41d8cd98f00b204e9800998ecf8427e",
    "sha256:" + 64 * "a", "git@github.com:shop/shop.git"])
def test_references_placeholders_and_digests_are_no_secrets(text):
    assert kinds_of_secrets(text) == set()


def test_a_false_alarm_is_allowed_by_a_comment(shop):
    lines = [f"a: {TOKEN}  # pragma: allowlist secret", "# pragma: allowlist nextline secret", f"b: {TOKEN}"]
    (shop / "conf/a.yml").write_text("\n".join(lines))
    assert result_of("secrets", checked_files(shop)) is None


def test_a_missing_tool_is_a_failed_check_with_the_command_that_installs_it(shop, monkeypatch):
    monkeypatch.setattr("mlops_nb.commits.checked_files.shutil.which", lambda *_, **__: None)
    refusal = result_of("code", checked_files(shop))
    assert refusal.faults == ("ruff is not installed",) and "make install" in refusal.mend


def commit(project: Path, message: str, code: int = 0) -> str:
    run(project, "git", "add", "-A")
    return run(project, "git", "commit", "-q", "-m", message, code=code)


@pytest.mark.slow
def test_after_make_setup_a_bad_commit_does_not_happen(shop, monkeypatch):
    if not (Path(sys.executable).parent / "pre-commit").exists(): pytest.skip("pre-commit is missing: make install")
    monkeypatch.setenv("SKIP", "bundle")  # of pre-commit: this hook takes seconds
    make(shop, "setup")
    driver = run(shop, "git", "config", "--local", "merge.nbdev-merge.driver").strip()
    assert driver == f"'{shop}/.venv/bin/nbdev_merge' %O %A %B %P" and (shop / ".venv/bin/nbdev_merge").exists()
    with_a_secret_in_a_cell(shop)
    before = run(shop, "git", "rev-parse", "HEAD")
    printed = commit(shop, "a token", code=1)
    assert "contains a secret: Databricks token" in printed and "revoke it" in printed and TOKEN not in printed
    assert "export-current...." in printed and printed.count("Failed") == 1
    assert run(shop, "git", "rev-parse", "HEAD") == before
    run(shop, "git", "reset", "-q", "--hard")
    with (shop / "README.md").open("a") as page: page.write("\nThe shop.\n")
    commit(shop, "a sentence")
    assert run(shop, "git", "rev-parse", "HEAD") != before


DRIVER = f"merge.nbdev-merge.driver='{Path(sys.executable).parent}/nbdev_merge' %O %A %B %P"  # as make setup says
NAMES = [f'#| eval: false\nprint("{word}")\n' for word in ("one", "two", "three")]


@pytest.fixture
def repository(tmp_path) -> Path:
    "A repository with this project's .gitattributes and a notebook."
    folder = tmp_path / "merged"
    folder.mkdir()
    shutil.copy(ROOT / ".gitattributes", folder)
    cells = [code_cell(source, id=f"0000000{number}") for number, source in enumerate(NAMES)]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "a.ipynb").write_text(json.dumps(notebook, sort_keys=True, indent=1) + "\n")
    run(folder, "git", "init", "-q", "-b", "main")
    commit(folder, "start")
    return folder


def two_branches(folder: Path, *, counts: bool) -> None:
    "Two branches edit different cells; with counts, both have also run the cell between them."
    for branch, number in (("first", 0), ("second", 2)):
        run(folder, "git", "checkout", "-q", "-b", branch, "main")
        def change(cells, number=number, branch=branch):
            cells[number]["source"] = [f'print("{branch}")\n']
            if counts: cells[1]["execution_count"] = number + 1
        edit_notebook(folder, change, "a.ipynb")
        commit(folder, branch)


@pytest.mark.parametrize("counts", [False, True])
def test_edits_of_different_cells_merge_with_the_driver(repository, counts):
    two_branches(repository, counts=counts)
    run(repository, "git", "-c", DRIVER, "merge", "-q", "-m", "both", "first")
    sources = ["".join(cell["source"]) for cell in json.loads((repository / "a.ipynb").read_text())["cells"]]
    assert sources == ['print("first")\n', NAMES[1], 'print("second")\n']
    assert run(repository, "git", "status", "--porcelain") == ""


def test_edits_of_one_cell_stay_a_conflict_in_a_notebook_that_can_be_opened(repository):
    for branch in ("first", "second"):
        run(repository, "git", "checkout", "-q", "-b", branch, "main")
        source = [f"print('{branch}')"]
        edit_notebook(repository, lambda cells, source=source: cells[0].update(source=source), "a.ipynb")
        commit(repository, branch)
    run(repository, "git", "-c", DRIVER, "merge", "-q", "first", code=1)
    text = (repository / "a.ipynb").read_text()
    assert len(json.loads(text)["cells"]) == len(NAMES) + 4  # the other side, and three markers
    assert "has a merge conflict: keep one side" in notebook_fault("a.ipynb", text, ())


def test_without_the_driver_git_reports_the_conflict_and_the_check_names_it(repository):
    two_branches(repository, counts=True)
    run(repository, "git", "merge", "-q", "first", code=1)
    (repository / "nbs").mkdir()
    (repository / "a.ipynb").rename(repository / "nbs/a.ipynb")
    (repository / "settings.ini").write_text("[DEFAULT]\nlib_path = team_shop\nnbs_path = nbs\n")
    refusal = result_of("notebooks-clean", checked_files(repository))
    assert refusal.faults == ("nbs/a.ipynb has a merge conflict: resolve it with nbdev_fix nbs/a.ipynb",)


def test_both_makefiles_install_the_driver_that_the_attributes_name(shop):
    for folder in (ROOT, shop):
        lines = (folder / ".gitattributes").read_text().splitlines()
        assert "*.ipynb merge=nbdev-merge" in lines
        assert "git config merge.nbdev-merge.driver" in (folder / "Makefile").read_text()
    hooks = [(folder / ".pre-commit-config.yaml").read_text() for folder in (ROOT, shop)]
    for name in HOOKS: assert all(f"mlops check --only {name}\n" in text for text in hooks), name
