"""Translates soft prompts in folders of peft. Such a folder has one tensor for the whole adapter, and sizes of the host
in its options."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Size, nn

from peftcore.errors import CheckpointError, ExportError, HostMismatch, TargetError, UnsupportedSite
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.peft_method import PeftMethod
from peftcore.files.formats.peft_module_names import PREFIXES
from peftcore.files.formats.translated_operators import Place
from peftcore.forward.attention.attention_calls import locate_attention
from peftcore.injection.request import host_map
from peftcore.layers.layer import plain_class
from peftcore.registry.plugins import layer_of
from peftcore.surgery.defaults import default_sites
from peftcore.targets.resolver import Resolver
from peftcore.targets.sequence_sites import SequenceSite, locate_stack
from peftcore.targets.sites import Site

ROWS = "prompt_embeddings"
BOTH = "SEQ_2_SEQ_LM"
TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    BOTH: "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
}
"""Peft's task types. Each has the name of the mapping in which transformers lists the models for the task."""


class SoftPrompt(PeftMethod):
    """Base class for types of peft whose tensors extend the sequence instead of changing modules.

    For classification by an encoder, peft pools the first row of the prompt, and peftcore pools the first token.
    Therefore such prompts are refused.
    """

    stem = PREFIXES[-1]
    root: ClassVar[tuple[str, ...]] = (ROWS,)
    """Names of the type's tensors that belong to the whole adapter."""
    most_stacks: ClassVar[int] = 1
    """The largest number of stacks (encoder, decoder) that get a prompt: 2 if peft supports both."""

    def shared_options(self, keys: Keys) -> int:
        """Read the options that all soft prompts have. Returns the number of rows of the prompt."""
        keys.pass_over("token_dim", "num_layers", "num_attention_heads")
        halves(keys)
        length: int = keys.take("num_virtual_tokens", int)
        return length

    def check_rows(self, keys: Keys, shapes: Mapping[str, Size]) -> None:
        """Check that the prompt in the file has the number of rows that its options say.

        Raises:
            CheckpointError: the file has another number of rows.
        """
        rows = keys.take("num_virtual_tokens", int) * halves(keys)
        if ROWS in shapes and shapes[ROWS][0] != rows:
            raise CheckpointError(f"{keys.where} has {shapes[ROWS][0]} rows, but its options say {rows}")

    def stacks(self, keys: Keys, model: nn.Module, roles: Sequence[str] = ("stack",)) -> tuple[SavedSite, ...]:
        """Returns the stacks of blocks (encoder, decoder) that get the prompt, one for each of `roles`.

        Raises:
            HostMismatch: the host has other stacks, or peft and peftcore would compute different outputs with the
                prompt.
        """
        resolver = resolver_of(model)
        sites = [site for role in roles for site in _at(resolver, role)]
        if len(sites) != len(roles):
            paths = ", ".join(site.module_path for site in sites)
            raise HostMismatch(
                f"{keys.where} has a soft prompt for {len(roles)} stack(s) of blocks; this host has {paths or 'none'}"
            )
        for site in sites:
            stack = locate_stack(site, resolver).stack
            if keys.take("task_type", str, "") == "SEQ_CLS" and not stack.causal:
                raise HostMismatch(
                    f"{keys.where} is for classification by an encoder: peft pools the first row of the prompt instead "
                    "of the first token; peftcore does not support that"
                )
        return tuple(map(SavedSite.of, sites))

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        sites = [place.site for place in places]
        stacks = [site for site in sites if isinstance(site, SequenceSite)]
        task = task_of(model)
        if task is None:
            name = plain_class(model).__name__
            raise ExportError(f"peft has no task type for {name}, and needs one for a soft prompt")
        if task == "SEQ_CLS" and not all(site.stack.causal for site in stacks):
            raise ExportError("peft classifies by the first row of the prompt, peftcore by the first token")
        reading = sorted(site.stack.reads for site in stacks)
        if len(stacks) > self.most_stacks or reading != [False, True][: len(stacks)]:
            where = ", ".join(site.module_path for site in stacks)
            raise ExportError(
                f"peft has no prompts of this type for {where}: at most {self.most_stacks} stack(s), the encoder first"
            )
        heads, layers = _sizes(model, stacks[0].module_path) if stacks else (None, None)
        return {
            "task_type": task,
            "token_dim": stacks[0].out_features if stacks else None,
            "num_attention_heads": heads,
            "num_layers": layers,
            "num_transformer_submodules": len(stacks),
        }


def halves(keys: Keys) -> int:
    """Returns the number of stacks (encoder, decoder) for which peft has a prompt: 1 or 2.

    Raises:
        CheckpointError: the options have another number.
    """
    count: int = keys.take("num_transformer_submodules", int, 2 if keys.take("task_type", str, "") == BOTH else 1)
    if count not in (1, 2):
        raise CheckpointError(f"{keys.where}: 'num_transformer_submodules' is {count}, expected 1 or 2")
    return count


def task_of(model: nn.Module) -> str | None:
    """Returns peft's task type for a model of transformers, which decides how peft runs the model; None for other
    models."""
    return next((task for task, listed in TASKS.items() if is_listed(model, listed)), None)


def is_listed(model: nn.Module, *mappings: str) -> bool:
    """True if transformers lists the class of a model in one of these mappings of its Auto classes."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto") if "transformers" in sys.modules else None
    for listed in mappings if auto is not None else ():
        made = getattr(auto, listed).get(type(vars(model).get("config")), ())
        if issubclass(plain_class(model), made if isinstance(made, tuple) else (made,)):
            return True
    return False


def resolver_of(model: nn.Module) -> Resolver:
    """Returns a resolver of sites on a host."""
    return Resolver(model, host_map(model), layer_of)


def _at(resolver: Resolver, role: str) -> list[Site]:
    return default_sites(resolver, (role,)).sites


def _sizes(model: nn.Module, below: str) -> tuple[int | None, int | None]:
    """Returns the number of heads of each attention in a stack, and the number of attentions; None for both if they are
    unknown."""
    resolver = resolver_of(model)
    try:
        found = [site for site in resolver.sites("attn.core") if f"{site.module_path}.".startswith(f"{below}.")]
        return locate_attention(found[0], resolver).geometry.heads, len(found)
    except (TargetError, UnsupportedSite, IndexError):
        return None, None
