# barelora: `make precompute train compare`. `make help` explains every target.

PRESET ?= toy
RUN    ?= runs/$(PRESET)
PYTHON ?= .venv/bin/python
ARGS   ?=

# ---- Presets: the flags of each command, what it needs before, what comes after.

# A small SDXL that lies in this repository, and pictures that are drawn here: CPU, offline, two minutes.
toy.before     = $(PYTHON) -m data.toy.draw $(RUN)/pictures
toy.precompute = --pretrained_model_name_or_path data/toy/pipeline --train_data_dir $(RUN)/pictures --resolution 128 --mixed_precision no
toy.train      = --rank 16 --train_batch_size 8 --gradient_accumulation_steps 1 --max_train_steps 250 --learning_rate 4e-3 \
                 --lr_scheduler cosine --lr_warmup_steps 20 --proportion_empty_prompts 0.1 --use_8bit_adam --mixed_precision no
toy.compare    = --prompt "a red fox in the forest" "an orange cat in the meadow" "a green frog on the sea" "a blue bird in the snow" \
                 "a purple fish at night" "a white ninja in the desert" "a pink house in the snow" "a yellow tree in the meadow" \
                 "a blue bowl of ramen in the forest" "a red flower in the desert" "a white boat on the sea" "a purple owl in the forest" \
                 "a blue fox in the snow" "an orange ninja at night" "a green house in the desert" "a pink cat at night"
toy.after      = $(PYTHON) -m data.toy.score $(RUN)

# SDXL on the Naruto captions, within the memory of a 16 GB T4.
naruto.precompute = --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
                    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
                    --dataset_name lambdalabs/naruto-blip-captions --resolution 1024 --mixed_precision fp16
naruto.train      = --rank 32 --lora_alpha 32 --train_batch_size 1 --gradient_accumulation_steps 4 --max_train_steps 500 \
                    --learning_rate 1e-4 --lr_scheduler constant --use_8bit_adam --mixed_precision fp16 --seed 42
naruto.compare    = --prompt "Naruto Uzumaki eating ramen" "Bill Gates in Naruto style" "A boy with blue eyes in Naruto style"

# ---- Targets

$(if $(filter $(PRESET),toy naruto),,$(error PRESET=$(PRESET) is none of toy, naruto))

.PHONY: help setup precompute train compare check lint test test-all bench clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "PRESET=toy (default) or naruto; RUN=folder (default runs/PRESET); ARGS=\"more flags\" for one target;"
	@echo "PYTHON=python3 uses packages that are installed already in place of a new .venv."

setup:  ## .venv with the pinned packages; the other targets do it when it is not there
precompute:  ## pictures and captions -> RUN/cache; again: only what is new
precompute: setup
	$($(PRESET).before)
	$(PYTHON) -m data.precompute --output_dir $(RUN) $($(PRESET).precompute) $(ARGS)

train:  ## RUN/cache -> RUN/lora.safetensors; again: goes on where it stopped
train: setup
	$(PYTHON) -m train --output_dir $(RUN) $($(PRESET).train) $(ARGS)

compare:  ## base against LoRA on the preset's prompts -> RUN/compare/grid.png
compare: setup
	$(PYTHON) -m infer --output_dir $(RUN) $($(PRESET).compare) $(ARGS)
	$($(PRESET).after)

check:  ## is the machine fit, and what is to do? Then the whole line on two pictures; nothing of it stays
check: setup
	$(PYTHON) -m data.check $(RUN)
	rm -rf $(RUN)/check
	$($(PRESET).before)
	$(PYTHON) -m data.precompute --output_dir $(RUN) $($(PRESET).precompute) --explain
	$(PYTHON) -m data.precompute --output_dir $(RUN)/check $($(PRESET).precompute) --max_train_samples 2
	$(PYTHON) -m train --output_dir $(RUN)/check $($(PRESET).train) --max_train_steps 1
	$(PYTHON) -m infer --output_dir $(RUN)/check --prompt "a red house in the forest" --num_inference_steps 2
	rm -rf $(RUN)/check
	@echo "check: this machine can run PRESET=$(PRESET)"

test:  ## the tests, under two minutes on a CPU
test: setup-dev
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -m "not slow" $(ARGS) tests

test-all:  ## the slow tests as well
test-all: setup-dev
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q $(ARGS) tests

lint:  ## the formatter and the linter (ruff.toml)
lint: setup-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench:  ## a training step and precompute against the usual ways, at SDXL's size on a GPU -> runs/bench/*.json
bench: setup-dev
	HF_HUB_OFFLINE=1 $(PYTHON) -m tests.bench.step runs/bench
	HF_HUB_OFFLINE=1 $(PYTHON) -m tests.bench.precompute runs/bench

clean:  ## remove .venv and the toy's run
	rm -rf .venv runs/toy .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: setup-dev
ifeq ($(PYTHON),.venv/bin/python)
setup: .venv/installed
setup-dev: .venv/installed-dev
endif

.venv/installed: requirements.txt constraints.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -r requirements.txt -c constraints.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PYTHON) -m pip install -r requirements-dev.txt -c constraints.txt
	touch $@
