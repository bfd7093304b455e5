"""aLoRA in peft's files: the option `alora_invocation_tokens` contains the tokens from which on the adapter acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Size

from peftcore.author.formats import Keys
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant


class ALoRAVariant(LoRAVariant):
    """Low-rank factors that act from an invocation on."""

    reads = "alora"
    writes = ("alora",)

    def marked(self, keys: Keys) -> bool:
        return keys.take("alora_invocation_tokens", list, None) is not None

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        return {**common, "invocation": keys.take("alora_invocation_tokens", list)}

    def write_options(self, config: Any) -> dict[str, Any]:
        """Returns the invocation, and the only task type for which peft uses it. Without an invocation there are no
        options, and the file is a plain LoRA."""
        if not config.invocation:
            return {}
        return {"alora_invocation_tokens": config.invocation, "task_type": "CAUSAL_LM"}
