"""LoRA in peft's files (checked against peft 0.21): the translation shared by all variants, and the choice of a
variant.

A file is read as the first variant that its options mark. Options of a second variant are refused as unknown. When an
adapter is written, the name of its method selects the variant. Other plugins register a `LoRAVariant` under
``"peft/LORA/NAME"`` in the hook `peftcore_translations`.

If the file has a bias of B, this bias is multiplied by the scale and added to the bias of the module.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Size, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from peftcore.author.formats import (
    Found,
    Keys,
    PeftMethod,
    Place,
    ending,
    imported,
    is_parameter,
    not_added,
    peft_variants,
)
from peftcore.errors import CheckpointError, ExportError
from peftcore_reparameterized.interop.peft_lora import (
    alora,
    bd_lora,
    decomposed,
    dora,
    kasa,
    layouts,
    mica,
    monteclora,
    plain,
    velora,
)
from peftcore_reparameterized.interop.peft_lora.layer_replication import check_replication, written_replication
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant
from peftcore_reparameterized.lora import LoRA, scale_of

VARIANTS: tuple[type[LoRAVariant], ...] = (
    decomposed.DoRABesidePiSSA,
    decomposed.DoRABesideOLoRA,
    dora.DoRAVariant,
    bd_lora.BDLoRAVariant,
    monteclora.MonteCLoRAVariant,
    alora.ALoRAVariant,
    velora.VeLoRAVariant,
    kasa.KaSAVariant,
    decomposed.PiSSAVariant,
    decomposed.OLoRAVariant,
    mica.MiCAVariant,
    plain.DataStartVariant,
    plain.LoRAXSVariant,
)
"""The variants of this plugin, in the order in which their options are checked. A file that matches none is plain
LoRA."""


class PeftLoRA(PeftMethod):
    """Translates low-rank factors, by the variant of LoRA that the options mark."""

    methods = (*plain.PlainVariant.writes, *(name for each in VARIANTS for name in each.writes))
    below = (*layouts.FACTORS, *(name for each in VARIANTS for name in each.below))
    bias = "lora_only"
    ties = "ensure_weight_tying"
    advice: ClassVar[Mapping[str, str]] = {
        "bias": 'apply ["lora", "bitfit"]: bitfit trains the biases',
        "use_rslora": 'use scaling="sqrt_rank"',
        "init_lora_weights": 'use the method for it, such as "pissa", "olora" or "loftq"',
        "megatron_config": "leave it out: peftcore finds parallel layers by their structure",
        "megatron_core": "leave it out: peftcore finds parallel layers by their structure",
        "trainable_token_indices": 'apply ["lora", {"method": "trainable_tokens", "token_indices": [...]}]',
        "loftq_config": 'use the method "loftq"',
        "eva_config": 'use the method "eva"',
        "corda_config": 'use the method "corda"',
        "lora_ga_config": 'use the method "lora_ga"',
        "use_dora": 'use the method "dora"',
        "velora_config": 'use the method "velora"',
        "alora_invocation_tokens": 'use the method "alora"',
        "use_qalora": 'use the method "qa_lora"',
        "qalora_group_size": 'use the method "qa_lora"',
        "monteclora_config": 'use the method "monteclora"',
        "layer_replication": "call peftcore.replicate_layers(model, [...]) before it is adapted",
        "runtime_config": "leave it out: it has no counterpart here",
        "lora_bias": 'apply ["lora", "bitfit"]: bitfit trains the biases',
        "use_bdlora": 'use the method "bd_lora"',
        "arrow_config": 'call peftcore.gather(model, "arrow", {folder: 1.0, ...})',
        "kasa_config": 'use the method "kasa"',
        "num_samples": "use samples=",
        "sample_scaler": "use sample_scale=",
        "kl_loss_weight": "use kl=",
        "dirichlet_prior": "use prior=",
        "use_entropy": "use entropy=",
        "nblocks": "use blocks=",
    }
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

    def __init__(self) -> None:
        others: list[LoRAVariant] = [imported(place)() for place in peft_variants("LORA").values()]
        self.variants = [*(each() for each in VARIANTS), *others, plain.PlainVariant()]
        self.methods = (*type(self).methods, *(name for each in others for name in each.writes))
        self.below = (*type(self).below, *(name for each in others for name in each.below))
        self.in_file: LoRAVariant | None = None
        """The variant of the file that is being read. It is None until the file's options are read."""

    def _variant(self, place: Place) -> LoRAVariant:
        """Return the variant of the file that is being read, or, if an adapter is written, the variant for the method
        of a place."""
        name = place.config.method
        return self.in_file or next(each for each in self.variants if name in each.writes)

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("loftq_config", "eva_config", "corda_config", "lora_ga_config")
        keys.pass_over("qalora_group_size", "layer_replication")
        start = keys.take("init_lora_weights", (bool, str), True)
        if isinstance(start, str) and not any(start in each.starts for each in self.variants):
            raise CheckpointError(
                f"{keys.where}: with init_lora_weights = {start!r} peft changes the base's weights when it loads; save "
                "it in peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
            )
        rank, alpha = keys.take("r", int, 8), keys.take("lora_alpha", float, 8)
        dropout = float(keys.take("lora_dropout", float, 0.0))
        if layouts.TABLE_A in shapes:
            dropout = 0.0  # tokens cannot be dropped in parts, and peft drops none
        keys.take("lora_bias", bool, False)
        rs = keys.take("use_rslora", bool, False)
        if rank < 1:
            raise CheckpointError(f"{keys.where}: 'r' is {rank}, but a rank is 1 or more")
        variant = self.in_file = next(each for each in self.variants if each.marked(keys))
        if not variant.has_bias:
            keys.only("lora_bias", False)
        keys.only("init_lora_weights", True, False, *variant.starts)
        common = {"method": variant.reads, "rank": rank, "alpha": float(alpha), "dropout": dropout}
        if variant.has_scaling:
            common["scaling"] = "sqrt_rank" if rs else "rank"
        elif rs:
            common["alpha"] = float(alpha * math.sqrt(rank))
        return variant.options(keys, shapes, common)

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Returns the ranks and scales of modules that differ from the defaults, and the variant's options for each."""
        found = super().changes(keys, paths)
        own = self.in_file.changes(keys, paths) if self.in_file else {}
        for path, changed in own.items():
            found.setdefault(path, {}).update(changed)
        return found

    def differs(self, place: Place) -> str:
        if own := self._variant(place).differs(place):
            return own
        site = place.site
        if is_parameter(site) or site.tensor != "weight":
            return ""
        if isinstance(site.module, _ConvNd):
            across = getattr(place.config, "across_groups", None)
            if site.module.groups > 1 and across is None:
                return "groups, where it takes the norms of another product than it adds"
            if site.module.groups > 1 and not across:
                return "groups, unless across_groups is set"
            if any(step > 1 and size > 1 for step, size in zip(site.module.dilation, site.kernel, strict=True)):
                return "a dilation, which its A does not have"
        if "embed_scale" in site.module._buffers:  # peft scales what it adds to such a table, too
            return ""
        return not_added(site)

    def trains(self, keys: Keys, path: str) -> tuple[str, ...]:
        return (f"{path}.bias",) if keys.take("lora_bias", bool, False) else ()

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        variant = self._variant(place)
        return variant.read(place, found, layouts.read_factors(place.site, *variant.shapes(place), found))

    def replaced(self, place: Place, config: Mapping[str, Any], found: Found) -> Tensor:
        site = place.site
        here = LoRA.Config.model_validate(dict(config)).at(site.module_path)
        bias = replace(site, meta=False).weight().detach()
        return bias + scale_of(here) * found.take(layouts.BIAS, bias.shape)

    def companions(self, keys: Keys, model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
        check_replication(keys, model)
        tokens = keys.take("trainable_token_indices", (list, dict), None)
        if not tokens:
            return []
        if isinstance(tokens, list):
            return [("TRAINABLE_TOKENS", {"token_indices": tokens})]
        tables: dict[int, dict[str, Any]] = {}  # those that are tied have their rows in the file once, at the embedding
        modules = dict(model.named_modules(remove_duplicate=False))
        found = [(path, rows) for name, rows in tokens.items() for path in sorted(ending(modules, [name]))]
        for path, rows in sorted(found, key=lambda each: not isinstance(modules[each[0]], nn.Embedding)):
            table = {"token_indices": rows, "target_modules": [path]}
            if tables.setdefault(id(modules[path]._parameters.get("weight")), table)["token_indices"] != rows:
                raise CheckpointError(f"{keys.where}: {path} is tied to a table in which other tokens train")
        return [("TRAINABLE_TOKENS", table) for table in tables.values()]

    def joined(self, others: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
        if any(kind != "TRAINABLE_TOKENS" for kind, _ in others):
            return None
        found = {name: table["token_indices"] for _, table in others for name in table["target_modules"]}
        return {"trainable_token_indices": found}

    def write_options_at(self, place: Place) -> dict[str, Any]:
        site, config, variant = place.site, place.config, self._variant(place)
        options = {
            "r": variant.times * config.rank,
            "lora_alpha": variant.times * (config.rank if config.alpha is None else config.alpha),
            "lora_dropout": getattr(config, "dropout", 0.0),
            "use_dora": False,
            "use_rslora": getattr(config, "scaling", "rank") == "sqrt_rank",
            "init_lora_weights": True,
            **variant.write_options(config),
        }
        if (is_parameter(site) or site.tensor != "weight") and (options["use_dora"] or options["lora_dropout"]):
            raise ExportError(f"{site.path}: peft has neither DoRA nor dropout at parameters and in torch's attention")
        if site.layer.one_hot:
            del options["lora_dropout"]  # which does nothing there
        return options

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        layouts.check_attention([place.site for place in places])
        own = self._variant(places[0]).write_options_of_all(places) if places else {}
        return {**own, **written_replication(model)}

    def write(self, place: Place) -> dict[str, Tensor]:
        variant = self._variant(place)
        return {**layouts.write_factors(place.site, *variant.factors(place)), **variant.write(place)}
