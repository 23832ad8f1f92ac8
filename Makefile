# barelora: `make precompute train compare`. `make help` explains every target.

PRESET ?= toy
NAME   := $(basename $(notdir $(PRESET)))
RUN    ?= runs/$(NAME)
PYTHON ?= $(VENV)
GPUS   ?=
ARGS   ?=
VENV   := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)/python

# ---- Presets: the flags of each command, what it needs before, what comes after.

# A small SDXL that lies in this repository, and pictures that are drawn here: CPU, offline, two minutes.
toy.before     = $(PYTHON) -m data.toy.draw "$$RUN/pictures"
toy.precompute = --pretrained_model_name_or_path data/toy/pipeline --train_data_dir "$$RUN/pictures" --resolution 128 --mixed_precision no \
                 --validation_fraction 0.06
toy.train      = --rank 32 --lora_layers attn-mlp $(toy.batch) --max_train_steps 300 --learning_rate 4e-3 --lr_scheduler cosine \
                 --lr_warmup_steps 20 --snr_gamma 1 --proportion_empty_prompts 0.1 --use_8bit_adam --mixed_precision no
# A step's eight pictures, shared out where there are 2, 4 or 8 GPUs; on another number of them train refuses.
toy.batch      = $(if $(filter 2 4 8,$(GPUS)),--train_batch_size $(shell expr 8 / $(GPUS)) --gradient_accumulation_steps $(GPUS),$(toy.alone))
toy.alone      = --train_batch_size 8 --gradient_accumulation_steps 1
toy.compare    = --num_inference_steps 20 --guidance_scale 3 \
                 --prompt "a red fox in the forest" "an orange cat in the meadow" "a green frog on the sea" "a blue bird in the snow" \
                 "a purple fish at night" "a white ninja in the desert" "a pink house in the snow" "a yellow tree in the meadow" \
                 "a blue bowl of ramen in the forest" "a red flower in the desert" "a white boat on the sea" "a purple owl in the forest" \
                 "a blue fox in the snow" "an orange ninja at night" "a green house in the desert" "a pink cat at night"
toy.after      = $(PYTHON) -m data.toy.score "$$RUN"

# SDXL on the Naruto captions, within the memory of a 16 GB T4.
SDXL = --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
       --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --resolution 1024 --mixed_precision fp16
naruto.precompute = $(SDXL) --dataset_name lambdalabs/naruto-blip-captions --validation_fraction 0.02
naruto.train      = --rank 32 --lora_alpha 32 --train_batch_size 1 --gradient_accumulation_steps 4 --max_train_steps 500 \
                    --learning_rate 1e-4 --lr_scheduler constant --use_8bit_adam --mixed_precision fp16 --seed 42
naruto.compare    = --prompt "Naruto Uzumaki eating ramen" "Bill Gates in Naruto style" "A boy with blue eyes in Naruto style"

# SDXL on pictures of your own: PICTURES=folder, PROMPTS='"first prompt" "second prompt"'.
PICTURES ?= my_pictures
PROMPTS   ?= "a cat" "a house at night"
mine.precompute = $(SDXL) --train_data_dir "$$PICTURES"
mine.train      = --rank 32 --train_batch_size 1 --gradient_accumulation_steps 4 --max_train_steps 500 \
                  --learning_rate 1e-4 --lr_scheduler constant --use_8bit_adam --mixed_precision fp16 --seed 42
mine.compare    = --prompt $(PROMPTS)

