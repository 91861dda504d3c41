"""Counts of an exploration on Sail, of a binary label and of a number, against pandas, NumPy and scikit-learn."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from mlops_nb.workflow import exploration
from mlops_nb.workflow.exploration import Label

SOLD, PRICE = Label("sold"), Label("price", is_share=False)


@pytest.fixture(scope="module")
def houses() -> pd.DataFrame:
    "Houses: a category, numbers, dates, missing values, and both kinds of labels."
    rng = np.random.default_rng(0)
    size = rng.gamma(4, 30, 900).round(1)
    frame = pd.DataFrame({"town": rng.choice(["it's", "B", "C"], 900), "size": size, "rooms": rng.integers(1, 5, 900),
                          "price": size * 3 + rng.normal(0, 40, 900), "sold": rng.random(900) < 80 / (80 + size)})
    frame["sold"] = frame.sold.astype("boolean").mask(rng.random(900) < 0.1)
    return frame.assign(size=frame["size"].mask(rng.random(900) < 0.2), price=frame.price.mask(rng.random(900) < 0.1))


@pytest.fixture(scope="module")
def rows(spark, houses):
    return spark.createDataFrame(houses.astype({"sold": object}), "town STRING, size DOUBLE, rooms INT, price DOUBLE, "
                                 "sold BOOLEAN")


@pytest.mark.parametrize("label", [SOLD, PRICE], ids=["binary", "number"])
def test_means_count_rows_and_labels_apart(spark, houses, rows, label):
    means = exploration.label_means(spark, rows, label, "town", "rooms").set_index(["town", "rooms"])
    values = houses[label.column].astype("Float64").astype(float).groupby([houses.town, houses.rooms])
    wanted = values.agg(["size", "count", "mean", "std", "sem"])
    np.testing.assert_allclose(means[["rows", "labels", label.column, "spread"]], wanted.iloc[:, :4])
    if label is PRICE: np.testing.assert_allclose(means.high - means.price, 1.96 * wanted["sem"])
    whole = exploration.label_means(spark, rows, label)
    assert whole["rows"].tolist() == [900] and whole.labels.tolist() == [houses[label.column].count()]


def test_bands_are_those_of_numpy(spark, houses, rows):
    edges = exploration.quantile_edges(spark, rows, "size", 4)
    np.testing.assert_allclose(edges, houses["size"].quantile([0.25, 0.5, 0.75]), rtol=0.01)
    means = exploration.label_means(spark, rows, PRICE, f"{exploration.band_number('size', edges)} AS band")
    known = houses["size"].notna()
    counts = pd.Series(np.digitize(houses["size"][known], edges)).value_counts().sort_index()
    assert means.dropna(subset="band")["rows"].tolist() == counts.tolist()
    assert means[means.band.isna()]["rows"].tolist() == [(~known).sum()]


def test_panels_choose_groups_for_text_and_numbers(spark, houses, rows):
    panels = exploration.label_panels(spark, rows, SOLD, ["town", "size", "rooms"], bands=3)
    assert sorted(panels["town"].town) == ["B", "C", "it's"] and panels["rooms"].rooms.tolist() == ["1", "2", "3", "4"]
    names = exploration.band_names(exploration.quantile_edges(spark, rows, "size", 3))
    assert panels["size"]["size"].tolist() == [*names, "missing"] and len(names) == 3
    assert panels["size"].labels.sum() == houses.sold.count()


@pytest.mark.parametrize("label", [SOLD, PRICE], ids=["binary", "number"])
def test_distributions_by_class(spark, houses, rows, label):
    classes = exploration.label_classes(spark, rows, label)
    bins = exploration.histogram(spark, rows, "size", classes, bins=10)
    low, high = houses["size"].quantile([0.01, 0.99])
    edge = 1.0 if label is SOLD else houses.price.median()
    is_above = houses[label.column].astype("Float64") >= edge
    for part, above in zip(sorted(bins.part.unique()), (False, True) if label is SOLD else (True, False), strict=True):
        sizes = houses["size"][(is_above == above).fillna(False)].dropna().clip(low, high)
        wanted = np.histogram(sizes, np.linspace(low, high, 11))[0]
        ours = bins[bins.part == part].set_index("bin")["rows"].reindex(range(10), fill_value=0)
        assert ours.tolist() == wanted.tolist(), part
    assert np.allclose(bins.groupby("part").share.sum(), 1)


def test_missing_values_by_group(spark, houses, rows):
    gaps = exploration.missing_shares(spark, rows, ["size", "sold", "town"], by="rooms")
    wanted = houses[["size", "sold", "town"]].isna().groupby(houses.rooms).mean().T
    np.testing.assert_allclose(gaps.loc[["size", "sold", "town"]].astype(float), wanted)
    assert gaps.loc["rows"].tolist() == houses.rooms.value_counts().sort_index().tolist()


def test_single_signals_are_those_of_scikit_learn_and_scipy(spark, houses, rows):
    known = houses.dropna(subset=["size", "sold"])
    auc = exploration.auc_of_means(exploration.label_means(spark, rows, SOLD, "size"), SOLD)
    assert auc == pytest.approx(roc_auc_score(known.sold.astype(int), known["size"])) and auc < 0.45
    known = houses.dropna(subset=["size", "price"])
    correlations = exploration.rank_correlations(rows, ["size", "price", "sold"])
    assert correlations.loc["size", "price"] == pytest.approx(spearmanr(known["size"], known.price).statistic)
