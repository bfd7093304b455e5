"""LoRA, DoRA and aLoRA in peft's files (checked against peft 0.21).

``lora_A`` and ``lora_B`` are our A and B; those of an embedding are called ``lora_embedding_A`` and
``lora_embedding_B``. Stacked experts lie side by side, A [experts * rank, in] and B [out, rank * experts]; a
convolution's B has a kernel of ones, and in a grouped one A reads all channels. A bias of B adds its share to the
module's own bias. Behind torch's attention peft adds the update twice, in its forward and when it merges, so there our
B is twice that of the file.

PiSSA and OLoRA: peft decomposes the base again when it loads such a file, so it means W - s B0 A0 + s B A, with the
product s B0 A0 that is the same for all who decompose exactly; ours has A0 and B0 of the host that it is loaded into.
They are written as plain LoRA of twice the rank, which is right on any base that is the same. So is LoRA-XS, of its
rank; what it freezes would train on there. DoRA beside such a start is DoRA of twice the rank: with B A and -B0 A0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from peftcore.errors import CheckpointError, ExportError, HostMismatch, shown
from peftcore.files.formats.found import Found
from peftcore.files.formats.keys import Keys
from peftcore.files.formats.patterns import ending
from peftcore.files.formats.peft_layers import is_one_of, not_added
from peftcore.files.formats.peft_method import PeftMethod
from peftcore.files.formats.peft_writing import is_parameter
from peftcore.files.formats.places import Place
from peftcore.injection.replicated_layers import replicated_layers, runs
from peftcore.layers.kinds import Transposed
from peftcore.targets.sites import Site
from peftcore_reparameterized.lora import LoRA, scale_of
from peftcore_reparameterized.olora import OLoRA, OLoRAOperator
from peftcore_reparameterized.pissa import PiSSA, PiSSAOperator

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "lora_ga", "mini_lora")
DECOMPOSED = {"pissa": (nn.Linear, Transposed), "olora": (nn.Linear,)}
"""Starts that take a part out of the base, exactly, and the layers where peft can; our methods have the same names."""
STARTS = {"pissa": (PiSSAOperator, PiSSA.Config), "olora": (OLoRAOperator, OLoRA.Config)}
AS_LORA = {"pissa": 2, "olora": 2, "lora_xs": 1}
"""Methods that are written as LoRA, and how many times their rank."""
MOST = 1000
"""The most ranges of layers that a file may name, and layers in each."""

_GENERATES = {"task_type": "CAUSAL_LM"}
"""What peft's file of an aLoRA says: no other of its models looks for the invocation."""
PACKED, BEHIND = "in_proj_weight", "out_proj.weight"
"""The tensors of torch's attention, of which peft adapts both."""


