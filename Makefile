# make demo     train on the digits: SGD and G-SGD, from a start and from a rescaled copy of it
# make test     the C core under sanitizers (the same bits with and without OpenMP), then the Python suite and the
#               notebooks on the installed package
# make fuzz     the property tests on other random examples than make test's: minutes. It prints its seed first, and
#               make fuzz SEED=... repeats it. Where clang is installed, libFuzzer then drives the C core for a minute
# make soak     an hour (MINUTES=60) of steps, saves, copies, forks and refused steps at random: memory has to stay flat
# make mutants      whether the tests notice some ninety changes of a line each: an hour
# make test-wild    trace what other libraries ship, which is installed in build/wild, and write docs/architectures.md;
#                   go on from checkpoints of Lightning and Accelerate
# make lint     ruff, mypy, clang-format, and the compiler with warnings as errors
# make bench    the step against PyTorch's optimizers; make bench-training: whole training steps;
#               make bench-scaling: construction and step against the number of weights;
#               make bench-gpu: steps and training steps on a GPU, where there is one
# make lib      the C library: build/lib (libgsgd.a, libgsgd.so, pkgconfig/gsgd.pc) and build/include, to be copied to
#               a prefix
# make docs     the documentation as a site, in build/site; a broken link or any other warning is an error
# make wheel    dist/: a manylinux wheel and the source distribution, each tried in an environment of its own
# make valgrind, make sanitize, make sanitize-threads    the C core under valgrind; the Python suite with a sanitized
#               extension; the C core under clang's thread sanitizer
#
# Everything is installed in .venv, made with $(PYTHON).

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

TRITON := triton==3.9.0

