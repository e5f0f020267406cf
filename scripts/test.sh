#!/usr/bin/env bash
# Sets up a virtual environment of its own and runs lint, format check, import contracts, type check, the build of the
# documentation (into out/docs) and the test suite. Arguments go to pytest: -m "" also runs the tests marked slow.
# Needs Python 3.10 or later and the Python package index.
#   VENV    the environment  (.venv-test in the repository)
#   PYTHON  the interpreter  (python3)
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
venv=${VENV:-$root/.venv-test}
cd "$root"

require_python 10
make_venv
pip install --quiet -c constraints.txt -e ".[dev,docs]"
install_model
export PATH="$venv/bin:$PATH"

ruff check .
ruff format --check .
lint-imports
pyright --pythonpath "$venv/bin/python"
# A warning is an error; -E reads every page anew, because docstrings change without the pages.
sphinx-build -W --keep-going -E -q -b html docs out/docs

# Two processes of one thread each: more threads only get in each other's way on models this small.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
pytest -n 2 "$@"
