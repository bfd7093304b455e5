"""The prompts that IDPG's authors make of texts, with gradients, on tensors of sines; their encoder runs whole:
``python -m peftcore.testing.freeze idpg.py CHECKOUT``."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "CSerxy/IDPG", "691b282", "fairseq/modules/transformer_sentence_encoder.py")
VERSIONS = ("torch",)
IDS = [[0, 7, 9, 4, 2], [0, 5, 8, 2, 1]]
NEEDED = {  # utils imports some of the modules, which import it
    "modules.gelu": ["gelu", "gelu_accurate"],
    "utils": [],
    "modules.layer_norm": ["LayerNorm"],
    "modules.layer_drop": ["LayerDropModuleList"],
    "modules.multihead_attention": ["MultiheadAttention"],
    "modules.learned_positional_embedding": ["LearnedPositionalEmbedding"],
    "modules.sinusoidal_positional_embedding": ["SinusoidalPositionalEmbedding"],
    "modules.positional_embedding": ["PositionalEmbedding"],
    "modules.transformer_sentence_encoder_layer": ["TransformerSentenceEncoderLayer"],
}


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


def on_the_cpu() -> None:
    """Let ``.to("cuda:0")``, which their code says, leave tensors where they are."""
    to = Tensor.to
    Tensor.to = lambda self, *args, **kwargs: self if args == ("cuda:0",) else to(self, *args, **kwargs)  # type: ignore


def only_what_it_needs(checkout: Path) -> None:
    """Let their packages import nothing by themselves, and have those names that the encoder asks for."""
    sys.path.insert(0, str(checkout))
    for name in ("fairseq", "fairseq.modules"):
        package = ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    modules = sys.modules["fairseq.modules"]
    for file, names in NEEDED.items():
        found = importlib.import_module(f"fairseq.{file}")
        vars(modules).update({name: getattr(found, name) for name in names})


def encoder(checkout: Path, phm: int | None, width: int = 8, rows: int = 3, hidden: int = 4, **more: Any) -> Any:
    """Returns their encoder, with so many rows made through a hidden width."""
    only_what_it_needs(checkout)
    numpy.float = float  # type: ignore[attr-defined]  # since gone
    module = load(checkout / SOURCE.script, root=checkout, absent=["fairseq.data"])
    sizes = {"num_encoder_layers": 1, "embedding_dim": width, "ffn_embedding_dim": 12, "num_attention_heads": 2}
    plain = {"num_segments": 0, "max_seq_len": 20, "use_position_embeddings": False}
    made = {
        "add_suffix": True,
        "suffix_len": rows,
        "phm_bottleneck_dim": hidden,
        "generation_layer": 2,
        "insert_position": 0,
    }

    class Narrow(module.TransformerSentenceEncoder):  # type: ignore[name-defined,misc]
        """It says 1024 for the width of what prompts are made of, whatever the width of the encoder."""

        generator_dim = property(lambda self: width, lambda self, value: None)

    model = Narrow(None, None, "roberta", 1, 11, **sizes, **plain, **made, **more, generation_quaternions=phm)
    return model.double().eval()


def filled(model: Any) -> dict[str, Tensor]:
    """Fill all tensors with sines, and return those of the network that makes rows, by name."""
    with torch.no_grad():
        for index, each in enumerate(model.parameters()):
            each.copy_(0.5 * wave(tuple(each.shape), 0.37 + 0.011 * index))
    return {name: each for name, each in model.named_parameters() if name.startswith("generation")}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns for either network the state of the first tokens, the rows, tensors and gradients; all flat."""
    on_the_cpu()
    found: dict[str, Any] = {}
    for name, phm in (("dnn", None), ("phm", 2)):
        model = encoder(checkout, phm)
        tensors, states = filled(model), []
        handle = model.layers[-1].register_forward_hook(lambda module, args, y, states=states: states.append(y[0]))
        (inner, *_), _ = model(torch.tensor(IDS))
        handle.remove()
        rows = inner.transpose(0, 1)[:, 1:4]  # [2, 3, 8]: behind the first token, before any layer
        gradients = torch.autograd.grad((rows * wave((2, 3, 8), 0.23)).sum(), list(tensors.values()))
        found[name] = {
            "summary": states[0][0].flatten().tolist(),
            "rows": rows.flatten().tolist(),
            "tensors": {key: each.flatten().tolist() for key, each in tensors.items()},
            "gradients": {key: each.flatten().tolist() for key, each in zip(tensors, gradients, strict=True)},
        }
    return found


def start(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns what tensors of either network start from, 400 rows in a width of 32, by their names: lists together."""
    found: dict[str, dict[str, Any]] = {}
    for name, phm in (("dnn", None), ("phm", 32)):
        parts: dict[str, list[Tensor]] = {}
        for key, each in encoder(checkout, phm, width=32, rows=400, hidden=12_800 if phm else 400).named_parameters():
            if key.startswith("generation"):
                parts.setdefault(re.sub(r"\.\d+$", "", key), []).append(each.flatten())
        found[name] = {key: drawn(torch.cat(each)) for key, each in parts.items()}
    return found


def command(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command for RTE."""
    return flags((checkout / "scripts/multi-suffix-rte_finetune-phm-p-layerb.sh").read_text(encoding="utf-8"))


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns the names of what gets gradients in the encoder with either network, where their command freezes it: two
    norms that it does not use are not frozen."""
    frozen = {"freeze_embeddings": command(checkout)["freeze-encoder"], "n_trans_layers_to_freeze": 1}
    on_the_cpu()
    found = {}
    for name, phm in (("dnn", None), ("phm", 2)):
        model = encoder(checkout, phm, **frozen)
        states, _ = model(torch.tensor(IDS))
        states[-1].square().sum().backward()
        found[name] = sorted(key for key, each in model.named_parameters() if each.grad is not None)
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of their script, of its command, and the dropout that their encoder has by itself."""
    script = (checkout / "IDPG-PHM.sh").read_text(encoding="utf-8")
    length, hidden = (re.search(rf'(?m)^{name}="(\d+)"', script) for name in ("suffixlen", "pdim"))
    assert length is not None and hidden is not None
    options = inspect.signature(type(encoder(checkout, None)).__mro__[1]).parameters
    dropout = options["generation_dropout"].default
    told = {"length": int(length[1]), "hidden": int(hidden[1]), "dropout": dropout}
    return {**told, "phm": command(checkout)["generation-quaternions"]}
