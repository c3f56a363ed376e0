# diffret: `make help` says what there is. GNU make 3.81 or later.

# What is given on the command line or in the environment is data: `value` and `:=` keep make from expanding it, and
# recipes read it from the shell's environment, so that no quote, space, semicolon or dollar in it is ever run.
$(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$(eval override $v := $$(value $v))$(eval export $v)))
override PROFILE     := $(or $(value PROFILE),embedded)
override COLLECTION  := $(value COLLECTION)
override ARGS        := $(value ARGS)
override PYTHON      := $(value PYTHON)
override ROUNDS      := $(value ROUNDS)
override VIRTUAL_ENV := $(value VIRTUAL_ENV)
override CONDA       := $(if $(filter base,$(value CONDA_DEFAULT_ENV)),,$(value CONDA_PREFIX))
export PROFILE COLLECTION ARGS PYTHON ROUNDS

# An active environment is used as it is (conda's `base` does not count); otherwise .venv is made from the lock.
override ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA))
override PY := $(or $(ACTIVE),$(CURDIR)/.venv)/bin/python
export ACTIVE PY

override LEFT_OUT  := $(value LEFT_OUT)
override NOTEBOOKS := $(filter-out $(LEFT_OUT),$(sort $(basename $(notdir $(wildcard notebooks/[0-9][0-9]_*.ipynb)))))
override PROFILES  := $(sort $(basename $(notdir $(wildcard notebooks/profiles/*.yml))))
override KNOWN     := $(if $(filter 1,$(words $(PROFILE))),$(filter $(PROFILES),$(PROFILE)))
override BUILD     := build/$(KNOWN)

# A notebook's kernel is the environment's own, whatever kernels and packages else are on the machine.
override KERNEL = PYTHONPATH="$$PWD$${PYTHONPATH:+:$$PYTHONPATH}" PYTHONHASHSEED=0 PYTHONUTF8=1 JUPYTER_PREFER_ENV_PATH=1 \
	JUPYTER_PATH= MPLBACKEND=module://matplotlib_inline.backend_inline

.DEFAULT_GOAL := help
.PHONY: help plan reproduce smoke appendix test torture lab clean distclean env profile run
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## this text
	@echo "usage: make TARGET [PROFILE=embedded] [COLLECTION=path/of/a/BEIR/folder[:split]]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "profiles: $(PROFILES)"
	@echo "Outside a conda or virtual environment the first target that needs one makes .venv (Python 3.11 to 3.13)."

plan: profile env ## what a run of the profile needs: time, memory, disk
	@PYTHONPATH="$$PWD" "$$PY" scripts/plan.py

reproduce: profile env ## run the notebooks into results/PROFILE/ (those that are out of date)
	@PYTHONPATH="$$PWD" "$$PY" scripts/start_run.py "$(MAKE)" --no-print-directory run

smoke: ## the same notebooks on next to nothing, into results/smoke/
	@"$(MAKE)" --no-print-directory reproduce PROFILE=smoke

appendix: profile env ## the executed notebooks as HTML pages, into results/PROFILE/appendix/
	@PYTHONPATH="$$PWD" "$$PY" scripts/appendix/build.py results/$(KNOWN)

test: env ## run the tests (ARGS="-k name" for some)
	@OMP_NUM_THREADS=1 "$$PY" scripts/environment.py run -m pytest -q -n auto --maxprocesses 4 --dist loadfile

torture: env ## kill, fill, damage and run twice, over and over: some minutes (ROUNDS=3)
	@PYTHONPATH="$$PWD" "$$PY" tests/test_faults.py "$${ROUNDS:-3}"

lab: env ## open JupyterLab in notebooks/ with the kernel ready
	@$(KERNEL); export PYTHONPATH JUPYTER_PREFER_ENV_PATH; \
		cd notebooks && "$$PY" ../scripts/environment.py run -m jupyterlab

clean: ## remove stamps, caches of tools and results/smoke (keeps .venv, other results and the encodings)
	@rm -rf build results/smoke .pytest_cache .ruff_cache .import_linter_cache diffret.egg-info
	@find diffret_lib tests notebooks benchmarks scripts \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv
	@rm -rf .venv

# -- the notebooks -------------------------------------------------------------------------------------------
# scripts/start_run.py writes NAME.inputs, a hash of all that a notebook depends on, newer than NAME.done when that is
# not the outcome of just these inputs; scripts/keep_notebook.py writes NAME.done.  Both are in build/, which git
# ignores: a fresh clone runs everything, and a second run does nothing.

run: $(NOTEBOOKS:%=$(BUILD)/%.done)
	@echo "results/$(KNOWN) is up to date"

# Which notebook reads what another one found.
$(BUILD)/03_training.done: $(BUILD)/02_mask_count_ablation.done
$(BUILD)/04_evaluation.done: $(BUILD)/02_mask_count_ablation.done
$(BUILD)/04_evaluation.done: $(patsubst %,$(BUILD)/%.done,$(filter 03_training,$(NOTEBOOKS)))
$(BUILD)/05_per_query_optimal_k.done: $(BUILD)/04_evaluation.done
$(BUILD)/06_efficiency.done: $(BUILD)/04_evaluation.done
$(BUILD)/07_claims.done: $(BUILD)/05_per_query_optimal_k.done $(BUILD)/06_efficiency.done
$(BUILD)/90_explore.done: $(BUILD)/02_mask_count_ablation.done

# NAME.plain.ipynb is there when papermill could not read the notebook as it is (a byte-order mark).
$(BUILD)/%.done: $(BUILD)/%.inputs
	@echo "== $* ($(KNOWN))"
	@rm -f $(BUILD)/$*.ipynb $(BUILD)/$*.peak && touch $(BUILD)/$*.begun
	@$(KERNEL) DIFFRET_PEAK_FILE="$$PWD/$(BUILD)/$*.peak" "$$PY" -m papermill \
		$(or $(wildcard $(BUILD)/$*.plain.ipynb),notebooks/$*.ipynb) $(BUILD)/$*.ipynb \
		-f notebooks/profiles/$(KNOWN).yml $${COLLECTION:+-r collection "$$COLLECTION"} \
		--cwd notebooks -k python3 -l python; \
	status=$$?; PYTHONPATH="$$PWD" "$$PY" scripts/keep_notebook.py $(KNOWN) $* $$status

profile:
ifeq ($(KNOWN),)
	@printf 'error: there is no profile "%s"; PROFILE may be: $(PROFILES)\n' "$$PROFILE" >&2; exit 1
endif

# -- the environment: .venv from the lock, made again when the lock's content changes or its Python is gone --
env:
ifeq ($(strip $(ACTIVE)),)
	@cmp -s requirements.lock .venv/installed.lock && "$$PY" -c pass 2>/dev/null && exit 0; \
	if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3.11 python3.12 python3.13 python3 python; fi; \
	for python; do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
			2>/dev/null; then exec "$$python" scripts/environment.py make; fi; \
	done; \
	echo "error: no Python 3.11, 3.12 or 3.13 with the venv module (tried: $$*). Install one, name one" \
		"(make PYTHON=/path/of/python3.11 ...), or use conda: conda env create -f environment.yml &&" \
		"conda activate diffret" >&2; exit 1
else
	@test -x "$$PY" || { printf 'error: the active environment (VIRTUAL_ENV or CONDA_PREFIX) is "%s", which has no %s\n' \
		"$$ACTIVE" bin/python >&2; exit 1; }
	@"$$PY" scripts/environment.py check
endif
