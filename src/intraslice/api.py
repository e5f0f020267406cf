"""The Python interface: what the commands do, as functions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from intraslice.checkpoint.source import open_checkpoint
from intraslice.data.mixture import check_source
from intraslice.data.text import load_text
from intraslice.data.windows import token_stream
from intraslice.errors import RecipeError, nearest
from intraslice.evaluation.domains import TextScores, check_same_tokens, measure_texts
from intraslice.evaluation.perplexity import Perplexity, measure_perplexity
from intraslice.evaluation.task_data import DEFAULT_BATCH_SIZE
from intraslice.evaluation.tasks import (
    TaskComparison,
    TaskResults,
    check_range,
    compare_answers,
    open_tasks,
    score_tasks,
)
from intraslice.evaluation.text_choice import parse_texts
from intraslice.exporters.export import export_checkpoint
from intraslice.exporters.options import ExportOptions, ExportReport
from intraslice.healing.after_prune import prune_and_heal
from intraslice.healing.options import HealOptions, heal_options
from intraslice.healing.run import HealResult, heal_checkpoint
from intraslice.loading import load_model
from intraslice.names import expanded
from intraslice.options import CalibrationOptions
from intraslice.progress import Progress
from intraslice.pruning import calibrate, prune_recipe
from intraslice.recipes.recipe import load_recipe
from intraslice.results.result import PruneResult
from intraslice.speed.bench import BenchOptions, BenchResult, bench_models
from intraslice.speed.layer_bench import LayerBenchResult, bench_layers
from intraslice.streaming.analysis import analyze_model


def prune(
    model: str | None = None,
    *,
    output: str | Path | None = None,
    sparsity: float | None = None,
    target_speedup: float | None = None,
    target_parameters: int | str | None = None,
    target_size: int | str | None = None,
    speedup_of: str | None = None,
    method: str | None = None,
    effort: str | None = None,
    target: str | None = None,
    calibration: str | None = None,
    options: Mapping[str, Any] | None = None,
    recipe: str | Path | None = None,
    heal: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model and write a smaller checkpoint that loads like any other.

    Args:
        model: hub id, local folder, .gguf file or built-in name.
        output: folder to write.
        sparsity: fraction of the decoder layers' linear weights to remove, in [0, 0.95).
        target_speedup: instead of sparsity: how many times as fast as the dense model the result should be; layers
            are measured on this machine to find the sparsity.
        target_parameters: instead of sparsity: parameters that the result may have, embeddings included, such as "6B".
        target_size: instead of sparsity: bytes that its weight files may have in the saved dtype, such as "4GB".
        speedup_of: what is to be faster: "decode" (default) or "prefill".
        method: name of a preset; "intraslice" unless given.
        effort: how much time the default method takes for quality: "low", "medium" (default) or "high".
        target: runtime that the shapes are chosen for: "transformers" (default), "vllm", "llama.cpp" or "stock".
        calibration: name of a text, a file, or several with weights, as in "self:0.5,notes.txt:0.5";
            `options.DEFAULT_CALIBRATION` unless given.
        options: further settings by dotted name, for example {"calibration.num_samples": 64}.
        recipe: YAML file whose values hold where no argument says otherwise.
        heal: then train the result to agree with the model for this budget: "5M" tokens or "20min"; see `heal`.
        overwrite: whether an existing output folder is replaced.
        resume: go on from the last finished layer of an interrupted run.
        progress: shows how far the work is.

    Raises:
        IntraSliceError: see errors.py; nothing is left under `output` then.
    """
    given: dict[str, Any] = {
        "model": model,
        "output": None if output is None else str(output),
        "sparsity": sparsity,
        "target_speedup": target_speedup,
        "target_parameters": target_parameters,
        "target_size": target_size,
        "speedup_of": speedup_of,
        "method": method,
        "effort": effort,
        "target": target,
        "calibration.source": calibration,
        **(options or {}),
    }
    merged = load_recipe(recipe, given)
    shared: dict[str, Any] = {
        "overwrite": overwrite,
        "resume": resume,
        "command": _call("prune", {**given, "heal": heal}),
        "progress": progress,
    }
    if heal is None:
        return prune_recipe(merged, **shared)
    return prune_and_heal(merged, heal_options(merged.calibration, merged.run.device, heal), **shared)


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    given = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items() if value is not None)
    return f"intraslice.{name}({given})"


