"""Recognizes configurations of peft, and has advice for users who write an option by its name in peft.

This module contains options that many methods of peft share. Options of a single method are in `PeftMethod.advice`, in
the plugin of that method.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping

from peftcore.contract.config import RESERVED
from peftcore.registry.plugins import imported, named_places

LAYERS = r'use target= with the numbers of the layers, target=r"re:.*layers\.[01]\..*q_proj"'
PASSED = {
    "adapter_name": "use name=",
    "base_model_name_or_path": "leave it out: the model is an argument of apply",
    "ensure_weight_tying": "leave it out: tied tables stay tied",
    "exclude_modules": "use exclude=",
    "fan_in_fan_out": "leave it out: peftcore finds how a layer stores its weight",
    "inference_mode": "leave it out: a loaded adapter is frozen",
    "init_weights": "leave it out: a fresh adapter starts as in its paper",
    "layers_pattern": LAYERS,
    "layers_to_transform": LAYERS,
    "modules_to_save": "use train=",
    "num_attention_heads": "leave it out: the model has the number of heads",
    "num_layers": "leave it out: the adapter acts in all layers of the model",
    "num_transformer_submodules": "leave it out: peftcore finds the stacks; target= chooses among them",
    "peft_type": "leave it out: the name of the method defines it",
    "target_modules": "use target=, with the same names",
    "target_parameters": "use target=, with the same names",
    "task_type": "leave it out: no task changes how a model is adapted",
    "token_dim": "leave it out: the model has the width",
}
"""Advice by option, for options that exist in peft but in no method of peftcore. Their values are an argument of
`apply`, or are determined by the model."""
RENAMED = (
    (r"r", "rank", "use rank="),
    (r"num_virtual_tokens", "length", "use length="),
    (r"\w+_alpha", "alpha", "use alpha="),
    (r"\w+_dropout", "dropout", "use dropout="),
    (r"(\w+)_pattern", r"\1", r'use overrides={"*.q_proj": {"\1": 4}}'),
)
"""Rules for options of peft that have another name in peftcore. Each rule is a pattern of the name in peft, the option
that the method of peftcore must have, and the advice."""


def is_peft_config(method: object) -> bool:
    """Whether an object is a configuration of peft. This does not import peft: if such an object exists, peft is
    already imported."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(method, peft.PeftConfig)


def peft_advice(method: str, option: str, options: Collection[str]) -> str | None:
    """Returns what to write instead of an option of peft, as advice for the user; None if there is no advice.

    Args:
        method: the name of the method.
        option: the name that the user wrote.
        options: the names of the method's own options.
    """
    own, others = _translations(method)
    if (text := _first(own, option, options)) or (text := PASSED.get(option)):
        return text
    for pattern, needed, text in RENAMED:
        if (found := re.fullmatch(pattern, option)) and found.expand(needed) in options:
            return found.expand(text)
    return _first(others, option, options)


def _translations(method: str) -> tuple[list[Mapping[str, str]], list[Mapping[str, str]]]:
    """Returns the advice of the configuration types of peft that represent the method, and then the advice of all other
    types."""
    places = named_places("peftcore_translations", "translation")
    kinds = [imported(place) for name, place in places.items() if re.fullmatch(r"peft/\w+", name)]
    own = [kind.advice for kind in kinds if method in kind.methods]
    return own, [kind.advice for kind in kinds if method not in kind.methods]


def _first(types: Iterable[Mapping[str, str]], option: str, options: Collection[str]) -> str | None:
    return next((each[option] for each in types if option in each and _applies(each[option], options)), None)


def _applies(text: str, options: Collection[str]) -> bool:
    """Whether the advice applies: if it says to use an option, the method must have that option."""
    named = re.match(r"use (\w+)=", text)
    return named is None or named[1] in options or named[1] in RESERVED
