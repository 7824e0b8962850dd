# Two commands matter: `make run` and `make test`. The rest are their steps.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

# The slow layers (Debian packages, wheels) are kept outside the checkout; they are rebuilt when absent.
export TERMINA_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/termina-agent

.PHONY: help
help: ## what there is to make
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: run
run: venv image container-image ## build what is missing, boot the VM, bring up a container
	.venv/bin/termina run $(RUN)

.PHONY: test
test: venv image container-image ## every test, cheapest first, the real VM included
	tests/as-root .venv/bin/python -m pytest $(PYTEST)

.PHONY: test-generic
test-generic: venv container-image ## what Debian's cloud kernel has no modules for: 9p and USB, in a VM with the generic one
	requirements/install-packages requirements/debian-9p.txt
	@KERNEL=generic $(IMAGE) guest
	tests/as-root .venv/bin/python -m pytest tests/vm/test_9p.py tests/vm/test_usb.py

.PHONY: bench
bench: venv image container-image ## our figures beside a peer's, as ratios
	requirements/install-packages requirements/debian-bench.txt
	tests/as-root .venv/bin/python -m benchmarks $(BENCH)

.PHONY: lint
lint: venv ## ruff, mypy and shellcheck only
	.venv/bin/python -m pytest tests/test_linters.py

# ---- what the development machine needs -------------------------------------------------------

build/.packages: requirements/debian.txt requirements/install-packages
	requirements/install-packages requirements/debian.txt
	@mkdir -p build && touch $@

.PHONY: venv
venv: .venv/.ready agent/pb/__init__.py ## .venv with everything installed, and the wire's code

.venv/.ready: requirements/guest.txt requirements/dev.txt pyproject.toml | build/.packages
	test -x .venv/bin/python || /usr/bin/python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

agent/pb/__init__.py: protos/generate.py $(wildcard protos/*.proto) .venv/.ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python protos/generate.py

include image/image.mk

.PHONY: clean
clean: ## throw away what was built (the cache outside the checkout stays)
	rm -rf build .venv agent/pb *.egg-info
