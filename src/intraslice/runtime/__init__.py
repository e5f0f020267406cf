"""What loads and runs a pruned checkpoint.

Importing this package registers the pruned architectures with the Auto classes of transformers.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import configuration_intraslice, modeling_intraslice, shortcuts_intraslice

RUNTIME_FILES = (
    Path(configuration_intraslice.__file__),
    Path(modeling_intraslice.__file__),
    Path(shortcuts_intraslice.__file__),
)
"""Files that travel with a checkpoint, for `trust_remote_code=True`."""


def register() -> None:
    """Register all pruned architectures with the Auto classes; again is harmless."""
    for config, model, causal_lm in modeling_intraslice.MODELS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


register()
