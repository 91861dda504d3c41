"""Retraining with a registry and tables on Sail: causes train, are held back, promoted or refused, stop, and resume."""
from dataclasses import replace
from datetime import date, timedelta
from types import SimpleNamespace

import pandas as pd
import pytest
import small_use_cases as small
from made_up import NAME, deploy, home, meet
from matplotlib import pyplot
from test_small_use_cases import TAGS, monitoring_conf

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.deployment import aliases, promotion
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.monitoring import retraining_log
from mlops_nb.monitoring.retraining import Cause
from mlops_nb.monitoring.retraining_log import decide_once, read_retrainings, record_outcome, resume_retraining
from mlops_nb.workflow import batch_scoring, inference_logging, investigation, monitoring, other_target, retraining
from mlops_nb.workflow.payloads import LogStep
from mlops_nb.workflow.rows import ROW_GROUP, labelled

# MLflow warns of its own type hints, and of models without examples
pytestmark = [pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
              pytest.mark.filterwarnings("ignore:.*An input example was not"),
              pytest.mark.filterwarnings("ignore:.*Add type hints to the")]
SETTINGS = {"cooldown_days": 21, "min_new_labelled_rows": 100, "max_refused": 2, "causes": ["schedule", "alert"]}


class Loop:
    "The tasks of the job `retrain`, with made-up predictions: v2 is better than v1, the later ones are between them."

    def __init__(self, env, spark): self.env, self.spark, self.trained = env, spark, []

    def decide(self, day, cause=None, new_rows=1000, settings=SETTINGS):
        return decide_once(self.spark, self.env, NAME, day, cause or Cause(), settings, lambda champion: new_rows)

    def train(self, day):
        "As the job `train`: the same version for the same day, validated and compared with the Champion."
        client = registry.client(self.env)
        tags = {"model_validation_status": "PASSED", "as_of": str(day)}
        known = [version for version in registry.model_versions(self.env, NAME) if version.tags["as_of"] == str(day)]
        version = known[0] if known else client.create_model_version(NAME, source=str(self.env.state), tags=tags)
        self.trained.append(int(version.version))
        return deploy(self.env, self.spark, int(version.version), meet=self.meet)

    def meet(self, version, champion):
        "Versions after v2 predict as v3 does, which is between v1 and v2."
        match = meet(small_number(version), champion and small_number(champion))
        return replace(match, challenger=replace(match.challenger, name=f"v{version.version}"))

    def record(self, day, cause=None, train_result="success", settings=SETTINGS):
        key = retraining_log.decision_key(day, cause or Cause())
        return record_outcome(self.spark, self.env, NAME, key, train_result, settings)

    def run(self, day, cause=None, **options):
        "The whole job."
        row = self.decide(day, cause, **options)
        if retraining.is_due(row): self.train(day)
        return self.record(day, cause, "success" if retraining.is_due(row) else "excluded")


def small_number(version):
    "A version whose predictions are those of one of the first three."
    return SimpleNamespace(version=str(min(int(version.version), 3)), name=version.name)


@pytest.fixture
def loop(tmp_path, monkeypatch):
    def empty_figure(*_): return pyplot.figure(figsize=(1, 1))
    for name in ("plot_losses", "plot_change"): monkeypatch.setattr(promotion, name, empty_figure)
    env = home(tmp_path)
    spark = get_spark(env)
    registry.client(env).create_registered_model(NAME)
    yield Loop(env, spark)
    stop()


def alert(month): return Cause("loss_ratio", month)


