"""Loading a bundle: files, targets, variables, references."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import by_size

from mlops_nb.bundle import load
from mlops_nb.bundle.load import find_root, job_id, load_bundle, target_names
from mlops_nb.errors import MlopsError
from mlops_nb.git import git
from mlops_nb.yaml_files import read_yaml

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _no_variables_from_outside(monkeypatch):
    for name in os.environ:
        if name.startswith("BUNDLE_VAR_"):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path):
    """Writes files of a bundle and returns its root; a bare text is databricks.yml without its name."""

    def files(text="", **more):
        for name, content in {"databricks_yml": "bundle: {name: example}\n" + dedent(text), **more}.items():
            path = tmp_path / name.replace("__", "/").replace("_yml", ".yml").replace("_json", ".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(content))
        return tmp_path

    return files


def refused(root, message, **options):
    with pytest.raises(MlopsError) as error:
        load_bundle(root, **options)
    assert message in str(error.value), str(error.value)


# files


def test_the_root_is_found_from_inside_and_missed_elsewhere(write, tmp_path_factory):
    root = write()
    (root / "nbs" / "deep").mkdir(parents=True)
    assert find_root(root / "nbs" / "deep") == root.resolve() == load_bundle(root / "nbs").root
    with pytest.raises(MlopsError, match="no databricks.yml in"):
        find_root(tmp_path_factory.mktemp("elsewhere"))


def test_includes_are_read_in_order_and_once(write):
    root = write(
        "include: [resources/*.yml, resources/a.yml]\nresources: {jobs: {c: {name: c}}}",
        resources__b_yml="resources: {jobs: {b: {name: b}}}",
        resources__a_yml="resources: {jobs: {a: {name: a}}}",
    )
    assert list(load_bundle(root).jobs) == ["c", "a", "b"]
    assert str(load_bundle(root).place("resources.jobs.b.name")) == "resources/b.yml:1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: [resorces/*.yml]", "databricks.yml:2: include 'resorces/*.yml' matches no file"),
        ("include: [missing.yml]", "include 'missing.yml' matches no file"),
        ("include: [/etc/hosts]", "is not a relative path"),
        ("include: ['*.txt']", "matches note.txt, which is not YAML or JSON"),
        ("include: a.yml", "databricks.yml:2: include must be a list of files, got 'a.yml'"),
    ],
)
def test_bad_includes(write, text, message):
    (write(text) / "note.txt").write_text("")
    refused(write(text), message)


def test_only_the_root_file_includes(write):
    refused(
        write("include: [a.yml]", a_yml="include: [b.yml]", b_yml=""), "a.yml:1: only databricks.yml can include files"
    )


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "resources: {jobs: {a: {name: a}}}",
            "resources: {jobs: {a: {tags: {}}}}",
            "b.yml:1: resources.jobs.a is defined twice\n  first defined at a.yml:1",
        ),
        ("variables: {x: {default: 1}}", "variables: {x: {default: 2}}", "variables.x.default is defined twice"),
        (
            "resources: {jobs: {a: {name: a}}}",
            "resources: {schemas: {a: {name: a}}}",
            "key 'a' is used in schemas and in jobs",
        ),
        ("resources: {jobs: [1]}", "resources: {jobs: {a: {}}}", "resources.jobs is a map here and a list at a.yml:1"),
    ],
)
def test_two_files_must_not_define_the_same_value(write, first, second, message):
    refused(write("include: [a.yml, b.yml]", a_yml=first, b_yml=second), message)


def test_errors_of_yaml_name_file_and_line(write):
    refused(
        write("include: [a.yml]", a_yml="resources:\n  jobs:\n  - a: [1"),
        "a.yml:3: '[' is never closed\n  in `- a: [1`",
    )
    refused(
        write("variables:\n  a: {default: 1}\n  a: {default: 2}"),
        "databricks.yml:4: duplicate key 'a'\n  first defined in line 3",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "variables: {a: {defualt: 1}}",
            "set it for the target in databricks.yml, or by --var a=..., or BUNDLE_VAR_a=...\n"
            "  warning: databricks.yml:2: no field of a variable 'defualt'; it is ignored; did you mean 'default'?",
        ),
        ("targets: [dev]", "expected a map, got ['dev']"),
        ("variables: {a: text}", "expected a map, got 'text'"),
        ("resources: {jobs: [a]}", "expected a map, got ['a']"),
        ("environments: {dev: {}}", "environments is the old name of targets"),
    ],
)
def test_sections_with_a_wrong_name_or_type(write, text, message):
    refused(write(text), message)


@pytest.mark.parametrize(
    ("text", "key", "message", "hint"),
    [
        ("varaibles: {}", "varaibles", "no top-level key 'varaibles'", "did you mean 'variables'?"),
        (
            "targets: {dev: {vairables: {}}}",
            "targets.dev.vairables",
            "no field of a target 'vairables'",
            "did you mean 'variables'?",
        ),
        (
            "variables: {a: {default: 1, typ: complex}}",
            "variables.a.typ",
            "no field of a variable 'typ'",
            "did you mean 'type'?",
        ),
        (
            "variables: {a: {default: 1, type: string}}",
            "variables.a.type",
            "no type 'string' of a variable",
            "write complex for a map or a list",
        ),
        ("variables: {a: {default: 1, type: [x]}}", "variables.a.type", "no type ['x'] of a variable", "write complex"),
    ],
)
def test_names_that_databricks_ignores_are_warnings(write, text, key, message, hint):
    from mlops_nb.bundle.checks import check

    loaded = load_bundle(write(text))
    ((path, found_message, found_hint),) = loaded.warnings
    assert (path, found_message) == (key, f"{message}; it is ignored") and found_hint.startswith(hint)
    (problem,) = check(loaded)
    assert problem.is_warning and str(problem).startswith(f"databricks.yml:2: warning: {key}: {message}")


def test_a_type_that_does_not_exist_changes_no_value(write):
    """`type: string` stands for a single value, as no type does: a list is still refused."""
    assert load_bundle(write("variables: {a: {type: string, default: 1}}")).variables == {"a": 1}
    refused(write("variables: {a: {type: list, default: [1]}}"), "variable 'a' must be a single value, got a list")


def test_an_error_contains_the_warnings_that_can_be_its_cause(write):
    with pytest.raises(MlopsError) as error:
        load_bundle(write("targest: {}\nvaraibles: {}\nresources: {jobs: {a: {name: '${var.x}'}}}"))
    assert error.value.message.startswith("no variable 'x'")
    assert "databricks.yml:2: no top-level key 'targest'" in error.value.hint
    assert "databricks.yml:3: no top-level key 'varaibles'" in error.value.hint


@pytest.mark.parametrize("first", ["bundle: {}", "bundle:", "resources: {}", "bundle: {name: '${var.x}'}"])
def test_a_bundle_needs_a_literal_name(tmp_path, first):
    (tmp_path / "databricks.yml").write_text(first + "\nvariables: {x: {default: a}}\n")
    refused(tmp_path, "the bundle has no name")


# targets

TWO = "targets: {dev: {}, prod: {default: true}}"


def test_choosing_a_target(write):
    assert load_bundle(write(TWO)).target == "prod" and load_bundle(write(TWO), "dev").target == "dev"
    assert load_bundle(write("targets: {only: }")).target == "only" and load_bundle(write("")).target == "default"
    assert target_names(write(TWO)) == ["dev", "prod"] == list(load_bundle(write(TWO)).targets)
    refused(write(TWO), "no target 'prd' in databricks.yml\n  did you mean 'prod'? there are: dev, prod", target="prd")
    refused(
        write("targets: {a: {}, b: {}}"), "no target was given, and no target has default: true\n  there are: a, b"
    )
    refused(write("targets: {a: {default: true}, b: {default: true}}"),
            "no target was given, and several targets have default: true\n  there are: a, b")


def test_a_target_is_laid_over_the_rest(write):
    loaded = load_bundle(
        write("""
        workspace: {host: https://example.org}
        permissions: [{level: CAN_VIEW, group_name: all}]
        run_as: {user_name: somebody}
        resources:
          jobs:
            score:
              name: score
              max_concurrent_runs: 1
              tags: {team: flights, stage: none}
              tasks:
                - {task_key: a, max_retries: 1, notebook_task: {notebook_path: a.ipynb, base_parameters: {x: '1'}}}
                - {task_key: b, depends_on: [{task_key: a}], notebook_task: {notebook_path: b.ipynb}}
              job_clusters: [{job_cluster_key: small, new_cluster: {num_workers: 1, spark_version: a}}]
              parameters: [{name: days, default: '1'}, {name: target, default: x}]
              email_notifications: {on_failure: [one]}
          schemas:
            flights: {name: flights, catalog_name: main, grants: [{principal: readers, privileges: [SELECT]}]}
        targets:
          prod:
            mode: production
            run_as: {service_principal_name: robot}
            permissions: [{level: CAN_RUN, group_name: some}]
            resources:
              jobs:
                score:
                  max_concurrent_runs: 4
                  tags: {stage: prod}
                  tasks:
                    - {task_key: b, max_retries: 3}
                    - {task_key: a, notebook_task: {base_parameters: {y: '2'}}}
                    - {task_key: c, depends_on: [{task_key: b}], notebook_task: {notebook_path: c.ipynb}}
                  job_clusters: [{job_cluster_key: small, new_cluster: {num_workers: 8}}]
                  parameters: [{name: days, default: '7'}]
                  email_notifications: {on_failure: [two]}
              schemas:
                flights:
                  grants:
                    - {principal: readers, privileges: [SELECT, EXECUTE]}
                    - {principal: writers, privileges: [MODIFY]}
        """),
        "prod",
    )
    assert loaded.data["bundle"] == {"name": "example", "target": "prod", "mode": "production", "git": {}}
    assert loaded.data["run_as"] == {"service_principal_name": "robot"}
    assert [item["group_name"] for item in loaded.data["permissions"]] == ["all", "some"]
    assert loaded.job("score") == {
        "name": "score",
        "max_concurrent_runs": 4,
        "tags": {"team": "flights", "stage": "prod"},
        "tasks": [
            {
                "task_key": "a",
                "max_retries": 1,
                "notebook_task": {"notebook_path": "a.ipynb", "base_parameters": {"x": "1", "y": "2"}},
            },
            {
                "task_key": "b",
                "depends_on": [{"task_key": "a"}],
                "notebook_task": {"notebook_path": "b.ipynb"},
                "max_retries": 3,
            },
            {"task_key": "c", "depends_on": [{"task_key": "b"}], "notebook_task": {"notebook_path": "c.ipynb"}},
        ],
        "job_clusters": [{"job_cluster_key": "small", "new_cluster": {"num_workers": 8, "spark_version": "a"}}],
        "parameters": [{"name": "days", "default": "7"}, {"name": "target", "default": "x"}],
        "email_notifications": {"on_failure": ["one", "two"]},
    }
    assert loaded.data["resources"]["schemas"]["flights"]["grants"] == [
        {"principal": "readers", "privileges": ["SELECT", "EXECUTE"]},
        {"principal": "writers", "privileges": ["MODIFY"]},
    ]


def test_keys_are_joined_after_their_references_are_resolved(write):
    loaded = load_bundle(
        write("""
        variables: {key: {default: a}}
        resources: {jobs: {score: {tasks: [{task_key: a, max_retries: 1}]}}}
        targets: {dev: {resources: {jobs: {score: {tasks: [{task_key: '${var.key}', max_retries: 2}]}}}}}
        """)
    )
    assert loaded.job("score")["tasks"] == [{"task_key": "a", "max_retries": 2}]


def test_a_target_of_another_shape_is_refused(write):
    refused(
        write("resources: {jobs: {a: {tasks: []}}}\ntargets: {dev: {resources: {jobs: {a: {tasks: {}}}}}}"),
        "databricks.yml:3: resources.jobs.a.tasks is a map here and a list at databricks.yml:2",
    )


# variables

VARIABLES = """
    variables:
      name: {default: own}
      size: {default: 1}
      loud: {default: false}
      many: {type: complex, default: [a]}
      needed: {description: has no default}
    targets:
      dev: {variables: {needed: dev}}
      prod: {variables: {needed: prod, name: {default: of target}, many: [b, c]}}
    """


def test_the_first_source_with_a_value_counts(write, monkeypatch):
    root = write(
        VARIABLES,
        **{
            ".databricks__bundle__prod__variable-overrides_json": json.dumps(
                {"name": "of file", "many": ["d"], "size": 7}
            )
        },
    )
    assert load_bundle(root, "dev").variables == {
        "name": "own",
        "size": 1,
        "loud": False,
        "many": ["a"],
        "needed": "dev",
    }
    assert load_bundle(root, "prod").variables == {
        "name": "of file",
        "size": 7,
        "loud": False,
        "many": ["d"],
        "needed": "prod",
    }
    monkeypatch.setenv("BUNDLE_VAR_name", "of environment")
    assert load_bundle(root, "prod").variables["name"] == "of environment"
    assert load_bundle(root, "prod", {"name": "of command line"}).variables["name"] == "of command line"
    assert load_bundle(write(VARIABLES), "dev", {"size": "3", "loud": "true"}).variables["size"] == 3


def test_a_target_gives_a_variable_its_value(write):
    variables = load_bundle(write(VARIABLES), "prod").variables
    assert (variables["name"], variables["many"]) == ("of target", ["b", "c"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variables": {"nam": "x"}}, "no variable 'nam' in --var\n  did you mean 'name'?"),
        ({"variables": {"size": "big"}}, "--var: variable 'size' must be int, got 'big'\n  its default is 1"),
        ({"variables": {"loud": "1"}}, "--var: variable 'loud' must be bool, got '1'\n  its default is False"),
        ({"variables": {"many": "a,b"}}, "variable 'many' must be a map or a list, which cannot be passed as a string"),
        ({"variables": {"name": ["a"]}}, "variable 'name' must be a single value, got a list"),
    ],
)
def test_bad_values_from_the_command_line(write, options, message):
    refused(write(VARIABLES), message, target="dev", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variables: {a: {}}", "variable 'a' has no value\n  set it for the target"),
        ("variables: {a: }", "variable 'a' has no value"),
        ("variables: {a: {default: }}", "variable 'a' has no value"),
        ("targets: {dev: {variables: {a: 1}}}", "no variable 'a' in databricks.yml:2"),
        ("variables: {a: {default: [1]}}", "databricks.yml:2: variable 'a' must be a single value, got a list"),
        ("variables: {a: {type: complex, default: 1}}", "databricks.yml:2: variable 'a' must be a map or a list"),
        (
            "variables: {a: {lookup: {cluster_policy: small}}}",
            "databricks.yml:2: variable 'a' has a lookup, which needs a workspace\n"
            "  set its value: --var a=..., or BUNDLE_VAR_a=",
        ),
    ],
)
def test_bad_definitions(write, text, message):
    refused(write(text), message)


def test_a_bad_overrides_file(write):
    name = ".databricks__bundle__default__variable-overrides_json"
    refused(
        write("variables: {a: {default: 1}}", **{name: '{"b": 1}'}),
        "no variable 'b' in variable-overrides.json\n  there is only a",
    )
    refused(write("", **{name: "{"}), "variable-overrides.json: invalid JSON: Expecting property name")
    refused(write("", **{name: "[]"}), "expected a map, got []")


def test_a_variable_that_is_looked_up_takes_a_value(write, monkeypatch):
    root = write("variables: {policy: {lookup: {cluster_policy: small}}}")
    assert load_bundle(root, variables={"policy": "A1"}).variables == {"policy": "A1"}
    monkeypatch.setenv("BUNDLE_VAR_policy", "B2")
    assert load_bundle(root).variables == {"policy": "B2"}


def test_a_target_turns_a_lookup_into_a_value_and_back(write):
    text = """
        variables: {a: {lookup: {job: x}}, b: {default: y}}
        targets: {one: {variables: {a: z}}, two: {variables: {a: z, b: {lookup: {job: y}}}}}
        """
    assert load_bundle(write(text), "one").variables == {"a": "z", "b": "y"}
    refused(write(text), "variable 'b' has a lookup", target="two")


# references


def resolved(root, **options):
    return load_bundle(root, **options).job("a")["name"]


def test_references_to_everything_known(write, monkeypatch):
    monkeypatch.setattr(load, "bundle_user", lambda: "Ana.B@example.org")
    monkeypatch.setenv("DATABRICKS_HOST", "https://home.example.org")
    name = """
      - ${bundle.name} ${bundle.target} ${bundle.mode}
      - ${var.catalog}.${var.deep.schemas[1].name}
      - ${workspace.current_user.userName} ${workspace.current_user.short_name}
      - ${workspace.root_path} ${workspace.file_path} ${workspace.host}
      - ${resources.jobs.b.id} ${resources.jobs.b.name} ${resources.schemas.s.id} ${resources.registered_models.m.id}
      - ${artifacts.wheel.path}"""
    loaded = load_bundle(
        write(
            """
        variables:
          catalog: {default: "${var.prefix}_main"}
          prefix: {default: "${bundle.target}"}
          deep: {type: complex, default: {schemas: [{name: x}, {name: "${var.prefix}_y"}]}}
        artifacts: {wheel: {path: ./dist}}
        resources:
          jobs: {a: {name: "PLACE"}, b: {name: "b of ${var.catalog}"}}
          schemas: {s: {name: s, catalog_name: "${var.catalog}"}}
          registered_models: {m: {name: m, schema_name: s, catalog_name: "${var.catalog}"}}
        targets: {dev: {mode: development}}
        """.replace('"PLACE"', json.dumps(name))
        )
    )
    assert loaded.job("a")["name"].split("\n      - ")[1:] == [
        "example dev development",
        "dev_main.dev_y",
        "Ana.B@example.org ana_b",
        "/Workspace/Users/Ana.B@example.org/.bundle/example/dev "
        "/Workspace/Users/Ana.B@example.org/.bundle/example/dev/files https://home.example.org",
        f"{job_id('b', 'dev')} b of dev_main dev_main.s dev_main.s.m",
        "./dist",
    ]


def test_a_whole_text_takes_the_value_itself(write):
    loaded = load_bundle(
        write("""
        variables:
          tags: {type: complex, default: {team: "${bundle.name}"}}
          tasks: {type: complex, default: [{task_key: train, timeout_seconds: "${var.seconds}"}]}
          seconds: {default: 60}
        resources:
          jobs:
            a:
              {tags: "${var.tags}", tasks: "${var.tasks}", timeout_seconds: "${var.seconds}", name: "${var.seconds} s"}
        """)
    )
    assert loaded.job("a") == {
        "tags": {"team": "example"},
        "tasks": [{"task_key": "train", "timeout_seconds": 60}],
        "timeout_seconds": 60,
        "name": "60 s",
    }


@pytest.mark.parametrize(
    "text", ["{{job.parameters.as_of}}", "${HOME}", "$var.x", "${}", "a {{tasks.x.values.y}} ${PATH} b", "$${HOME}"]
)
def test_text_that_is_not_a_reference_stays(write, text):
    assert resolved(write(f"resources: {{jobs: {{a: {{name: {json.dumps(text)}}}}}}}")) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "${var.catlog}",
            "no variable 'catlog' in ${var.catlog}, at resources.jobs.a.name (a.yml:4)\n  did you mean 'catalog'?",
        ),
        (
            "x ${bundle.nam}",
            "no field 'nam' in ${bundle.nam}, at resources.jobs.a.name (a.yml:4)\n  did you mean 'name'?",
        ),
        ("${vars.catalog}", "no namespace 'vars'"),
        (
            "${resources.job.a.id}",
            "no kind of resource 'job' in ${resources.job.a.id}, at resources.jobs.a.name (a.yml:4)\n"
            "  did you mean 'jobs'?",
        ),
        (
            "${resources.jobs.aa.id}",
            "no job 'aa' in ${resources.jobs.aa.id}, at resources.jobs.a.name (a.yml:4)\n  did you mean 'a'?",
        ),
        ("${resources.jobs.a.idd}", "no field 'idd'"),
        ("${workspace.current_user.username}", "did you mean 'userName'?"),
        ("${var.catalog.x}", "no field 'x' in ${var.catalog.x}"),
        ("${var.many[2]}", "no field '2' in ${var.many[2]}, at resources.jobs.a.name (a.yml:4)\n  there are: 0, 1"),
        ("x ${var.many}", "only a single value can be inserted into a string, got ['p', 'q']"),
        ("${var.catalog", None),
        ("${ var.catalog }", "resources.jobs.a.name (a.yml:4): invalid reference ${ var.catalog }"),
        ("${var}", "invalid reference ${var}"),
        ("${resources.jobs.a.name}", "circular references: resources.jobs.a.name -> resources.jobs.a.name"),
        ("${var.round}", "circular references: var.round -> var.about -> var.round"),
    ],
)
def test_references_that_cannot_be_resolved(write, text, message):
    root = write(
        """
        include: [a.yml]
        variables:
          catalog: {default: main}
          many: {type: complex, default: [p, q]}
          round: {default: '${var.about}'}
          about: {default: main}
        targets: {one: {}, two: {variables: {about: '${var.round}'}}}
        """,
        a_yml=f"resources:\n  jobs:\n    a:\n      name: {json.dumps(text)}\n",
    )
    if message is None:
        assert resolved(root, target="one") == text
    else:
        refused(root, message, target="two" if "round" in text else "one")


def test_references_where_none_can_be(write):
    nested = "variables: {a: {default: x}, x: {default: y}, b: {default: '${var.${var.a}}'}}"
    refused(write(nested), "has a reference inside a reference")
    refused(write("resources: {jobs: {'${bundle.name}_job': {}}}"), "key '${bundle.name}_job' contains a reference")
    assert load_bundle(write("resources: {jobs: {a: {tags: {'${HOME}': x}}}}")).job("a") == {"tags": {"${HOME}": "x"}}


def test_an_entry_that_only_holds_an_anchor_is_left_out(write):
    text = "common: &common {max_retries: 2}\nresources: {jobs: {a: {tasks: [{task_key: a, <<: *common}]}}}"
    assert load_bundle(write(text)).job("a") == {"tasks": [{"max_retries": 2, "task_key": "a"}]}
    for key in ("common", '"common"', "'common'"):
        assert load_bundle(write(text.replace("common:", f"{key}:"))).warnings == ()
    assert load_bundle(write(text.replace("&common", "").replace(", <<: *common", ""))).warnings[0][0] == "common"


def test_anchors_below_a_free_name_work_with_a_warning(write):
    loaded = load_bundle(
        write(
            """
            include: [a.yml]
            definitions: {retry: &retry {max_retries: 2}}
            resources: {jobs: {a: {tasks: [{task_key: a, <<: *retry}]}}}
            """,
            a_yml="definitions: {retry: &fast {max_retries: 1}}\n"
            "resources: {jobs: {b: {tasks: [{task_key: b, <<: *fast}]}}}",
        )
    )
    assert [loaded.job(key)["tasks"][0]["max_retries"] for key in "ab"] == [2, 1]
    assert [key for key, _, _ in loaded.warnings] == ["definitions"] and "definitions" not in loaded.data


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "a\\b", ""])
def test_names_of_bundle_and_target_are_one_part_of_a_path(write, name):
    refused(write(f"targets: {{{json.dumps(name)}: {{}}}}"), f"{name!r} is not a valid name of a target")
    if name:
        root = write("")
        (root / "databricks.yml").write_text(f"bundle: {{name: {json.dumps(name)}}}")
        refused(root, f"{name!r} is not a valid name of a bundle")


def test_a_job_key_with_a_dot_in_two_files_is_defined_twice(write):
    one = "resources: {jobs: {daily.train: {name: a}}}"
    two = "resources: {jobs: {daily.train: {tags: {a: b}}}}"
    refused(write("include: [a.yml, b.yml]", a_yml=one, b_yml=two), "resources.jobs.daily.train is defined twice")


@pytest.mark.parametrize("key", ["daily.train", "a[b", "a]", "[0]", "", " ", "a.b.c[1"])
def test_the_place_of_a_key_with_dots_and_brackets(write, key):
    loaded = load_bundle(write(f"resources: {{jobs: {{{json.dumps(key)}: {{name: a}}}}}}"))
    for path in (f"resources.jobs.{key}", f"resources.jobs.{key}.name", f"resources.jobs.{key}.tasks[3].x"):
        assert (loaded.place(path).file, loaded.place(path).line) == ("databricks.yml", 2)


def test_an_empty_field_of_a_job_counts_as_not_set(write):
    loaded = load_bundle(
        write("""
        resources:
          jobs:
            a:
              queue:
              parameters: ~
              tasks: [{task_key: t, max_retries: , condition_task: , notebook_task: {base_parameters: {x: }}}]
        """)
    )
    assert loaded.job("a") == {"tasks": [{"task_key": "t", "notebook_task": {"base_parameters": {"x": None}}}]}


def test_circular_variables_are_refused_even_if_unused(write):
    refused(write("variables: {a: {default: '${var.b}'}, b: {default: 'x ${var.a}'}}"), "circular references")


def test_branch_and_commit(write):
    root = write("resources: {jobs: {a: {name: '${bundle.git.branch} ${bundle.git.commit}'}}}")
    assert resolved(root) == " "
    git(root, "init", "-q", "-b", "topic")
    git(root, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q", "--allow-empty", "-m", "first")
    assert resolved(root) == f"topic {(root / '.git/refs/heads/topic').read_text().strip()}"


# the finished bundle


def test_paths_are_rewritten_from_where_they_stand(write):
    task = "{task_key: %s, notebook_task: {notebook_path: %s}}"
    root = write(
        "include: [resources/*.yml]\nvariables: {where: {default: ../nbs/v.ipynb}}",
        resources__a_yml=f"""
        resources:
          jobs:
            a:
              tasks:
                - {task % ("up", "../nbs/a.ipynb")}
                - {task % ("beside", "./b.ipynb")}
                - {task % ("workspace", "/Workspace/c.ipynb")}
                - {task % ("variable", '"${var.where}"')}
                - {{task_key: loop, for_each_task: {{inputs: '[1]', task: {task % ("inner", "../nbs/d.ipynb")}}}}}
                - {{task_key: script, spark_python_task: {{python_file: ../src/e.py}}}}
            b: {{git_source: {{git_url: x}}, tasks: [{task % ("git", "nbs/a")}]}}
        targets: {{dev: {{resources: {{jobs: {{a: {{tasks: [{task % ("of_target", "../nbs/t.ipynb")}]}}}}}}}}}}
        """,
    )
    tasks = {task["task_key"]: task for task in load_bundle(root).job("a")["tasks"]}
    paths = {key: task["notebook_task"]["notebook_path"] for key, task in tasks.items() if "notebook_task" in task}
    assert paths == {
        "up": "nbs/a.ipynb",
        "beside": "resources/b.ipynb",
        "workspace": "/Workspace/c.ipynb",
        "variable": "nbs/v.ipynb",
        "of_target": "nbs/t.ipynb",
    }
    assert tasks["loop"]["for_each_task"]["task"]["notebook_task"]["notebook_path"] == "nbs/d.ipynb"
    assert tasks["script"]["spark_python_task"]["python_file"] == "src/e.py"
    assert load_bundle(root).job("b")["tasks"][0]["notebook_task"]["notebook_path"] == "nbs/a"


def test_values_that_databricks_stores_as_strings_are_strings(write):
    loaded = load_bundle(
        write("""
        resources:
          jobs:
            a:
              parameters: [{name: n, default: 1}, {name: t, default: true}, {name: d, default: 2013-04-01}]
              tasks:
                - {task_key: 1, notebook_task: {notebook_path: a.ipynb, base_parameters: {x: 1.5, y: false}}}
                - task_key: 2
                  depends_on: [{task_key: 1, outcome: true}]
                  condition_task: {left: 1, right: 2, op: EQUAL_TO}
        """)
    ).job("a")
    assert [item["default"] for item in loaded["parameters"]] == ["1", "true", "2013-04-01"]
    assert loaded["tasks"][0]["task_key"] == "1" and loaded["tasks"][0]["notebook_task"]["base_parameters"] == {
        "x": "1.5",
        "y": "false",
    }
    assert loaded["tasks"][1]["depends_on"] == [{"task_key": "1", "outcome": "true"}]
    assert loaded["tasks"][1]["condition_task"] == {"left": "1", "right": "2", "op": "EQUAL_TO"}


@pytest.mark.parametrize(
    ("target", "status"), [("development", "PAUSED"), ("production", None), ("preset", "UNPAUSED")]
)
def test_development_pauses_schedules_without_a_pause_status(write, target, status):
    root = write("""
        resources: {jobs: {a: {schedule: {timezone_id: UTC}}, b: {trigger: {pause_status: UNPAUSED}}}}
        targets:
          development: {mode: development}
          production: {mode: production}
          preset: {presets: {trigger_pause_status: UNPAUSED}}
        """)
    jobs = load_bundle(root, target).jobs
    assert jobs["a"]["schedule"].get("pause_status") == status and jobs["b"]["trigger"]["pause_status"] == "UNPAUSED"


def test_jobs_by_key_and_by_id(write):
    loaded = load_bundle(write("resources: {jobs: {train: {}, deploy: {name: d}}}"))
    number = job_id("train", loaded.target)
    assert (
        loaded.job("deploy") == {"name": "d"}
        and loaded.job_by_id(number) == loaded.job_by_id(str(number)) == "train"
    )
    with pytest.raises(MlopsError, match="no job 'trian' in example\n  did you mean 'train'"):
        loaded.job("trian")
    with pytest.raises(MlopsError, match=r"no job with the id 7 in example\n  there are: \d+ \(deploy\)"):
        loaded.job_by_id(7)


@given(st.text(min_size=1), st.text(min_size=1))
def test_ids_of_jobs_are_positive_and_stable(first, second):
    assert 0 < job_id(first, "dev") < 2**32
    assert first != second or job_id(first, "dev") == job_id(second, "dev")


def test_ids_are_the_same_in_another_process():
    command = [sys.executable, "-c", "from mlops_nb.bundle.load import job_id; print(job_id('train', 'dev'))"]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) == job_id("train", "dev")


# any invalid value gives a problem or a MlopsError, and no other exception

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(["", "a", "${var.a}", "${bundle.name}", "${x.y}", "{{job.id}}"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "default", "name", "task_key", "jobs"]), inner, max_size=2)
    ),
    max_leaves=5,
)
GOOD = {
    "bundle": {"name": "example"},
    "include": [],
    "variables": {
        "a": {"default": "1"},
        "b": {"type": "complex", "default": ["${var.a}"]},
        "catalog": {"default": "c"},
        "schema": {"default": "s"},
        "workers": {"default": "w"},
        "read": {"type": "complex", "default": ["c", "other"]},
        "settings": {"default": '{"schema": "s"}'},
    },
    "workspace": {"root_path": "/Workspace/x"},
    "artifacts": {"w": {"path": "."}},
    "permissions": [{"level": "CAN_VIEW", "group_name": "g"}],
    "resources": {
        "jobs": {
            "j": {
                "name": "j",
                "tags": {"a": "b"},
                "schedule": {"quartz_cron_expression": "0 0 6 * * ?", "timezone_id": "UTC"},
                "parameters": [{"name": "p", "default": "1"}],
                "permissions": [{"level": "CAN_VIEW", "group_name": "g"}],
                "tasks": [
                    {
                        "task_key": "t",
                        "depends_on": [{"task_key": "u", "outcome": "true"}],
                        "notebook_task": {"notebook_path": "a.ipynb", "base_parameters": {"p": "1"}},
                    },
                    {
                        "task_key": "u",
                        "condition_task": {"left": "1", "op": "EQUAL_TO", "right": "{{job.parameters.p}}"},
                    },
                    {
                        "task_key": "v",
                        "for_each_task": {
                            "inputs": "[1]",
                            "task": {"task_key": "w", "run_job_task": {"job_id": "${resources.jobs.j.id}"}},
                        },
                    },
                ],
            }
        },
        "schemas": {
            "s": {"catalog_name": "c", "name": "s", "grants": [{"principal": "p", "privileges": ["SELECT"]}]}
        },
        "volumes": {"v": {"catalog_name": "c", "schema_name": "${resources.schemas.s.name}", "name": "v"}},
        "registered_models": {"m": {"catalog_name": "c", "schema_name": "s", "name": "m"}},
        "experiments": {"e": {"name": "/Shared/e", "permissions": [{"level": "CAN_READ", "group_name": "g"}]}},
        "model_serving_endpoints": {
            "n": {
                "name": "n",
                "config": {
                    "served_entities": [{"name": "a", "entity_name": "c.s.m", "workload_size": "Small"}],
                    "traffic_config": {"routes": [{"served_model_name": "a", "traffic_percentage": 100}]},
                },
            }
        },
        "quality_monitors": {
            "q": {
                "table_name": "c.s.t",
                "assets_dir": "/Shared",
                "output_schema_name": "c.s",
                "time_series": {"timestamp_col": "t", "granularities": ["1 day"]},
                "notifications": {"on_failure": {"email_addresses": ["a"]}},
                "schedule": {"quartz_cron_expression": "0 0 6 * * ?", "timezone_id": "UTC"},
            }
        },
        "alerts": {"l": {"display_name": "l", "warehouse_id": "1", "file_path": "l.dbalert.json"}},
        "dashboards": {"d": {"file_path": "d.lvdash.json"}},
    },
    "run_as": {"user_name": "u"},
    "presets": {"name_prefix": "p_"},
    "targets": {
        "dev": {
            "mode": "development",
            "variables": {"a": "2"},
            "resources": {"jobs": {"j": {"tasks": [{"task_key": "t"}]}}},
        }
    },
}


def spots(value, path=()):
    yield path
    keys = ()
    if isinstance(value, dict): keys = value
    elif isinstance(value, list): keys = range(len(value))
    for key in keys:
        yield from spots(value[key], (*path, key))


NAMES = ["a.b", "a[b", "a]", "[0]", "", "..", "../x", "a b", "é", "123", "_x", "a-", "<<", "~", "*", "x" * 300, "\t"]


def changed(spot: tuple, value: object, name: str | None) -> dict:
    """GOOD with another value at the spot, or with another name of the entry that it ends with."""
    tree = json.loads(json.dumps(GOOD))
    inside = tree
    for key in spot[:-1]: inside = inside[key]
    if name is not None and isinstance(inside, dict): inside[name] = inside.pop(spot[-1])
    else: inside[spot[-1]] = value
    return tree


def is_reported(root: Path, tree: dict) -> None:
    """A traceback, or a search that never ends, fails the test."""
    from mlops_nb.bundle.checks import check

    root.mkdir(exist_ok=True)
    (root / "databricks.yml").write_text(json.dumps(tree))
    try:
        assert all(str(problem) for problem in check(load_bundle(root)))
    except MlopsError as error:
        assert error.message


SPOTS = [spot for spot in spots(GOOD) if spot]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SPOTS), junk, st.none() | st.sampled_from(NAMES) | st.text(max_size=5))
def test_any_wrong_value_or_name_is_reported(tmp_path_factory, spot, value, name):
    is_reported(tmp_path_factory.getbasetemp() / "mistakes", changed(spot, value, name))


@pytest.mark.slow
@settings(deadline=None, max_examples=by_size(400, 100))
@given(st.sampled_from(SPOTS), junk, st.none() | st.sampled_from(NAMES) | st.text(max_size=5))
def test_many_wrong_values_and_names_are_reported(tmp_path_factory, spot, value, name):
    is_reported(tmp_path_factory.getbasetemp() / "mistakes", changed(spot, value, name))


@pytest.mark.parametrize("key", NAMES)
def test_every_job_key_gives_no_traceback(tmp_path, key):
    job = {"name": "j", "tasks": [{"task_key": "a", "condition_task": {"left": "1", "op": "EQUAL_TO", "right": "1"}}]}
    is_reported(tmp_path, {"bundle": {"name": "x"}, "resources": {"jobs": {key: job}}})


# this project's own


def without_target(loaded):
    """The jobs without the values that have to differ: the ids of jobs and alerts, and the parameter `target`."""
    text = json.dumps(loaded.jobs)
    for key in loaded.jobs:
        text = text.replace(str(job_id(key, loaded.target)), json.dumps(key))
    for key in loaded.data["resources"]["alerts"]:
        text = text.replace(str(job_id(f"alerts.{key}", loaded.target)), key)
    jobs = json.loads(text)
    for job in jobs.values():
        for parameter in job.get("parameters", []):
            if parameter["name"] == "target":
                assert parameter.pop("default") == loaded.target
    return jobs


def test_staging_and_prod_differ_in_declared_variables_only():
    prod = load_bundle(ROOT, "prod")
    assert load_bundle(ROOT, "staging").jobs != prod.jobs
    staging = load_bundle(ROOT, "staging", variables=prod.variables)
    assert staging.variables == prod.variables
    assert without_target(staging) == without_target(prod)
    assert staging.data["permissions"] == prod.data["permissions"]
    assert {kind: value for kind, value in staging.data["resources"].items() if kind != "jobs"} == {
        kind: value for kind, value in prod.data["resources"].items() if kind != "jobs"
    }


@pytest.mark.parametrize("target", target_names(ROOT))
def test_no_reference_is_left_in_our_own_bundle(target):
    loaded = load_bundle(ROOT, target)
    assert "${" not in json.dumps(loaded.data) and loaded.variables["catalog"] == target
    for job in loaded.jobs.values():
        for task in job["tasks"]:
            if "run_job_task" in task:
                assert loaded.job_by_id(task["run_job_task"]["job_id"]) in loaded.jobs


def test_places_of_our_own_bundle_name_the_right_lines():
    loaded = load_bundle(ROOT)
    for key, number in (("train", 0), ("monitor", 1)):
        place = loaded.place(f"resources.jobs.{key}.tasks[{number}].task_key")
        line = (ROOT / place.file).read_text().splitlines()[place.line - 1]
        assert line.strip() == f"- task_key: {key}"
    assert loaded.place("resources.jobs.train.tasks[9].nothing[3].here").file == "resources/train.job.yml"


def test_importing_the_bundle_and_its_checks_is_cheap():
    heavy = ["databricks.sdk", "croniter", "papermill", "pandas", "mlflow", "pyspark", "numpy", "IPython"]
    code = f"import sys, mlops_nb.bundle, mlops_nb.bundle.checks; print([m for m in {heavy} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert process.stdout.strip() == "[]"


def test_repeated_reads_are_equal():
    text = (ROOT / "databricks.yml").read_text()
    assert read_yaml(text, "a") == read_yaml(text, "a") and load_bundle(ROOT) == load_bundle(ROOT)
