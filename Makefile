# Two commands for a newcomer: `make demo` and `make test`. Each first makes .venv and installs what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS := ignore::FutureWarning,ignore::DeprecationWarning
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALLED := .venv/installed

.PHONY: demo test test-all lessons clean-checkout bench docs readme notebooks reproduce

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED) ## the blog's comparison on digits, with controls
	$(BIN)/python examples/demo.py

test: clean-checkout lessons $(INSTALLED) ## lessons and tests, under 15 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m 'not slow'

test-all: $(INSTALLED) ## what takes longer
	$(BIN)/pytest -q -m slow

lessons: $(INSTALLED) ## run every notebook from top to bottom
	if [ -n "$$LTH_NB_IMAGENETTE" ] || $(BIN)/python -c 'from lth_nb.data import imagenette_path; imagenette_path()' 2>/dev/null; then leave_out='^[_.]'; \
	else leave_out='^[_.]|winning_the_lottery'; echo "winning_the_lottery is left out: Imagenette is neither in LTH_NB_IMAGENETTE nor to be downloaded"; fi; \
	LTH_NB_QUICK=1 OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --skip-file-re "$$leave_out"

clean-checkout: $(INSTALLED) ## export, clean and README change nothing
	$(BIN)/python tests/clean_checkout.py

bench: $(INSTALLED) ## side by side with fasterai and torch.nn.utils.prune, into benchmarks/results.md
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run.py

docs: $(INSTALLED) ## the site, into docs/_build/html
	mkdir -p docs/_build/pages
	$(BIN)/sphinx-build -q -W --keep-going -c docs docs/_build/pages docs/_build/html

reproduce: $(INSTALLED) ## the comparison on Imagenette and the tutorial that shows it, in full: most of a day on two cores
	$(BIN)/python experiments/imagenette.py all
	cd nbs && ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN --ExecutePreprocessor.timeout=-1 tutorials/winning_the_lottery.ipynb explains/what_a_ticket_knows.ipynb
	$(BIN)/nbdev-clean

readme: $(INSTALLED) ## README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

notebooks: $(INSTALLED) ## run every notebook and store its outputs; `reproduce` does it for winning_the_lottery
	cd nbs && ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN $$(find . -name '*.ipynb' -not -path '*checkpoints*' -not -name 'winning_the_lottery*' | sort)
	$(BIN)/nbdev-clean