def test_a_year_of_causes(loop):
    first, stopped = loop.run(date(2013, 4, 1))  # without a Champion; it only has to beat the baseline
    assert (first["decision"], first["train_version"], first["outcome"], first["champion_version"]) == (
        "train", 1, "promoted", None)
    held, _ = loop.run(date(2013, 4, 9), alert("2013-04"))
    assert held["rule"] == "cooldown" and "8 days away, at least 21 are required" in held["reason"]
    few, _ = loop.run(date(2013, 4, 30), alert("2013-04"), new_rows=99)
    assert few["rule"] == "rows" and "99 labelled rows" in few["reason"]
    second, _ = loop.run(date(2013, 5, 9), alert("2013-04"))
    assert (second["train_version"], second["outcome"], second["champion_version"]) == (2, "promoted", 1)
    third, stopped = loop.run(date(2013, 6, 3), alert("2013-05"))
    assert (third["train_version"], third["outcome"], stopped) == (3, "refused", None)
    repeated, _ = loop.run(date(2013, 7, 3), alert("2013-05"))
    assert repeated["rule"] == "repeated" and repeated["decision"] == "hold"
    fourth, stopped = loop.run(date(2013, 7, 4), alert("2013-06"))
    assert fourth["outcome"] == "refused" and stopped["reason"].startswith("2 Challengers in a row refused (v3, v4)")
    again = loop.record(date(2013, 7, 4), alert("2013-06"))[1]  # it fails again: the first run can have been killed
    assert (again["number"], again["reason"]) == (stopped["number"], stopped["reason"])
    quiet, told_again = loop.run(date(2013, 9, 1))
    assert quiet["rule"] == "stopped" and quiet["reason"].startswith("stopped since 2013-07-04") and told_again is None
    resume_retraining(loop.spark, loop.env, NAME, "Ann Smith", "the source had changed")
    with pytest.raises(MlopsError, match="is not stopped"):
        resume_retraining(loop.spark, loop.env, NAME, "Ann Smith", "again")
    fifth, stopped = loop.run(date(2013, 9, 1))  # held by the stop alone, so it is decided again
    assert (fifth["decision"], fifth["train_version"], fifth["outcome"], stopped) == ("train", 5, "refused", None)
    assert loop.trained == [1, 2, 3, 4, 5]
    log = read_retrainings(loop.spark, loop.env, NAME)
    assert [row["number"] for row in log] == sorted({row["number"] for row in log})
    assert log[-2]["decided_by"] == "Ann Smith" and log[-2]["reason"] == "the source had changed"


def test_a_kill_between_decision_and_training_trains_once_and_a_repetition_changes_nothing(loop):
    day = date(2013, 4, 1)
    with pytest.raises(MlopsError, match="may not write prod.flights.late_arrival"):
        decide_once(loop.spark, loop.env, "prod.flights.late_arrival", day, Cause(), SETTINGS, lambda champion: 1)
    assert not tables.exists(loop.spark, loop.env, retraining_log.RETRAINING_LOG)
    before = loop.decide(day)
    again = loop.decide(day)  # the run was killed after the decision
    assert before["decision"] == again["decision"] == "train" and retraining.is_due(again)
    loop.train(day)
    registered = loop.decide(day)  # killed after the training: the outcome is known, and nothing is due
    assert (registered["outcome"], retraining.is_due(registered)) == ("promoted", False)
    row, _ = loop.record(day)
    version = tables.version(loop.spark, loop.env, retraining_log.RETRAINING_LOG)
    assert loop.run(day)[0] == row and loop.trained == [1]
    assert tables.version(loop.spark, loop.env, retraining_log.RETRAINING_LOG) == version
    assert len(read_retrainings(loop.spark, loop.env, NAME)) == 1


@pytest.mark.slow
def test_a_failed_training_is_due_again_and_a_rolled_back_champion_counts_as_refused(loop):
    day = date(2013, 4, 1)
    loop.decide(day)
    row, _ = loop.record(day, train_result="failed")
    assert row["outcome"] == "failed" and retraining.is_due(loop.decide(day))
    assert "failed is 5 days away" in loop.decide(date(2013, 4, 6), alert("2013-04"))["reason"]
    assert loop.run(day)[0]["outcome"] == "promoted" and loop.run(date(2013, 5, 1))[0]["outcome"] == "promoted"
    aliases.rollback(loop.spark, loop.env, NAME, "warns of everything")
    loop.decide(date(2013, 5, 2))
    outcome = read_retrainings(loop.spark, loop.env, NAME)[2]
    assert (outcome["train_version"], outcome["outcome"]) == (2, "refused")
    assert outcome["outcome_reason"] == "rolled back: warns of everything"


