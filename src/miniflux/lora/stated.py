"""What a LoRA file says of its strength beside the tensors: PEFT's config, in the header or in a file of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from miniflux.errors import CheckpointError, LoraError
from miniflux.lora.dialects import PartName
from miniflux.lora.patterns import Patterns
from miniflux.strictjson import json_file, json_of

log = logging.getLogger(__name__)

PEFT_METADATA = "lora_adapter_metadata"  # header entry of diffusers: JSON with PEFT's config per network
PEFT_CONFIG = "adapter_config.json"  # beside the file, as PEFT itself saves it
COMPONENTS: dict[PartName, str] = {"transformer": "transformer", "clip": "text_encoder", "t5": "text_encoder_2"}
TEXTS = ("peft_type", "init_lora_weights")
FIELDS = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", *TEXTS)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of PEFT's ways to begin a LoRA that take what it begins with out of the weights it hangs on."""
PREFIXES = ("transformer.", "text_encoder.", "text_encoder_2.", "diffusion_model.", "base_model.model.")
"""Of keys, before the name that a module has in the network that PEFT saw; one or two of them."""


class Stated:
    """Factors by which a header or a config multiplies the changes of modules.

    Args:
        name: the file, for messages.
        metadata: its header's entries.
        config: PEFT's own config beside it, or None. The header counts where both are there.

    Raises:
        CheckpointError: it is no JSON, or not what a config is made of.
        LoraError: a pattern is no regular expression, or cannot be matched in bounded time; or the LoRA belongs to
            other weights than the model's.
    """

    def __init__(self, name: str, metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> None:
        self.name = name
        self.configs = _of_header(metadata) or ({} if config is None else {"transformer": dict(config)})
        for component, config in self.configs.items():
            init = config.get("init_lora_weights")
            if isinstance(init, str) and init.strip('"').lower().startswith(CHANGES_BASE):
                raise LoraError(
                    f"{name}: the init_lora_weights of {component} in its metadata is {init}: it was trained beside "
                    "weights that PEFT had changed, and is none for the model's own; PEFT converts it when it is saved "
                    "with path_initial_model_for_weight_conversion"
                )
        self.patterns = {
            (component, field): Patterns(f"{name}: the {field} of {component} in its metadata", _keys(config, field))
            for component, config in self.configs.items()
            for field in ("rank_pattern", "alpha_pattern")
        }

    def factor(self, network: PartName, module: str, form: str, rank: int | None) -> float | None:
        """What is stated for one module: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRAs.

        Args:
            module: what its keys begin with.
            form: a name of `files.FORMS`.
            rank: of its tensors; None where they have none, as whole factors of a Kronecker product.

        Returns:
            None if nothing is stated.

        Raises:
            LoraError: alpha or rank is no number, or 0; or the rank is not that of the tensors.
        """
        component = COMPONENTS[network]
        config = self.configs.get(component)
        if config is None or (rank is None and (form, config.get("peft_type")) != ("LoKr", "LOKR")):
            return None  # of whole factors only PEFT itself counts the alpha
        field = "lora_alpha" if form == "LoRA" or "alpha" not in config else "alpha"
        alpha = self._value(component, "alpha_pattern", module, config.get(field))
        stated = self._value(component, "rank_pattern", module, config.get("r"))
        if alpha is None:
            return None
        if not _is_number(alpha) or alpha == 0:
            raise LoraError(f"the {field} of {module} in the file's metadata is {alpha!r}; expected a number, not 0")
        if stated is not None and (not _is_number(stated) or stated <= 0 or stated != int(stated)):
            raise LoraError(
                f"the rank of {module} in the file's metadata is {stated!r}; expected a whole number above 0"
            )
        if rank is not None and stated is not None and stated != rank:
            raise LoraError(
                f"{self.name}: its metadata gives {module} the rank {stated}, its tensors have {rank}: "
                "the strength is not known"
            )
        rank = rank or stated
        if rank is None:
            return None
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _value(self, component: str, field: str, module: str, default: Any) -> Any:
        patterns = self.patterns[component, field]
        key = patterns.first(_inner(module)) if patterns.keys else None
        return default if key is None else self.configs[component][field][key]

    def warn_of_idle_patterns(self) -> None:
        """Log patterns that no module was told by: most likely misspelled."""
        for patterns in self.patterns.values():
            idle = [key for key in patterns.keys if key not in patterns.fitted]
            if idle:
                more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
                shown = ", ".join(repr(key[:80]) for key in idle[:3])
                log.info("%s: %s%s decide nothing", patterns.what, shown, more)


def config_beside(folder: Path, path: Path) -> dict[str, Any] | None:
    """PEFT's own config, if it lies beside a file that PEFT named."""
    file = folder / PEFT_CONFIG
    if not file.is_file() or not (path.is_dir() or path.name.startswith("adapter_model")):
        return None
    return _object(str(file), json_file(file))


def _inner(module: str) -> str:
    """The name that a module has in the network that PEFT saw."""
    while (prefix := next((p for p in PREFIXES if module.startswith(p)), None)) is not None:
        module = module[len(prefix) :]
    return module


def _of_header(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Configs by component: diffusers' JSON, else the same fields as entries of their own (SimpleTuner and others)."""
    configs: dict[str, dict[str, Any]] = {}
    if PEFT_METADATA in metadata:
        what = f"the header's {PEFT_METADATA}"
        for key, value in _object(what, json_of(metadata[PEFT_METADATA].encode(), what)).items():
            component, field = _split(key)
            configs.setdefault(component, {})[field] = value
        return configs
    for key, text in metadata.items():
        component, field = _split(key)
        if field in FIELDS and component in COMPONENTS.values():
            configs.setdefault(component, {})[field] = text if field in TEXTS else _flat(key, text)
    return configs


def _split(key: str) -> tuple[str, str]:
    """Component and field; without a component it is the transformer's, as a network saves by itself."""
    component, dot, field = key.rpartition(".")
    return (component, field) if dot else ("transformer", key)


def _flat(key: str, text: str) -> Any:
    """The value of a field that is a header entry of its own: JSON, or what Python prints."""
    plain = {"True": True, "False": False, "None": None, "": None}
    return plain[text] if text in plain else json_of(text.encode(), f"the header's {key}")


def _keys(config: Mapping[str, Any], field: str) -> list[str]:
    patterns = config.get(field) or {}
    return list(_object(f"the {field} of the file's metadata", patterns))


def _object(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return cast("dict[str, Any]", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
