"""What the encoder of RoBERTa in the code of MAM's authors gives with a prefix in its attention and an adapter beside
its feed-forward, in float64, on tensors of cosines; what both start from, what trains, and the options of their script:
``python -m peftcore.testing.freeze mam_adapter.py CHECKOUT``.

Their transformers does not run here as a whole; the encoder needs of it only the activation.
"""

import sys
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
# The MAM adapter of their scripts.
TUNED: dict[str, Any] = {"attn_option": "concat", "attn_composition": "add", "ffn_mode": "adapter", "ffn_bn": 5}
TUNED |= {"ffn_option": "parallel", "ffn_adapter_layernorm_option": "none", "ffn_adapter_init_option": "lora"}
TUNED |= {"attn_bn": 3, "mid_dim": 6, "prefix_dropout": 0.0}
VARIANTS = {
    "network": {"attn_mode": "prefix", "ffn_adapter_scalar": "4"},
    "direct": {"attn_mode": "prefix_nomlp", "ffn_adapter_scalar": "4"},
    "learned": {"attn_mode": "prefix", "ffn_adapter_scalar": "learnable_scalar"},
}
IDS = [[2, 5, 3, 9, 4], [4, 10, 7, 1, 1]]


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def authors(checkout: Path) -> tuple[Any, Any]:
    """Returns the module of RoBERTa and that of the prefix. Packages around the first are empty."""
    for name in ("transformers", "transformers.models", "transformers.models.roberta"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / "src" / name.replace(".", "/"))]
    sys.modules["transformers"].__dict__["RobertaConfig"] = SimpleNamespace
    petl = load(checkout / "petl" / "petl_factory.py", root=checkout)
    roberta = load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    roberta.ACT2FN = {"gelu": nn.functional.gelu}
    roberta.apply_chunking_to_forward = lambda forward, size, dim, x: forward(x)
    return roberta, petl


def run(model: nn.ModuleDict) -> Tensor:
    """Returns the output for two rows of five tokens, and lets gradients flow."""
    ids = torch.tensor(IDS)
    mask = (ids == 1)[:, None, None] * -10000.0  # as their models have it
    state = model["prefix"](2, device="cpu")
    (y,) = model["encoder"](
        model["embeddings"](ids), mask, head_mask=[None, None], return_dict=False, prefix_state=state
    )
    (y.square() * wave(y.shape, "direction")).sum().backward()
    found: Tensor = y
    return found


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the output for two rows of five tokens, ``[2, 5, 8]``, of which two are padding, and gradients of the
    tensors that act, flat; in training, without dropout."""
    roberta, petl = authors(checkout)
    found = {}
    for variant, options in VARIANTS.items():
        config = SimpleNamespace(**SIZES, **HOST, **TUNED, **options)
        prefix = petl.Prefix if config.attn_mode == "prefix" else petl.PrefixDirectInit
        model = nn.ModuleDict({"embeddings": roberta.RobertaEmbeddings(config)})
        model["encoder"] = roberta.RobertaEncoder(config)
        model["prefix"] = prefix(config, config)
        with torch.no_grad():
            for name, parameter in model.double().train().named_parameters():
                parameter.copy_(wave(parameter.shape, name))
        y = run(model)
        own = {n: p for n, p in model.named_parameters() if (".ef_" in n or "prefix." in n) and p.grad is not None}
        found[variant] = {"output": rounded(y), "gradients": {name: rounded(p.grad) for name, p in own.items()}}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of the prefix of 30 layers 300 wide are drawn from, 200 long, by a network 200 wide (and
    its first bias by one 20000 wide), and those of an adapter from 300 features to 150, by the options of their
    script."""
    _, petl = authors(checkout)
    made = {}
    for layers, width in ((30, 200), (1, 20000)):
        sizes = {**SIZES, "hidden_size": 300, "num_hidden_layers": layers, "attn_bn": 200, "mid_dim": width}
        config = SimpleNamespace(**sizes, prefix_dropout=0.0)
        made[layers] = petl.Prefix(config, config)
    told = script(checkout)
    adapter = petl.Adapter_Layer(
        d_model=300,
        bottleneck=150,
        init_option=told["ffn_adapter_init_option"],
        adapter_scalar=str(told["ffn_adapter_scalar"]),
        adapter_layernorm_option=told["ffn_adapter_layernorm_option"],
    )
    names = [name for name, _ in made[30].named_parameters() if name.startswith(("wte.", "control_trans."))]
    own = {name: made[1 if name == "control_trans.0.bias" else 30].get_parameter(name) for name in names}
    found = {f"prefix.{name}": drawn(each) for name, each in own.items()}
    return found | {name: drawn(each) for name, each in adapter.named_parameters()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train and have a gradient, by name, of the model that their code makes of an encoder:
    it has networks besides for a decoder."""
    roberta, petl = authors(checkout)
    config = SimpleNamespace(**SIZES, **HOST, **TUNED, attn_mode="prefix", ffn_adapter_scalar="4")
    base = nn.ModuleDict({"embeddings": roberta.RobertaEmbeddings(config), "encoder": roberta.RobertaEncoder(config)})
    vars(sys.modules["transformers"])["PreTrainedModel"] = type(
        "PreTrainedModel", (nn.Module,), {"__init__": lambda self, config: nn.Module.__init__(self)}
    )
    sys.modules["petl.petl_factory"] = petl
    whole = load(checkout / "petl/petl_enc_model.py", root=checkout)
    unfreeze_params = script(checkout)["unfreeze_params"]
    made = whole.PETLEncModel(config, SimpleNamespace(**vars(config), unfreeze_params=unfreeze_params), base)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(wave(parameter.shape, name))
    model = nn.ModuleDict({**dict(base.items()), "prefix": made.prompt_model})
    run(model)
    own = {name: each for name, each in model.named_parameters() if each.requires_grad and each.grad is not None}
    return {name: each.numel() for name, each in own.items()}


def script(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script for summaries, without what it has for the debugger."""
    return flags((checkout / "exps/run_xsum.sh").read_text())


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script for summaries, and of their arguments what it leaves."""
    told, own = script(checkout), load(checkout / "petl/options.py", root=checkout).TuneArguments()
    return {
        "prefix_length": told["attn_bn"],
        "prefix_mid_dim": told["mid_dim"],
        "prefix_dropout": told.get("prefix_dropout", own.prefix_dropout),
        "ffn_bottleneck": told["ffn_bn"],
        "ffn_scale": float(told["ffn_adapter_scalar"]),
    }


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]
