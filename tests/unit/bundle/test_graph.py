"The task graph: order, selection, run_if, results and repair, compared with second implementations of the rules."
import re
from itertools import product

import pytest
from databricks.sdk.service import jobs
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.bundle import graph
from mlops_nb.bundle.graph import (
    ResultState,
    RunIf,
    condition,
    decide,
    downstream,
    job_result,
    leaves,
    needs_repair,
    select,
    subset,
    topological,
    upstream,
)
from mlops_nb.errors import MlopsError


def task(key: str, *before: str, **more) -> dict:
    return {"task_key": key, "depends_on": [{"task_key": other} for other in before], **more}


DIAMOND = [task("d", "b", "c"), task("b", "a"), task("c", "a"), task("a")]


@pytest.mark.parametrize("ours, theirs", [
    (graph.ResultState, jobs.RunResultState), (graph.RunIf, jobs.RunIf),
    (graph.COMPARISONS, jobs.ConditionTaskOp)])
def test_names_are_databricks_own(ours, theirs):
    own = {"WAITING"} if ours is graph.ResultState else set()  # of this machine; Databricks' life cycle has the word
    assert {str(name) for name in ours} == {name.value for name in theirs} | own


# run_if as a table: the states of all dependencies as sorted letters (C cancelled, D disabled, F failed, S succeeded,
# W waiting for a person, X excluded), and for each run_if the decision of the first pattern that matches them.
LETTER = {"SUCCESS": "S", "SUCCESS_WITH_FAILURES": "S", "EXCLUDED": "X", "DISABLED": "D", "FAILED": "F",
          "TIMEDOUT": "F", "UPSTREAM_FAILED": "F", "MAXIMUM_CONCURRENT_RUNS_REACHED": "F", "CANCELED": "C",
          "UPSTREAM_CANCELED": "C", "WAITING": "W"}
ALL_EXCLUDED = ("^X+$", "EXCLUDED")
RULES = {
    "ALL_SUCCESS": [ALL_EXCLUDED, ("D", "DISABLED"), ("F", "UPSTREAM_FAILED"), ("C", "UPSTREAM_CANCELED"), ("", "run")],
    "AT_LEAST_ONE_SUCCESS": [ALL_EXCLUDED, ("[SX]", "run"), ("F", "UPSTREAM_FAILED"), ("C", "UPSTREAM_CANCELED"),
                             ("", "DISABLED")],
    "NONE_FAILED": [ALL_EXCLUDED, ("F", "UPSTREAM_FAILED"), ("C", "UPSTREAM_CANCELED"), ("[SX]", "run"),
                    ("", "DISABLED")],
    "ALL_DONE": [ALL_EXCLUDED, ("", "run")],
    "AT_LEAST_ONE_FAILED": [ALL_EXCLUDED, ("[FC]", "run"), ("^D+$", "DISABLED"), ("", "EXCLUDED")],
    "ALL_FAILED": [ALL_EXCLUDED, ("D", "DISABLED"), ("^[FC]+$", "run"), ("", "EXCLUDED")],
}


def by_table(run_if: str, ends: tuple) -> str:
    letters = "".join(sorted(LETTER[end] for end in ends))
    if "W" in letters: return "WAITING"
    return next(answer for pattern, answer in RULES[run_if] if re.search(pattern, letters))


@pytest.mark.parametrize("run_if", list(RunIf))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_run_if_with_every_end_of_one_to_three_dependencies(run_if, count):
    assert set(LETTER) == set(ResultState)
    last = task("z", *"abc"[:count], run_if=str(run_if))
    for ends in product(map(str, ResultState), repeat=count):
        assert decide(last, dict(zip("abc", ends, strict=False))) == by_table(run_if, ends), (run_if, ends)


@pytest.mark.parametrize("run_if", list(RunIf))
def test_nothing_is_decided_before_all_dependencies_have_ended(run_if):
    last = task("z", "a", "b", run_if=run_if)
    for state in ResultState:
        assert decide(last, {"a": state}) is None
        assert decide(last, {"a": state, "b": None}) is None
        assert decide(last | {"disabled": True}, {"a": state}) is None


@pytest.mark.parametrize("run_if", list(RunIf))
def test_a_first_task_runs_whatever_its_run_if_and_a_disabled_one_never(run_if):
    assert decide({"task_key": "a", "run_if": run_if}, {}) == "run"
    assert decide({"task_key": "a", "depends_on": None}, {}) == "run"
    assert decide({"task_key": "a", "run_if": run_if, "disabled": True}, {}) == "DISABLED"
    assert all(decide(task("b", "a", disabled=True), {"a": state}) == "DISABLED" for state in ResultState)


