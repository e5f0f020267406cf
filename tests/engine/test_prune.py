"""The engine on tiny models of every family, through the same function that the command calls."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from intraslice.algebra.linalg import eigh_descending
from intraslice.checkpoint.source import open_checkpoint
from intraslice.errors import NumericalError, OutputError, RecipeError, ResumeMismatchError
from intraslice.methods.blockwise.gradient_pass import measure_gradients, pass_seconds
from intraslice.methods.blockwise.options import AttentionOptions, FFNOptions
from intraslice.progress import SilentProgress
from intraslice.results.result import PruneResult
from support.family_cases import family_model
from support.progress import StopAt
from support.prune import calibration, logits, prune, weights_of
from support.tiny import FAMILIES, make_tiny, tiny_tokenizer

TO_OWN_OUTPUT = {"attention__repair_against": "own_output", "ffn__repair_against": "own_output"}


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_meets_the_budget_and_loads(family, tiny_folder, tmp_path):
    folder, out = tiny_folder(family), tmp_path / "out"
    result = prune(folder, out)
    assert abs(result.sparsity - 0.3) <= 0.005
    stored = weights_of(out)
    in_layers = sum(
        tensor.numel()
        for name, tensor in stored.items()
        if "layers." in name and tensor.dim() == 2 and tensor.is_floating_point()
    )
    assert in_layers == result.pruned_layer_parameters == sum(record.num_parameters for record in result.layers)
    assert sum(tensor.numel() for tensor in stored.values() if tensor.is_floating_point()) == result.pruned_parameters
    assert PruneResult.load(out).to_dict() == result.to_dict()
    assert not (tmp_path / "out.partial").exists()
    tokens = calibration().tokens[:2]
    assert torch.isfinite(logits(out, tokens)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_zero_is_the_identity(family, tiny_folder, tmp_path):
    folder, out = tiny_folder(family), tmp_path / "out"
    result = prune(folder, out, sparsity=0.0)
    assert result.sparsity == 0.0
    tokens = calibration().tokens[:2]
    assert torch.allclose(logits(out, tokens), logits(folder, tokens), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_model_beats_removal_without_repair(family, tiny_folder, tmp_path):
    """Reconstruction must lower the error of every block against plain removal (same shapes, same order)."""
    folder = tiny_folder(family)
    repaired = prune(folder, tmp_path / "a", allocation__rule="uniform")
    plain = prune(
        folder,
        tmp_path / "b",
        allocation__rule="uniform",
        attention__repair="none",
        ffn__repair="none",
    )
    first, bare = repaired.layers[0], plain.layers[0]
    assert first.shape.heads_per_kv == bare.shape.heads_per_kv
    assert first.errors["attention"] <= bare.errors["attention"] + 1e-9
    assert first.errors["ffn"] < bare.errors["ffn"]


def test_streaming_gives_the_gradients_of_the_whole_model(tiny_folder, tmp_path):
    """Mask gradients of the layer-streamed pass, on channels and on directions, equal autograd through the model."""
    from intraslice.placement import Placement
    from intraslice.streaming.model import StreamedModel

    folder = make_tiny("llama", tmp_path / "m", dtype=torch.float64)
    checkpoint = open_checkpoint(str(folder))
    model = StreamedModel(checkpoint, Placement.choose("cpu", "auto", torch.float64), (1, 16))
    tokens = calibration(4, 16).tokens
    measured = measure_gradients(
        model,
        tokens,
        boundary_bytes=1,  # one batch a chunk
        num_channel_groups=8,
        rotated=True,
        save_path=tmp_path / "gradients.safetensors",
        progress=SilentProgress(),
    )
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    masks: dict[str, torch.Tensor] = {}

    def masked(name: str, width: int, moment: torch.Tensor):
        # All four sequences decide the directions, so they are the eigenvectors of the whole moments.
        basis = torch.block_diag(*eigh_descending(moment)[1])
        masks[name] = torch.ones(width, dtype=torch.float64, requires_grad=True)
        masks[f"{name} rotated"] = torch.ones(width, dtype=torch.float64, requires_grad=True)
        return lambda module, inputs: ((inputs[0] * masks[name] @ basis * masks[f"{name} rotated"]) @ basis.T,)

    for index, layer in enumerate(stock.model.layers):
        sites = measured.layers[index]
        attention, ffn = sites["attention"].moment, sites["ffn"].moment
        layer.self_attn.o_proj.register_forward_pre_hook(masked(f"attention{index}", 32, attention))
        layer.mlp.down_proj.register_forward_pre_hook(masked(f"ffn{index}", 64, ffn))
    for sequence in range(4):
        row = tokens[sequence : sequence + 1]
        loss = stock(row, labels=row).loss
        grads = dict(zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True))
        for index, sites in enumerate(measured.layers):
            # The pass sums them in float32.
            for site, found in sites.items():
                assert found.rotated is not None
                wanted = grads[f"{site}{index}"], grads[f"{site}{index} rotated"]
                assert torch.allclose(found.grad[sequence], wanted[0], rtol=1e-4, atol=1e-7)
                assert torch.allclose(found.rotated[sequence], wanted[1], rtol=1e-4, atol=1e-7)


def test_chunks_and_disk_change_nothing(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    prune(folder, tmp_path / "a")
    prune(folder, tmp_path / "b", run__boundary_bytes=1, run__hidden_states="disk")
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_same_seed_gives_the_same_bytes(tiny_folder, tmp_path):
    folder = tiny_folder("qwen2")
    for name in ("a", "b"):
        prune(folder, tmp_path / name, ffn__iter_pca=True)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("step,units", [("layers", 0), ("layers", 1), ("mask gradients", 20), ("mask gradients", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_resumes_with_the_same_result(step, units, dtype, tmp_path):
    folder = make_tiny("llama", tmp_path / "m", dtype=dtype)
    prune(folder, tmp_path / "whole", run__boundary_bytes=1)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "out", run__boundary_bytes=1, progress=StopAt(step, units))
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="--resume"):
        prune(folder, tmp_path / "out", run__boundary_bytes=1)
    prune(folder, tmp_path / "out", run__boundary_bytes=1, resume=True)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_matrices_stored_transposed_or_fused_by_head_resume_too(family, tiny_folder, tmp_path):
    folder = tiny_folder(family)
    prune(folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "out", progress=StopAt("layers", 1))
    prune(folder, tmp_path / "out", resume=True)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "changes,field",
    [
        ({"sparsity": 0.4}, "method.sparsity"),
        ({"attention__damping": 0.5}, "method.attention.damping"),
        ({"on": calibration(seed=1)}, "calibration.seed"),
        ({"on": calibration(num_samples=4)}, "calibration.num_samples"),
    ],
)
def test_resume_with_something_else_says_which_field(changes, field, tiny_folder, tmp_path):
    folder, out = tiny_folder("llama"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(folder, out, progress=StopAt("layers", 0))
    with pytest.raises(ResumeMismatchError, match=field):
        prune(folder, out, resume=True, **changes)
    prune(folder, out, overwrite=True, **changes)  # starting again is always possible


def test_resume_with_another_model_is_refused(tiny_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_folder("llama"), out, progress=StopAt("layers", 0))
    with pytest.raises(ResumeMismatchError, match="model"):
        prune(tiny_folder("llama", seed=5), out, resume=True)


@pytest.mark.parametrize(
    "name,options",
    [
        ("naive", {"method": "naive"}),
        ("uniform groups", {"attention__gqa_groups": "uniform"}),
        ("uniform", {"allocation__rule": "uniform"}),
        ("no pca", {"allocation__pca_attention": False, "allocation__pca_ffn": False}),
        ("share", {"allocation__ffn_share": 0.9}),
        ("iter", {"ffn__iter_pca": True, "ffn__iter_pca_fraction": 0.5}),
        ("own output", TO_OWN_OUTPUT),
        ("own output iter", {**TO_OWN_OUTPUT, "ffn__iter_pca": True}),
    ],
)
def test_every_setting_meets_the_budget(name, options, tiny_folder, tmp_path):
    # Sixteen heads: whole heads are then fine enough to land on the budget.
    folder = tiny_folder("llama", num_attention_heads=16, num_key_value_heads=8, head_dim=4, hidden_size=64)
    result = prune(folder, tmp_path / "out", **options)
    assert abs(result.sparsity - 0.3) <= 0.005
    if name == "uniform groups":
        assert all(len(set(record.shape.heads_per_kv)) == 1 for record in result.layers)
    if name == "naive":
        assert all(record.shape.v_head_dim == 4 for record in result.layers)
    if name == "iter":
        assert sum(record.iter_pca for record in result.layers) == 2


def test_half_precision_checkpoint_stays_half_and_statistics_do_not(tmp_path):
    folder = make_tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    result = prune(folder, tmp_path / "out")
    assert result.dtype == "bfloat16"
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} <= {torch.bfloat16, torch.int64}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_nan_activations_name_the_layer(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_tiny("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    # Finite weights whose products overflow float32 in the FFN of layer 1.
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="layer 1"):
        prune(folder, tmp_path / "out", allocation__rule="uniform")
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept_unless_overwrite(tiny_folder, tmp_path):
    folder, out = tiny_folder("llama"), tmp_path / "out"
    prune(folder, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="overwrite"):
        prune(folder, out, sparsity=0.5)
    assert (out / "model.safetensors").read_bytes() == before
    prune(folder, out, sparsity=0.5, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(("family", "share"), [("llama", 1.0), ("opt", 1.0), ("llama", 0.3), ("opt", 0.0)])
def test_moments_against_the_dense_model_are_those_of_explicit_streams(family, share, tmp_path):
    """The FFN is fitted to its own output and a share of what leads from there to the dense stream after the layer."""
    from intraslice.methods.blockwise.measure import context_moments, ffn_moments
    from intraslice.placement import Placement
    from intraslice.streaming.hidden import HiddenStates, Streams
    from intraslice.streaming.model import StreamedModel

    folder = make_tiny(family, tmp_path / "m", dtype=torch.float64)
    model = StreamedModel(open_checkpoint(str(folder)), Placement.choose("cpu", "auto", torch.float64), (2, 16))
    tokens = calibration(4, 16).tokens
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        dense_states = stock(tokens, output_hidden_states=True).hidden_states
    before, after = dense_states[0], dense_states[1]
    drifted = before + 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).double()
    hidden = [HiddenStates(tuple(before.shape), torch.float64, 2, torch.device("cpu")) for _ in range(2)]
    streams = Streams(pruned=hidden[0], dense=hidden[1])
    for part in hidden[0].slices():
        hidden[0].write(part, drifted[part])
        hidden[1].write(part, before[part])
    block = model.load_layer(0)
    # With cross_fit all of the drift is measured, and the site's own output beside it.
    repair = "cross_fit" if share == 0.0 else "ridge"
    share = share or 1.0
    given = {"repair": repair, "drift_share": share if repair == "ridge" else 0.5}
    options = AttentionOptions(**given), FFNOptions(**given)
    with torch.no_grad():
        attention = context_moments(model, block, streams, block.attention, options[0])
        middle = block.attention_step(before)
        ffn = ffn_moments(model, block, streams, block.attention, options[1])
        pruned_middle = block.attention_step(drifted)
        context = block.context(block.attention, block.attention_input(drifted)).flatten(0, 1)
        act = block.act(block.ffn_input(pruned_middle)).flatten(0, 1)
        zero = torch.zeros((), dtype=torch.float64)
        out_bias = block.out_projection.bias if block.out_projection.bias is not None else zero
        down_bias = block.down_projection.bias if block.down_projection.bias is not None else zero
        own = block.attention_output(block.attention, drifted)
        own_ffn = block.ffn_output(pruned_middle)
    wanted = (own + share * (middle - drifted - own) - out_bias).flatten(0, 1)
    assert torch.allclose(attention.cross, context.T @ wanted, atol=1e-8)
    assert attention.target_energy == pytest.approx(float(wanted.square().sum()))
    wanted = (own_ffn + share * (after - pruned_middle - own_ffn) - down_bias).flatten(0, 1)
    assert torch.allclose(ffn.cross, act.T @ wanted, atol=1e-8)
    assert ffn.target_energy == pytest.approx(float(wanted.square().sum()))
    if repair == "cross_fit":
        for found, inputs, wanted in (
            (attention, context, (own - out_bias).flatten(0, 1)),
            (ffn, act, (own_ffn - down_bias).flatten(0, 1)),
        ):
            assert torch.allclose(found.own_cross, inputs.T @ wanted, atol=1e-8)
            first = slice(0, len(inputs) // 2)  # two batches
            assert torch.allclose(found.halves[0].gram, inputs[first].T @ inputs[first], atol=1e-8)
            assert torch.allclose(found.halves[0].own_cross, inputs[first].T @ wanted[first], atol=1e-8)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "granite", "cohere", "phi"])
def test_moments_count_what_comes_after_the_projection(family, tmp_path):
    """Output norms frozen at the dense site, factors of the family, FFNs that read the input of the layer."""
    from intraslice.methods.blockwise.measure import context_moments, ffn_moments
    from intraslice.placement import Placement
    from intraslice.streaming.hidden import HiddenStates, Streams
    from intraslice.streaming.model import StreamedModel

    family_model(family).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    model = StreamedModel(checkpoint, Placement.choose("cpu", "auto", torch.float64), (2, 16))
    spec, config = checkpoint.spec, checkpoint.config
    tokens = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))
    block = model.load_layer(0)
    before = model.embed(tokens)
    drifted = before + 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).double()
    hidden = [HiddenStates(tuple(before.shape), torch.float64, 2, torch.device("cpu")) for _ in range(2)]
    streams = Streams(pruned=hidden[0], dense=hidden[1])
    hidden[0].write(slice(0, 2), drifted)
    hidden[1].write(slice(0, 2), before)
    scale = getattr(config, spec.residual_scale) if spec.residual_scale else 1.0

    def check(found, inputs, missing, own, dense_raw, linear, norm_name):
        gain, root = scale, torch.ones(2, 16, 1, dtype=torch.float64)
        if norm_name:
            gain = (block.module.get_submodule(norm_name).weight + spec.norm_offset) * scale
            root = (dense_raw.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
            # Of the drift, a channel that the norm turns down can only give a part.
            missing = own + (gain.square() / gain.square().mean()).clamp(max=1.0) * (missing - own)
        target = missing * root - (0.0 if linear.bias is None else gain * linear.bias)
        rows, targets = (inputs / root).flatten(0, 1), (target / root).flatten(0, 1)
        # The norms of the stock classes are float32 inside.
        torch.testing.assert_close(found.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.cross, rows.T @ targets, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.target_sum, (target / root**2).sum((0, 1)), rtol=1e-4, atol=1e-3)
        assert found.target_energy == pytest.approx(float(targets.square().sum()), rel=1e-4)
        assert found.num_tokens == pytest.approx(float((1 / root**2).sum()), rel=1e-5)

    with torch.no_grad():
        attention = context_moments(model, block, streams, block.attention, AttentionOptions())
        raw = block.raw_output(block.attention, before)
        middle = before + block.added("attention", raw)
        context = block.context(block.attention, block.attention_input(drifted))
        own = block.attention_output(block.attention, drifted)
        check(attention, context, middle - drifted, own, raw, block.out_projection, spec.attention_out_norm)
        ffn = ffn_moments(model, block, streams, block.attention, FFNOptions())
        after = block.run(before)[0]
        reads, dense_reads = drifted, before
        pruned_middle = drifted + own
        if not spec.parallel:
            reads, dense_reads = pruned_middle, middle
        act = block.act(block.ffn_input(reads))
        raw = block.raw_ffn_output(dense_reads)
        own = block.ffn_output(reads)
        check(ffn, act, after - pruned_middle, own, raw, block.down_projection, spec.ffn_out_norm)
        torch.testing.assert_close(hidden[1].read(slice(0, 2)), after)
        torch.testing.assert_close(block.ffn_step(hidden[0].read(slice(0, 2))), block.run(drifted)[0])
    for part in hidden[1].slices():
        assert torch.allclose(hidden[1].read(part), after[part], atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("against", ["dense_stream", "own_output"])
def test_a_cross_fitted_repair_is_better_than_a_bias(family, against, tmp_path):
    family_model(family).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    errors = []
    for repair in ("cross_fit", "bias"):
        given = {
            f"{site}__{option}": value
            for site in ("attention", "ffn")
            for option, value in (("repair", repair), ("repair_against", against))
        }
        if against == "dense_stream":
            # Both have all of the drift in their target: otherwise their errors are of different targets.
            given |= {"attention__drift_share": 1.0, "ffn__drift_share": 1.0}
        result = prune(tmp_path / "m", tmp_path / repair, allocation__rule="uniform", **given)
        errors.append(result.layers[0].errors["ffn"])
    assert errors[0] < errors[1]


def test_drift_in_channels_that_an_output_norm_turns_down_spoils_nothing(tmp_path):
    """Gains of real models go from 0.004 to 400: what is missing in a channel, divided by such a gain, is huge."""
    model = family_model("gemma3_text")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
                weight.copy_(10.0 ** torch.empty(weight.shape).uniform_(-3, 0.5, generator=generator) - 1.0)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    tokens = torch.randint(3, 250, (4, 24), generator=generator)
    expected = logits(tmp_path / "m", tokens)
    errors = []
    for against in ("dense_stream", "own_output"):
        given = {f"{site}__repair_against": against for site in ("attention", "ffn")}
        prune(tmp_path / "m", tmp_path / against, allocation__rule="uniform", **given)
        errors.append(float((logits(tmp_path / against, tokens) - expected).square().mean()))
    assert errors[0] < 1.2 * errors[1]


def test_cross_fitting_needs_two_batches(tiny_folder, tmp_path):
    with pytest.raises(RecipeError, match="two halves of the calibration text, and all of it is in one batch"):
        prune(tiny_folder("llama"), tmp_path / "out", ffn__repair="cross_fit", on=calibration(1, 32))


def test_a_kept_gradient_pass_costs_what_it_cost_the_run_that_made_it(tiny_folder, tmp_path):
    folder, options = tiny_folder("llama"), {"run__gradient_folder": str(tmp_path / "gradients")}
    first = prune(folder, tmp_path / "first", **options)
    (kept,) = (tmp_path / "gradients").iterdir()
    spent = pass_seconds(kept)
    assert 0.0 < spent <= first.seconds["plan"]
    save_file({**load_file(kept), "seconds": torch.tensor(1000.0, dtype=torch.float64)}, kept)
    second = prune(folder, tmp_path / "second", sparsity=0.2, **options)
    assert 1000.0 < second.seconds["plan"] < 2000.0 and second.seconds["total"] > 1000.0
    uniform = prune(folder, tmp_path / "third", **options, allocation__rule="uniform")
    assert uniform.seconds["total"] < 1000.0
    assert pass_seconds(tmp_path / "none") == 0.0
