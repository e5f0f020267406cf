#!/usr/bin/env bash
# The campaign of faults (docs/reliability.md): every test of tests/faults, the slow ones included, in an environment
# that scripts/test.sh has made. On a disk in memory where there is one, because every kill waits for the disk often.
#   VENV  the environment  (.venv-test in the repository)
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
venv=${VENV:-$root/.venv-test}
cd "$root"
export PATH="$venv/bin:$PATH"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

place=$(mktemp -d "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")/intraslice-faults.XXXXXX")
trap 'rm -rf "$place"' EXIT
python -m pytest tests/faults -m "" -v --basetemp="$place/run" "$@"