def test_the_default_is_all_success():
    for state in ResultState:
        assert decide(task("b", "a"), {"a": state}) == decide(task("b", "a", run_if="ALL_SUCCESS"), {"a": state})


def test_a_branch_not_taken_is_excluded_and_the_join_after_it_runs():
    yes = {"task_key": "yes", "depends_on": [{"task_key": "if", "outcome": "true"}]}
    no = {"task_key": "no", "depends_on": [{"task_key": "if", "outcome": "false"}]}
    for outcome, taken, left in (("true", yes, no), ("false", no, yes)):
        assert decide(taken, {"if": "SUCCESS"}, {"if": outcome}) == "run"
        assert decide(left, {"if": "SUCCESS"}, {"if": outcome}) == "EXCLUDED"
    join = task("join", "yes", "no")
    assert decide(join, {"yes": "SUCCESS", "no": "EXCLUDED"}) == "run"
    assert decide(join, {"yes": "EXCLUDED", "no": "EXCLUDED"}) == "EXCLUDED"
    assert decide(join, {"yes": "FAILED", "no": "EXCLUDED"}) == "UPSTREAM_FAILED"


@pytest.mark.parametrize("state", [state for state in ResultState if state != "SUCCESS"])
def test_a_condition_without_an_outcome_counts_with_its_own_state(state):
    branch = {"task_key": "yes", "depends_on": [{"task_key": "if", "outcome": "true"}]}
    assert decide(branch, {"if": state}, {}) == decide(task("yes", "if"), {"if": state})


def test_an_outcome_can_be_a_yaml_boolean_and_needs_a_condition_task():
    branch = {"task_key": "yes", "depends_on": [{"task_key": "if", "outcome": True}]}
    assert decide(branch, {"if": "SUCCESS"}, {"if": "true"}) == "run"
    with pytest.raises(MlopsError, match="task 'if' has no outcome"): decide(branch, {"if": "SUCCESS"}, {})


def test_an_unknown_state_and_an_unknown_run_if_are_refused():
    with pytest.raises(ValueError, match="RUNNING"): decide(task("b", "a"), {"a": "RUNNING"})
    with pytest.raises(MlopsError, match="no run_if 'ALL_FALED'.*\n  did you mean 'ALL_FAILED'"):
        decide(task("b", "a", run_if="ALL_FALED"), {"a": "SUCCESS"})


# --- order and selection, on random graphs

@st.composite
def graphs(draw, size: int = 7) -> list[dict]:  # edges only from later to earlier keys, tasks in any order
    keys = [f"t{i}" for i in range(draw(st.integers(1, size)))]
    tasks = [task(key, *draw(st.lists(st.sampled_from(keys[:i]), unique=True) if i else st.just([])))
             for i, key in enumerate(keys)]
    return draw(st.permutations(tasks))


def ancestors(tasks: list[dict]) -> dict[str, set[str]]:  # closure by repetition
    sets = {t["task_key"]: {e["task_key"] for e in t["depends_on"]} for t in tasks}
    for _ in tasks: sets = {k: s.union(*(sets[o] for o in s)) for k, s in sets.items()}
    return sets


@given(graphs())
def test_order_and_reach(tasks):
    order, above = topological(tasks), ancestors(tasks)
    assert sorted(order) == sorted(above)
    assert all(above[key] <= set(order[:i]) for i, key in enumerate(order))
    for key in above:
        assert upstream(tasks, key) == above[key]
        assert downstream(tasks, key) == {k for k in above if key in above[k]}
    assert set(leaves(tasks)) == set(above) - set().union(*above.values())


@given(graphs(), st.data())
def test_select_is_the_union_of_its_patterns(tasks, data):
    above = ancestors(tasks)
    patterns = data.draw(st.lists(st.tuples(st.sampled_from(["", "+"]), st.sampled_from(sorted(above)),
                                            st.sampled_from(["", "+"])), min_size=1, max_size=3))
    expected = {key for _, key, _ in patterns}
    expected |= {k for before, key, _ in patterns if before for k in above[key]}
    expected |= {k for _, key, after in patterns if after for k in above if key in above[k]}
    selected = select(tasks, ["".join(pattern) for pattern in patterns])
    assert set(selected) == expected and len(selected) == len(expected)
    assert selected == [key for key in topological(tasks) if key in expected]
    assert select(tasks) == select(tasks, []) == topological(tasks)


