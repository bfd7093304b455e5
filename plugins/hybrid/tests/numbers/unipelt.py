"""What the encoder of BERT in the code of UniPELT's authors gives with LoRA, a prefix and an adapter behind gates, in
float64, on tensors of cosines; what these parts start from, what trains, and the options of their script:
``python -m peftcore.testing.freeze unipelt.py CHECKOUT``.

Their transformers does not run here as a whole; the encoder needs of it only the activation and their adapters.
"""

import ast
import functools
import re
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "morningmoni/UniPELT", "53d3c35", "transformers/models/bert/modeling_bert.py")
VERSIONS = ("torch",)
ABSENT = ("transformers.activations", "transformers.modeling_outputs", "transformers.utils")
ABSENT += ("transformers.models.bert.configuration_bert",)
BASES = {  # classes of which the file derives others that are not needed
    "transformers.file_utils": ["ModelOutput"],
    "transformers.modeling_utils": ["PreTrainedModel"],
    "transformers.adapters.heads": ["ModelWithFlexibleHeadsAdaptersMixin"],
    "transformers.adapters.model_mixin": [
        "InvertibleAdaptersMixin",
        "ModelAdaptersMixin",
        "ModelWithHeadsAdaptersMixin",
    ],
}
SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "type_vocab_size": 1}
HOST: dict[str, Any] = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False}
HOST |= {"chunk_size_feed_forward": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HOST |= {"initializer_range": 0.02}
TUNED: dict[str, Any] = {"add_lora": True, "lora_r": 3, "lora_alpha": 16, "add_enc_prefix": True, "prefix_len": 3}
TUNED |= {"mid_dim": 6, "drop_first_prefix_layers_enc": [], "add_central_gate": False}
TUNED |= {f"add_{part}_gate": True for part in ("lora", "prefix", "adapter")}
IDS = [[2, 5, 3, 9, 4], [4, 10, 7, 1, 6]]


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def authors(checkout: Path) -> Any:
    """Returns the module of BERT. Packages around it are empty."""
    for name in ("", ".adapters", ".adapters.models", ".models", ".models.bert"):
        package = ModuleType(f"transformers{name}")
        package.__path__ = [str(checkout / package.__name__.replace(".", "/"))]
        sys.modules[package.__name__] = package
    for name, bases in BASES.items():
        sys.modules[name] = MagicMock(**{base: type(base, (), {}) for base in bases})
    bert = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    bert.ACT2FN = {"gelu": nn.functional.gelu}
    bert.apply_chunking_to_forward = lambda forward, size, dim, x: forward(x)
    return bert


def built(checkout: Path, reduction: int = 2, **changes: Any) -> tuple[nn.ModuleDict, list[str]]:
    """Returns embeddings and encoder, which start as the model's own do, with an adapter; and the names of what is
    added to BERT."""
    bert = authors(checkout)
    from transformers.adapters.composition import Stack  # type: ignore[attr-defined]
    from transformers.adapters.configuration import PfeifferConfig  # type: ignore[attr-defined]

    config = SimpleNamespace(**{**SIZES, **HOST, **TUNED, **changes})
    adapter = {"own": PfeifferConfig(reduction_factor=reduction)}
    config.adapters = SimpleNamespace(get=adapter.get, active_setup=Stack("own"), skip_layers=None)
    model = nn.ModuleDict({"embeddings": bert.BertEmbeddings(config), "encoder": bert.BertEncoder(config)})
    model.apply(functools.partial(bert.BertPreTrainedModel._init_weights, SimpleNamespace(config=config)))
    bare = set(dict(model.named_parameters()))
    model["encoder"].add_adapter("own")
    added = [name for name, _ in model.named_parameters() if name not in bare or "prefix" in name or "lora" in name]
    return model, added


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the output for two rows of five tokens without padding, ``[2, 5, 8]``, and gradients of all tensors that
    are added to BERT, flat; in training, without dropout."""
    model, added = built(checkout)
    with torch.no_grad():
        for name, parameter in model.double().train().named_parameters():
            parameter.copy_(wave(parameter.shape, name))
    (y,) = model["encoder"](model["embeddings"](torch.tensor(IDS)), head_mask=[None, None], return_dict=False)
    (y.square() * wave(y.shape, "direction")).sum().backward()
    return {"output": rounded(y), "gradients": {name: rounded(model.get_parameter(name).grad) for name in added}}


def kind(name: str) -> str:
    """Returns a name without the number of the layer."""
    return re.sub(r"^encoder\.layer\.\d+\.", "", name)


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors that are added to 40 layers 300 wide are drawn from, all layers together: at rank 100,
    with adapters 150 wide, and a prefix 200 long that a network 200 wide makes."""
    sizes = {"num_hidden_layers": 40, "hidden_size": 300, "lora_r": 100, "prefix_len": 200, "mid_dim": 200}
    model, added = built(checkout, **sizes)
    found: dict[str, list[Tensor]] = {}
    for name in added:
        found.setdefault(kind(name), []).append(model.get_parameter(name).detach().flatten())
    return {name: drawn(torch.cat(parts)) for name, parts in found.items()}


def parts(path: Path, names: set[str]) -> dict[str, Any]:
    """Returns functions and classes of one of their files, which imports what is not here."""
    every = ast.walk(ast.parse(path.read_text()))
    found: list[Any] = [each for each in every if getattr(each, "name", "") in names]
    space: dict[str, Any] = {"dataclass": dataclass, "field": field, "Optional": Optional}
    exec(compile(ast.Module(found, []), str(path), "exec"), space)
    return space


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train, by name, where their script trains adapters, and a prefix and LoRA are there."""
    model, _ = built(checkout)
    freeze = parts(checkout / "transformers/adapters/model_mixin.py", {"freeze_model"})["freeze_model"]
    whole = MagicMock(base_model=model, encoder=model["encoder"], config=SimpleNamespace(tune_bias=False))
    whole.freeze_model = functools.partial(freeze, whole)
    mixin = sys.modules["transformers.adapters.models.bert"].BertModelAdaptersMixin
    mixin.train_adapter(whole, ["own"])
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script, and of their configuration of the adapter."""
    authors(checkout)
    from transformers.adapters.configuration import PfeifferConfig  # type: ignore[attr-defined]

    arguments = parts(checkout / "run_glue.py", {"ModelArguments"})["ModelArguments"]
    told = {each.name: each.default for each in fields(arguments)}
    names = {"rank": "lora_r", "prefix_length": "prefix_len", "prefix_mid_dim": "mid_dim"}
    return {ours: told[name] for ours, name in names.items()} | {"adapter_reduction": PfeifferConfig().reduction_factor}


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]
