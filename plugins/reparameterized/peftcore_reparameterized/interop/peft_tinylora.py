"""TinyLoRA in peft's files (checked against peft 0.21).

``tinylora_A``, ``tinylora_B`` and ``tinylora_P`` are peftcore's A, B and P. ``tinylora_v.0``, ``.1``, … are stored for
the whole adapter, and are the vectors of the groups. If a file lacks P (`save_projection` is false), P is drawn from
the seed, which gives the same P as in peft. peft treats embeddings as [num, dim]. So for an embedding, peft's A and B
are peftcore's B and A, and P is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place


class PeftTinyLoRA(PeftMethod):
    """Translates the vectors of groups, and the frozen factors on both sides of them."""

    methods = ("tinylora",)
    below = ("tinylora_A", "tinylora_B", "tinylora_P")
    root = ("tinylora_v.",)
    bias = "tinylora_only"
    kinds = (nn.Linear, nn.Embedding, Transposed)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "weight_tying": "use tying=",
        "save_projection": "use store_basis=",
        "init_v_bound": "leave it out: a fresh adapter starts as in its paper",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("init_v_bound")  # of a start other than zero
        return {
            "method": "tinylora",
            "rank": keys.take("r", int, 2),
            "u": keys.take("u", int, 64),
            "tying": float(keys.take("weight_tying", (int, float), 0.0)),
            "dropout": float(keys.take("tinylora_dropout", float, 0.0)),
            "projection_seed": keys.take("projection_seed", int, 42),
            "store_basis": keys.take("save_projection", bool, True),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        names, turned = ("A", "B"), place.site.layer.one_hot
        shapes = [place.operator.get_tensor(name).shape for name in names]
        if turned:
            values = [found.take(f"tinylora_{each}", shape[::-1]).mT for each, shape in zip("BA", shapes, strict=True)]
        else:
            values = [found.take(f"tinylora_{each}", shape) for each, shape in zip("AB", shapes, strict=True)]
        tensors = dict(zip(names, values, strict=True))
        if place.config.store_basis:
            P = found.take("tinylora_P", place.operator.P.shape)
            tensors["P"] = P.mT.contiguous() if turned else P
        return tensors

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        return {"v": found.take(f"tinylora_{name.replace('_', '.')}", module.get_parameter("v").shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "r": config.rank,
            "u": config.u,
            "weight_tying": config.tying,
            "tinylora_dropout": config.dropout,
            "projection_seed": config.projection_seed,
            "save_projection": True,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        A, B, P = place.operator.A, place.operator.B, place.operator.P
        if place.site.layer.one_hot:
            A, B, P = B.mT.contiguous(), A.mT.contiguous(), P.mT.contiguous()
        return {"tinylora_A": A, "tinylora_B": B, "tinylora_P": P}

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        return {f"base_model.tinylora_{name.replace('_', '.')}": module.get_parameter("v")}
