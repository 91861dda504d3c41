"Intervals of shares and of means, and findings: without Spark."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mlops_nb.workflow import exploration
from mlops_nb.workflow.exploration import Label


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_of_a_share_are_wilsons(counts):
    late, labels = counts
    wanted = binomtest(late, labels).proportion_ci(0.95, method="wilson")
    means = pd.DataFrame({"late": [late / labels], "labels": [labels]})
    ours = exploration.with_interval(means, Label("late")).iloc[0]
    np.testing.assert_allclose([ours.low, ours.high], wanted, atol=1e-4)


def test_a_group_without_labels_has_no_interval():
    means = pd.DataFrame({"late": [None, 0.5], "labels": [0, 4], "spread": [None, None]})
    for label in (Label("late"), Label("late", is_share=False)):
        assert np.isnan(exploration.with_interval(means, label).low[0])


@pytest.mark.parametrize("holds", [True, False])
def test_a_finding_that_does_not_hold_is_marked(holds):
    results = []
    text = exploration.finding(results, "Late.", True, np.bool_(holds)).data
    assert results == [holds] and ("Does not hold" in text) != holds


def test_extremes_are_named_apart():
    from mlops_nb.workflow.exploration_plots import extreme_rows
    means = pd.DataFrame({"x": [0, 1, 500, 1000], "late": [0.0, 0.01, 0.5, 1.0]})
    assert extreme_rows(means, "x", "late", count=2).index.tolist() == [0, 2, 3]