class PeftLoRA(PeftMethod):
    """Translates low-rank factors, weight-decomposed or not."""

    methods = ("lora", "dora", "lora_plus", "alora", *AS_LORA)
    below = (
        "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
        "lora_magnitude_vector", "lora_magnitude_vector.weight",
    )  # fmt: skip
    bias = "lora_only"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    taken_out: str | None = None
    """The start, in a file of DoRA, that took a part out of the base."""

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying")
        keys.pass_over("qalora_group_size", "layer_replication")
        start = keys.take("init_lora_weights", (bool, str), True)
        if isinstance(start, str) and start not in (*PLAIN_STARTS, *DECOMPOSED):
            raise CheckpointError(
                f"{keys.where}: with init_lora_weights = {start!r} peft changes the base's weights when it loads; in "
                "peft, save with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        rank, alpha = keys.take("r", int, 8), keys.take("lora_alpha", float, 8)
        dropout = float(keys.take("lora_dropout", float, 0.0))
        if shapes.keys() & {"lora_embedding_A"}:
            dropout = 0.0  # tokens cannot be dropped in parts, and peft drops none
        keys.take("lora_bias", bool, False)
        rs = keys.take("use_rslora", bool, False)
        if rank < 1:
            raise CheckpointError(f"{keys.where}: 'r' is {rank}, but a rank is 1 or more")
        if keys.take("use_dora", bool, False):
            keys.only("lora_bias", False)
            scaled = float(alpha * (math.sqrt(rank) if rs else 1))
            if start in DECOMPOSED:
                keys.warn(f"DoRA that started by {start} is DoRA of twice the rank; in training, its start trains on")
                self.taken_out, rank, scaled = start, 2 * rank, 2 * scaled
            return {"method": "dora", "rank": rank, "alpha": scaled, "dropout": dropout}
        invocation = keys.take("alora_invocation_tokens", list, None)
        if invocation is not None:
            keys.only("lora_bias", False)
            keys.only("init_lora_weights", True, False, *PLAIN_STARTS)
            scaling = "sqrt_rank" if rs else "rank"
            options = {"rank": rank, "alpha": float(alpha), "scaling": scaling, "dropout": dropout}
            return {"method": "alora", "invocation": invocation, **options}
        if start in DECOMPOSED:
            keys.only("lora_bias", False)
            scaled = float(alpha * (math.sqrt(rank) if rs else 1))
            return {"method": start, "rank": rank, "alpha": scaled, "dropout": dropout}
        options = {"rank": rank, "alpha": float(alpha), "scaling": "sqrt_rank" if rs else "rank", "dropout": dropout}
        return {"method": "lora", **options, "across_groups": _in_groups(shapes)}

    def differs(self, place: Place) -> str:
        site = place.site
        if is_parameter(site) or site.tensor != "weight":
            return ""
        if isinstance(site.module, _ConvNd):
            if site.module.groups > 1 and not getattr(place.config, "across_groups", False):
                if place.config.method == "lora":
                    return "groups, unless across_groups is set"
                return "groups, where it takes the norms of another product than it adds"
            if any(step > 1 and size > 1 for step, size in zip(site.module.dilation, site.kernel, strict=True)):
                return "a dilation, which its A has not"
        if "embed_scale" in site.module._buffers:  # peft scales what it adds to such a table, too
            return ""
        return not_added(site)

    def trains(self, keys: Keys, path: str) -> tuple[str, ...]:
        return (f"{path}.bias",) if keys.take("lora_bias", bool, False) else ()

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        site, operator = place.site, place.operator
        A, B = operator.A.shape, operator.B.shape
        ones = (1,) * len(site.kernel)
        start = self.taken_out or place.config.method
        kinds = DECOMPOSED.get(start)
        if kinds and not is_one_of(site, kinds):
            raise CheckpointError(f"{site.path} is none of the layers that peft decomposes for {start}")
        if self.taken_out:
            half = place.config.rank // 2
            A, B = Size([half, *A[1:]]), Size([*B[:-1], half])
        if site.layer.one_hot:
            tensors = {"A": found.take("lora_embedding_A", A), "B": found.take("lora_embedding_B", B)}
        elif site.batch:
            experts, out, rank = B
            turned = _turned(site)
            out, inputs = (A[-1], out) if turned else (out, A[-1])
            side_by_side = found.take("lora_B.weight", (out, rank, experts), (out, rank * experts))
            down = found.take("lora_A.weight", (experts, rank, inputs), (experts * rank, inputs))
            up = side_by_side.permute(2, 0, 1)
            tensors = {"A": up.mT, "B": down.mT} if turned else {"A": down, "B": up}
        else:
            tensors = {"A": found.take("lora_A.weight", A), "B": found.take("lora_B.weight", B, (*B, *ones))}
        if site.tensor == BEHIND:
            tensors["B"] = 2 * tensors["B"]
        if self.taken_out:
            A0, B0 = self._start(place, half)
            tensors = {"A": torch.cat([tensors["A"], A0]), "B": torch.cat([tensors["B"], -B0], -1)}
        if place.graft.operator.state_dict().keys() >= {"magnitude"}:
            name = "lora_magnitude_vector"
            name = name if found.has(name) else f"{name}.weight"
            size = operator.magnitude.shape
            tensors["magnitude"] = found.take(name, size, (1, *size, *ones), (*size, 1), (1, *size))
        return tensors

    def _start(self, place: Place, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors of what peft takes out of the weight, with the scale that the file has."""
        operator, options = STARTS[self.taken_out or ""]
        made = operator(replace(place.site, meta=False), options(rank=rank, alpha=place.config.alpha / 2))
        return made.A0, made.B0

    def replaced(self, place: Place, config: Mapping[str, Any], found: Found) -> Tensor:
        site = place.site
        here = LoRA.Config.model_validate(dict(config)).at(site.module_path)
        bias = replace(site, meta=False).weight().detach()
        return bias + scale_of(here) * found.take("lora_B.bias", bias.shape)

    def companions(self, keys: Keys, model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
        ranges = keys.take("layer_replication", list, None)
        if ranges and not runs(model, _as_ranges(ranges, keys)):
            raise HostMismatch(
                f"{keys.where}: the model runs its layers in the ranges {shown(ranges)}, and this one does not; call "
                f"peftcore.replicate_layers(model, {shown(ranges)}) first"
            )
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
                raise CheckpointError(f"{keys.where}: {path} is tied to a table of which other tokens train")
        return [("TRAINABLE_TOKENS", table) for table in tables.values()]

    def joined(self, others: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
        if any(kind != "TRAINABLE_TOKENS" for kind, _ in others):
            return None
        found = {name: table["token_indices"] for _, table in others for name in table["target_modules"]}
        return {"trainable_token_indices": found}

    def write_options(self, config: Any) -> dict[str, Any]:
        times, options = AS_LORA.get(config.method, 1), config.model_dump()
        return {
            "r": times * config.rank,
            "lora_alpha": times * config.alpha,
            "lora_dropout": options.get("dropout", 0.0),
            "use_dora": config.method == "dora",
            "use_rslora": options.get("scaling") == "sqrt_rank",
            "init_lora_weights": True,
            **({"alora_invocation_tokens": options["invocation"], **_GENERATES} if options.get("invocation") else {}),
        }

    def write_options_at(self, place: Place) -> dict[str, Any]:
        options, site = self.write_options(place.config), place.site
        if (is_parameter(site) or site.tensor != "weight") and (options["use_dora"] or options["lora_dropout"]):
            raise ExportError(f"{site.path}: peft has neither DoRA nor dropout at parameters and in torch's attention")
        if site.layer.one_hot:
            del options["lora_dropout"]  # which does nothing there
        return options

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        tensors = [(place.site.module_path, place.site.tensor) for place in places]
        for path, tensor in tensors:
            other = {PACKED: BEHIND, BEHIND: PACKED}.get(tensor)
            if other is not None and (path, other) not in tensors:
                raise ExportError(f"peft adapts all of {path}, and here {other} is left out")
        ranges = list(replicated_layers(model).values())
        return {"layer_replication": ranges[0]} if ranges else {}

    def write(self, place: Place) -> dict[str, Tensor]:
        site, operator = place.site, place.operator
        A, B = operator.A.detach(), operator.B.detach()
        if times := AS_LORA.get(place.config.method):
            A, B = _factors(place, times * place.config.rank)
        if site.tensor == BEHIND:
            B = B / 2
        if site.layer.one_hot:
            tensors = {"lora_embedding_A": A, "lora_embedding_B": B}
        elif site.batch:
            A, B = (B.mT, A.mT) if _turned(site) else (A, B)
            tensors = {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}
        else:
            tensors = {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *(1 for _ in site.kernel))}
        state = operator.state_dict()
        if "magnitude" in state:
            size, ones = state["magnitude"].shape, [1 for _ in site.kernel]
            tensors["lora_magnitude_vector"] = state["magnitude"].view(1, *size, *ones) if ones else state["magnitude"]
        return tensors


def _as_ranges(ranges: list[Any], keys: Keys) -> list[list[int]]:
    """Return the ranges of layers that peft's option has.

    Raises:
        CheckpointError: it holds something else, or more layers than there can be.
    """
    pairs = all(isinstance(each, list) and len(each) == 2 and all(type(n) is int for n in each) for each in ranges)
    if not pairs or len(ranges) > MOST or any(stop - start > MOST for start, stop in ranges):
        raise CheckpointError(f"{keys.where}: 'layer_replication' is {shown(ranges)}, expected pairs of numbers")
    return ranges


def _in_groups(shapes: Mapping[str, Size]) -> bool:
    """Whether the tensors are those of a grouped convolution: each output mixes some of the rank alone."""
    A, B = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
    return len(A) == len(B) > 2 and A[0] != B[1]


def _turned(site: Site) -> bool:
    """Whether peft takes inputs of a stack for outputs: it believes what a module declares, and Llama 4 does not."""
    return isinstance(site.layer, Transposed) and not getattr(site.module, "is_transposed", False)


def _factors(place: Place, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of what an operator adds, [*batch, rank, in, *kernel] and [*batch, out, rank]: with zeros
    where the weight has not so many directions."""
    A, B, _ = place.operator.factors()
    lacking, dim = rank - B.shape[-1], len(place.site.batch)
    more = A.new_zeros(*A.shape[:dim], lacking, *A.shape[dim + 1 :])
    return torch.cat([A, more], dim).detach(), torch.cat([B, B.new_zeros(*B.shape[:-1], lacking)], -1).detach()
