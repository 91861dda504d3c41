"""The merge of three versions of a file."""
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.projects.merging import MergeNames, cells_of, cells_text, merge_file, merge_notebooks

NAMES = MergeNames("old", "new")
SOURCES = st.lists(st.text(st.characters(exclude_characters="\0␞", exclude_categories=["Cs"]), max_size=20), max_size=5)


def notebook(sources: list[str], outputs: tuple = ()) -> dict:
    cells = [{"cell_type": "code", "id": f"c{number}", "metadata": {}, "source": source.splitlines(keepends=True),
              "outputs": list(outputs), "execution_count": None} for number, source in enumerate(sources)]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@given(SOURCES)
def test_cells_are_the_same_after_a_round_trip(sources):
    assert cells_of(cells_text(notebook(sources)), {}) == notebook(sources)["cells"]


@settings(max_examples=15, deadline=None)  # each starts git
@given(SOURCES, SOURCES)
def test_a_change_of_one_side_is_the_result(old, changed):
    old, changed = json.dumps(notebook(old)), json.dumps(notebook(changed))
    assert json.loads(merge_notebooks(old, changed, old, NAMES)) == json.loads(changed)
    assert json.loads(merge_notebooks(old, old, changed, NAMES)) == json.loads(changed)


def test_outputs_of_unchanged_cells_are_kept():
    output = {"output_type": "stream", "name": "stdout", "text": ["1\n"]}
    old, new, own = notebook(["a", "b"]), notebook(["A", "b"]), notebook(["a", "b"], (output,))
    merged = merge_file("x.ipynb", *map(json.dumps, (old, new, own)), NAMES)
    assert merged.state == "merged"
    assert [cell["outputs"] for cell in json.loads(merged.text)["cells"]] == [[], [output]]


def test_a_notebook_that_only_an_editor_wrote_again_is_unchanged():
    old, new = notebook(["a"]), notebook(["a"])
    new["metadata"] = {"kernelspec": {"name": "python3"}}
    own = notebook(["a"]) | {"metadata": {"language_info": {"name": "python"}}}
    assert merge_file("x.ipynb", *map(json.dumps, (old, new, own)), NAMES).state == "unchanged"


def test_line_ends_of_a_project_are_kept():
    merged = merge_file("a.txt", "a\r\nb\r\nc\r\n", "A\r\nb\r\nc\r\n", "a\r\nb\r\nC\r\n", NAMES)
    assert (merged.state, merged.text) == ("merged", "A\r\nb\r\nC\r\n")
