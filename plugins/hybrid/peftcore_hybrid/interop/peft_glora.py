"""GLoRA in peft's files (checked against peft 0.21).

``glora_A`` to ``glora_E`` are the terms A to E of `glora`, stored as factors ``Xd`` and ``Xu``, or as ``X``; a term
that is left out is stored as ``zeros``. Peft has one option for A and B and one for D and E, and trains no bias terms
in layers without a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import ExportError

OPTION = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}
"""The option of peft that sets the kind of each term."""


class PeftGLoRA(PeftMethod):
    """Translates the terms A to E of a site's weight and bias."""

    methods = ("glora",)
    below = tuple(f"glora_{term}.{name}" for term in OPTION for name in ("Xd", "Xu", "X", "zeros"))
    kinds = (nn.Linear,)
    adds = True
    bias = "glora_only"
    advice: ClassVar[Mapping[str, str]] = {
        "config_A_B": "use A= and B=",
        "config_C": "use C=",
        "config_D_E": "use D= and E=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("init_weights")
        defaults = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}
        kinds = {term: keys.take(option, str, defaults[option]) for term, option in OPTION.items()}
        left_out = {term: "none" for term in OPTION if f"glora_{term}.zeros" in shapes}
        return {"method": "glora", "rank": keys.take("r", int, 8), **kinds, **left_out}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        tensors = {}
        for name, value in place.operator.named_parameters():
            term, _, up = name.partition("_")
            shape = tuple(value.shape)
            if up:
                tensors[name] = found.take(f"glora_{term}.Xu", shape)
            elif place.operator.has_factors(term):
                tensors[name] = found.take(f"glora_{term}.Xd", shape)
            else:
                tensors[name] = found.take(f"glora_{term}.X", shape, shape[:1])
        for term in OPTION:
            name = f"glora_{term}.zeros"
            if found.has(name) and found.take(name, found.shape(name)).any():
                found.wrong.append(f"{found.names[name]} is not zero")
        return tensors

    def write_options_at(self, place: Place) -> dict[str, Any]:
        config, found = place.config, {"r": place.config.rank}
        has_bias = place.site.module._parameters.get("bias") is not None
        for term, option in OPTION.items():
            kind = getattr(config, term)
            if term in "CDE" and not has_bias:
                if term in place.operator._parameters:
                    raise ExportError(
                        f"{place.site.path} has no bias, and peft does not add one: set C and E to 'none' for it"
                    )
                continue
            if found.setdefault(option, kind) != kind:
                raise ExportError(
                    f"peft has one {option} for all modules: {term} is {kind} here, but {found[option]} elsewhere"
                )
        return found

    def write(self, place: Place) -> dict[str, Tensor]:
        operator, shape = place.operator, place.site.weight_shape
        sizes = {"A": shape, "B": shape, "C": (shape[1], 1), "D": shape[:1], "E": shape[:1]}
        tensors: dict[str, Tensor] = {}
        for term, size in sizes.items():
            own = operator._parameters
            if term not in own:
                tensors[f"glora_{term}.zeros"] = place.site.weight().new_zeros(size)
            elif operator.has_factors(term):
                tensors |= {f"glora_{term}.Xd": own[term], f"glora_{term}.Xu": own[f"{term}_up"]}
            else:
                flat = term in "DE" or own[term].numel() == 1
                tensors[f"glora_{term}.X"] = own[term].flatten() if flat else own[term]
        return tensors