def heal(
    checkpoint: str | Path,
    *,
    output: str | Path,
    budget: str = "1M",
    teacher: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> HealResult:
    """Train a pruned checkpoint to agree with its dense model; sizes and shapes stay as they are.

    Args:
        checkpoint: folder that `prune` has written, or a stock folder exported from one.
        output: folder to write.
        budget: tokens ("300k", "5M") or time ("20min").
        teacher: the dense model; the one that the checkpoint was pruned from unless given.
        revision: branch, tag or commit of a teacher on the hub.
        trust_remote_code: whether code that comes with the teacher's tokenizer may be executed.
        overwrite: whether an existing output folder is replaced.
        resume: go on with an interrupted healing.
        progress: shows how far the work is.
        options: further fields of `healing.options.HealOptions`, for example calibration="wikitext2" or weights="lora".

    Raises:
        IntraSliceError: see errors.py; nothing is left under `output` then.
    """
    unknown = sorted(options.keys() - HealOptions.__dataclass_fields__.keys())
    if unknown:
        raise RecipeError(f"heal has no option {unknown[0]!r}.{nearest(unknown[0], HealOptions.__dataclass_fields__)}")
    named = {"checkpoint": str(checkpoint), "output": str(output), "budget": budget, "teacher": teacher, **options}
    return heal_checkpoint(
        str(checkpoint),
        expanded(output),
        HealOptions(budget=budget, **options),
        teacher=None if teacher is None else str(teacher),
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        resume=resume,
        command=_call("heal", named),
        progress=progress,
    )


def load(path: str | Path, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a saved model, dense or pruned, for generation: the same as AutoModelForCausalLM.from_pretrained.

    Of a composite (vision-language) model it is the text tower alone; AutoModelForImageTextToText loads the whole.

    Args:
        path: folder, hub id, .gguf file or built-in name.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or a torch device.
    """
    return load_model(str(path), dtype=dtype, device=device)[0]


def evaluate(
    model: str | Path,
    *,
    text: str = "builtin",
    seqlen: int = 2048,
    windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    text_field: str | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of a saved model, dense or pruned.

    Args:
        model: folder, hub id, .gguf file or built-in name.
        text: "builtin", a data set name (its test split) or a text file.
        seqlen: tokens in a window; windows do not overlap.
        windows: measure at most this many windows, from the start.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or a torch device.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code that comes with the model may be executed.
        text_field: the column of a .jsonl or .parquet file that holds the text.
        progress: shows the windows.
    """
    # The text comes first: a wrong name must not cost the loading of the model.
    content = load_text(text, split="test", text_field=text_field)
    loaded, tokenizer = load_model(
        str(model),
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    tokens = token_stream(content, tokenizer)
    return measure_perplexity(loaded, tokens, seqlen=seqlen, windows=windows, progress=progress)


def evaluate_texts(
    model: str | Path,
    texts: Sequence[str],
    *,
    against: str | Path | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    text_field: str | None = None,
    progress: Progress | None = None,
) -> TextScores:
    """Measure a saved model on several texts, and how far it is from the dense model.

    Args:
        model: folder, hub id, .gguf file or built-in name.
        texts: each one "builtin", a data set name (its test split) or a text file; "NAME=..." names it in the result,
            and "...@4-9" measures only its windows 4 to 9.
        against: the dense model; the log gap, the KL divergence and the agreement of the greedy token are measured
            against it.
        seqlen: tokens in a window; windows do not overlap.
        windows: measure at most this many windows of a text that does not name its windows.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or a torch device.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code that comes with the model may be executed.
        text_field: the column of a .jsonl or .parquet file that holds the text.
        progress: shows the windows.

    Raises:
        IntraSliceError: see errors.py.
    """
    # The texts come first: a wrong name must not cost the loading of a model.
    choices = parse_texts(texts, windows)
    contents = [load_text(choice.source, split="test", text_field=text_field) for choice in choices]
    opened: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = load_model(str(model), revision=revision, progress=progress, **opened)
    tokens = [token_stream(content, tokenizer) for content in contents]
    dense = None
    if against is not None:
        dense, other = load_model(str(against), progress=progress, **opened)
        check_same_tokens(tokens, [token_stream(content, other) for content in contents])
    named = [
        (replace(choice, source=Path(choice.source).name), own) for choice, own in zip(choices, tokens, strict=True)
    ]
    return measure_texts(loaded, named, dense=dense, seqlen=seqlen, progress=progress)


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> TaskResults:
    """Measure the zero-shot accuracy of a saved model, dense or pruned, by lm-eval's official task definitions.

    Args:
        model: folder, hub id, .gguf file or built-in name.
        tasks: names of lm-eval, for example ["arc_easy", "piqa"].
        task_data: folder of <task>.jsonl files with the field names of the hub's data sets; None loads those.
        limit: use at most this many examples of each task, from the start; None uses all.
        batch_size: examples at a time.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or a torch device.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code that comes with the model may be executed.
        progress: shows the answers.
    """
    # The tasks come first: a wrong name or line must not cost the loading of the model.
    check_range(limit, batch_size)
    opened = open_tasks(tasks, None if task_data is None else expanded(task_data))
    loaded, tokenizer = load_model(
        str(model),
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return score_tasks(loaded, tokenizer, opened, limit=limit, batch_size=batch_size, progress=progress)


def compare_tasks(
    model: str | Path,
    against: str | Path,
    tasks: Sequence[str],
    *,
    progress: Progress | None = None,
    revision: str | None = None,
    **options: Any,
) -> TaskComparison:
    """Measure a saved model and the dense one on the same questions.

    Args:
        model: folder, hub id, .gguf file or built-in name.
        against: the dense model.
        tasks: names of lm-eval.
        progress: shows the answers.
        revision: branch, tag or commit of `model` on the hub.
        options: the other ones of `evaluate_tasks`.

    Returns:
        Both results, and the differences with paired standard errors.
    """
    own = evaluate_tasks(model, tasks, revision=revision, progress=progress, **options)
    dense = evaluate_tasks(against, tasks, progress=progress, **options)
    return TaskComparison(model=own, dense=dense, differences=compare_answers(own, dense))


def analyze(
    model: str | Path,
    *,
    text: str = "builtin",
    num_samples: int = 8,
    seqlen: int = 1024,
    seed: int = 0,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    text_field: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what there is to compress in a dense model: spectra, effective ranks, RoPE-pair sensitivity.

    Args:
        model: hub id, folder, .gguf file or built-in name.
        text: as the calibration text of `prune`; the same text gives the same tokens.
        num_samples: how many sequences of tokens.
        seqlen: tokens in a sequence.
        seed: decides which sequences are taken.
        device: "auto", "cpu" or a torch device.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether code that comes with the model may be executed.
        text_field: the column of a .jsonl or .parquet file that holds the text.
        progress: shows the layers.

    Returns:
        What `streaming.analysis.analyze_model` says, in JSON types.

    Raises:
        IntraSliceError: see errors.py.
    """
    check_source(text)
    checkpoint = open_checkpoint(str(model), revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    wanted = CalibrationOptions(source=text, num_samples=num_samples, seqlen=seqlen, seed=seed, text_field=text_field)
    calibration = calibrate(checkpoint, wanted, device=device, progress=progress)
    return analyze_model(checkpoint, calibration.tokens, device=device, progress=progress)


def analyse(model: str | Path, **options: Any) -> dict[str, Any]:
    """Call `analyze`; the name goes away with the next release."""
    warnings.warn("analyse is now called analyze.", DeprecationWarning, stacklevel=2)
    return analyze(model, **options)


def benchmark(
    model: str | Path,
    against: str | Path | None = None,
    *,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure speed and memory of a saved model, in turns with another one.

    Args:
        model: folder, hub id, .gguf file or built-in name.
        against: the base of the ratios, usually the dense model.
        options: what is run.
        progress: shows the repetitions.
    """
    base = None if against is None else str(against)
    return bench_models(str(model), base, options=options, progress=progress)


def benchmark_layers(
    model: str | Path,
    against: str | Path | None = None,
    *,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> LayerBenchResult:
    """Measure each distinct decoder layer of a saved model alone, in turns with the dense one.

    Args:
        model: folder, hub id, .gguf file or built-in name.
        against: the dense model; its shape with random weights unless given.
        options: what is run; 4096 tokens unless given.
        progress: shows the repetitions.
    """
    base = None if against is None else str(against)
    return bench_layers(str(model), base, options=options, progress=progress)


def export(
    checkpoint: str | Path,
    *,
    to: str,
    output: str | Path,
    dtype: str = "auto",
    pad_to: str | None = None,
    tokenizer_from: str | Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a pruned checkpoint in the form of another runtime.

    Args:
        checkpoint: folder that `prune` has written.
        to: name of an exporter: "stock", "padded", "gguf", "onnx", or another row of `exporters.registry.EXPORTERS`.
        output: folder to write; for gguf, the file.
        dtype: of the written weights: "auto" (as stored), "float32", "bfloat16" or "float16".
        pad_to: for padded: "dense" (default), or "max" for the largest of each size that occurs.
        tokenizer_from: for gguf: a GGUF file of the base model whose tokenizer is copied.
        verify: reload the result in its runtime, where that is installed, and compare the logits of a prompt.
        overwrite: replace an existing output.
        progress: shows the layers.

    An option that the exporter does not read is refused.

    Raises:
        IntraSliceError: see errors.py; nothing is left under `output` then.
    """
    options = ExportOptions(
        dtype=dtype,
        pad_to=pad_to,
        tokenizer_from=None if tokenizer_from is None else str(tokenizer_from),
        verify=verify,
        overwrite=overwrite,
    )
    return export_checkpoint(str(checkpoint), to, expanded(output), options, progress)
