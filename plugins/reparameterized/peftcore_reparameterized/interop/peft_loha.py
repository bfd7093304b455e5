"""LoHa in peft's files (checked against peft 0.21).

Tensors with the ending ``_a`` are peftcore's B1 and B2, and those with ``_b`` are A1 and A2. If kernels are factored,
the ``_a`` tensors have the shape ``[rank, out]``. In a one-dimensional convolution, the cores ``hada_t1`` and
``hada_t2`` have an additional last dimension of size 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place
from peftcore.errors import ExportError


class PeftLoHa(PeftMethod):
    """Translates the low-rank Hadamard product."""

    methods = ("loha",)
    below = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    adds = True
    advice: ClassVar[Mapping[str, str]] = {
        "use_effective_conv2d": "use tucker=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        return {
            "method": "loha",
            "rank": keys.take("r", int, 8),
            "alpha": float(keys.take("alpha", float, 8)),
            "tucker": keys.take("use_effective_conv2d", bool, False),
            "rank_dropout": float(keys.take("rank_dropout", float, 0.0)),
            "rank_dropout_scale": True,
            "module_dropout": float(keys.take("module_dropout", float, 0.0)),
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        held, tensors = place.operator.state_dict(), {}
        for number in "12":
            A, B, T = (f"{name}{number}" for name in "ABT")
            tensors[A] = found.take(f"hada_w{number}_b", held[A].shape)
            if T in held:
                tensors[B] = found.take(f"hada_w{number}_a", held[B].mT.shape).mT
                tensors[T] = found.take(f"hada_t{number}", held[T].shape, (*held[T].shape, 1))
            else:
                tensors[B] = found.take(f"hada_w{number}_a", held[B].shape)
        return tensors

    def write_options(self, config: Any) -> dict[str, Any]:
        if config.rank_dropout and not config.rank_dropout_scale:
            raise ExportError("peft's LoHa always rescales after rank_dropout: set rank_dropout_scale=True")
        return {
            "r": config.rank,
            "alpha": config.alpha,
            "use_effective_conv2d": config.tucker,
            "rank_dropout": config.rank_dropout,
            "module_dropout": config.module_dropout,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        held, tensors = place.operator.state_dict(), {}
        for number in "12":
            A, B, T = (held.get(f"{name}{number}") for name in "ABT")
            tensors[f"hada_w{number}_b"] = A
            tensors[f"hada_w{number}_a"] = B if T is None else B.mT.contiguous()
            if T is not None:
                tensors[f"hada_t{number}"] = T if T.dim() == 4 else T.unsqueeze(-1)
        return tensors
