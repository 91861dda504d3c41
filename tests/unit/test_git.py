"""What git refuses is an error; what it has not got is a default. A real repository of another user."""
import os
import subprocess

import pytest

from mlops_nb import git, job_homes
from mlops_nb.env import folder_env
from mlops_nb.errors import MlopsError
from mlops_nb.models import evidence


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no safe.directory of this machine
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    folder = tmp_path / "a b"
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    return folder


def test_a_repository_of_another_user_is_an_error_with_the_command_that_mends_it(repository, project, monkeypatch):
    if os.geteuid(): pytest.skip("only root can give a folder to another user")
    for path in (repository, repository / ".git"): os.chown(path, 12345, 12345)
    for read in (git.git_details, lambda folder: evidence.code_version(folder_env(folder))):
        with pytest.raises(MlopsError, match="belongs to another user") as raised: read(repository)
        assert raised.value.hint == f"if you trust it: git config --global --add safe.directory '{repository}'"
    os.chown(project.root, 12345, 12345)
    subprocess.run(["git", "init", "--quiet", str(project.root)], check=True)
    os.chown(project.root / ".git", 12345, 12345)
    loaded = project.home().bundle
    with pytest.raises(MlopsError, match="belongs to another user"):
        job_homes.problems_of(loaded)  # before a run begins
    subprocess.run(["git", "config", "--global", "--add", "safe.directory", str(repository)], check=True,
                   env=os.environ | {"HOME": str(repository)})
    monkeypatch.setenv("HOME", str(repository))
    assert git.git_details(repository)["commit"] == ""


def test_no_commit_no_remote_no_repository_and_no_git_are_defaults(repository, tmp_path, monkeypatch):
    assert git.git_details(repository) | {"branch": ""} == {"branch": "", "commit": "", "origin_url": ""}
    assert git.git_details(tmp_path) == {"branch": "", "commit": "", "origin_url": ""}
    assert evidence.code_version(folder_env(repository))["git_sha"].startswith("mlops_nb ")
    (repository / ".git/config").write_text("[core")
    with pytest.raises(MlopsError, match="bad config"): git.git_details(repository)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git.git_details(repository)["commit"] == ""


def test_deployed_files_below_a_repository_record_the_commit_of_their_deployment(repository, monkeypatch):
    files = repository / ".mlops/workspace/files"
    project = files / "Users/me/project"
    project.mkdir(parents=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(files))  # as in the notebooks of created jobs
    assert set(git.git_details(project).values()) == {""}
    env = folder_env(project)
    assert evidence.code_version(env)["git_sha"].startswith("mlops_nb ")
    env.variables.update(git_sha="0123abc", git_branch="release/1")
    assert evidence.code_version(env) == {"git_sha": "0123abc", "git_branch": "release/1", "git_dirty": "unknown"}