SOURCES := pyproject.toml setup.py MANIFEST.in constraints.txt $(wildcard csrc/*.* csrc/python/*) \
           $(shell find gsgd -name '*.py' -o -name '*.pyi' -o -name py.typed)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
LIBRARY := build/lib/libgsgd.a build/lib/libgsgd.so build/lib/pkgconfig/gsgd.pc build/include/gsgd.h
CORE := tests/core.c $(wildcard csrc/*.c)
CORE_FLAGS := -std=c11 -g -O1 -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror -Icsrc
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
OPENMP := $(shell echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c -o /dev/null - 2>/dev/null && echo -fopenmp)

.PHONY: demo test test-wild fuzz mutants soak lint bench bench-training bench-scaling bench-gpu lib docs wheel valgrind \
        sanitize sanitize-threads clean

demo: .venv/demo
	$(BIN)/python -P -m gsgd.demo

test: .venv/dev build/core-sanitize build/core-sanitize-serial build/fuzz build/mlp build/digits.bin
	build/core-sanitize >build/core.out
	build/core-sanitize-serial >build/core-serial.out
	cmp build/core.out build/core-serial.out
	build/fuzz 0 500
	build/mlp build/digits.bin
	$(BIN)/pytest -q -n 2 --dist loadfile
	GSGD_EPOCHS=2 $(BIN)/pytest -q --nbmake notebooks

fuzz: SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
fuzz: .venv/dev
	@echo "make fuzz SEED=$(SEED)"
	$(BIN)/pytest -q -m hypothesis --hypothesis-profile=random --hypothesis-seed=$(SEED)
	if command -v clang >/dev/null; then mkdir -p build/corpus && \
	    clang $(CORE_FLAGS) -DLIBFUZZER -fsanitize=fuzzer $(SANITIZE) tests/fuzz.c csrc/*.c -lm -o build/libfuzzer && \
	    build/libfuzzer -seed=$(SEED) -max_total_time=60 -max_len=1024 -verbosity=0 build/corpus; \
	else echo "libFuzzer was not run: apt install clang"; fi

soak: MINUTES := 60
soak: .venv/dev
	PYTHONPATH=tests $(BIN)/python -W ignore tests/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

mutants: .venv/dev
	$(BIN)/python tests/mutants.py

test-wild: .venv/dev build/wild
	PYTHONPATH=build/wild HF_HUB_OFFLINE=1 $(BIN)/pytest -q tests/test_wild.py tests/test_torch_resume.py

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy gsgd
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.[ch] csrc/*.inc csrc/python/*.[ch] examples/*.c tests/*.c)
	GSGD_WERROR=1 $(BIN)/python setup.py -q build_ext --force --build-lib build/lint --build-temp build/lint

bench: .venv/dev
	$(BIN)/python benchmarks/step.py

bench-training: .venv/dev
	$(BIN)/python benchmarks/training.py

bench-scaling: .venv/dev
	$(BIN)/python benchmarks/scaling.py

bench-gpu: .venv/dev
	$(BIN)/python benchmarks/gpu.py

lib: $(LIBRARY)

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The wheel is built from the source distribution. libgomp comes with it; what else it may load is checked by auditwheel,
# and that it keeps to the stable ABI by abi3audit.
wheel: .venv/wheel
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir build/dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	$(BIN)/abi3audit --strict --verbose dist/*.whl
	cp build/dist/*.tar.gz dist
	for file in dist/*; do \
	    rm -rf build/bare && $(PYTHON) -m venv build/bare && \
	    build/bare/bin/python -m pip --disable-pip-version-check install --quiet $$file && \
	    build/bare/bin/python -I tests/smoke.py || exit 1; \
	done

valgrind: build/core
	@command -v valgrind >/dev/null || { echo "valgrind is missing: apt install valgrind" >&2; exit 1; }
	valgrind --quiet --error-exitcode=1 --leak-check=full --show-leak-kinds=definite \
	    --errors-for-leak-kinds=definite build/core

sanitize: .venv/dev
	GSGD_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	PYTHONPATH=build/sanitize/lib PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" $(BIN)/pytest -q

# libomp comes with what tells the thread sanitizer of OpenMP's own synchronization; gcc's libgomp has no such thing.
sanitize-threads:
	@mkdir -p build
	clang $(CORE_FLAGS) -fopenmp -fsanitize=thread $(CORE) -lm -o build/core-threads || \
	    { echo "clang or its OpenMP is missing: apt install clang libomp-dev" >&2; exit 1; }
	OMP_NUM_THREADS=4 TSAN_OPTIONS=ignore_noninstrumented_modules=1 build/core-threads

clean:
	rm -rf .venv build dist *.egg-info gsgd/*.so

build/wild: tests/wild.txt | $(BIN)/python
	rm -rf $@
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ --requirement $<
	@touch $@

build/core: $(CORE) $(wildcard csrc/*)
	@mkdir -p build
	$(CC) $(CORE_FLAGS) $(OPENMP) $(CORE) -lm -o $@

build/core-sanitize: $(CORE) $(wildcard csrc/*)
	@mkdir -p build
	$(CC) $(CORE_FLAGS) $(SANITIZE) $(OPENMP) $(CORE) -lm -o $@

build/core-sanitize-serial: $(CORE) $(wildcard csrc/*)
	@mkdir -p build
	$(CC) $(CORE_FLAGS) $(SANITIZE) $(CORE) -lm -o $@

build/fuzz: tests/fuzz.c $(wildcard csrc/*)
	@mkdir -p build
	$(CC) $(CORE_FLAGS) $(SANITIZE) $(OPENMP) $< $(wildcard csrc/*.c) -lm -o $@

# The first two numbers of a version name the library's interface.
OBJECTS := $(patsubst csrc/%.c,build/object/%.o,$(wildcard csrc/*.c))
SONAME := libgsgd.so.$(shell echo $(VERSION) | cut -d. -f1,2)

build/object/%.o: csrc/%.c $(wildcard csrc/*.h csrc/*.inc)
	@mkdir -p build/object
	$(CC) -std=c11 -O3 -ffp-contract=off -fno-math-errno -fPIC $(OPENMP) -c $< -o $@

build/lib/libgsgd.a: $(OBJECTS)
	@mkdir -p build/lib
	rm -f $@ && $(AR) rcs $@ $^

build/lib/libgsgd.so: $(OBJECTS)
	@mkdir -p build/lib
	$(CC) -shared -Wl,-soname,$(SONAME) $(OPENMP) $^ -lm -o build/lib/$(SONAME)
	ln -sf $(SONAME) $@

build/lib/pkgconfig/gsgd.pc: pyproject.toml
	@mkdir -p build/lib/pkgconfig
	printf '%s\n' 'prefix=$${pcfiledir}/../..' 'Name: gsgd' 'Version: $(VERSION)' \
	    'Description: G-SGD: training of ReLU networks in their positively scale-invariant space' \
	    'Cflags: -I$${prefix}/include' 'Libs: -L$${prefix}/lib -lgsgd' 'Libs.private: $(OPENMP) -lm' >$@

build/include/gsgd.h: csrc/gsgd.h
	@mkdir -p build/include
	cp $< $@

build/mlp: examples/mlp.c $(LIBRARY)
	$(CC) -std=c11 -O2 -Wall -Wextra -Werror -Ibuild/include $< -Lbuild/lib -Wl,-rpath,'$$ORIGIN/lib' -lgsgd -lm -o $@

build/digits.bin: .venv/dev
	$(BIN)/python -c "import numpy as np, sklearn.datasets as d; x, y = d.load_digits(return_X_y=True); \
	    np.c_[x / 16, y].astype('f').tofile('$@')"

# Stamps: the package and what it needs are installed anew only when a source is newer. The extension is also built
# in place: a script in the checkout imports the checkout's gsgd/. Triton comes with CUDA builds of PyTorch; elsewhere its
# interpreter and its compiler need no more of it than the tests do.
.venv/demo .venv/dev .venv/docs .venv/wheel: .venv/%: $(SOURCES) | $(BIN)/python
	$(PIP) ".[$*]" setuptools
	$(BIN)/python setup.py -q build_ext --inplace
	@[ $* != dev ] || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps $(TRITON) || \
	    echo "$(TRITON) can't be installed here: its tests are skipped" >&2
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "gsgd needs Python >= 3.11: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "Python's venv module is missing: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' 2>/dev/null || \
	    { echo "Python's C headers are missing: apt install python3-dev" >&2; exit 1; }
	$(PYTHON) -m venv .venv