@pytest.fixture
def source(tmp_path, request):
    "The source table of a use case, without features: rows that can be learnt are counted from it alone."
    use_case = request.param
    env = small.home_of(tmp_path)
    spark = get_spark(env)
    frame = small.FRAMES[use_case.source[0]]()
    tables.merge(spark, env, use_case.source[0], spark.createDataFrame(frame), use_case.key)
    yield use_case, spark, env, frame
    stop()


def version_of(**tags):
    return SimpleNamespace(name="m", version="1", tags=tags, run_id="")


@pytest.mark.parametrize("source", [small.DELIVERIES], indirect=True, ids=["minutes"])
def test_new_rows_are_those_that_the_next_training_learns_and_the_champion_has_not(source):
    use_case, spark, env, frame = source
    conf, champion = small.TRAIN["minutes"], version_of(trained_through="2021-03-15")
    for day in (date(2021, 3, 26), date(2021, 4, 5)):
        held_out_from = pd.Timestamp(day - timedelta(conf["held_out_days"]))
        known = frame[frame.delivered_at < held_out_from.tz_localize("UTC")]
        days = pd.to_datetime(known.delivery_day)
        learnt = known[days < held_out_from]
        assert len(learnt) > 100
        assert retraining.count_unlearnt(use_case, spark, env, day, conf, None) == len(learnt)
        new = int((days > "2021-03-15").sum())
        assert retraining.count_unlearnt(use_case, spark, env, day, conf, champion) == new
    assert new == 99  # of ten days; the label of the last row becomes known a day later


@pytest.mark.parametrize("source", [small.CUSTOMERS], indirect=True, ids=["cancelled"])
def test_without_a_time_the_rows_that_a_champion_has_learnt_from_are_subtracted(source, monkeypatch):
    use_case, spark, env, _ = source
    day, conf = date(2021, 4, 1), small.TRAIN["cancelled"]
    groups = labelled(use_case, spark, env, day).select(ROW_GROUP).toPandas()[ROW_GROUP]
    in_training = int((groups >= 50).sum())  # a quarter of 200 groups is held out
    run = SimpleNamespace(data=SimpleNamespace(params={"training_rows": "200"}))
    assert retraining.count_unlearnt(use_case, spark, env, day, conf, None) == in_training > 200
    monkeypatch.setattr(registry, "run_of", lambda *_: run)
    assert retraining.count_unlearnt(use_case, spark, env, day, conf, version_of()) == in_training - 200


REFUSED = dict(model_name="prod.flights.minutes", number=1, as_of=date(2021, 4, 8), cause="loss_ratio/2021-04-05",
               decision="train", rule="", champion_version=1, train_version=1, outcome="refused", reason="why",
               outcome_reason="not better", decision_id="2021-04-08 loss_ratio/2021-04-05")


@pytest.fixture(scope="module")
def prod(tmp_path_factory):
    "Deliveries in prod: predictions, metrics by week and a refused retraining; and dev, which reads them."
    folder = tmp_path_factory.mktemp("prod")
    dev = replace(small.home_of(folder), root=folder)
    env = replace(dev, target="prod", catalog="prod", source_catalog="prod", read=("prod",), write=("prod",))
    spark, use_case = get_spark(env), small.DELIVERIES
    small.write_tables(use_case, spark, env)
    small.conf_files(folder, monitoring=monitoring_conf(use_case), features={"area_daily": {"columns": {}}},
                     train=small.TRAIN["minutes"])
    version = small.formula_version(use_case, spark, env, TAGS["minutes"])
    batch_scoring.write_predictions(use_case, spark, env, version, date(2021, 4, 1), 10)
    inference_logging.ingest_log(LogStep(use_case, spark, env, date(2021, 4, 11), env.table("no_payload")))
    monitor, thresholds = monitoring.read_monitoring(use_case, folder)
    monitoring.monitor_predictions(use_case, spark, env, date(2021, 4, 11), "1 week", monitor, thresholds)
    row = dict.fromkeys(retraining_log.RETRAINING_NAMES) | REFUSED
    retraining_log.write_retraining(spark, env, row)
    yield use_case, spark, dev, env
    stop()


