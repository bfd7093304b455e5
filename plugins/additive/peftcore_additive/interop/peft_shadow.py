"""ShadowPEFT in peft's files, where it is named SHADOW (checked against peft 0.21).

``shadow_backbone`` is our guest network, ``shadow_projection`` its projection, and ``shadow_head`` the head that
classifies from its output. In models like GPT-2, peft stores an unused token table even if the guest shares the model's
table. peftcore ignores that table when it reads a file, and does not write it. The shadow update of the last block is
unused in peft too: peftcore ignores it, and writes zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, SavedSite, task_of
from peftcore.errors import CheckpointError, ExportError
from peftcore_additive.shadow import GuestLoss, ShadowOperator

BACKBONE, PROJECTION, HEAD = "shadow_backbone.default.", "shadow_projection.default.", "shadow_head.default."
NAMES = {f"{ours}.weight": f"shadow_{ours}.default.weight" for ours in ("down", "up")} | {
    f"{ours}.{layer}.{kind}": f"shadow_update_{ours}.default.{layer}.{kind}"
    for ours in ("transform", "gate")
    for layer in (0, 2)
    for kind in ("weight", "bias")
}
"""The names of a block's tensors in peft, by their names in peftcore."""
SIZES = {
    "shadow_hidden_size": "hidden_size",
    "shadow_num_attention_heads": "num_attention_heads",
    "shadow_intermediate_size": "intermediate_size",
}


class PeftShadow(PeftMethod):
    """Translates the guest network, and for each block the correction and the update of the shadow."""

    methods = ("shadow",)
    below = tuple(NAMES.values())
    root = (BACKBONE, PROJECTION, HEAD)
    advice: ClassVar[Mapping[str, str]] = {
        "shadow_alpha": "use scale=",
        "shadow_model": 'use sizes= of that network, then injection.shared["guest"].take(network)',
        "shadow_num_hidden_layers": "use layers=",
        "shadow_hidden_size": "use sizes=",
        "shadow_num_attention_heads": "use sizes=",
        "shadow_intermediate_size": "use sizes=",
        "share_embeddings": "use own_table=, the opposite",
        "update_hidden_size": "use update_width=",
        "auxiliary_loss_weight": "use guest_weight=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        if (named := keys.take("shadow_model", str, "mirror")) != "mirror":
            raise CheckpointError(
                f"{keys.where}: its shadow network is the checkpoint {named!r}, which peftcore does not download: "
                "apply shadow with sizes= of that network, and pass the network to "
                "injection.shared['guest'].take(network)"
            )
        sizes = {ours: keys.take(theirs, int, None) for theirs, ours in SIZES.items()}
        return {
            "method": "shadow",
            "rank": keys.take("r", int, 8),
            "scale": float(keys.take("shadow_alpha", float, 0.1)),
            "dropout": float(keys.take("shadow_dropout", float, 0.2)),
            "update_width": keys.take("update_hidden_size", int, None),
            "layers": keys.take("shadow_num_hidden_layers", int, 1),
            "sizes": {name: size for name, size in sizes.items() if size is not None},
            "own_table": not keys.take("share_embeddings", bool, True),
            "guest_weight": float(keys.take("auxiliary_loss_weight", float, 0.05)),
        }

    def selections(self, keys: Keys, sites: Sequence[SavedSite], model: nn.Module) -> dict[str, tuple[SavedSite, ...]]:
        return {"": tuple(site.model_copy(update={"role": "block"}) for site in sites)}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        if not isinstance(place.operator, ShadowOperator):
            return {}
        own = place.operator.state_dict()
        found.used.update(full for name, full in found.names.items() if name in NAMES.values())  # those of no effect
        return {ours: found.take(NAMES[ours], value.shape) for ours, value in own.items()}

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        own = {key: value.shape for key, value in module.state_dict().items()}
        unread = HEAD if name == "guest" else None  # of a head without a loss, and of a table that is the model's
        table = f"{BACKBONE}{module.table}.weight" if name == "guest" and not module.own_table else None
        found.used.update(
            full for key, full in found.names.items() if key == table or (unread and key.startswith(unread))
        )
        return {key: found.take(_theirs(name, key), shape) for key, shape in own.items()}

    def write_options(self, config: Any) -> dict[str, Any]:
        known = {ours: theirs for theirs, ours in SIZES.items()}
        if strange := sorted(set(config.sizes) - set(known)):
            raise ExportError(
                f"peft has no option for {strange[0]} of the guest network; its options are {', '.join(known)}"
            )
        return {
            "r": config.rank,
            "shadow_alpha": config.scale,
            "shadow_dropout": config.dropout,
            "update_hidden_size": config.update_width,
            "shadow_model": "mirror",
            "shadow_num_hidden_layers": config.layers,
            **{theirs: config.sizes.get(ours) for ours, theirs in known.items()},
            "share_embeddings": not config.own_table,
            "auxiliary_loss_weight": config.guest_weight,
        }

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        sites = [place.site for place in places if isinstance(place.operator, ShadowOperator)]
        depths = sorted(site.depth for site in sites)
        if depths != list(range(depths[0], depths[0] + len(depths))):
            raise ExportError(
                "peft's shadow needs consecutive blocks, but some blocks between the targets are left out"
            )
        targets = [site.module_path for site in sites]
        return {"target_modules": targets, "target_parameters": None, "task_type": task_of(model)}

    def write(self, place: Place) -> dict[str, Tensor]:
        if isinstance(place.operator, GuestLoss) and place.operator.head is not None:  # peft wants the model's, too
            return {name: value for name, value in place.site.module._parameters.items() if value is not None}
        if not isinstance(place.operator, ShadowOperator):
            return {}
        own = place.operator.state_dict()
        width, inner = place.site.width, place.config.update_width or place.config.rank
        shapes = {"0.weight": (inner, width), "0.bias": (inner,), "2.weight": (width, inner), "2.bias": (width,)}
        unread = {f"{each}.{name}": own["up.weight"].new_zeros(shape) for each in ("transform", "gate")
                  for name, shape in shapes.items()}  # fmt: skip
        return {theirs: (unread | own)[ours] for ours, theirs in NAMES.items()}

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        return {f"base_model.{_theirs(name, key)}": value for key, value in module.state_dict().items()}


def _theirs(name: str, key: str) -> str:
    """Returns the name in peft of a tensor of a shared module: the guest, its projection or its head."""
    if name == "head":
        return f"{HEAD}{key}"
    start, _, rest = key.partition(".")
    return f"{BACKBONE if start == 'network' else PROJECTION}{rest}"
