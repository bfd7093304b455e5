"""What prompt tuning's authors put in front of embedded tokens, of sines, how often a token is drawn for the start, and
what trains: ``python -m peftcore.testing.freeze prompt_tuning.py CHECKOUT``.

JAX does not run here. Their modules ask for little of it, which NumPy has under the same names.
"""

import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "google-research/prompt-tuning", "72285ee", "prompt_tuning/train/prompts.py")
VERSIONS = ("numpy",)
ABSENT = ("absl", "flax.traverse_util", "seqio", "t5x", "tensorflow", "tensorflow.io", "flaxformer", "flaxformer.types")
LENGTH, WIDTH, VOCABULARY = 4, 16, 40
IDS = [[5, 1, 3, 8, 30], [2, 9, 4, 0, 17]]


def wave(shape: Sequence[int], k: float) -> Tensor:
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * k + k).view(*shape)


class Module:
    """A module whose fields are its options."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(cls)


def stand_in(name: str, **functions: Any) -> Any:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(functions, __path__=[])
    return module


def authors(checkout: Path) -> tuple[Any, Any]:
    """Returns their module of prompts, and the one of prompts in training."""

    def param(name: str, start: Callable[..., Any], shape: Any, axes: Any) -> Any:
        return start(np.random.default_rng(0), shape)

    initializers = SimpleNamespace(uniform=lambda: None)
    partitioning = stand_in("flax.linen.partitioning", param_with_axes=param)
    linen = stand_in(
        "flax.linen", Module=Module, compact=lambda call: call, initializers=initializers, partitioning=partitioning
    )
    stand_in("flax", linen=linen)
    random = SimpleNamespace(choice=lambda rng, count, shape, replace: rng.choice(count, shape, replace))
    device = {"device_put": lambda array, where: array, "local_devices": lambda backend: [None]}
    sys.modules["jax.numpy"] = np
    stand_in("jax", numpy=np, random=random, **device)
    train = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    return train.prompts, train


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the rows ``[2, 9, 16]`` that the encoder reads."""
    prompts, train = authors(checkout)
    ids, table = np.array(IDS), wave((VOCABULARY, WIDTH), 0.29).numpy()
    given = prompts.from_array(wave((LENGTH, WIDTH), 0.41).numpy())
    prompt = train.Prompt(prompt=prompts.Prompt(length=LENGTH, prompt_init=given, dtype=np.float64))
    return {"rows": prompt(ids, table[ids]).flatten().tolist()}


def start(checkout: Path) -> dict[str, int]:
    """Returns how many tokens of 40 a fresh prompt of 40 has."""
    prompts, _ = authors(checkout)
    ids, table = np.array(IDS), wave((VOCABULARY, WIDTH), 0.29).numpy()
    fresh = prompts.Prompt(length=VOCABULARY, prompt_init=prompts.from_sample_of_embeddings(table), dtype=np.float64)
    drawn = {int(each) for each in (fresh(ids, table[ids])[:, None] == table[None]).all(-1).argmax(1)}
    return {"drawn": len(drawn)}


def defaults(checkout: Path) -> dict[str, int]:
    """Returns the rows of a prompt in their configuration of T5."""
    found = re.search(
        r"PROMPT_LENGTH = (\d+)", (checkout / "prompt_tuning/configs/models/t5_1_1_prompt.gin").read_text()
    )
    assert found
    return {"length": int(found[1])}


def trains(checkout: Path) -> list[str]:
    """Returns which of the names of a T5's parameters, and of its prompt, their optimizer takes.

    The names are those of transformers: what chooses is a pattern of theirs, and their T5 does not run here.
    """
    absent = (*ABSENT, "flax", "flax.optim", "jax", "jax.experimental")
    with patch.dict(sys.modules):
        utils = load(checkout / "prompt_tuning/train/utils.py", root=checkout, absent=absent)
    configs = checkout / "prompt_tuning/configs"
    model = (configs / "models/t5_1_1_prompt.gin").read_text()
    path = (configs / "extended/models/wayward_t5_1_1_prompt.gin").read_text()
    pattern, own = re.search(r"PROMPT_REGEX = (.*)", model), re.search(r'prompt_path = "(.*)"', path)
    assert pattern and own
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    host = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    names = [*(name.replace(".", "/") for name, _ in host.named_parameters()), own[1]]
    chosen = utils.match_any(ast.literal_eval(pattern[1]))
    return [name for name in names if chosen(f"/{name}", None)]
