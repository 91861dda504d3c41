"""The list of calls in the docs is that of the application."""
from dataclasses import replace
from pathlib import Path

from mlops_nb.env import load_env
from mlops_nb.serving.places import make_places
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.call_list import call_list
from mlops_nb.workspace.routers import workspace_routers
from mlops_nb.workspace.token_access import Permissions

PAGE = Path(__file__).parents[3] / "docs/rest-api.md"
MARK = "<!-- list of calls: python tests/unit/workspace/test_call_list.py writes it -->\n\n"


def written(folder: Path) -> str:
    env = replace(load_env(), state=folder)
    routers = workspace_routers(env, make_places(env), None, None, None, Permissions(env.root, dict))
    return call_list(build_app(dict, routers))


def test_the_docs_list_what_is_answered_and_what_is_not(tmp_path):
    assert PAGE.read_text().partition(MARK)[2] == written(tmp_path)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder: content = written(Path(folder))
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + content)
