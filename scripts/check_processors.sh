#!/usr/bin/env bash
# Runs the tests as on other processors: without the vector instructions of this one, and with other numbers of threads.
# Results may round differently there, and the tests must pass all the same. Uses the environment of scripts/test.sh,
# which must have run before. Arguments go to pytest.
#   VENV    the environment  (.venv-test in the repository)
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
venv=${VENV:-$root/.venv-test}
cd "$root"
[ -x "$venv/bin/python" ] || {
    echo "error: there is no environment in $venv; run scripts/test.sh, which makes one" >&2
    exit 2
}

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=()
for setting in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
    OMP_NUM_THREADS=2; do
    step "$setting"
    # Compiled code is kept on the disk, and its key does not say for which instructions it was made.
    compiled=$(mktemp -d)
    # The setting comes last: it wins over the one thread that the others run with.
    env OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR="$compiled" "$setting" "$venv/bin/python" -m pytest -n 2 "$@" || failed+=("$setting")
    rm -rf "$compiled"
done
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed with %s\n' "${failed[*]}" >&2
    exit 1
fi
printf '\nall passed\n'
