"""Inputs as a stranger might make them: good files of every kind, and one of them spoilt."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

NESTED = "\0nested\0"
"""Stands for a value that is nested too deep for Python to write: `dump` puts it in."""
LARGE = "\0large\0"
"""Stands for an integer of ten thousand digits, which Python does not write either."""

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, -(2**63) - 1, 10**40, LARGE),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), 1e-320),
    *("", "x", "\ud800", "a\0b", "../../x", "0", "-1", "1e9", "é" * 300, "x" * 100_000),
    *([], {}, [[]], [None], [0], [-1], [2**63], ["x"], {"x": 1}, {"": None}, NESTED),
    *("auto", "load", "int8", "complex64", "float8_e4m3fn", "flash_attention_2", "kernels-community/flash-attn"),
    *("full_attention", "sliding_attention", "linear_attention", "yarn", "longrope", "llama3", "dynamic", "linear"),
)
EXTRA_FIELDS = (
    *("attn_implementation", "_attn_implementation", "dtype", "torch_dtype", "output_attentions", "per_layer_config"),
    *("quantization_config", "auto_map", "layer_types", "rope_scaling", "rope_parameters", "sliding_window"),
    *("num_experts", "intraslice", "text_config", "head_dim", "tie_word_embeddings", "pad_token_id", "hidden_act"),
    *(
        "use_cache",
        "attention_bias",
        "mlp_bias",
        "partial_rotary_factor",
        "num_labels",
        "pruned_heads",
        "architectures",
    ),
    *("max_position_embeddings", "return_dict", "problem_type", "id2label", "is_encoder_decoder", "cross_attention"),
)


def dump(content: Any) -> bytes:
    """Return JSON with what Python does not write in the place of its marks; lone surrogates become escapes."""
    text = json.dumps(content)
    text = text.replace(json.dumps(NESTED), "[" * 100_000 + "]" * 100_000).replace(json.dumps(LARGE), "9" * 10_000)
    return text.encode("ascii")


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything in a JSON content, itself first; of a long list only its first entries."""
    found = [path]
    if isinstance(content, dict):
        for key, value in content.items():
            found += places(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content[:4]):
            found += places(value, (*path, index))
    return found


def replaced(content: Any, path: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    """Return a content in which the value at a path is another one; `...` as the new one removes it."""
    if not path:
        return change(content)
    key, *rest = path
    inner = replaced(content[key], rest, change)
    if isinstance(content, dict):
        return {
            name: inner if name == key else value for name, value in content.items() if name != key or inner is not ...
        }
    return [inner if at == key else value for at, value in enumerate(content) if at != key or inner is not ...]


@st.composite
def spoilt_json(draw: st.DrawFn, content: Any, extra: Sequence[str] = EXTRA_FIELDS) -> bytes:
    """Draw a JSON file in which one or two values are others, are gone, or are new."""
    if draw(st.integers(0, 9)) == 0:
        return draw(spoilt_bytes(dump(content)))
    for _ in range(draw(st.integers(1, 2))):
        known = places(content)
        path = draw(st.sampled_from(known))
        value = draw(st.sampled_from((*NASTY, ...)))
        if value is ... and not path:
            value = None
        if extra and draw(st.integers(0, 3)) == 0:
            objects = [one for one in known if isinstance(_at(content, one), dict)]
            if objects:
                name = draw(st.sampled_from(extra))
                value = None if value is ... else value
                content = replaced(content, draw(st.sampled_from(objects)), lambda old: {**old, name: value})  # noqa: B023
                continue
        content = replaced(content, path, lambda old: value)  # noqa: B023
    return dump(content)


def _at(content: Any, path: Sequence[Any]) -> Any:
    for key in path:
        content = content[key]
    return content


@st.composite
def spoilt_bytes(draw: st.DrawFn, content: bytes, head: int = 4096) -> bytes:
    """Draw a file that is cut, lengthened, or has some other bytes in its first `head` ones."""
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return content[: draw(st.integers(0, len(content)))]
    if kind == 1:
        return content + draw(st.binary(min_size=1, max_size=64))
    if kind == 2:
        return draw(st.binary(max_size=64))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), head) - 1))
        if kind == 3:
            changed[at] = draw(st.integers(0, 255))
        else:
            whole = draw(st.sampled_from((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)))
            changed[at : at + 8] = struct.pack("<Q", whole)
    return bytes(changed)


