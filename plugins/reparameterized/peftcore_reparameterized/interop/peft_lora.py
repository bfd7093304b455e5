"""LoRA, DoRA, aLoRA, BD-LoRA and MonteCLoRA in peft's files (checked against peft 0.21).

``lora_A`` and ``lora_B`` are our A and B; those of an embedding are called ``lora_embedding_A`` and
``lora_embedding_B``. Stacked experts lie side by side, A [experts * rank, in] and B [out, rank * experts]; a
convolution's B has a kernel of ones, and in a grouped one A reads all channels. A bias of B adds its share to the
module's own bias. Behind torch's attention peft adds the update twice, in its forward and when it merges, so there our
B is twice that of the file.

PiSSA and OLoRA: peft decomposes the base again when it loads such a file, so it means W - s B0 A0 + s B A, with the
product s B0 A0 that is the same for all who decompose exactly; ours has A0 and B0 of the host that it is loaded into.
They are written as plain LoRA of twice the rank, which is right on any base that is the same, as are CorDA and
LoRA-GA, whose start no file of peft's has. So is LoRA-XS, of its rank; what it freezes would train on there. EVA is
LoRA once it has started: its files are read as LoRA, and written so, with a rank and an alpha of each module. LoRA-One
is LoRA, too. KaSA's file means W without its smallest singular values, which peft takes away when it loads; it is
written as LoRA of twice the rank. DoRA beside PiSSA or OLoRA is DoRA of twice the rank: with B A and -B0 A0.

BD-LoRA: blocks lie one below the other, as ours. Peft's option says which factor has blocks, by parts of names; where
it names neither, the site is a plain LoRA, here one of a single block.

MonteCLoRA: ``std_prior`` and ``expert_weights_prior`` of peft's sampler are our t and p; what else it saves is its last
draw, which nothing needs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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
from peftcore.files.formats.peft_writing import is_parameter, module_key
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
MOST = 1000
"""The most ranges of layers that a file may name, and layers in each."""
AS_LORA = {"pissa": 2, "olora": 2, "kasa": 2, "corda": 2, "lora_ga": 2, "lora_xs": 1}
"""Methods that are written as LoRA, and how many times their rank."""
PROJECTIONS = {"batch_average_once": "first", "batch_average": "each", "random": "random"}
"""What peft calls the projections of VeLoRA."""
MINOR = (nn.Linear, Transposed, nn.Embedding)
"""The layers where peft has MiCA."""

_GENERATES = {"task_type": "CAUSAL_LM"}
"""What peft's file of an aLoRA says: no other of its models looks for the invocation."""
PACKED, BEHIND = "in_proj_weight", "out_proj.weight"
"""The tensors of torch's attention, of which peft adapts both."""
SAMPLER, PRIORS = "lora_monteclora_sampler", {"t": "std_prior", "p": "expert_weights_prior"}
"""MonteCLoRA's tensors in peft, by ours."""
DRAWS = ("gaussian_var_prior", "expert_weights")
SAMPLED = tuple(f"{SAMPLER}.{name}" for name in (*PRIORS.values(), *DRAWS))
MONTECLORA = {
    "samples": "num_samples",
    "sample_scale": "sample_scaler",
    "prior": "dirichlet_prior",
    "kl": "kl_loss_weight",
}
"""MonteCLoRA's options in peft, by ours."""
BLOCKS = ("target_modules_bd_a", "target_modules_bd_b")
"""Peft's lists of parts of names: where A is block diagonal, and where B is."""


