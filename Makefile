# diffret: `make help` says what there is. GNU make 3.81 or later.

PROFILE    ?= embedded
COLLECTION ?=
ARGS       ?=
PYTHONS    := python3.11 python3.12 python3.13 python3 python

# An active environment is used as it is (conda's `base` does not count); otherwise .venv is made from the lock.
ACTIVE := $(or $(VIRTUAL_ENV),$(if $(filter base,$(CONDA_DEFAULT_ENV)),,$(CONDA_PREFIX)))
ifeq ($(strip $(ACTIVE)),)
PY := $(CURDIR)/.venv/bin/python
else
PY := $(or $(wildcard $(ACTIVE)/bin/python),python)
endif

# What a notebook's result depends on. Stamps live in build/, which git ignores: a fresh clone has none and runs
# everything, whatever the times of its files; a second run finds them and does nothing.
NOTEBOOKS := $(sort $(basename $(notdir $(wildcard notebooks/[0-9][0-9]_*.ipynb))))
LIBRARY   := $(shell find diffret_lib -type f ! -name appendix.py \( -name '*.py' -o -name '*.yaml' -o -name '*.json' -o -name '*.safetensors' \))
EXTRA     := $(if $(COLLECTION),$(wildcard $(COLLECTION)/*.jsonl $(COLLECTION)/qrels/*.tsv))
STAMPS    := build/$(PROFILE)
DONE      := $(NOTEBOOKS:%=$(STAMPS)/%.done)

.DEFAULT_GOAL := help
.PHONY: help reproduce smoke appendix test lab clean distclean env profile FORCE
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SECONDEXPANSION:

help: ## this text
	@echo "usage: make TARGET [PROFILE=embedded] [COLLECTION=path/of/a/BEIR/folder]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "profiles: $(basename $(notdir $(wildcard notebooks/profiles/*.yml)))"
	@echo "Outside a conda or virtual environment the first target that needs one makes .venv (Python 3.11 to 3.13)."

reproduce: profile env $(DONE) ## run the notebooks into results/PROFILE/ (those that are out of date)
	@echo "results/$(PROFILE) is up to date"

smoke: ## the same notebooks on next to nothing, into results/smoke/
	@$(MAKE) --no-print-directory reproduce PROFILE=smoke

appendix: profile env ## the executed notebooks as HTML pages, into results/PROFILE/appendix/
	@$(PY) -m diffret_lib.appendix --profile $(PROFILE)

test: env ## run the tests (ARGS="-k name" for some)
	@$(PY) -m pytest -q $(ARGS)

lab: env ## open JupyterLab in notebooks/ with the kernel ready
	@cd notebooks && JUPYTER_PREFER_ENV_PATH=1 PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(PY) -m jupyterlab $(ARGS)

clean: ## remove stamps, caches of tools and results/smoke (keeps .venv, other results and the encodings)
	@rm -rf build results/smoke .pytest_cache .ruff_cache diffret.egg-info
	@find diffret_lib tests notebooks benchmarks \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv
	@rm -rf .venv

# Which notebook reads what another one found.
$(STAMPS)/03_training.done: $(STAMPS)/02_mask_count.done
$(STAMPS)/04_evaluation.done: $(STAMPS)/03_training.done
$(STAMPS)/05_per_query_optimal_k.done: $(STAMPS)/04_evaluation.done
$(STAMPS)/06_efficiency.done: $(STAMPS)/04_evaluation.done
$(STAMPS)/07_claims.done: $(STAMPS)/05_per_query_optimal_k.done $(STAMPS)/06_efficiency.done
$(STAMPS)/90_explore.done: $(STAMPS)/02_mask_count.done

# The stamp has the time at which the run began, so that an edit made meanwhile counts.
$(STAMPS)/%.done: notebooks/%.ipynb $(LIBRARY) notebooks/profiles/$(PROFILE).yml requirements.lock $(EXTRA) \
		$(STAMPS)/collection $$(if $$(wildcard results/$(PROFILE)/notebooks/$$*.ipynb),,FORCE) | profile env
	@touch $@.begun
	@echo "== $* ($(PROFILE))"
	@$(PY) -m diffret_lib.reproduce $* --profile $(PROFILE) $(if $(COLLECTION),--collection "$(COLLECTION)")
	@mv $@.begun $@

# Changes when COLLECTION does.
$(STAMPS)/collection: FORCE | profile
	@mkdir -p $(@D)
	@echo "$(COLLECTION)" | cmp -s - $@ || echo "$(COLLECTION)" > $@

notebooks/profiles/$(PROFILE).yml: | profile ;

profile:
	@test -f "notebooks/profiles/$(PROFILE).yml" || { \
		echo "error: there is no profile '$(PROFILE)'; PROFILE may be:" \
			"$(basename $(notdir $(wildcard notebooks/profiles/*.yml)))" >&2; exit 1; }

FORCE:

# The environment: .venv from the lock, made again when the lock's content changes or its Python is gone.
ifeq ($(strip $(ACTIVE)),)
env:
	@if cmp -s requirements.lock .venv/installed.lock && $(PY) -c pass 2>/dev/null; then exit 0; fi; \
	for python in $(PYTHON) $(if $(PYTHON),,$(PYTHONS)); do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
			2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
		echo "error: no Python 3.11, 3.12 or 3.13 with the venv module (tried:" \
			"$(or $(PYTHON),$(PYTHONS))). Install one, name one (make PYTHON=/path/of/python3.11 ...)," \
			"or use conda: conda env create -f environment.yml && conda activate diffret" >&2; \
		exit 1; \
	fi; \
	echo "making .venv from requirements.lock with $$("$$found" --version), some minutes the first time"; \
	"$$found" -m venv --clear .venv && \
	$(PY) -m pip install -qq --disable-pip-version-check -r requirements.lock && \
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e . && \
	cp requirements.lock .venv/installed.lock
else
define CHECK_LOCK
import re, sys
from importlib import metadata

if not (3, 11) <= sys.version_info[:2] < (3, 14):
    sys.exit(f"error: Python 3.11 to 3.13 is needed, the active environment has {sys.version.split()[0]}")
missing, other = [], []
for line in open("requirements.lock", encoding="utf-8"):
    if pin := re.match(r"([\w.-]+)==([\w.]+)", line):
        try:
            if (found := metadata.version(pin[1]).split("+")[0]) != pin[2]:
                other.append(f"{pin[1]} {found} (lock: {pin[2]})")
        except metadata.PackageNotFoundError:
            missing.append(pin[1])
if missing:
    sys.exit(
        f"error: the active environment ({sys.prefix}) lacks {len(missing)} packages of requirements.lock: "
        f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}\n"
        "Install them:   python -m pip install -r requirements.lock && python -m pip install --no-deps -e .\n"
        "or deactivate the environment: make then makes its own .venv."
    )
if other:
    print(f"note: {len(other)} packages are not as in requirements.lock: {', '.join(other[:4])}", file=sys.stderr)
endef
export CHECK_LOCK
env:
	@$(PY) -c "$$CHECK_LOCK"
endif