@st.composite
def spoilt_gguf(draw: st.DrawFn, content: bytes, keys: Sequence[str]) -> bytes:
    """Draw a GGUF file with another number in one of its fields, or a spoilt one."""
    if draw(st.integers(0, 2)) == 0:
        return draw(spoilt_bytes(content, 512))
    key = draw(st.sampled_from(keys)).encode()
    # A key is followed by the type of its value, and the value.
    at = content.index(key) + len(key) + 4
    number = draw(st.sampled_from((0, 1, 3, 5, 1000, 10**6, 2**31, 2**32 - 1)))
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


@st.composite
def spoilt_lines(draw: st.DrawFn, rows: Sequence[Any]) -> bytes:
    """Draw JSON lines of which one is spoilt."""
    lines = [dump(row) for row in rows]
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(spoilt_json(rows[at], ()))
    return b"\n".join(lines) + b"\n"


YAML_VALUES = (
    *("2024-01-01", "!!binary aGVsbG8=", "!!set {a, b}", "!!python/object/apply:os.system [id]", "&a [*a]"),
    *("[" * 3000 + "]" * 3000, "9" * 10_000, "0x" + "f" * 5000, "1e400", ".nan", ".inf", "null", "~", "[]", "{}", "''"),
    *("{a: {b: {c: 1}}}", "- 1", "yes", "-1", "18446744073709551616", "1:30:00", '"\\ud800"', '"a\\0b"', "*b"),
    *("!!omap [a: 1]", "? [1, 2]\n: 3", "<<: 1", "'" + "x" * 100_000 + "'", "{1: 2}", "{[1]: 2}", "|\n  x", "!x y"),
    "[&a [x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c],"
    " &e [*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e], &g [*f,*f,*f,*f,*f,*f,*f,*f], [*g,*g,*g,*g,*g,*g]]",
)


@st.composite
def spoilt_yaml(draw: st.DrawFn, lines: Sequence[str]) -> bytes:
    """Draw a YAML file in which the value of one line is another one."""
    if draw(st.integers(0, 5)) == 0:
        return draw(spoilt_bytes("\n".join(lines).encode()))
    at = draw(st.integers(0, len(lines) - 1))
    name = lines[at].split(":")[0]
    name = draw(st.sampled_from((name, name, name, "x", "? 1", "[a]", "<<", "'\\ud800'")))
    return "\n".join([*lines[:at], f"{name}: {draw(st.sampled_from(YAML_VALUES))}", *lines[at + 1 :]]).encode()


SETTINGS = (
    "--set",
    "--align",
    "--seed",
    "--sparsity",
    "--num-samples",
    "--seqlen",
    "--target-size",
    "--heal",
    "--device",
)
WORDS = (
    *(
        "",
        "-1",
        "0",
        "1e999",
        "nan",
        "9" * 10_000,
        "18446744073709551616",
        "x",
        "é",
        "a=b",
        "ffn=" + "9" * 60,
        "head=0",
    ),
    *(
        "ffn.damping=" + "[" * 5000,
        "ffn.damping=2024-01-01",
        "ffn.damping=!!binary aGk=",
        "run.batch_tokens=" + "9" * 400,
    ),
    *("run.batch_tokens=" + "9" * 400, "run.max_shard_bytes=0", "run.hidden_states=tape", "sparsity=[0.3]"),
    *("calibration.seed=18446744073709551616", "run.device=meta", "model=[]", "ffn=1,ffn=2", "head=" + "9" * 5000),
    *("calibration.source=a:1e400,b:1", "ffn.damping=.nan", 'calibration.source="\\ud800"', "a" * 100_000, "cuda:99"),
    *("allocation.max_site_sparsity=1e308", "run.max_shard_bytes=1e400", 'calibration.text_field="\\0"', "1e-320"),
)

_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SPOILT_TEMPLATES: st.SearchStrategy[bytes] = st.one_of(
    st.sampled_from(
        (
            *("{{ messages }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "", "{% if %}", "{{ 1 / 0 }}"),
            *("{{ messages[9] }}", "{{ nothing.x }}", "{{ raise_exception('no') }}", "{% include 'x' %}", _LOOP),
            *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('id') }}"),
            *("{{ 'x' * 10 ** 6 }}", "{{ range(10 ** 12) | list }}", "{{ messages | tojson(indent=9999999999) }}"),
            *(
                "(" * 3000,
                "{{ " + "(" * 3000,
                "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
                "\ud800 {{ '\\ud800' }}",
            ),
        )
    ).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=64),
)
"""Chat templates that fail, never end, or try to get out of their sandbox."""
