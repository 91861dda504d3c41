"""The cells of a notebook that a task executes, compared with nbclient."""
import inspect
from itertools import product

from nbclient import NotebookClient
from nbformat import from_dict, v4

from mlops_nb.jobs.execute import RAISES_TAG, SKIP_TAG, is_executed, skipped_cells

SOURCES = ["x = 1", "", " \n\t", "# a comment", "#| eval: false\n", "%%bash\n"]
TAGS = [None, [], ["parameters"], ["injected-parameters"], [SKIP_TAG], [RAISES_TAG], ["hide", SKIP_TAG]]


class Sent(Exception):
    "nbclient is about to send the cell to the kernel."


def is_sent_to_the_kernel(cell) -> bool:
    "Whether nbclient would execute the cell; no kernel runs."
    def stop(**_): raise Sent
    client = NotebookClient(v4.new_notebook(cells=[]), on_cell_execute=stop)
    client.kc = object()
    try: client.execute_cell(cell, 0)
    except Sent: return True
    return False


def test_the_executed_cells_are_those_of_nbclient():
    answers = []
    for kind, source, tags in product(("code", "raw", "markdown"), SOURCES, TAGS):
        fields = {"outputs": [], "execution_count": None} if kind == "code" else {}
        metadata = {} if tags is None else {"tags": tags}
        cell = from_dict({"cell_type": kind, "source": source, "metadata": metadata} | fields)
        answers.append(is_executed(cell))
        assert answers[-1] == is_sent_to_the_kernel(cell), (kind, source, tags)
        assert len(skipped_cells(from_dict({"cells": [cell]}))) == answers[-1]
    assert sum(answers) == 4 * 5  # code that is not blank, without the tag skip-execution


def test_the_tags_are_those_of_nbclient():
    assert NotebookClient.skip_cells_with_tag.default_value == SKIP_TAG
    assert f'"{RAISES_TAG}" in cell.metadata' in inspect.getsource(NotebookClient)