@given(graphs(), st.data())
def test_subset_keeps_who_comes_before_whom(tasks, data):
    above = ancestors(tasks)
    keys = data.draw(st.sets(st.sampled_from(sorted(above))))
    part = subset(tasks, keys)
    assert {t["task_key"] for t in part} == keys
    if part: assert ancestors(part) == {key: above[key] & keys for key in keys}


def test_a_subset_keeps_the_outcome_of_a_replaced_dependency():
    tasks = [task("if"), {"task_key": "yes", "depends_on": [{"task_key": "if", "outcome": "true"}]}, task("z", "yes")]
    assert subset(tasks, ["if", "z"])[1]["depends_on"] == [{"task_key": "if", "outcome": "true"}]
    assert tasks[2]["depends_on"] == [{"task_key": "yes"}]  # the job's own tasks are not touched


def test_circular_unknown_and_duplicate_tasks_are_named():
    circles = "circular dependencies: (a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c)"
    with pytest.raises(MlopsError, match=circles):
        topological([task("a", "c"), task("b", "a"), task("c", "b"), task("d")])
    with pytest.raises(MlopsError, match="circular dependencies: a -> a"): topological([task("a", "a")])
    with pytest.raises(MlopsError, match="duplicate task_key 'a'"): topological([task("a"), task("a")])
    with pytest.raises(MlopsError, match="no task 'tarin' in depends_on of task 'b'\n  did you mean 'train'"):
        topological([task("train"), task("b", "tarin")])
    for call in (upstream, downstream):
        with pytest.raises(MlopsError, match="no task 'e'"): call(DIAMOND, "e")
    for pattern in ("e", "+e", "e+", "++a", "", "+"):
        with pytest.raises(MlopsError, match="no task"): select(DIAMOND, [pattern])


def test_a_thousand_tasks_in_a_chain():
    chain = [task("t0"), *(task(f"t{i}", f"t{i - 1}") for i in range(1, 1000))]
    assert len(select(chain, ["+t999"])) == 1000
    assert len(needs_repair(chain, {})) == 1000
    assert subset(chain, ["t0", "t999"])[1]["depends_on"] == [{"task_key": "t0"}]


# --- whole runs

def run(tasks: list[dict], broken: dict[str, str], states: dict | None = None) -> dict[str, str]:
    states = dict(states or {})
    while len(states) < len(tasks):
        answers = {t["task_key"]: decide(t, states) for t in tasks if t["task_key"] not in states}
        moved = {key: broken.get(key, "SUCCESS") if answer == "run" else answer
                 for key, answer in answers.items() if answer is not None}
        assert moved, f"nothing can go on after {states}"
        states |= moved
    return states


@given(graphs(), st.data())
def test_with_the_default_run_if_a_task_runs_when_all_above_it_succeeded(tasks, data):
    above = ancestors(tasks)
    broken = data.draw(st.dictionaries(st.sampled_from(sorted(above)), st.sampled_from(["FAILED", "TIMEDOUT"])))
    states = run(tasks, broken)
    for key, state in states.items():
        expected = "UPSTREAM_FAILED" if above[key] & set(broken) else broken.get(key, "SUCCESS")
        assert state == expected
    assert job_result(tasks, states) == ("FAILED" if broken else "SUCCESS")
    repair = needs_repair(tasks, states)
    assert repair == {key for key in above if key in broken or above[key] & set(broken)}
    kept = {key: state for key, state in states.items() if key not in repair}
    assert job_result(tasks, run(tasks, {}, kept)) == "SUCCESS"


@given(graphs(), st.data())
def test_any_run_comes_to_an_end_and_to_a_result(tasks, data):
    some_run_if, some_truth = st.sampled_from(list(RunIf)), st.booleans()
    tasks = [t | {"run_if": data.draw(some_run_if), "disabled": data.draw(some_truth)} for t in tasks]
    ends = st.sampled_from(["FAILED", "TIMEDOUT", "CANCELED", "SUCCESS"])
    states = run(tasks, data.draw(st.dictionaries(st.sampled_from([t["task_key"] for t in tasks]), ends)))
    assert set(states) == {t["task_key"] for t in tasks}
    assert job_result(tasks, states) in {"SUCCESS", "FAILED", "CANCELED", "SUCCESS_WITH_FAILURES"}


