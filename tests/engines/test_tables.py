"""Each function of `tables` writes the same tables on Sail as on Apache Spark with Delta, the reference."""
import ast
from pathlib import Path

import pytest
from special_numbers import columns, facts, stored, types

SCRIPT = Path(__file__).with_name("tables_scenario.py")
STEPS = [node.name for node in ast.parse(SCRIPT.read_text()).body
         if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "step" for d in node.decorator_list)]


@pytest.fixture(scope="module")
def results(each_engine): return each_engine(SCRIPT.name)


@pytest.mark.parametrize("step", STEPS)
def test_both_engines_give_the_same_result(results, step):
    for engine, steps in results.items(): assert "failed" not in steps[step], f"on {engine}: {steps[step]['failed']}"
    assert results["sail"][step] == results["spark"][step]


def test_every_function_of_tables_is_in_a_step():
    called = {node.attr for node in ast.walk(ast.parse(SCRIPT.read_text()))
              if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "tables"}
    assert called >= {"create", "merge", "replace", "overwrite", "snapshot",
                      "read", "version", "history", "table_names", "exists"}


def test_mistakes_are_refused(results):
    messages, condition_messages, unchanged, exist = results["spark"]["mistakes"]
    assert not [message for message in messages if message.startswith("NOT REFUSED")] and unchanged
    assert all(message.startswith("the condition ") for message in condition_messages) and exist == [False, True, True]


def test_special_numbers_are_kept_as_the_oracle_says(results):
    "NaN, infinities, zeros and null, on each engine and by each kind of write: the rows, and the counts of conditions."
    kinds = types(columns(1, 6, 6))
    first, second = (stored(columns(seed, 6, 6), kinds) for seed in (1, 2))
    wanted = {name: first[name] + second[name] for name in kinds}
    for engine in ("sail", "spark"):
        step = results[engine]["special_numbers"]
        assert step["written"] == [6, 3, 6, True, True], engine
        for name in ("numbers", "other_numbers"):
            in_order = sorted(step["rows"][name], key=lambda row: row["k"])
            for c in kinds:
                written = [None if value is None else repr(value) for value in wanted[c]]
                assert [row[c] for row in in_order] == written, (engine, name, c)
        for kind in ("own tables", "the other's tables"):
            assert results[engine][kind]["dev.flights.numbers"]["facts"] == {"c0": facts(wanted["c0"])}, (engine, kind)


@pytest.mark.parametrize("writer, reader", [("sail", "spark"), ("spark", "sail")])
def test_an_engine_reads_the_tables_of_the_other(results, writer, reader):
    own, read = results[writer]["own tables"], results[reader]["the other's tables"]
    assert len(own) >= 10 and read == own


def test_rows_outside_of_a_write_stay(results):
    "The reference is checked too: the expected rows after merges, replacements and concurrent writers, by hand."
    spark = results["spark"]
    merged, replaced = spark["merged"][-1]["rows"], spark["replaced"][-1]["rows"]
    assert [r["v"] for r in sorted(merged, key=lambda r: r["k"])] == ["closest", "B", "taken", "untouched", "e", "f"]
    assert replaced == [{"day": "2013-02-01", "k": 9, "v": None, "note": None}]
    best = {k: (20 + min(k // 5, 1), 2) for k in range(15)}
    assert {r["k"]: (r["v"], r["writer"]) for r in spark["two_writers_at_once"]} == best
    assert len(spark["two_writers_at_once"]) == 15
