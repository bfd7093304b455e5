"""X-LoRA in files of peft, which calls it XLORA (checked against peft 0.21).

The file contains the classifier's layers. Its key `adapters` maps names to the folders of the LoRAs, which peft looks
up in the working directory. peft numbers the LoRAs, but assigns shares by name, so the names must be these numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import OFF, Found, Keys, PeftMethod, Place, is_one_of
from peftcore.errors import CheckpointError, ExportError

STEM = "internal_xlora_classifier."
MOST = 10
"""The largest number of LoRAs. With more, peft mixes them up when it loads a file, since it sorts the numbers as
texts."""
PLAIN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern")
PLACES = ("target_modules", "task_type")
LOST = (
    f"it lacks {STEM}layers.0, which save_pretrained of peft 0.21 drops, because layers of the classifier and LoRAs "
    "have the same names. If the model still exists, write the file from it: "
    f"safetensors.torch.save_file({{key: each for key, each in model.state_dict().items() if {STEM[:-1]!r} in key}}, "
    '"adapter_model.safetensors")'
)
DROPOUT = "the LoRAs' dropout acts in training in peft, but not in peftcore, where parts have no dropout"


class PeftXLoRA(PeftMethod):
    """Translates the classifier of X-LoRA; the LoRAs are in separate folders."""

    methods = ("xlora",)
    root = (STEM,)
    folders = "adapters"
    part_kinds = ("LORA",)
    trained_beside = False
    advice: ClassVar[Mapping[str, str]] = {
        "hidden_size": "leave it out: the model has the width",
        "adapters": 'call peftcore.gather(model, "xlora", {folder: 1.0, ...})',
        "enable_softmax": "use softmax=",
        "enable_softmax_topk": "use softmax_top_k=",
        "layerwise_scalings": "use layerwise=",
        "xlora_depth": "use depth=",
        "xlora_size": "use width=",
        "xlora_dropout_p": "use dropout=",
        "use_trainable_adapters": "use train_parts=",
        "softmax_temperature": "use temperature=",
        "top_k_lora": "use top_k=",
        "scaling_pass_value": "leave it out: the first pass runs the base alone",
        "global_scaling_weight": "use scale=",
    }

    def named(self, keys: Keys) -> dict[str, str]:
        found = super().named(keys)
        if not found or len(found) > MOST or list(found) != [str(number) for number in range(len(found))]:
            raise CheckpointError(
                f"{keys.where}: 'adapters' has {', '.join(map(repr, found)) or 'no names'}; peft's XLORA would mix up "
                f"shares under these names: call the LoRAs '0', '1' and so on in this order, {MOST} at most"
            )
        return found

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("hidden_size")  # the classifier's tensors have it
        keys.only("scaling_pass_value", 0.0)
        return {
            "method": "xlora",
            "train_parts": keys.take("use_trainable_adapters", bool, False),
            "layerwise": keys.take("layerwise_scalings", bool, False),
            "softmax": keys.take("enable_softmax", bool, True),
            "temperature": keys.take("softmax_temperature", float, 1.0),
            "top_k": keys.take("top_k_lora", int, None),
            "softmax_top_k": keys.take("enable_softmax_topk", bool, False),
            "depth": keys.take("xlora_depth", int, 1),
            "width": keys.take("xlora_size", int, 2048),
            "dropout": keys.take("xlora_dropout_p", float, 0.2),
            "scale": keys.take("global_scaling_weight", float, 1.0),
        }

    def parts_options(self, keys: Keys, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for number, part in enumerate(parts):
            if part["method"] != "lora":
                raise CheckpointError(
                    f"{keys.where}: adapter {number} is {part['method']}, and peft's X-LoRA blends only lora"
                )
        if (top := keys.take("top_k_lora", int, None)) is not None and top > len(parts):
            raise CheckpointError(f"{keys.where}: 'top_k_lora' is {top}, but there are {len(parts)} LoRAs")
        if keys.take("use_trainable_adapters", bool, False):
            keys.warn(
                "use_trainable_adapters: peft does not save the LoRAs that it also trains; those of the folders are "
                "used"
            )
        everywhere = [each for part in parts for each in (part, *part.get("overrides", {}).values())]
        if any(each.get("dropout") for each in everywhere):
            keys.warn(DROPOUT)
        return {"parts": list(parts)}

    def check(self, place: Place, error: type[CheckpointError] | type[ExportError], where: str = "") -> None:
        if place.site.role != "stack" and not is_one_of(place.site, (nn.Linear,)):
            raise error(
                f"{where}{place.site.path} is not a linear layer; peft and peftcore blend LoRAs of other layers "
                "differently"
            )

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        return {}

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        values = {}
        for ours, theirs, tensor in _layers(module):
            if found.has(theirs):
                values[ours] = found.take(theirs, tensor.shape)
            else:
                found.wrong.append(LOST if theirs.startswith(f"{STEM}layers.0.") else f"missing {theirs}")
        return values

    def write_options(self, config: Any) -> dict[str, Any]:
        weights = config.weights or [1.0]
        if len(set(weights)) > 1:
            raise ExportError(
                f"peft has one weight for all LoRAs, but these have {weights}; set equal weights, or use peftcore's "
                "own format"
            )
        if len(config.parts) > MOST:
            raise ExportError(
                f"peft mixes up names of more than {MOST} LoRAs, and this adapter has {len(config.parts)}; use "
                "peftcore's own format"
            )
        top = config.top_k
        return {
            "use_trainable_adapters": config.train_parts,
            "layerwise_scalings": config.layerwise,
            "enable_softmax": config.softmax,
            "softmax_temperature": config.temperature,
            "top_k_lora": None if top is None or top >= len(config.parts) else top,
            "enable_softmax_topk": config.softmax_top_k,
            "xlora_depth": config.depth,
            "xlora_size": config.width,
            "xlora_dropout_p": config.dropout,
            "scaling_pass_value": 0.0,
            "global_scaling_weight": config.scale * weights[0],
        }

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        paths = [place.site.module_path for place in places if place.site.role != "stack"]
        for path in paths:
            if not path.startswith("model.") or path.startswith("model.model."):
                raise ExportError(
                    f"peft loads X-LoRA only if all LoRAs are below a module `model` of the model, and {path} is not; "
                    "use peftcore's own format"
                )
        [stack] = [place.site for place in places if place.site.role == "stack"]
        return {"hidden_size": stack.out_features}

    def part_differs(self, options: Mapping[str, Any]) -> str:
        other = [name for name, value in options.items() if name not in (*PLAIN, *PLACES) and value not in OFF]
        own = [] if options.get("init_lora_weights") is True else ["init_lora_weights"]
        return next(iter(other + own), "")

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        return {f"base_model.{theirs}": tensor for _, theirs, tensor in _layers(module)}


def _layers(classifier: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Returns our name and peft's name of each tensor of a classifier, and the tensor. peft has no layer for a dropout
    of zero, so that dropout is not counted in the numbers of layers."""
    names: list[tuple[str, str, Tensor]] = []
    number = 0
    for ours, layer in classifier.named_children():
        for leaf, tensor in layer.named_parameters():
            names.append((f"{ours}.{leaf}", f"{STEM}layers.{number}.{leaf}", tensor))
        number += not (isinstance(layer, nn.Dropout) and layer.p == 0.0)
    return names