$(if $(filter 1,$(words $(PRESET))),,$(error PRESET=$(PRESET): a preset's name or file has no spaces))

# Presets of your own: PRESET=file.mk, a file that sets file.precompute, file.train and file.compare as above; or any
# other name, with these variables on the command line.
ifeq ($(suffix $(PRESET)),.mk)
$(if $(wildcard $(PRESET)),,$(error PRESET=$(PRESET): no such file))
include $(PRESET)
endif

# Recipes read "$$RUN", because the shell does not split what it reads from a variable in quotes. Behind PICTURES ?=, because
# what is exported before has a value, an empty one.
export RUN CACHE PICTURES HUB

# ---- Targets

$(if $(value $(NAME).precompute),,$(error PRESET=$(PRESET) is none of toy, naruto, mine, and $(NAME).precompute is not set: \
  name a file of your own that ends in .mk, or set $(NAME).precompute, $(NAME).train and $(NAME).compare))

CACHE_DIR = $(if $(CACHE),--cache_dir "$$CACHE")
# Tests run side by side, one for each core; not on a GPU, where they measure what they hold of it.
WORKERS   = $(if $(shell command -v nvidia-smi),0,auto) --dist worksteal
ON_GPUS   = $(PYTHON)$(if $(GPUS), -m torch.distributed.run --standalone --nproc_per_node $(GPUS))

.PHONY: help setup precompute train compare publish check lint test test-all bench clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "PRESET=toy (default), naruto, mine, or a file of your own, my.mk; RUN=folder (default runs/PRESET);"
	@echo "CACHE=folder (default RUN/cache), for several runs on one cache; ARGS=\"more flags\" for one target;"
	@echo "GPUS=2 runs precompute and train on two GPUs of this machine;"
	@echo "PYTHON=python3 uses packages that are installed already instead of a new .venv."

setup:  ## .venv with the pinned packages, around a torch that is there; the other targets do it when it is not there
precompute:  ## pictures and captions -> the cache; again: only what is new
precompute: setup
	$($(NAME).before)
	$(ON_GPUS) -m data.precompute --output_dir "$$RUN" $(CACHE_DIR) $($(NAME).precompute) $(ARGS)

train:  ## the cache -> RUN/lora.safetensors; again: goes on where it stopped
train: setup
	$(ON_GPUS) -m train --output_dir "$$RUN" $(CACHE_DIR) $($(NAME).train) $(ARGS)

compare:  ## base against LoRA on the preset's prompts -> RUN/compare/grid.png
compare: setup
	$(PYTHON) -m infer --output_dir "$$RUN" $($(NAME).compare) $(ARGS)
	$($(NAME).after)

publish:  ## RUN's weights, pictures and a model card -> the hub: HUB=USER/NAME (ARGS=--private)
publish: setup
	$(if $(HUB),,$(error HUB=USER/NAME names the repository, as in: make publish PRESET=$(PRESET) HUB=me/my-lora))
	$(PYTHON) -m infer.publish "$$RUN" --hub_model_id "$$HUB" $(ARGS)

check:  ## is the machine fit, and what is to do? Then the whole line on two pictures; nothing of it stays
check: setup
	$(PYTHON) -m data.check "$$RUN"
	$($(NAME).before)
	$(PYTHON) -m data.precompute --output_dir "$$RUN" $(CACHE_DIR) $($(NAME).precompute) --explain
	mkdir -p "$$RUN" && try=$$(mktemp -d "$$RUN/check.XXXXXX") && trap 'rm -rf "$$try"' EXIT && \
	$(PYTHON) -m data.precompute --output_dir "$$try" $($(NAME).precompute) --max_train_samples 2 && \
	$(PYTHON) -m train --output_dir "$$try" $($(NAME).train) --max_train_steps 1 && \
	$(PYTHON) -m infer --output_dir "$$try" --prompt "a red house in the forest" --num_inference_steps 2
	@echo "check: this machine can run PRESET=$(PRESET)"

test:  ## the tests, under two minutes on a CPU
test: setup-dev
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -n $(WORKERS) -m "not slow" $(ARGS) tests

test-all:  ## the slow tests as well
test-all: setup-dev
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -n $(WORKERS) $(ARGS) tests

lint:  ## the formatter and the linter (ruff.toml)
lint: setup-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench:  ## a step, precompute, a whole job and two GPUs, at SDXL's size -> runs/bench/*.json
bench: setup-dev
	HF_HUB_OFFLINE=1 $(PYTHON) -m tests.bench.step runs/bench
	HF_HUB_OFFLINE=1 $(PYTHON) -m tests.bench.precompute runs/bench
	HF_HUB_OFFLINE=1 $(PYTHON) -m tests.bench.job runs/bench
	HF_HUB_OFFLINE=1 $(PYTHON) -m tests.bench.ranks runs/bench

clean:  ## remove .venv and the toy's run
	rm -rf .venv runs/toy .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- The packages: data/common/setup.py says what it does

.PHONY: setup-dev
setup setup-dev:
	@$(PYTHON) -m data.common.setup fits

ifeq ($(PYTHON),$(VENV))
# Other programs' packages are found by these.
unexport PYTHONPATH PYTHONHOME
setup: .venv/installed
setup-dev: .venv/installed-dev
endif

PYTHON3 := $(if $(filter Windows_NT,$(OS)),python,python3)

.venv/installed: requirements.txt constraints.txt
	@$(PYTHON3) -m data.common.setup requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	@$(PYTHON3) -m data.common.setup requirements-dev.txt
	@touch $@
