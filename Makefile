BIN := .venv/bin
STAMP := .venv/.stamp
# Processes that share the test files: engines of both would not fit the memory of one GPU.
WORKERS := $(if $(shell command -v nvidia-smi),0,2)

.PHONY: demo test lint types dev clean

demo: dev  ## needles in haystacks, asked with dense and with sparse attention
	$(BIN)/python examples/demo.py

test: dev  ## never `python -m pytest`: it puts this folder, with kernels/, on sys.path
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: dev  ## checks the built package: mypy cannot follow an editable kernels/ and patches/
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p sparsed_vllm

dev: $(STAMP)  ## .venv with vLLM, this package (editable) and the tools; made once

$(STAMP): setup.py tools/setup_env.sh $(wildcard requirements/*.txt) \
          $(shell find tests/stubs -name '*.py' -not -path '*/build/*')
	tools/setup_env.sh
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
