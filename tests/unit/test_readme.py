"""What the README and the pages of the site name: files that exist, commands that the command line has, tests."""
import re
import textwrap
from pathlib import Path
from urllib.parse import urldefrag

import pytest
import typer
import yaml

from mlops_nb.commands.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = {urldefrag(target)[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target} - {""}
    generated = {"pages/tour", "pages/reference/index"}
    assert not {target for target in targets - generated if not (page.parent / target).exists()}


YAML_FILES = [ROOT / "databricks.yml",
              *(file for name in ("conf", "resources", "template") for file in sorted((ROOT / name).rglob("*.yml")))]


@pytest.mark.parametrize("loader", [yaml.SafeLoader, yaml.CSafeLoader], ids=lambda loader: loader.__name__)
def test_every_reader_of_yaml_reads_the_pages_and_the_files(loader):
    "The reader in C takes more than the one in Python, such as a ? between { and }; others are as strict."
    blocks = {f"{page.name}: {text}": textwrap.dedent(text) for page in PAGES
              for text in re.findall(r"^ *```ya?ml\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)}
    assert len(blocks) >= 8
    for name, text in (blocks | {file.name: file.read_text() for file in YAML_FILES}).items():
        anchors = set(re.findall(r"\*(\w+)$", text, re.MULTILINE)) - set(re.findall(r"&(\w+)", text))  # of elsewhere
        try: yaml.load("".join(f"{anchor}: &{anchor} {{}}\n" for anchor in anchors) + text, Loader=loader)
        except yaml.YAMLError as error: pytest.fail(f"{name}\n{error}")


def test_each_mark_of_what_runs_where_is_a_file_of_tests():
    table = (ROOT / "README.md").read_text().split("## What runs where")[1].split("\n## ")[0]
    files = re.findall(r"\[✓\]\((\S+)\)", table)
    assert len(files) >= 25 and all("def test_" in (ROOT / file).read_text() for file in files)


def command_words(group, words=()):
    "The names of all commands and their options."
    for name, command in group.commands.items():
        if hasattr(command, "commands"): yield from command_words(command, (*words, name))
        options = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        yield " ".join((*words, name)), options | {"--help"}


GROUPS = {name for name, command in typer.main.get_command(app).commands.items() if hasattr(command, "commands")}
COMMANDS = dict(command_words(typer.main.get_command(app)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_a_page_shows_exists(page):
    for line in re.findall(r"(?:`|^|\$ |/)mlops ([a-z]+[^`\n|]*)", page.read_text(), re.MULTILINE):
        words = line.split("#")[0].split()
        known = [" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS]
        if not known:
            assert words[0] in GROUPS, f"mlops {line}"
            continue
        wrong = [word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word) and word not in COMMANDS[known[0]]]
        assert not wrong, f"mlops {line}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_that_a_page_shows_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = set(re.findall(r"(?:`|^|\$ )make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert shown <= targets, shown - targets
