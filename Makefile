# `make demo` and `make test` do everything on a fresh machine with Python 3.11.
# Which package index pip uses is the machine's business (pip.conf, PIP_* variables).

VENV := .venv
PY := $(VENV)/bin/python
# Stamps live inside the environment, so they vanish with it; a changed setup.py installs again.
RUN_STAMP := $(VENV)/.installed-run
TEST_STAMP := $(VENV)/.installed-test
# --no-compile: Python makes bytecode of what it imports; of all 28,000 files it takes longer than installing them.
PIP_INSTALL := $(PY) -m pip install --no-compile --quiet --disable-pip-version-check

DEMO_DIR := runs/demo
DEMO_PROMPT := 比较适合深度学习入门的书籍有
PYTHON_SOURCES := research scripts tests examples docker setup.py $(wildcard convert_weight.py run_qwen_7b.py)

# Where bytecode is not kept, every process compiles again whatever it imports: tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast lint fix bench clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

demo: $(RUN_STAMP) ## install, convert the embedded demo model, ask it one question
	@echo "[demo 1/2] converting the demo model to $(DEMO_DIR)/qwen_demo.ckpt"
	@mkdir -p $(DEMO_DIR)
	@$(PY) convert_weight.py --torch_ckpt_dir research/qwen/demo/model \
		--mindspore_ckpt_path $(DEMO_DIR)/qwen_demo.ckpt --force
	@echo "[demo 2/2] asking: $(DEMO_PROMPT)"
	@$(PY) run_qwen_7b.py --config $(DEMO_DIR)/qwen_demo.yaml --run_mode predict \
		--load_checkpoint $(DEMO_DIR)/qwen_demo.ckpt --predict_data "$(DEMO_PROMPT)"

# Two workers: most tests wait for one core. A file stays in one process, which loads its models once.
test: lint ## everything: lint, types, layers, all tests
	$(PY) -m pytest -n 2 --dist loadfile

test-fast: $(TEST_STAMP) ## the quick tests, without MindSpore, PyTorch and a browser
	$(PY) -m pytest -m "not mindspore and not torch and not browser and not slow" -n 2 --dist loadfile -p no:schemathesis

lint: $(TEST_STAMP) ## ruff, format, mypy, layers
	$(PY) -m ruff check $(PYTHON_SOURCES)
	$(PY) -m ruff format --check $(PYTHON_SOURCES)
	$(PY) -m mypy research scripts examples/react
	$(PY) scripts/check_layers.py

fix: $(TEST_STAMP) ## what ruff can mend by itself
	$(PY) -m ruff check --fix $(PYTHON_SOURCES)
	$(PY) -m ruff format $(PYTHON_SOURCES)

bench: $(RUN_STAMP) ## tokens per second, as JSON (options: make bench BENCH_ARGS=...)
	$(PY) scripts/bench.py $(BENCH_ARGS)

clean: ## remove what runs and builds leave behind, keep .venv
	rm -rf runs output build dist rank_0 kernel_meta text_generation_result.txt *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find research scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the same and .venv
	rm -rf $(VENV)

# The first of these that is Python 3.11 makes the environment; PYTHON=... is tried first.
$(PY):
	@found=; for candidate in $(PYTHON) python3.11 python3 python; do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
			found=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "error: Python 3.11 is needed (MindSpore 2.9.0 has no other build); python3 here is:" \
			"$$(python3 --version 2>&1). Install it, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	fi; \
	echo "[setup] creating $(VENV) with $$found ($$($$found --version))"; \
	$$found -m venv $(VENV) || { rm -f $(PY); \
		echo "error: $$found cannot create an environment (Debian, Ubuntu: apt install python3.11-venv)" >&2; exit 2; }

$(RUN_STAMP): setup.py | $(PY)
	$(call install,.,MindSpore and MindFormers (3 GB on disk))

$(TEST_STAMP): setup.py | $(PY)
	$(call install,.[test],MindSpore and MindFormers with the test tools (5 GB on disk))
	@$(PIP_INSTALL) --upgrade --no-deps --target $(VENV)/openai-1 openai==1.109.1  # the server is tested with both
	@touch $(RUN_STAMP)

define install
@$(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	echo "error: $(VENV) is $$($(PY) --version 2>&1), Python 3.11 is needed; remove it: make distclean" >&2; exit 2; }
@echo "[setup] installing $(2): takes some minutes"
@$(PIP_INSTALL) --editable '$(1)'
@touch $@
endef
