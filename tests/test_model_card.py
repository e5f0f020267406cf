from __future__ import annotations

import yaml
from huggingface_hub import ModelCard

from intraslice.results.model_card import render
from intraslice.results.result import LayerRecord, PruneResult
from intraslice.runtime.families_intraslice import LayerShape


def result(model: str) -> PruneResult:
    shape = LayerShape(heads_per_kv=(3, 2), qk_head_dim=48, v_head_dim=52, intermediate_size=1024)
    record = LayerRecord(
        layer=0,
        shape=shape,
        num_parameters=700,
        errors={"attention": 0.0123, "ffn": 0.0456},
        heads=(0, 1, 2, 4, 5),
        seconds=1.0,
    )
    return PruneResult(
        output="/somewhere/small-model",
        model=model,
        family="llama",
        method="ada-h",
        requested_sparsity=0.3,
        sparsity=0.3012,
        dense_layer_parameters=1000,
        pruned_layer_parameters=699,
        dense_parameters=1_234_567,
        pruned_parameters=934_266,
        dense_bytes=4_938_268,
        pruned_bytes=3_737_064,
        layers=(record,),
        seconds={"total": 12.0},
        peak_memory_bytes=1,
        calibration={
            "name": "/home/me/text.txt",
            "num_samples": 4,
            "seqlen": 32,
            "seed": 5,
            "fingerprint": "f",
        },
        versions={"intraslice": "0.1.0"},
        device="cpu",
        dtype="float32",
    )


def head(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_numbers_and_head():
    card = render(result("org/model"))
    assert head(card)["base_model"] == "org/model"
    assert head(card)["library_name"] == "transformers"
    for text in (
        "30.1 %",
        "1,234,567",
        "934,266",
        "| 0 | 5 | 2 | 48 | 52 | 1024 | 0.0123 | 0.0456 |",
        "`ada-h`",
    ):
        assert text in card
    assert 'folder = "small-model"' in card


def test_the_hub_reads_the_head():
    data = ModelCard(render(result("org/model"))).data
    assert data.base_model == "org/model" and data.tags == ["intraslice", "pruned", "llama"]
    assert ModelCard(render(result("./dense"))).data.base_model is None


def test_local_paths_stay_private():
    for model in ("/home/me/models/dense", "./dense", "~/dense", "files/model.gguf"):
        card = render(result(model))
        assert "base_model" not in head(card)
        assert "/home/me" not in card and "/somewhere" not in card
