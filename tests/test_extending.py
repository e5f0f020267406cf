"""The worked examples of docs/extending.md run as they stand there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from intraslice.exporters.registry import EXPORTERS
from intraslice.methods.blockwise.strategies import ALLOCATION_RULES, REPAIRS, SCORES
from intraslice.methods.registry import METHODS
from intraslice.runtime.families_intraslice import FAMILIES
from support.tiny import make_tiny, tiny_tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
NAMED = re.compile(r"# (\w+\.py)\n")
TEXT = {"calibration.source": "builtin", "calibration.num_samples": 4, "calibration.seqlen": 32}
FINE = {**TEXT, "ffn.ffn_multiple": 1}
SMALL = {**FINE, "attention.head_multiple": 2}


def tiny_model_of(model_type: str, folder: Path) -> str:
    """Save a tiny model of a stock class that tests/support does not know."""
    config = CONFIG_MAPPING[model_type](
        vocab_size=272,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def _tables_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Restore every table, and forget the modules of the examples."""
    monkeypatch.syspath_prepend(tmp_path)
    tables: list[dict] = [SCORES, REPAIRS, ALLOCATION_RULES, METHODS, FAMILIES, EXPORTERS]
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)
    for block in BLOCKS:
        if name := NAMED.match(block):
            sys.modules.pop(name.group(1).removesuffix(".py"), None)


@pytest.mark.usefixtures("_tables_as_before")
def test_the_examples_run(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    model = make_tiny("llama", tmp_path / "model", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)
    names = {
        "MODEL": str(model),
        "OUT": out,
        "SMALL": SMALL,
        "FINE": FINE,
        "TEXT": TEXT,
        "NUM_LAYERS": 4,
        "tiny_model_of": lambda model_type: tiny_model_of(model_type, tmp_path / model_type),
    }
    assert len(BLOCKS) >= 12
    for block in BLOCKS:
        if name := NAMED.match(block):
            (tmp_path / name.group(1)).write_text(block, encoding="utf-8")
            importlib.invalidate_caches()
        else:
            exec(compile(block, str(PAGE), "exec"), names)
