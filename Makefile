# Region-R1. Two commands do everything, set-up included:
#
#     make data train eval      the whole method on the embedded world, to the paper's tables
#     make test                 all tests
#
# The embedded world drawn from another seed:  make data train eval DATASET=world1
# Real data:  make data train eval DATASET=evqa ROOT=/where/it/is POLICY=Qwen/Qwen2.5-VL-3B-Instruct SCORER=FOLDER
#
# A stage is a real file: it runs once, and again only when the stage before it made its file anew. Source files are no
# prerequisites, on purpose: a comment mended in policy.py must not throw away a training run. After a change that
# matters, name a new RUN or `make clean`. The same goes for the flags: SEED=1 is a run of its own by its name, any
# other change of TRAIN_FLAGS needs its own RUN, and one of PREPARE_FLAGS or SCORER begins with
# rm data/$(DATASET)/manifest.json.

DATASET ?= world
WORLD := $(filter world%,$(DATASET))
ROOT ?= raw/$(DATASET)
POLICY ?= mini/policy
SCORER ?= mini/scorer
SEED ?= 0
RUN ?= $(DATASET)$(if $(filter-out 0,$(SEED)),-seed$(SEED))
PRESET ?= $(if $(filter mini/policy,$(POLICY)),mini,paper)
WORLD_FLAGS ?=
PREPARE_FLAGS ?=
TRAIN_FLAGS ?=
EVAL_FLAGS ?=
# Table 6: the same pools and crops by a scorer that the policy has never met. On real data: RESCORE_FLAGS="--scorer NAME".
RESCORE_FLAGS ?= $(if $(WORLD),--scorer mini/scorer2) --fuse .6
QUALITY_FLAGS ?=
TEST_FLAGS ?=
BENCH_FLAGS ?=
SCALE_FLAGS ?=
REPORT_FLAGS ?=
DEMO_PORT ?= 8000
DEMO_FLAGS ?=
# Ablations: readings of r-GRPO and of its reward, each with every seed. READINGS="default fuse" SEEDS="0 1" asks for fewer.
SEEDS ?= 0 1 2
READINGS ?= default force fuse nokl pi nostd group conditional resample plain free \
    delta paper mrr ndcg rank shyforce shyresample shyplain
flags.force := --balance force
flags.fuse := --fuse .6
flags.nokl := --beta 0
flags.pi := --decision-weight pi
flags.nostd := --no-std
flags.group := --advantage group
flags.conditional := --advantage conditional
flags.resample := --balance resample
flags.plain := --balance none --advantage group
flags.free := --decode free
# Rewards by Eq. 7-8, with the paper's groups, and with fewer of Eq. 7's terms: `rank` lacks the margin alone.
flags.delta := --reward delta
flags.paper := --reward delta --balance force
flags.mrr := --reward delta --reward-weights 1 0 0 0
flags.ndcg := --reward delta --reward-weights .5 .5 0 0
flags.rank := --reward delta --reward-weights .333 .333 .334 0
# From a policy that practically never crops: trained on rewards that pay for FULL alone.
flags.shyforce = --init-adapter $(dir $(SHY))adapter --balance force
flags.shyresample = --init-adapter $(dir $(SHY))adapter --balance resample
flags.shyplain = --init-adapter $(dir $(SHY))adapter --balance none --advantage group

# Passes of ever new lengths: without this PyTorch's memory on a card falls to pieces that fit none of them.
export PYTORCH_ALLOC_CONF ?= expandable_segments:True

PYTHON ?= python3
VENV ?= .venv
# To use an environment of your own: make PY=python READY=
PY ?= $(VENV)/bin/python
READY ?= $(VENV)/run.stamp

RAW := $(if $(WORLD),$(ROOT)/test.csv)
POOLS := data/$(DATASET)/manifest.json
TRAINED := runs/$(RUN)/finished
TABLES := runs/$(RUN)/eval/metrics.json
RETRIEVED := runs/$(RUN)/eval/retrieval/test.policy.jsonl

