"""What a method does to a reference model, recorded by the surgeon and folded into one block: what `diagram` draws."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import peftcore
import snippets
from peftcore.authoring.branches import Bypass, is_post_norm
from peftcore.authoring.budgets import reference
from peftcore.contract.operators import Combiner, Operator, Replacement, WeightOperator
from peftcore.contract.surgeon_protocol import Graft, Surgeon
from peftcore.errors import ConfigError, PeftcoreError
from peftcore.injection.applying import record
from peftcore.injection.request import Request, host_map, resolve_method
from peftcore.roles import HostEntry, HostMap
from peftcore.roles.hostmap import part_roles
from peftcore.roles.vocabulary import FUSED_ROLES, OTHER
from peftcore.targets.sites import Site
from peftcore.utils.quiet import unlogged

HOSTS = ("Llama 2 7B", "BERT base", "ViT base", "T5 small", "CLIP text", "SD 1.5 UNet", "ResNet-50", "Mamba 130M")
HOSTS_OF: Mapping[str, tuple[str, ...]] = {
    "vision": ("ViT base", "CLIP vision", "CLIP text", "CLIP", *HOSTS),
    "diffusion": ("SD 1.5 UNet", "SDXL UNet", "CLIP text", "DiT-XL/2", *HOSTS),
}
"""In which reference model a method of a category is drawn: the first in which it has a place."""
STAGE = re.compile(r"(?:down_blocks|mid_block|up_blocks)\.(.+)")
"""What stands in all stages of a UNet is one box."""
SEQUENCE, FRAME = "sequence", "block"
"""What is marked besides the roles: the rows in front of the tokens, a block as a whole."""
ON_WEIGHT = "acts on the weight"
ACTS = (
    (Replacement, "trains in place"),
    (WeightOperator, ON_WEIGHT),
    (peftcore.author.AttentionOperator, "acts on queries, keys and values"),
    (peftcore.author.SequenceOperator, "adds vectors in front of the tokens"),
    (Bypass, "acts in parallel to the branch"),
    (peftcore.author.InputOperator, "changes what the model gets"),
    (Combiner, "weights the outputs of adapters"),
    (Operator, "acts on the output"),
)
"""By kind of operator, the narrow ones first."""


@dataclass(frozen=True)
class Key:
    """A box of the picture: a role, counted where a block has several (norms); a path where the map has no role."""

    role: str
    number: int = 0
    path: str = ""


@dataclass(frozen=True)
class Mark:
    """Something that a method put at a box: alike in all blocks that have it, but for sizes."""

    keys: frozenset[Key]
    kind: str
    """ "trains"; "acts", where its parameters are elsewhere; "reads"; "" of what is frozen."""
    name: str = ""
    act: str = ""
    shapes: tuple[str, ...] = ()
    sizes: int = 1
    """In how many sizes it is there."""


@dataclass(frozen=True)
class Drawn:
    """A method in a reference model."""

    host: str
    map: HostMap
    marks: tuple[Mark, ...]
    shared: tuple[Mark, ...]
    """What belongs to no place."""
    blocks: Mapping[str, tuple[int, int]]
    """By path of the block that stands for those alike: how many have marks, and how many there are."""
    post: Mapping[str, bool]
    """Whether norms stand behind the branches of such a block."""


@functools.cache
def host(name: str) -> tuple[nn.Module, HostMap]:
    """A reference model without values, and its map."""
    model = OWN[name]() if name in OWN else reference(name)
    if model is None:
        raise LookupError(f"{name} needs a library that is not installed")
    return model, host_map(model)


def vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        return CLIPVisionModelWithProjection(CLIPVisionConfig())


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    # The tower of texts is the larger one, so that it is drawn: methods in both put their prompts there.
    small = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(vision_config=small))


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


OWN = {"CLIP vision": vision, "CLIP": clip, "SDXL UNet": sdxl}
"""Not among the references of the core, whose tables of budgets have no place for them."""


@functools.cache
def drawn(name: str) -> Drawn:
    """A method in the first reference model in which it has a place.

    Raises:
        LookupError: it has a place in none.
    """
    cls = peftcore.method(name)
    reasons = []
    for each in HOSTS_OF.get(cls.tags.category, HOSTS):
        try:
            return folded(each, host(each)[1], recorded(name, each))
        except (PeftcoreError, LookupError) as error:
            reasons.append(f"{each}: {error}")
    raise LookupError(f"{name} has a place in no reference model: {'; '.join(reasons)}")


def recorded(name: str, where: str) -> Surgeon:
    """What a method would do, with its default options; with those of its example, where some have no default."""
    model, found = host(where)
    try:
        method, config = resolve_method(name, {})
    except ConfigError:
        method, config = resolve_method(name, snippets.options(peftcore.method(name)))
    with unlogged(), warnings.catch_warnings(action="ignore"):
        return record(Request(model, method, config, host=found), dry=True)


def folded(name: str, found: HostMap, surgeon: Surgeon) -> Drawn:
    """The grafts, without those that are like others in other blocks."""
    keys = keys_of(found)
    alike: dict[tuple[Any, ...], dict[tuple[Key, ...], list[Graft]]] = {}
    reads: set[Key] = set()
    touched: set[str] = set()
    for graft in surgeon.grafts:
        touched.update(entry.block for entry in found.at(graft.site.module_path) if entry.block is not None)
        shown = (called(graft), graft.part, *dict(trained(graft.operator)))
        alike.setdefault(shown, {}).setdefault(boxes_of(graft.site, found, keys), []).append(graft)
        apart = (
            each for each in graft.holders if each.form != graft.site.form and each.module is not graft.site.module
        )
        reads.update(*(boxes_of(site, found, keys) for site in apart))
    marks = [mark for places in alike.values() for mark in marks_of(places)]
    acting = frozenset(key for mark in marks for key in mark.keys)
    marks += [Mark(reads - acting, "reads")] if reads - acting else []
    blocks = counts(found, touched)
    post = {path: is_post_norm(surgeon.resolver, path) for path in blocks}
    return Drawn(name, found, tuple(marks), tuple(shared(surgeon)), blocks, post)


def marks_of(places: Mapping[tuple[Key, ...], list[Graft]]) -> Iterator[Mark]:
    """One mark for each size of the first places; boxes of one size share it."""
    by_size: dict[tuple[str, ...], list[tuple[Key, ...]]] = {}
    for keys, grafts in places.items():
        by_size.setdefault(sizes(grafts[0]), []).append(keys)
    for size, boxes in by_size.items():
        first = places[boxes[0]][0]
        number = len({sizes(each) for keys in boxes for each in places[keys]})
        act = next(words for kind, words in ACTS if isinstance(first.operator, kind))
        on_weight = first.site.form == "weight" and act == ACTS[-1][1]
        kind = "trains" if size else "acts"
        yield Mark(frozenset().union(*boxes), kind, called(first), ON_WEIGHT if on_weight else act, size, number)


def sizes(graft: Graft) -> tuple[str, ...]:
    """The shapes of what trains; the one of what trains in place needs no name."""
    found = shapes(trained(graft.operator))
    return tuple(each.removeprefix("value ") for each in found) if isinstance(graft.operator, Replacement) else found


def called(graft: Graft) -> str:
    """An operator's name without what all of them are called; of what trains in place, the tensor's."""
    if isinstance(graft.operator, Replacement):
        return graft.site.tensor.rpartition(".")[2]
    return type(graft.operator).__name__.removesuffix("Operator")


def trained(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((name, tuple(each.shape)) for name, each in module.named_parameters() if each.requires_grad)


def shapes(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[str, ...]:
    """Names and sizes; of long names the end."""
    texts = [(name, " × ".join(f"{n:,}" if n >= 100_000 else str(n) for n in shape) or "1") for name, shape in tensors]
    return tuple(f"{name if len(name) < 16 else '.'.join(name.split('.')[-2:])} {size}" for name, size in texts)


def shared(surgeon: Surgeon) -> Iterator[Mark]:
    """What several places use: of each class of the method's once, and of torch's each by its name."""
    alike: dict[str, list[nn.Module]] = {}
    for name, each in surgeon.owned.items():
        cls = type(each.module)
        own = not cls.__module__.startswith("torch.")
        alike.setdefault(cls.__name__ if own else name.rpartition("/")[2].partition("_")[0], []).append(each.module)
    for name, modules in alike.items():
        tensors = shapes(item for module in modules for item in trained(module))
        values = sum(parameter.numel() for module in modules for parameter in module.parameters())
        lines = tensors if len(tensors) <= 4 else (f"{values:,} parameters",)
        act = "shared" if tensors else "shared, frozen"
        yield Mark(frozenset(), "trains" if tensors else "", name, act, lines, len(modules))


def keys_of(found: HostMap) -> dict[tuple[str, str], Key]:
    """The box of each entry, by path and role."""
    numbers: dict[tuple[str | None, str], int] = {}
    keys = {}
    for entry in found.entries:
        counted = entry.role == "norm" and entry.block is not None
        number = numbers[entry.block, entry.role] = numbers.get((entry.block, entry.role), -1) + 1
        plain = "" if entry.role != OTHER else STAGE.sub(r"\1", re.sub(r"\.\d+", "", entry.path))
        keys[entry.path, entry.role] = Key(entry.role, number if counted else 0, plain)
    return keys


def boxes_of(site: Site, found: HostMap, keys: Mapping[tuple[str, str], Key]) -> tuple[Key, ...]:
    """The boxes of a site: several, where it is all of a fused weight."""
    if site.form == SEQUENCE:
        return (Key(SEQUENCE),)
    if site.slices is not None and site.role is not None:
        return (Key(site.role),)
    full = f"{site.module_path}.{site.tensor}".lstrip(".")
    entries = found.at(site.module_path) or found.at(full) or found.at(full.rpartition(".")[0])
    wanted = ("attn", "cross") if site.form == "attention" else (site.role,)
    entry = next((each for each in entries if each.role in wanted), entries[0])
    return tuple(map(Key, parts(entry))) if entry.role in FUSED_ROLES else (keys[entry.path, entry.role],)


def parts(entry: HostEntry) -> tuple[str, ...]:
    """The roles of the boxes of an entry: those of its parts, where it is a fused weight."""
    return tuple(sorted(part_roles(entry))) if entry.role in FUSED_ROLES else (entry.role,)


def counts(found: HostMap, touched: set[str]) -> dict[str, tuple[int, int]]:
    """Blocks of the main tower by kind: what roles they have."""
    kinds: dict[frozenset[str], list[str]] = {}
    tower = found.main_tower()
    for entry in found.entries:
        if entry.role == FRAME and entry.tower == tower:
            roles = frozenset(each.role for each in found.entries if each.block == entry.path) - {OTHER, "conv", FRAME}
            kinds.setdefault(roles, []).append(entry.path)
    return {
        next((path for path in paths if path in touched), paths[0]): (len(touched.intersection(paths)), len(paths))
        for paths in kinds.values()
    }
