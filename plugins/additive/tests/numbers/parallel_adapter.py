"""What the encoder of RoBERTa in the code of the parallel adapter's authors gives with one beside its feed-forward, in
float64, on tensors of cosines: ``python -m peftcore.testing.freeze parallel_adapter.py CHECKOUT``.

Their transformers does not run here as a whole; the encoder needs of it only the activation.
"""

import logging
import sys
import textwrap
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source(
    "authors",
    "jxhe/unify-parameter-efficient-tuning",
    "3222ce2",
    "src/transformers/models/roberta/modeling_roberta.py",
)
VERSIONS = ("torch",)
ABSENT = ("transformers.activations", "transformers.file_utils", "transformers.modeling_outputs", "transformers.utils")
ABSENT += ("transformers.modeling_utils", "transformers.models.roberta.configuration_roberta")
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 1, "type_vocab_size": 1}
HOST: dict[str, Any] = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False}
HOST |= {"chunk_size_feed_forward": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TUNED: dict[str, Any] = {"attn_mode": "none", "attn_option": "none", "attn_composition": "add", "ffn_mode": "adapter"}
TUNED |= {"ffn_option": "parallel", "ffn_adapter_layernorm_option": "none", "ffn_bn": 5}
SCALES = {"4": 4.0, "learnable_scalar": "learned"}
"""Scales by their names, and by ours."""
INITS = {"lora": "lora", "bert": "normal"}
IDS = [[2, 5, 3, 9, 4], [4, 10, 7, 1, 1]]


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def authors(checkout: Path) -> tuple[Any, Any]:
    """Returns the module of RoBERTa and that of the adapter. Packages around the first are empty."""
    for name in ("transformers", "transformers.models", "transformers.models.roberta"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / "src" / name.replace(".", "/"))]
    sys.modules["transformers"].__dict__["RobertaConfig"] = SimpleNamespace
    petl = load(checkout / "petl" / "petl_factory.py", root=checkout)
    roberta = load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    roberta.ACT2FN = {"gelu": nn.functional.gelu}
    roberta.apply_chunking_to_forward = lambda forward, size, dim, x: forward(x)
    return roberta, petl


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns, by the scale, the output for two rows of five tokens, ``[2, 5, 8]``, and gradients of the adapters'
    tensors, flat."""
    roberta, _ = authors(checkout)
    found: dict[str, Any] = {}
    for scale in SCALES:
        config = SimpleNamespace(**SIZES, **HOST, **TUNED, ffn_adapter_scalar=scale, ffn_adapter_init_option="lora")
        model = nn.ModuleDict({"embeddings": roberta.RobertaEmbeddings(config)})
        model["encoder"] = roberta.RobertaEncoder(config)
        with torch.no_grad():
            for name, parameter in model.double().train().named_parameters():
                parameter.copy_(wave(parameter.shape, name))
        ids = torch.tensor(IDS)
        mask = (ids == 1)[:, None, None] * -10000.0  # as their models have it
        (y,) = model["encoder"](model["embeddings"](ids), mask, head_mask=[None, None], return_dict=False)
        (y.square() * wave(y.shape, "direction")).sum().backward()
        own = {name: p for name, p in model.named_parameters() if ".ef_" in name and p.grad is not None}
        found[scale] = {"output": rounded(y), "gradients": {name: rounded(p.grad) for name, p in own.items()}}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns, by the start, what an adapter of the width 64 on 800 numbers starts from."""
    _, petl = authors(checkout)
    found = {}
    for init in INITS:
        adapter = petl.Adapter_Layer(d_model=800, bottleneck=64, init_option=init, adapter_layernorm_option="none")
        found[init] = {name: drawn(each) for name, each in adapter.named_parameters()}
    return found


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command for XSum, and the non-linearity of their adapter."""
    told, (_, petl) = flags((checkout / "exps/run_xsum.sh").read_text()), authors(checkout)
    adapter = petl.Adapter_Layer(d_model=8, bottleneck=2)
    kinds = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Tanh: "tanh"}
    found = {"bottleneck": told["ffn_bn"], "scale": told["ffn_adapter_scalar"], "init": told["ffn_adapter_init_option"]}
    return found | {"activation": kinds[type(adapter.non_linear_func)]}


def trains(checkout: Path) -> dict[str, int]:
    """Returns what the lines of their wrapper leave to train of an encoder, with the names that their command gives:
    how many numbers."""
    roberta, _ = authors(checkout)
    config = SimpleNamespace(**SIZES, **HOST, **TUNED, ffn_adapter_scalar="4", ffn_adapter_init_option="lora")
    model = nn.ModuleDict({"encoder": roberta.RobertaEncoder(config)})
    command = flags((checkout / "exps/run_xsum.sh").read_text())
    told = SimpleNamespace(**TUNED, unfreeze_params=command["unfreeze_params"])
    text = (checkout / "petl/petl_enc_model.py").read_text()
    lines = text[text.index("        not_freeze_set = []") : text.index('        logger.info("already freezed')]
    own = SimpleNamespace(
        pretrained_model=model, check_params=lambda name, parts, all_match: any(x in name for x in parts)
    )
    space = {"args": told, "self": own, "logger": logging, "print": lambda *args: None}
    exec(compile(textwrap.dedent(lines), "petl_enc_model.py", "exec"), space)
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
