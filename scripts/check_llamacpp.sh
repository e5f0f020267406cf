#!/usr/bin/env bash
# Compares pruned checkpoints in llama.cpp with the same checkpoints in transformers: greedy tokens, logits,
# quantised files, and decoding speed beside the dense model; and small random models of families with an architecture of
# their own in llama.cpp. Sets up an environment of its own; the first run compiles llama.cpp, about 15 minutes on two
# cores. Needs Python 3.10 or later, a C++ compiler, CMake from the Python package index, no GPU.
#   VENV        the environment           (.venv-llamacpp in the repository)
#   WHEELS      keeps the compiled wheel  (build/wheels in the repository)
#   OUT         where files go            (out/llamacpp in the repository)
#   MODEL       what is pruned            (smollm2-135m)
#   CHECKPOINT  an existing checkpoint of `intraslice prune --target llama.cpp`  (pruned here at 30 %)
#   DENSE       an existing checkpoint of `intraslice prune --sparsity 0`        (written here)
#   FAMILIES    random models of these families are tried as well  (qwen3 gemma3_text gemma2)
#   PYTHON      the interpreter           (python3)
# Arguments go to check_llamacpp.py, see check_llamacpp.py --help.
set -euo pipefail

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
venv=${VENV:-$root/.venv-llamacpp}
wheels=${WHEELS:-$root/build/wheels}
out=${OUT:-$root/out/llamacpp}
model=${MODEL:-smollm2-135m}
version=0.3.36

require_python 10
SECONDS=0

step "environment: $venv"
make_venv
install_package
install_model
if ! "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('llama-cpp-python') != '$version')" \
    2>/dev/null; then
    mkdir -p "$wheels"
    found=$(find "$wheels" -name "llama_cpp_python-$version-*.whl" | head -n 1)
    if [ -z "$found" ]; then
        step "compile llama-cpp-python $version (about 15 minutes on two cores)"
        # Without the part for pictures.
        CMAKE_BUILD_PARALLEL_LEVEL=$(getconf _NPROCESSORS_ONLN) CMAKE_ARGS="${CMAKE_ARGS:--DLLAVA_BUILD=OFF}" \
            pip wheel --quiet --no-deps --wheel-dir "$wheels" "llama-cpp-python==$version"
        found=$(find "$wheels" -name "llama_cpp_python-$version-*.whl" | head -n 1)
    fi
    pip install --quiet -c "$root/constraints.txt" "$found"
fi
export PATH="$venv/bin:$PATH"
mkdir -p "$out"

# What this check calibrates on matters little.
calibration=(--target llama.cpp --num-samples 16 --seqlen 256 --overwrite)
if [ -z "${CHECKPOINT:-}" ]; then
    CHECKPOINT=$out/pruned
    step "prune $model for llama.cpp at 30 %: $CHECKPOINT"
    intraslice prune "$model" -o "$CHECKPOINT" --sparsity 0.3 "${calibration[@]}"
fi
if [ -z "${DENSE:-}" ]; then
    DENSE=$out/dense
    step "the dense model through the same road: $DENSE"
    intraslice prune "$model" -o "$DENSE" --sparsity 0 "${calibration[@]}"
fi

step "export both; llama.cpp's logits are compared with those of the checkpoints"
for name in pruned dense; do
    [ "$name" = pruned ] && source=$CHECKPOINT || source=$DENSE
    intraslice export "$source" --to gguf -o "$out/$name-f32.gguf" --dtype float32 --overwrite
done

step "compare"
compare() {
    python "$root/scripts/check_llamacpp.py" "$@" \
        --checkpoint "$CHECKPOINT" --pruned "$out/pruned-f32.gguf" --dense "$out/dense-f32.gguf"
}
status=0
compare "$@" || status=$?
if [ "$status" = 132 ]; then
    step "compare again without repacked weights: this machine does not run llama.cpp's AMX kernels (illegal instruction)"
    status=0
    compare "$@" --plain-kernels || status=$?
fi
# Small random models: norms of query and key, norms of outputs, windows and caps. One is pruned to the one shape that
# llama.cpp has for them, and one with a shape per layer, which the export fills up with zeros.
for family in ${FAMILIES-qwen3 gemma3_text gemma2}; do
    rm -rf "$out/$family"
    python "$root/scripts/small_model.py" "$family" "$out/$family"
    for target in llama.cpp transformers; do
        step "a random $family model, pruned for $target"
        # Without a target query and key would be narrowed, and their norms would differ from head to head.
        width=()
        [ "$target" = llama.cpp ] || width=(--set attention.qk_width=dense)
        intraslice prune "$out/$family" -o "$out/$family-pruned" --sparsity 0.3 --target "$target" "${width[@]}" \
            --align ffn=16,head=16 --num-samples 16 --seqlen 128 --overwrite
        intraslice export "$out/$family-pruned" --to gguf -o "$out/$family.gguf" --dtype float32 --overwrite
        python "$root/scripts/check_llamacpp.py" "$@" --checkpoint "$out/$family-pruned" --pruned "$out/$family.gguf" \
            || status=1
    done
done
step "what llama.cpp says to layers of different shapes in these architectures"
python "$root/scripts/llamacpp_layers.py" || status=1
echo "total: $((SECONDS / 60)) min $((SECONDS % 60)) s; files are in $out"
exit "$status"
