"""What a comparison document and a result.json must hold before anything is made of them: both may be a stranger's.

Only what is read stands here; other fields pass, so that a newer release may add some.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

Number = float | None


class _Calibration(BaseModel):
    tokens: dict[str, str]


class _TextEntry(BaseModel):
    name: str
    first: int
    windows: int | None


class _Tasks(BaseModel):
    names: list[str]


class _Protocol(BaseModel):
    calibration: _Calibration
    text: dict[str, Any] | None = None
    texts: list[_TextEntry] | None = None
    tasks: _Tasks | None = None
    heal: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    machine: str = ""
    versions: dict[str, str] | None = None
    models: dict[str, str] = {}


class _Sweep(BaseModel):
    option: str
    value: bool | int | float | str | list[Any] | dict[str, Any] | None


class _Task(BaseModel):
    acc: float
    acc_norm: Number = None
    acc_stderr: Number = None
    acc_norm_stderr: Number = None
    samples: int | None = None


class _Layer(BaseModel):
    num_attention_heads: float
    num_key_value_heads: float
    qk_head_dim: float
    v_head_dim: float
    intermediate_size: float
    num_parameters: float
    errors: dict[str, Number] | None = None
    attention_error: Number = None
    ffn_error: Number = None


class _Prune(BaseModel):
    seconds: dict[str, float] = {}
    peak_memory_bytes: Number = None


class _Paired(BaseModel):
    average: dict[str, Number] | None = None
    tasks: dict[str, dict[str, Number]] | None = None


class _Point(BaseModel):
    step: int
    tokens: float
    loss: Number
    kl: float
    seconds: float


class _Cell(BaseModel):
    key: str
    model: str
    label: str
    method: str
    options: dict[str, Any] = {}
    sweep: _Sweep | None
    asked: float = Field(ge=0, le=1)
    sparsity: Number
    parameters: Number
    layer_parameters: Number
    weight_bytes: Number
    perplexity: Number
    texts: dict[str, Number] | None = None
    gaps: dict[str, Number] | None = None
    divergence: dict[str, dict[str, Any]] | None = None
    mean_gap: Number = None
    mean_kl: Number = None
    mean_agreement: Number = None
    tasks: dict[str, _Task] | None
    average: Number
    paired: _Paired | None = None
    speed: dict[str, Number] | None
    prune: _Prune | None
    layers: list[_Layer] | None
    effective_rank: list[Number] | None = None
    healing: list[_Point] | None = None
    healed: dict[str, Number] | None = None
    error: str | None = None


class _RopePairs(BaseModel):
    kept_fraction: list[float] = []
    relative_error: list[list[Number] | None] = []


class _Analysis(BaseModel):
    context_spectrum: list[list[Number]] | None = None
    act_spectrum: list[list[Number]] | None = None
    residual_spectrum: list[list[Number]] | None = None
    effective_rank: dict[str, list[Number] | None] | None = None
    rope_pairs: _RopePairs | None = None


class Document(BaseModel):
    """A comparison document: how it was measured, its cells, the analysis of its dense models by name."""

    title: str
    created: str = ""
    protocol: _Protocol
    cells: list[_Cell]
    analysis: dict[str, _Analysis]


class _PruneCalibration(BaseModel):
    name: str
    num_samples: int
    seqlen: int
    seed: int
    fingerprint: str


class _Recipe(BaseModel):
    model: str
    method: str
    sparsity: Number


class PruneRecord(BaseModel):
    """What `report` reads of a result.json besides the fields that its class checks."""

    calibration: _PruneCalibration
    recipe: _Recipe