class PeftLoRA(PeftMethod):
    """Translates low-rank factors, weight-decomposed or not."""

    methods = (
        "lora", "dora", "lora_plus", "alora", "eva", "lora_one", "mica", "velora", "bd_lora", "monteclora", *AS_LORA,
    )  # fmt: skip
    below = (
        "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
        "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_diag", "lora_velora_embed", *SAMPLED,
    )  # fmt: skip
    bias = "lora_only"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    taken_out: str | None = None
    """The start, in a file of DoRA, that took a part out of the base."""

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Returns other ranks and scales of some modules, and which factor of each is block diagonal."""
        found = super().changes(keys, paths)
        if told := keys.table("use_bdlora"):
            for path in paths:
                hit = {name: _names_part(told, name, path, keys) for name in BLOCKS}
                if all(hit.values()):
                    raise CheckpointError(f"{keys.where}: 'use_bdlora' has blocks in both factors of {path}")
                if told.get("match_strict", True) and not any(hit.values()):
                    raise CheckpointError(f"{keys.where}: 'use_bdlora' has no blocks for {path}, and match_strict")
                cut = {name: [path] if hit[name] else [] for name in BLOCKS}
                count = told.get("nblocks") if any(hit.values()) else 1
                found.setdefault(path, {})["use_bdlora"] = {**told, **cut, "nblocks": count}
        return found

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying")
        keys.pass_over("qalora_group_size", "layer_replication")
        start = keys.take("init_lora_weights", (bool, str), True)
        if isinstance(start, str) and start not in (*PLAIN_STARTS, *DECOMPOSED, "mica"):
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
        if told := keys.take("use_bdlora", dict, {}):
            keys.only("lora_bias", False)
            keys.only("init_lora_weights", True, False, *PLAIN_STARTS)
            inside = Keys(told, keys.where)
            inside.pass_over("match_strict", BLOCKS[1])
            options = {"blocks": inside.take("nblocks", int, 1), "cut_inputs": ["*"] if inside.names(BLOCKS[0]) else []}
            inside.check_known()
            options |= {"alpha": float(alpha), "scaling": "sqrt_rank" if rs else "rank", "dropout": dropout}
            return {"method": "bd_lora", "rank": rank, **options}
        if told := keys.take("monteclora_config", dict, {}):
            keys.only("lora_bias", False)
            keys.only("init_lora_weights", True, False, *PLAIN_STARTS)
            inside, defaults = Keys(told, keys.where), (8, 1e-4, 0.1, 1e-5)
            inside.pass_over("buffer_size")
            found = {mine: inside.take(name, type(default), default)
                     for (mine, name), default in zip(MONTECLORA.items(), defaults, strict=True)}  # fmt: skip
            found |= {"entropy": inside.take("use_entropy", bool, False), "alpha": float(alpha), "dropout": dropout}
            inside.check_known()
            return {"method": "monteclora", "rank": rank, "scaling": "sqrt_rank" if rs else "rank", **found}
        invocation = keys.take("alora_invocation_tokens", list, None)
        if invocation is not None:
            keys.only("lora_bias", False)
            keys.only("init_lora_weights", True, False, *PLAIN_STARTS)
            scaling = "sqrt_rank" if rs else "rank"
            options = {"rank": rank, "alpha": float(alpha), "scaling": scaling, "dropout": dropout}
            return {"method": "alora", "invocation": invocation, **options}
        groups = keys.take("velora_config", dict, None)
        if groups is not None:
            keys.only("lora_bias", False)
            keys.only("init_lora_weights", True, False, *PLAIN_STARTS)
            scaled = float(alpha * (math.sqrt(rank) if rs else 1))
            of = Keys(groups, keys.where)
            of.only("init_type", *PROJECTIONS)
            own = {
                "num_groups": of.take("num_groups", int, 64),
                "projection": PROJECTIONS[of.take("init_type", str, "batch_average")],
                "rebuilt_scale": float(of.take("scale", float, 1.0)),
            }
            of.check_known()
            return {"method": "velora", "rank": rank, "alpha": scaled, "dropout": dropout, **own}
        losses = keys.take("kasa_config", dict, None)
        if losses is not None:
            keys.only("lora_bias", False)
            keys.only("init_lora_weights", True, False, *PLAIN_STARTS)
            scaled = float(alpha * (math.sqrt(rank) if rs else 1))
            of = Keys(losses, keys.where)
            weights = {"beta": float(of.take("beta", float, 1e-4)), "gamma": float(of.take("gamma", float, 1e-3))}
            of.check_known()
            return {"method": "kasa", "rank": rank, "alpha": scaled, "dropout": dropout, **weights}
        if start in DECOMPOSED or start == "mica":
            keys.only("lora_bias", False)
            scaled = float(alpha * (math.sqrt(rank) if rs else 1))
            return {"method": start, "rank": rank, "alpha": scaled, "dropout": dropout}
        options = {"rank": rank, "alpha": float(alpha), "scaling": "sqrt_rank" if rs else "rank", "dropout": dropout}
        return {"method": "lora", **options, "across_groups": _in_groups(shapes)}

    def differs(self, place: Place) -> str:
        site = place.site
        if place.config.method == "bd_lora" and not is_one_of(site, (nn.Linear,)):
            return "factors in blocks, which it has in linear layers alone"
        if place.config.method == "monteclora" and not is_one_of(site, (nn.Linear,)):
            return "a sampler, which it has in linear layers alone"
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
        kinds = (nn.Linear,) if start == "kasa" else DECOMPOSED.get(start)
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
        if place.config.method == "velora":
            tensors["v"] = found.take("lora_velora_embed", operator.v.shape)
        if place.config.method == "kasa":
            tensors["d"] = found.take("lora_diag", operator.d.shape)
        if self.taken_out:
            A0, B0 = self._start(place, half)
            tensors = {"A": torch.cat([tensors["A"], A0]), "B": torch.cat([tensors["B"], -B0], -1)}
        if place.graft.operator.state_dict().keys() >= {"magnitude"}:
            name = "lora_magnitude_vector"
            name = name if found.has(name) else f"{name}.weight"
            size = operator.magnitude.shape
            tensors["magnitude"] = found.take(name, size, (1, *size, *ones), (*size, 1), (1, *size))
        if place.config.method == "monteclora":
            for mine, name in PRIORS.items():
                tensors[mine] = found.take(f"{SAMPLER}.{name}", operator.get_tensor(mine).shape)
            for name, shape in zip(DRAWS, ((A[0], A[0]), operator.p.shape), strict=True):
                found.take(f"{SAMPLER}.{name}", shape)
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
            **(_velora(config) if config.method == "velora" else {}),
            **_monteclora(config),
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
        minor = all(place.config.method == "mica" and _is_minor(place) for place in places)
        start = {"init_lora_weights": "mica"} if places and minor else {}
        ranges = list(replicated_layers(model).values())
        return {**_blocks_of(places), **start, **({"layer_replication": ranges[0]} if ranges else {})}

    def write(self, place: Place) -> dict[str, Tensor]:
        site, operator = place.site, place.operator
        A, B = operator.A.detach(), operator.B.detach()
        if place.config.method == "mica":
            A, B = _factors(place, place.config.rank)  # with zeros where the weight has not so many directions
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
        if place.config.method == "velora":
            tensors["lora_velora_embed"] = state["v"]
        if "magnitude" in state:
            size, ones = state["magnitude"].shape, [1 for _ in site.kernel]
            tensors["lora_magnitude_vector"] = state["magnitude"].view(1, *size, *ones) if ones else state["magnitude"]
        if place.config.method == "monteclora":
            draws = torch.eye(len(A), dtype=A.dtype), torch.full_like(operator.p, 1 / len(operator.p))
            tensors |= {f"{SAMPLER}.{name}": operator.get_tensor(mine) for mine, name in PRIORS.items()}
            tensors |= {f"{SAMPLER}.{name}": value for name, value in zip(DRAWS, draws, strict=True)}
        return tensors


def _velora(config: Any) -> dict[str, Any]:
    """Return what peft's file says of VeLoRA."""
    kind = next(name for name, own in PROJECTIONS.items() if own == config.projection)
    return {"velora_config": {"num_groups": config.num_groups, "init_type": kind, "scale": config.rebuilt_scale}}


