#!/usr/bin/env bash
# Runs the tests of the files that travel with a checkpoint under several releases of transformers, each in a virtual
# environment of its own. Needs Python 3.10 or later and the Python package index.
# Arguments: releases, "oldest" (the floor of pyproject.toml) or "newest"; without any, those two.
#   VENVS   where the environments lie  (.venv-transformers in the repository)
#   PYTHON  the interpreter             (python3)
#   TESTS   what to run                 (tests/runtime)
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
venvs=${VENVS:-$root/.venv-transformers}
cd "$root"

require_python 10
floor=$(sed -n 's/^ *"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
[ -n "$floor" ] || {
    echo "error: pyproject.toml names no oldest release of transformers" >&2
    exit 2
}

# Two processes of one thread each: more threads only get in each other's way on models this small.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- oldest newest
failed=()
for release in "$@"; do
    case $release in
    oldest) wanted="transformers==$floor.*" ;;
    newest) wanted="transformers" ;;
    *) wanted="transformers==$release" ;;
    esac
    venv=$venvs/$release
    make_venv
    # Upgraded in one go, so that the other packages fit the release.
    pip install --quiet --upgrade --upgrade-strategy only-if-needed -c constraints.txt "$wanted" -e ".[dev]"
    version=$("$venv/bin/python" -c 'import transformers; print(transformers.__version__)')
    step "transformers $version ($release)"
    # Word splitting is meant: TESTS may name several paths.
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pytest -n 2 -m "" ${TESTS:-tests/runtime} || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed with transformers %s\n' "${failed[*]}" >&2
    exit 1
fi
printf '\nall passed\n'
