"""recipes/paper: the cells of the paper's tables, with the share of its Table 6."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from intraslice.recipes.recipe import load_recipe

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "paper"

MODELS = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "phi-3-medium-4k": "microsoft/Phi-3-medium-4k-instruct",
}

# lambda_b at 20, 30 and 40 %.
TABLE_6 = {
    "llama-2-7b": (1.00, 1.00, 1.00),
    "llama-2-13b": (1.00, 0.82, 1.00),
    "llama-2-70b": (0.82, 0.91, 0.94),
    "llama-3-8b": (0.98, 0.95, 1.00),
    "phi-3-medium-4k": (1.00, 1.00, 1.00),
}

PERCENTS = (20, 30, 40)
SHARE = {
    (model, percent): share for model, row in TABLE_6.items() for percent, share in zip(PERCENTS, row, strict=True)
}
# Tables 2 and 3 go further without saying the share: 1 is what the paper starts from.
SHARE |= {("llama-2-7b", 50): 1.0, ("llama-2-13b", 50): 1.0, ("llama-2-13b", 60): 1.0}


def test_there_is_a_file_for_every_cell_and_no_other():
    assert {path.name for path in FOLDER.iterdir()} == {f"{model}-{percent}.yaml" for model, percent in SHARE}


@pytest.mark.parametrize(("model", "percent"), SHARE)
def test_the_recipe_is_the_cell(model: str, percent: int):
    recipe = load_recipe(FOLDER / f"{model}-{percent}.yaml")
    assert recipe.model == MODELS[model]
    assert (recipe.method, recipe.sparsity) == ("paper", percent / 100)
    assert recipe.options.allocation.ffn_share == SHARE[model, percent]
    calibration = recipe.calibration
    assert (calibration.source, calibration.num_samples, calibration.seqlen) == ("wikitext2", 128, 2048)
    # Nothing else differs from the preset.
    preset = load_recipe(None, {"model": "m", "sparsity": 0.1, "method": "paper"})
    found, expected = recipe.options, preset.options
    assert (found.attention, found.ffn, recipe.run) == (expected.attention, expected.ffn, preset.run)
    assert replace(found.allocation, ffn_share=1.0) == expected.allocation
    assert recipe.notes == ()


def test_the_c4_table_is_a_flag():
    recipe = load_recipe(FOLDER / "llama-2-13b-30.yaml", {"calibration.source": "c4"})
    assert (recipe.calibration.source, recipe.calibration.num_samples) == ("c4", 128)
    assert recipe.options.allocation.ffn_share == 0.82
