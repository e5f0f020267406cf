"""Plug-in of vLLM: pruned checkpoints load there without `trust_remote_code`.

vLLM calls `register` in each of its processes, through the entry-point group `vllm.general_plugins`. This package
does not depend on vLLM, and importing this module does not import it.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from packaging.version import Version

logger = logging.getLogger(__name__)

MIN_VLLM = "0.32.0"
"""The first release of vLLM that this was tested with; older ones know one attention shape for all layers."""
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register the pruned architectures with transformers and vLLM; again is harmless.

    An old vLLM gets a warning only: it calls this for every model, and may be there for others.

    Raises:
        ImportError: vLLM is not installed.
    """
    try:
        vllm: Any = importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError("intraslice.vllm_plugin is called by vLLM, which is not installed here.") from error
    if Version(vllm.__version__) < Version(MIN_VLLM):
        logger.warning(
            "vLLM %s cannot run checkpoints of intraslice; install vLLM %s or later.", vllm.__version__, MIN_VLLM
        )
        return
    from intraslice import runtime
    from intraslice.runtime.configuration_intraslice import PREFIX, class_stem, known_families

    runtime.register()
    checks: Any = importlib.import_module("vllm.model_executor.models.config")
    for family in known_families():
        architecture = f"{PREFIX}{class_stem(family)}ForCausalLM"
        # By name: vLLM imports the class late, because that may touch the accelerator.
        vllm.ModelRegistry.register_model(architecture, BACKEND)
        checks.MODELS_CONFIG_MAP[architecture] = _EarlyCheck


class _EarlyCheck:
    """What vLLM asks before it starts its engine: here an error still reaches the caller.

    The model checks the same again while it is built, for those who use `trust_remote_code` instead.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse settings that cannot work.

        Raises:
            ValueError: with what to do instead.
        """
        vllm_config.model_config.hf_config.check_vllm(vllm_config.parallel_config.tensor_parallel_size)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to change."""