def _is_minor(place: Place) -> bool:
    """Whether peft has MiCA at a place, with the rank that is said."""
    whole = not is_parameter(place.site) and place.site.tensor == "weight"
    return whole and is_one_of(place.site, MINOR) and place.operator.A.shape[0] == place.config.rank


def _monteclora(config: Any) -> dict[str, Any]:
    """Returns peft's option for MonteCLoRA; none for other methods."""
    if config.method != "monteclora":
        return {}
    told = {theirs: getattr(config, mine) for mine, theirs in MONTECLORA.items()}
    return {"monteclora_config": {**told, "use_entropy": config.entropy, "buffer_size": 150}}


def _names_part(told: Mapping[str, Any], key: str, path: str, keys: Keys) -> bool:
    """Whether one of peft's lists has a part of the path."""
    return any(part in path for part in Keys(told, keys.where).names(key))


def _blocks_of(places: Sequence[Place]) -> dict[str, Any]:
    """Returns peft's option for factors in blocks, which it has once for all modules."""
    blocks = {module_key(place.site): place.operator for place in places if place.config.method == "bd_lora"}
    counts = {each.blocks for each in blocks.values()} - {1}
    if not blocks:
        return {}
    if len(counts) > 1:
        raise ExportError(f"peft has one number of blocks, and here they are {sorted(counts)}")
    cut = [[path for path, each in blocks.items() if each.blocks > 1 and each.cut_A is side] for side in (True, False)]
    for path, each in blocks.items():
        hit = [any(part in path for part in names) for names in cut]
        if hit != [each.blocks > 1 and each.cut_A, each.blocks > 1 and not each.cut_A]:
            raise ExportError(f"peft knows modules by parts of their names, and others have one in common with {path}")
    return {
        "use_bdlora": {**dict(zip(BLOCKS, cut, strict=True)), "nblocks": max(counts, default=1), "match_strict": False}
    }


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