ABLATIONS := runs/$(if $(filter-out world,$(DATASET)),$(DATASET)-)ablation
ABLATED := $(foreach r,$(READINGS),$(SEEDS:%=$(ABLATIONS)/$(r)-seed%/eval/metrics.json))
SHY := $(ABLATIONS)/shy/finished
# What there is of them, in the order of READINGS; asked when the recipe runs.
REPORT = $(PY) -m tools.report --run runs/$(RUN) --runs $(patsubst %/eval/metrics.json,%,$(wildcard $(ABLATED))) \
    --bench $(wildcard bench/*.json) $(REPORT_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help data train eval tables ablations report test mini demo bench scale figure card clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {gsub(/\$$\(DATASET\)/, "$(DATASET)"); gsub(/\$$\(RUN\)/, "$(RUN)"); \
	    gsub(/\$$\(ABLATIONS\)/, "$(ABLATIONS)"); printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  variables: DATASET=$(DATASET) ROOT=$(ROOT) POLICY=$(POLICY) SCORER=$(SCORER) RUN=$(RUN) SEED=$(SEED)"
	@echo "             WORLD_FLAGS PREPARE_FLAGS TRAIN_FLAGS EVAL_FLAGS (see each file's --help), PYTHON=$(PYTHON)"

data: $(POOLS) ## raw data -> embeddings -> index -> candidate pools, in data/$(DATASET)

train: $(TRAINED) ## r-GRPO, in runs/$(RUN); goes on where a killed run stopped

eval: $(RETRIEVED) ## every method on the test split, and the paper's tables, in runs/$(RUN)/eval

tables: $(RETRIEVED) | $(READY:run.stamp=dev.stamp) ## all tables with intervals and tests, as text, Markdown and LaTeX, in runs/$(RUN)/report
	$(REPORT) --tables-only

ablations: $(ABLATED) ## READINGS x SEEDS (57 runs of 6 minutes on a core) in $(ABLATIONS); goes on where it was stopped

report: $(RETRIEVED) | $(READY:run.stamp=dev.stamp) ## the tables and one page with plots and pictures: report/report.html
	$(REPORT)

test: $(READY:run.stamp=dev.stamp) ## all tests, in two processes (TEST_FLAGS="-n 8" for more, "-n 0" for one)
	PYTHONHASHSEED=0 $(PY) -m pytest tests -n 2 --dist loadfile $(TEST_FLAGS)

# The stand-ins are shipped and have no file target: a checkout's time stamps would start an hour of training at random.
mini: | $(READY) ## build the stand-in models mini/scorer, mini/policy and mini/scorer2 anew
	$(PY) -m mini.pretrain

demo: $(TRAINED) ## try the trained policy on a page: http://127.0.0.1:8000 (DEMO_PORT=8000; KB=FOLDER: your pictures)
	$(PY) -m tools.demo --port $(DEMO_PORT) --data data/$(DATASET) --run runs/$(RUN) $(if $(KB),--kb "$(KB)") $(DEMO_FLAGS)

bench: | $(READY) ## time and memory of a step and of an answer on random weights, into bench/ (see tools/bench.py)
	$(PY) -m tools.bench $(BENCH_FLAGS)

scale: | $(READY) ## prepare.py at full scale: 2 million entries (11 GB in scratch/, removed by clean), a million vectors
	$(PY) -m tools.scale --folder scratch $(SCALE_FLAGS)

figure: $(READY:run.stamp=dev.stamp) $(POOLS) ## the README's picture of the loop, from a real group of rollouts
	$(PY) -m tools.figure --data data/$(DATASET) --policy $(POLICY)

card: $(TABLES) ## the model card, beside the adapter of runs/$(RUN)
	$(PY) -m tools.card --run runs/$(RUN)

clean: ## remove data/, runs/, scratch/ and the worlds in raw/, but neither your raw data nor the environment
	rm -rf data runs scratch raw/world*

# The environment. Stages have it as an order-only prerequisite (after the |): a new version of a package rebuilds the
# environment, not the data. The stamp comes last, so an install that was cut short is taken up again.
$(VENV)/run.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else \
	    "Python 3.10 to 3.12 is needed and this is %d.%d; say for example: make PYTHON=python3.12" % v)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/run.stamp
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

# The stages. Each writes its target last and by a rename: a stage that was killed has not made it.
ifneq ($(WORLD),)
$(RAW): | $(READY)
	$(PY) -m mini.world --out $(ROOT) --seed $(or $(WORLD:world%=%),0) $(WORLD_FLAGS)
endif

$(POOLS): $(RAW) | $(READY)
	$(PY) prepare.py --dataset $(if $(WORLD),world,$(DATASET)) --root $(ROOT) --scorer $(SCORER) --out data/$(DATASET) $(PREPARE_FLAGS)

$(TRAINED): $(POOLS) | $(READY)
	$(PY) train.py --preset $(PRESET) --data data/$(DATASET) --policy $(POLICY) --scorer $(SCORER) --run runs/$(RUN) \
	    --seed $(SEED) $(if $(wildcard runs/$(RUN)/state.pt),--resume) $(TRAIN_FLAGS)

# metrics.json is evaluate.py's last file. Tables 6, 7, 8 and TREC runs are made from its rows, without a policy.
$(TABLES): $(TRAINED) | $(READY)
	$(PY) evaluate.py --data data/$(DATASET) --run runs/$(RUN) --split test $(EVAL_FLAGS)

$(RETRIEVED): $(TABLES)
	$(PY) -m tools.rescore --data data/$(DATASET) --run runs/$(RUN) --split test $(RESCORE_FLAGS)
	$(PY) -m tools.crop_quality --data data/$(DATASET) --run runs/$(RUN) --split test $(QUALITY_FLAGS)
	$(PY) -m tools.trec --data data/$(DATASET) --run runs/$(RUN) --split test
	$(PY) -m tools.retrieve --data data/$(DATASET) --run runs/$(RUN) --split test

# One pattern for all of Table 5: runs/ablation/<reading>-seed<k>. The two words of the stem name flags and seed.
$(ABLATED): $(ABLATIONS)/%/eval/metrics.json: $(POOLS) | $(READY)
	$(PY) train.py --preset $(PRESET) --data data/$(DATASET) --policy $(POLICY) --scorer $(SCORER) \
	    --run $(ABLATIONS)/$* --seed $(lastword $(subst -seed, ,$*)) \
	    $(if $(wildcard $(ABLATIONS)/$*/state.pt),--resume) $(TRAIN_FLAGS) $(flags.$(firstword $(subst -seed, ,$*)))
	$(PY) evaluate.py --data data/$(DATASET) --run $(ABLATIONS)/$* --split test --methods full,policy,learned_best

$(filter $(ABLATIONS)/shy%,$(ABLATED)): $(SHY)

$(SHY): $(POOLS) | $(READY)
	$(PY) train.py --preset $(PRESET) --data data/$(DATASET) --policy $(POLICY) --scorer $(SCORER) \
	    --run $(ABLATIONS)/shy --steps 25 --warmup 5 --reward delta --reward-weights 0 0 0 0 --eval-every 0 \
	    $(if $(wildcard $(ABLATIONS)/shy/state.pt),--resume)
