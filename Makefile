# The commands of the project; CI calls the same targets.
.DEFAULT_GOAL := help
.PHONY: help install setup install-docs install-engines install-stores install-peers demo approve test test-all test-notebooks test-unit test-integration test-slow test-spark \
  bench docs docs-links integration metrics report deploy run roll-back release-check plan check notebooks-clean export-current code secrets bundle wheel tidy ui lab lock clean
.SHELLFLAGS := -eu -c
# Waiting threads must not spin: they would slow down other processes.
export OMP_WAIT_POLICY = PASSIVE
unexport PYTHONDONTWRITEBYTECODE  # without bytecode, imports take twice as long in every notebook

PYTHON ?= python3
UV := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

help:  ## this list
	@echo "make TARGET, with TARGET one of"; \
	awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY)  ## create .venv from requirements.lock (other targets do this when needed)

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "environment: $(VENV) from requirements.lock (about 1.3 GB; a minute, less when packages are cached)"
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 || { cat $(VENV).log; rm -rf $(VENV) $(VENV).log; \
	  echo "This Python cannot create environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@rm -f $(VENV).log; $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(READY)

# The driver merges notebooks by cell (see .gitattributes). It belongs to the clone, so that other clones need no nbdev.
setup: $(READY)  ## set up this clone for git: merge notebooks by cell, run the checks before each commit
	@git rev-parse --git-dir >/dev/null || { echo "make it a repository first: git init"; exit 1; }
	@git config merge.nbdev-merge.name "merge notebooks by cell"
	@git config merge.nbdev-merge.driver "'$(CURDIR)/$(BIN)/nbdev_merge' %O %A %B %P"
	@$(BIN)/pre-commit install

install-stores: $(READY)  ## install the Python drivers for the tests of online stores (servers: see .ci/run)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --requirements tests/stores.lock

demo: $(READY)  ## run a year of production on the flights of 2013: train, score, monitor, retrain
	@$(BIN)/mlops run demo

integration: $(READY)  ## run all pipelines on the target staging, in a temporary catalog; report in build/integration
	@$(BIN)/mlops ci integration -t staging

BASE ?= origin/main
metrics: $(READY)  ## compare the metrics of this commit with the Champion of a shared registry, or with BASE=origin/main
	@$(BIN)/mlops ci metrics --base $(BASE) $(if $(ACCEPT),--accept)

report: $(READY)  ## print the report of a pull request from what is in build: tests, coverage, metrics, integration
	@$(BIN)/mlops ci report

# With DATABRICKS_HOST the next targets work in that workspace, otherwise `run` runs the job on this machine.
TARGET ?= dev
WITH_CLI = command -v databricks >/dev/null || { echo "install the Databricks CLI 1.0 or later: see docs/deploy.md"; exit 1; }
DIRTY = $$(test -z "$$(git status --porcelain --untracked-files=no)" && echo false || echo true)

release-check: $(READY)  ## check that this commit may be deployed: TARGET=prod
	@$(BIN)/mlops ci release -t $(TARGET)

plan:  ## show what a deployment would change: TARGET=staging
	@$(WITH_CLI); databricks bundle validate -t $(TARGET) && databricks bundle plan -t $(TARGET)

deploy:  ## deploy the bundle to the workspace: TARGET=dev
	@$(WITH_CLI); databricks bundle deploy -t $(TARGET) --var git_dirty=$(DIRTY) $(if $(BRANCH),--var git_branch=$(BRANCH))

run: $(if $(DATABRICKS_HOST),,$(READY))  ## run a job of the workspace, or of this machine: JOB=smoke TARGET=prod (WAIT=no: only start it)
	@if [ -n "$${DATABRICKS_HOST:-}" ]; then $(WITH_CLI); databricks bundle run -t $(TARGET) $(if $(filter no,$(WAIT)),--no-wait) $(JOB); \
	else $(BIN)/mlops run $(JOB) -t $(TARGET); fi

roll-back:  ## deploy an earlier commit again: COMMIT=... TARGET=prod
	@git rev-parse --quiet --verify "$(COMMIT)^{commit}" >/dev/null || { echo "no commit COMMIT=$(COMMIT); git fetch origin"; exit 1; }
	@git worktree remove --force .mlops/roll-back 2>/dev/null || true; git worktree add --quiet --detach .mlops/roll-back "$(COMMIT)"
	@branch=$$(git for-each-ref --contains "$(COMMIT)" --format '%(refname)' 'refs/heads/release/*' 'refs/remotes/origin/release/*' | head -1); \
	status=0; $(MAKE) -C .mlops/roll-back deploy TARGET=$(TARGET) BRANCH="$$(echo "$$branch" | sed -E "s;refs/(heads|remotes/origin)/;;")" || status=$$?; \
	git worktree remove --force .mlops/roll-back; exit $$status

approve: $(READY)  ## approve a version that waits: NAME=... VERSION=... WHO="..." TARGET=...
	@$(BIN)/mlops approve "$$NAME" "$$VERSION" --as "$$WHO" --target "$$TARGET"

test: test-notebooks test-unit test-integration  ## run the tests required for every change, on a plain machine

test-all: test test-slow test-spark  ## run all tests in full size (needs make install-stores, servers, Java 17)

PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --durations=10 --dist loadfile

# $(call suite,name,seconds it may take,command). The command holds no comma.
define suite
	@echo "── $(1) (budget $(2) s)"; began=$$(date +%s); $(3); took=$$(( $$(date +%s) - began )); \
	echo "── $(1): $$took s of $(2) s$$([ $$took -le $(2) ] || echo ', OVER BUDGET')"
endef

test-notebooks: $(READY)
	$(call suite,notebooks,70,$(BIN)/nbdev_test --path nbs --n_workers 2)

test-unit: $(READY)
	$(call suite,unit,105,$(PYTEST) -m "not slow" tests/unit)

test-integration: $(READY)
	$(call suite,integration,185,$(PYTEST) --no-loadscope-reorder -m "not slow" tests/integration)

REDUCED = $(filter reduced,$(MLOPS_TEST_SIZE))

test-slow: $(READY)  ## run rare and long tests: kills, online stores, a year (MLOPS_TEST_SIZE=reduced: fewer)
	$(call suite,slow,$(if $(REDUCED),720,1500),$(PYTEST) --no-loadscope-reorder -m "slow$(if $(REDUCED), and not full)" tests)

# Each engine installs its own `pyspark`, so each has a separate environment.
.venv-spark/.ready: tests/engines/requirements.lock $(READY)
	@echo "environment: .venv-spark with Apache Spark (about 1.5 GB)"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-spark
	@$(BIN)/uv pip install --quiet --python .venv-spark/bin/python --requirements tests/engines/requirements.lock
	@$(BIN)/uv pip install --quiet --python .venv-spark/bin/python --no-deps --editable . && touch $@

.venv-connect/.ready: tests/engines/connect.lock $(READY)
	@echo "environment: .venv-connect with Databricks Connect"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-connect
	@$(BIN)/uv pip install --quiet --python .venv-connect/bin/python --requirements tests/engines/connect.lock
	@$(BIN)/uv pip install --quiet --python .venv-connect/bin/python --no-deps --editable . && touch $@

install-engines: .venv-spark/.ready .venv-connect/.ready  ## install the environments with Apache Spark and Databricks Connect

test-spark: $(READY) .venv-spark/.ready .venv-connect/.ready  ## compare Sail with Apache Spark and Delta (Java 17)
	$(call suite,engines,600,$(PYTEST) -m "not slow" tests/engines)

$(VENV)/.bench: benchmarks/requirements.lock $(READY)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements benchmarks/requirements.lock && touch $@

# The servers that `make bench` compares endpoints with; their dependencies exclude some of ours
.venv-peers/.ready: benchmarks/serving_peers.lock $(READY)
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-peers
	@$(BIN)/uv pip install --quiet --python .venv-peers/bin/python --requirements benchmarks/serving_peers.lock && touch $@

install-peers: .venv-peers/.ready  ## install MLServer and BentoML for make bench

.venv-monitoring/.ready: benchmarks/monitoring_peers.lock $(READY)
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-monitoring
	@$(BIN)/uv pip install --quiet --python .venv-monitoring/bin/python --requirements benchmarks/monitoring_peers.lock && touch $@

bench: $(VENV)/.bench .venv-monitoring/.ready  ## measure timings as ratios to a peer
	@$(BIN)/python benchmarks/run.py

$(VENV)/.docs: docs/requirements.lock $(READY)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements docs/requirements.lock && touch $@

install-docs: $(VENV)/.docs  ## install what builds the documentation, and the driver of Chromium for its test
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements tests/browser/requirements.lock

SPHINX = $(BIN)/python -m sphinx -q -W --keep-going -j 2 -d docs/_build/doctrees

docs: $(VENV)/.docs  ## build the site of the documentation, with the notebooks as the runs of the state executed them
	@$(SPHINX) -b html docs docs/_build/html && echo "the site: docs/_build/html/index.html"

docs-links: $(VENV)/.docs  ## check the links of the documentation to other sites
	@$(SPHINX) -b linkcheck docs docs/_build/linkcheck && echo "every link to another site leads somewhere"

NOTEBOOKS = $$(find nbs template -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*')
# nbdev keeps the modules of moved or deleted notebooks, so all generated modules are deleted first.
EXPORT = grep -rl --include='*.py' '^\# AUTOGENERATED! DO NOT EDIT!' mlops_nb | xargs rm -f && $(BIN)/nbdev_export

check: $(READY)  ## run the checks of a commit; each is a target, too: the six below
	@$(BIN)/mlops check

notebooks-clean: $(READY)  ## check that no notebook has outputs or execution counts
export-current: $(READY)  ## check that mlops_nb is what the notebooks export
code: $(READY)  ## check the code with ruff
secrets: $(READY)  ## check that no file contains a key, a token or a password
bundle: $(READY)  ## check the bundle and conf/ in every target
wheel: $(READY)  ## build the wheel into dist/, and check that it is complete

notebooks-clean export-current code secrets bundle wheel:
	@$(BIN)/mlops check --only $@

tidy: $(READY)  ## before a commit: clear outputs, sort imports, export mlops_nb
	@$(BIN)/jupyter nbconvert --log-level=ERROR --clear-output --inplace $(NOTEBOOKS)
	@$(BIN)/ruff check --quiet --fix . || echo "correct these lines by hand, then run make tidy again"
	@$(BIN)/nbdev_clean --fname nbs && $(BIN)/nbdev_clean --fname template/nbs && $(EXPORT)

ui: $(READY)  ## show the models and runs of the state in use in MLflow's pages
	@exec $(BIN)/mlops ui

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

COMPILE = $(BIN)/uv pip compile --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header --quiet
EXTRA = import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")

lock: $(READY)  ## compile requirements.lock and the locks of benchmarks, docs, engines and store tests
	@$(COMPILE) pyproject.toml --extra local --extra dev --extra flights --output-file requirements.lock
	@$(BIN)/python -c '$(EXTRA)' bench | $(COMPILE) - --constraint requirements.lock --output-file benchmarks/requirements.lock
	@$(COMPILE) benchmarks/serving_peers.in --output-file benchmarks/serving_peers.lock
	@$(COMPILE) benchmarks/monitoring_peers.in --output-file benchmarks/monitoring_peers.lock
	@$(BIN)/python -c '$(EXTRA)' docs | $(COMPILE) - --constraint requirements.lock --output-file docs/requirements.lock
	@$(BIN)/python -c '$(EXTRA)' browser | $(COMPILE) - --constraint requirements.lock --output-file tests/browser/requirements.lock
	@$(COMPILE) pyproject.toml tests/engines/spark.in --extra spark --extra flights \
	  --output-file tests/engines/requirements.lock
	@$(COMPILE) pyproject.toml tests/stores.in --extra aws --extra azure --extra postgres --extra redis \
	  --constraint requirements.lock --output-file tests/stores.part  # without what requirements.lock has
	@grep -vxFf requirements.lock tests/stores.part >tests/stores.lock; rm tests/stores.part

clean:  ## delete the environments and the local state
	rm -rf $(VENV) .venv-spark .venv-connect .mlops docs/_build docs/pages .pytest_cache .ruff_cache