@pytest.mark.parametrize("states, expected", [
    ("SUCCESS SUCCESS SUCCESS SUCCESS", "SUCCESS"),
    ("SUCCESS SUCCESS EXCLUDED SUCCESS", "SUCCESS"),
    ("SUCCESS SUCCESS SUCCESS EXCLUDED", "SUCCESS"),
    ("FAILED SUCCESS SUCCESS SUCCESS", "SUCCESS_WITH_FAILURES"),
    ("SUCCESS CANCELED SUCCESS SUCCESS", "SUCCESS_WITH_FAILURES"),
    ("SUCCESS SUCCESS SUCCESS FAILED", "FAILED"),
    ("SUCCESS SUCCESS SUCCESS TIMEDOUT", "FAILED"),
    ("FAILED UPSTREAM_FAILED UPSTREAM_FAILED UPSTREAM_FAILED", "FAILED"),
    ("CANCELED UPSTREAM_CANCELED UPSTREAM_CANCELED UPSTREAM_CANCELED", "CANCELED"),
    ("SUCCESS FAILED DISABLED DISABLED", "FAILED"),
    ("SUCCESS SUCCESS DISABLED DISABLED", "SUCCESS"),
    ("DISABLED DISABLED DISABLED DISABLED", "SUCCESS"),
])
def test_the_last_tasks_decide(states, expected):
    assert job_result(DIAMOND, dict(zip("abcd", states.split(), strict=True))) == expected


def test_failure_among_the_last_tasks_outweighs_cancelling():
    tasks = [task("a"), task("b")]
    assert job_result(tasks, {"a": "CANCELED", "b": "FAILED"}) == "FAILED"
    assert job_result(tasks, {"a": "CANCELED", "b": "SUCCESS"}) == "CANCELED"


def test_a_job_that_has_not_ended_has_no_result():
    with pytest.raises(ValueError, match="not ended: d, c"): job_result(DIAMOND, {"a": "SUCCESS", "b": "SUCCESS"})


def test_a_repair_runs_a_clean_up_again_and_what_a_killed_runner_left_open():
    tasks = [task("a"), task("b", "a"), task("clean", "b", run_if="ALL_DONE"), task("other", "a")]
    states = {"a": "SUCCESS", "b": "FAILED", "clean": "SUCCESS", "other": "SUCCESS"}
    assert needs_repair(tasks, states) == {"b", "clean"}
    assert needs_repair(tasks, {"a": "SUCCESS", "b": None, "other": "SUCCESS"}) == {"b", "clean"}
    assert needs_repair(tasks, dict.fromkeys(states, "SUCCESS")) == set()


# --- conditions

@pytest.mark.parametrize("left, op, right, expected", [
    ("12.0", "EQUAL_TO", "12", False), ("12.0", "NOT_EQUAL", "12", True), ("12.0", "GREATER_THAN_OR_EQUAL", "12", True),
    ("10.0", "GREATER_THAN_OR_EQUAL", "12", False), ("9", "LESS_THAN", "10", True), ("9", "GREATER_THAN", "10", False),
    ("-1", "LESS_THAN_OR_EQUAL", "-1.0", True), (" 2 ", "EQUAL_TO", "2", False), ("", "EQUAL_TO", "", True),
    ("True", "EQUAL_TO", "true", False), (True, "EQUAL_TO", "true", True), (3, "EQUAL_TO", "3", True),
    ("9007199254740993", "GREATER_THAN", "9007199254740992", True),  # equal as floats
    ("0.1", "LESS_THAN", "1e-1", False), ("1E3", "GREATER_THAN", "999", True), (".5", "LESS_THAN", "+1.", True)])
def test_conditions(left, op, right, expected):
    assert condition(left, op, right) is expected


@pytest.mark.parametrize("text", ["", "late", "nan", "inf", "-Infinity", "1_000", "1,5", "0x10", "true", "１", "1 2",
                                  None])
@pytest.mark.parametrize("op", ["GREATER_THAN", "GREATER_THAN_OR_EQUAL", "LESS_THAN", "LESS_THAN_OR_EQUAL"])
def test_only_numbers_are_compared_as_numbers(text, op):
    with pytest.raises(MlopsError, match="is not a number"): condition(text, op, "1")
    with pytest.raises(MlopsError, match="is not a number"): condition("1", op, text)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_any_two_numbers(left, right):
    assert condition(repr(left), "LESS_THAN", repr(right)) is (left < right)
    assert condition(repr(left), "GREATER_THAN_OR_EQUAL", repr(right)) is (left >= right)


def test_an_operator_that_does_not_exist():
    with pytest.raises(MlopsError, match="no op 'EQUALS' in condition_task"): condition("1", "EQUALS", "1")
