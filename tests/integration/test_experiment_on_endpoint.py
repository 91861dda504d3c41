"""An online experiment on an endpoint of `mlops up`: split, requests, log and decision; alias and endpoint follow."""
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import lightgbm
import pytest
import yaml
from local_workspace import workspace
from states import MODEL, ROOT, env_of, mlops, scored_by

from mlops_nb.data import tables
from mlops_nb.data.json_rows import json_records
from mlops_nb.data.session import get_spark, stop
from mlops_nb.deployment import aliases
from mlops_nb.deployment.experiment_log import read_experiments
from mlops_nb.features.client import spec_of
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.models import registry
from mlops_nb.serving import endpoints
from mlops_nb.workflow import experimenting, inference_logging, payloads
from mlops_nb.workflow.endpoint import follow_champion
from mlops_nb.workflow.endpoint_check import request_columns

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*IProgress not found")]
NAME = "dev-flights-late_arrival"
START, FIRST, DAYS, END = "2013-03-15", date(2013, 3, 16), 6, "2013-03-24"
REQUESTS = 30  # on a day
QUICK = {"steps": [50, 100], "alpha": 0.4, "block_days": 1, "label_days": 1, "min_requests": 1}


def turned_around(state: Path, source: str) -> str:
    "A copy of a model whose scores have the other sign."
    folder = state / "turned_around"
    shutil.copytree(source, folder)
    file, = folder.rglob("booster.txt")
    booster, leaves = lightgbm.Booster(model_file=file), re.findall(r"^num_leaves=(\d+)", file.read_text(), re.M)
    for tree, number in enumerate(leaves):
        for leaf in range(int(number)): booster.set_leaf_output(tree, leaf, -booster.get_leaf_output(tree, leaf))
    booster.save_model(file)
    return folder.as_uri()


@pytest.fixture(scope="module")
def home(own_trained):
    "Version 2 is the trained model turned around, and Champion; versions 3 and 4 are the trained one."
    stop()
    env = env_of(own_trained)
    client = registry.client(env)
    first = client.get_model_version(MODEL, "1")
    folder = client.get_model_version_download_uri(MODEL, "1").removeprefix("file://")
    for source in (turned_around(own_trained, folder), first.source, first.source):
        client.create_model_version(MODEL, source=source, run_id=first.run_id, tags=first.tags)
    with pytest.MonkeyPatch.context() as patch, workspace(own_trained) as client:
        patch.setenv("MLOPS_STATE", str(own_trained))
        patch.chdir(ROOT)
        for alias, version in (("champion", 2), ("challenger", 3)):
            aliases.move_alias(get_spark(env), env, MODEL, alias, version, "a test")
        yield env, client
    stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "A copy of the bundle whose experiment decides within days."
    folder = tmp_path_factory.mktemp("project")
    for name in ("conf", "nbs", "resources"): shutil.copytree(ROOT / name, folder / name)
    for name in ("databricks.yml", "settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, folder)
    file = folder / "conf/validation.yml"
    settings = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(settings | {"experiment": settings["experiment"] | QUICK}))
    return folder


def experiment_as_of(day: str) -> experimenting.Experiment:
    experiment = experimenting.load_experiment(FLIGHTS, "dev", day)
    experiment.settings = {**experiment.settings, **QUICK}
    return experiment


def send_flights(env, client, number: int = REQUESTS) -> Counter:
    "Send real flights of some days with their keys, so many a day; the number of answers by served entity."
    rows = FLIGHTS.rows(get_spark(env), env, FIRST, DAYS)
    columns = dict.fromkeys([*FLIGHTS.key, FLIGHTS.prediction_time,
                             *request_columns(spec_of(f"models:/{MODEL}/1"), rows.columns)])
    frame = rows.toPandas().groupby(FLIGHTS.day).sample(number, random_state=1)
    return Counter(client.serving_endpoints.query(NAME, dataframe_records=[record]).served_model_name
                   for record in json_records(frame, columns))


def logged(env, number: int) -> int:
    "The number of predictions in the inference log, once so many requests are in the payload table."
    spark, table, end = get_spark(env), payloads.payload_table_name(FLIGHTS, env), time.monotonic() + 60
    while not tables.exists(spark, env, table) or tables.read(spark, env, table).count() < number:
        assert time.monotonic() < end, "the requests did not reach the payload table"
        time.sleep(1)
    step = payloads.load_log_step(FLIGHTS, "dev", END)
    inference_logging.write_inference_log(step)
    assert step.notes == []
    return step.logged


class Killed(BaseException): "The process ends here."


def test_a_better_challenger_wins_on_the_endpoint_which_follows_also_after_a_kill(home, project):
    env, client = home
    assert follow_champion(env, MODEL).outcome == "created"
    mlops(env.state, "run", "online_experiment", "--param", f"as_of={START}", cwd=project)
    assert endpoints.serving_config(env, NAME).text() == "champion v2 (50 %), challenger v3 (50 %)"
    answers = send_flights(env, client)
    assert min(answers["champion"], answers["challenger"]) > 0.3 * DAYS * REQUESTS
    aliases.move_alias(get_spark(env), env, MODEL, "challenger", 4, "a newer one")
    update = follow_champion(env, MODEL)
    assert (update.outcome, update.config.versions) == ("unchanged", {"champion": 2, "challenger": 3})
    assert logged(env, DAYS * REQUESTS) == DAYS * REQUESTS

    experiment = experiment_as_of(END)
    def killed(): raise Killed
    whole, experiment.endpoint = experiment.endpoint, replace(experiment.endpoint, follow=killed)
    with pytest.raises(Killed): experimenting.decide_day(experiment)
    assert aliases.points_to(env, MODEL, "champion") == 3 and whole.split() == {2: 0, 3: 100}
    printed = mlops(env.state, "run", "online_experiment", "--param", f"as_of={END}", cwd=project)
    assert "the experiment of v3 against v2 is won" in printed, printed
    assert endpoints.serving_config(env, NAME).text() == "champion v3 (100 %), challenger v4 (0 %)"
    assert set(send_flights(env, client, number=2)) == {"champion"}
    experiment.log = read_experiments(get_spark(env), env, MODEL)
    assert list(experimenting.decisions_table(experiment).decision) == ["start", "promote"]
    assert "the experiment is won" in experimenting.experiment_picture(experiment).get_suptitle()


@pytest.mark.full  # test_endpoint_follows has a rollback without an experiment before it
def test_a_rollback_moves_the_endpoint_and_the_next_batch_together(home):
    "The Champion is version 3, which won the experiment."
    env, client = home
    printed = mlops(env.state, "rollback", "late_arrival", "--reason", "warns of everything")
    assert f"endpoint {NAME} was updated and serves champion v2 (100 %)" in printed, printed
    assert endpoints.serving_config(env, NAME).versions["champion"] == 2
    assert set(send_flights(env, client, number=2)) == {"champion"}
    assert scored_by(env) == {2}