@pytest.mark.slow
def test_the_failing_window_of_prod_is_copied_into_dev(prod):
    use_case, spark, dev, env = prod
    history = read_retrainings(spark, dev, env.model("minutes"), env.table(retraining_log.RETRAINING_LOG))
    case = investigation.find_investigation(use_case, spark, dev, env, history)
    assert (case.first, case.end) == (date(2021, 4, 5), date(2021, 4, 12))  # a week from Monday on
    counts = investigation.copy_failing_days(case, spark)
    days = pd.to_datetime(tables.read(spark, env, "predictions").toPandas().as_of)
    assert counts["dev.flights.prod_failing_predictions"] == int(days.between("2021-04-05", "2021-04-11").sum()) == 60
    source = small.deliveries()
    known = source.delivered_at < pd.Timestamp("2021-04-12", tz="UTC")
    in_days = pd.to_datetime(source.delivery_day).between("2021-04-05", "2021-04-11")
    assert counts["dev.flights.prod_failing_labels"] == int((known & in_days).sum())
    metrics = tables.read(spark, dev, f"prod_failing_{investigation.PROFILE_TABLE}").toPandas()
    starts = {row["start"].date() if row else None for row in metrics.window}
    assert starts == {date(2021, 4, 5), None} and counts[f"dev.flights.prod_failing_{investigation.PROFILE_TABLE}"] > 9
    assert investigation.copy_failing_days(case, spark) == counts
    with pytest.raises(MlopsError, match="no retraining of prod.flights.minutes was refused"):
        investigation.find_investigation(use_case, spark, dev, env, [])
    given = investigation.find_investigation(use_case, spark, dev, env, [], date(2021, 4, 2), date(2021, 4, 3))
    assert investigation.copy_failing_days(given, spark)["dev.flights.prod_failing_predictions"] == 20


@pytest.mark.slow
def test_dev_reads_the_tables_of_prod_and_cannot_write_them(prod, capsys):
    use_case, spark, dev, env = prod
    seen = other_target.OtherTarget(use_case, spark, dev, env)
    overview = other_target.tables_overview(seen)
    assert overview.loc["prod.flights.predictions", "rows"] == 100
    assert overview.loc["prod.flights.inference_log", "written by"] == "mlops run inference_log -t prod"
    assert overview["rows"].isna().sum() == 1  # the requests
    before = tables.version(spark, env, "predictions")
    other_target.show_refusal(seen)
    assert "target 'dev' may not write prod.flights.predictions" in capsys.readouterr().out
    assert tables.version(spark, env, "predictions") == before
    open_before = pyplot.get_fignums()
    figure = other_target.plot_other(seen)
    assert pyplot.get_fignums() == open_before, "a cell shows what it returns; an open figure is shown again"
    rows = other_target.loss_windows(seen)
    assert list(figure.axes[0].lines[0].get_ydata()) == list(rows[rows.log_type == "INPUT"].sort_values(
        "window_start").loss)
    with pytest.raises(MlopsError, match="may write prod.flights.predictions"):
        other_target.refused_write(replace(seen, env=env), "predictions")
    other_target.finish_reading(seen)
    assert capsys.readouterr().out == "5 tables of prod can be read from dev, none written; 1 table not made yet\n"
