"""Single decoder layers: what is run, on a clock that counts operations instead of seconds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from intraslice.inspection import family_of
from intraslice.loading import load_model
from intraslice.placement import Placement
from intraslice.runtime.configuration_intraslice import CACHE_ARGUMENT
from intraslice.speed.bench import BenchOptions
from intraslice.speed.layer_bench import bench_layers
from intraslice.speed.layer_speed import LayerHost
from support.clock import count_operations
from support.tiny import FAMILIES
from support.tolerances import READ_BACK

CPU = Placement(torch.device("cpu"), torch.float32, torch.float32, torch.float32)
SMALL = BenchOptions(prompt_tokens=16, decode_tokens=3, batch_size=2, repetitions=2)


@pytest.fixture
def clock_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second is one multiply-add of a matrix product."""
    count_operations(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_computes_what_it_computes_in_the_model(family, tiny_folder):
    folder = str(tiny_folder(family))
    whole, _ = load_model(folder, device="cpu")
    seen = {}

    def keep(name: str):
        def hook(module, args, kwargs, output):
            seen[name] = args[0], output[0] if isinstance(output, tuple) else output

        return hook

    spec = family_of(whole.config)
    first = whole.get_submodule(spec.layers)[0]
    handle = first.register_forward_hook(keep("whole"), with_kwargs=True)
    cache = DynamicCache(config=whole.config)
    host = LayerHost(load_model(folder, device="cpu")[0], spec.layers, CPU)
    prompt, token = host.tokens(2, 9), host.tokens(2, 1)
    with torch.no_grad():
        whole.base_model(input_ids=prompt, **{CACHE_ARGUMENT: cache}, use_cache=True)
        whole.base_model(input_ids=token, **{CACHE_ARGUMENT: cache}, use_cache=True)
    handle.remove()
    host.layers[0].register_forward_hook(keep("alone"), with_kwargs=True)
    own = host.empty_cache()
    assert host.layer_seconds(0, host.layers[0], prompt, own) > 0
    host.layer_seconds(0, host.layers[0], token, own)
    # The model may hand its layers a mask where this layer gets none: another attention kernel.
    torch.testing.assert_close(seen["alone"], seen["whole"], **READ_BACK)
    torch.testing.assert_close(own.layers[0].keys, cache.layers[0].keys, **READ_BACK)


def test_steps_leave_the_cache_as_it_was(tiny_folder):
    model, _ = load_model(str(tiny_folder("llama")), device="cpu")
    host = LayerHost(model, "model.layers", CPU)
    cache = host.empty_cache()
    host.layer_seconds(1, host.layers[1], host.tokens(1, 7), cache)
    host.step_seconds(1, host.layers[1], cache, 1, 4)
    assert cache.get_seq_length() == 7 and cache.layers[1].keys.shape == (1, 2, 7, 8)


@pytest.fixture(scope="module")
def pruned_folder(tiny_folder, tmp_path_factory: pytest.TempPathFactory):
    import intraslice

    options = {"calibration.source": "builtin", "calibration.num_samples": 4, "calibration.seqlen": 32}
    options |= {"attention.head_multiple": 2, "ffn.ffn_multiple": 1}
    out = tmp_path_factory.mktemp("layers") / "pruned"
    intraslice.prune(str(tiny_folder("llama")), output=out, sparsity=0.5, options=options)
    return out


def test_pruned_layers_against_the_dense_shape(pruned_folder, tiny_folder, clock_of_operations):
    alone = bench_layers(str(pruned_folder), options=SMALL)
    against = bench_layers(str(pruned_folder), str(tiny_folder("llama")), options=SMALL)
    assert alone.base is not None and against.base is not None
    assert alone.base.random_weights and not against.base.random_weights
    # The clock does not look at weights: random ones take as long.
    assert alone.speedup == against.speedup
    assert min(alone.speedup.values()) > 1.3
    for speed in (alone.model, alone.base):
        assert sorted(layer for shape in speed.shapes for layer in shape.layers) == [0, 1, 2]
        total = sum(len(shape.layers) * shape.decode_seconds.median for shape in speed.shapes)
        assert speed.decode_seconds == total
    (dense,) = against.base.shapes
    # q, k, v, o of 4 and 2 heads of 8 channels, three FFN matrices of 64, and two norms.
    assert dense.parameters == 32 * (12 * 8 + 3 * 64) + 2 * 32
    assert dense.kv_cache_bytes_per_token == 2 * 2 * 8 * 4
    # Products with all weights, two sequences of 16 tokens, beside those of the attention scores.
    assert dense.prefill_seconds.median >= 32 * 32 * (12 * 8 + 3 * 64)


def test_rotary_models_go_beyond_their_positions(tiny_folder, clock_of_operations):
    options = BenchOptions(prompt_tokens=200, decode_tokens=2, repetitions=1)
    result = bench_layers(str(tiny_folder("llama")), options=options)
    assert result.model.shapes[0].layers == (0, 1, 2)
    assert result.base is None
