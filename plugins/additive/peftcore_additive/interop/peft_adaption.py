"""LLaMA-Adapter in peft's files, where it is named ADAPTION_PROMPT (checked against peft 0.21).

``adaption_prompt`` [1, length, width] is our prompt; ``adaption_gate`` is one number for all heads, used without tanh.
Peft adds the attention to the prompt after the output matrix. The result is the same if that matrix is a separate
module without a bias. Other models are refused: peft leaves the matrix out in GPT-2, and adds a bias of the matrix
twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, SavedSite, ending
from peftcore.errors import CheckpointError, ExportError

OUT = "o_proj"
"""The name of the module that peft uses as the output matrix."""


class PeftAdaptionPrompt(PeftMethod):
    """Translates the prompt and the gate of each adapted layer."""

    methods = ("llama_adapter",)
    below = ("adaption_prompt", "adaption_gate")
    advice: ClassVar[Mapping[str, str]] = {
        "adapter_len": "use length=",
        "adapter_layers": "use layers=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        length, layers = keys.take("adapter_len", int), keys.take("adapter_layers", int)
        if length < 1 or layers < 1:
            raise CheckpointError(
                f"{keys.where}: {length} vectors in {layers} layers are not an adaption prompt; both numbers must be "
                "at least 1"
            )
        return {"method": "llama_adapter", "length": length, "layers": layers, "tanh": False}

    def meant(self, keys: Keys, paths: Collection[str]) -> set[str] | None:
        found = ending(paths, [keys.take("target_modules", str)])
        return set([path for path in paths if path in found][-keys.take("adapter_layers", int) :])

    def selections(self, keys: Keys, sites: Sequence[SavedSite], model: nn.Module) -> dict[str, tuple[SavedSite, ...]]:
        return {"": tuple(site.model_copy(update={"role": "attn.core"}) for site in sites)}

    def differs(self, place: Place) -> str:
        out = place.site.module._modules.get(OUT)
        if out is None:
            return f"an attention without {OUT}, to whose output it adds the attention to the prompt"
        sizes, keys = place.site.geometry, place.site.projections["k"]
        if keys.in_features // keys.out_features != sizes.heads // sizes.kv_heads:
            return "heads whose number does not follow from the shape of the key matrix"
        return f"a bias of {OUT}, which it adds twice" if out._parameters.get("bias") is not None else ""

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        prompt, gate = place.operator.prompt.shape, place.operator.gate
        shared = found.take("adaption_gate", (1,))
        return {"prompt": found.take("adaption_prompt", (1, *prompt)).view(prompt), "gate": shared.expand(gate.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"adapter_len": config.length}

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        names = {place.site.module_path.rpartition(".")[2] for place in places}
        name = min(names)
        everywhere = [path for path, _ in model.named_modules() if path.endswith(f".{name}") and ".peft." not in path]
        if len(names) > 1 or everywhere[-len(places) :] != [place.site.module_path for place in places]:
            raise ExportError(
                "peft's ADAPTION_PROMPT adapts only the top layers of one stack; apply llama_adapter to these alone "
                "to export it"
            )
        return {"target_modules": name, "target_parameters": None, "adapter_layers": len(places)}

    def write(self, place: Place) -> dict[str, Tensor]:
        gate = place.operator.gate.tanh() if place.config.tanh else place.operator.gate
        if not gate.eq(gate[0]).all():
            raise ExportError(
                f"{place.site.path} has different gates for its heads, but peft stores one gate for all heads of a "
                "layer"
            )
        return {"adaption_prompt": place.operator.prompt[None], "adaption_gate": gate[:1]}
