"""What loads and runs a pruned checkpoint.

Importing this package imports neither torch nor transformers; `register` makes the pruned architectures known to the
Auto classes, and `import intraslice` calls it as soon as transformers is there.
"""

from __future__ import annotations

from pathlib import Path

RUNTIME_FILES = tuple(
    Path(__file__).with_name(f"{name}_intraslice.py") for name in ("configuration", "families", "modeling", "shortcuts")
)
"""Files that travel with a checkpoint, for `trust_remote_code=True`."""


def register() -> None:
    """Register all pruned architectures with the Auto classes; again is harmless."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    from intraslice.runtime.configuration_intraslice import known_composites, known_families, stock_config_class
    from intraslice.runtime.families_intraslice import FAMILIES
    from intraslice.runtime.modeling_intraslice import causal_lm_class, composite_classes, model_classes

    for config, model, causal_lm in map(model_classes, known_families()):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    for family in known_families():
        if FAMILIES[family].head_of is not None:
            AutoModelForCausalLM.register(stock_config_class(family), causal_lm_class(family), exist_ok=True)
    for config, model, conditional in map(composite_classes, known_composites()):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForImageTextToText.register(config, conditional, exist_ok=True)
