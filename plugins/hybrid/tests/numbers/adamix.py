"""What RoBERTa with a head for classes gives in the code of AdaMix's authors, in training with its two passes and in
evaluation, on tensors of cosines, with draws that are written here; what its adapters start from, what their script
trains, and its options: ``python -m peftcore.testing.freeze adamix.py CHECKOUT``. Their divergences are in float32.

Their transformers does not run here as a whole; what RoBERTa's file takes of it is an activation and base classes.
"""

import ast
import functools
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "microsoft/AdaMix", "d361e9d", "src/transformers/models/roberta/modeling_roberta.py")
VERSIONS = ("torch",)
ABSENT = ("loralib", "transformers.modeling_outputs", "transformers.utils")
ABSENT += ("transformers.models.roberta.configuration_roberta",)
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_labels": 3}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 1, "type_vocab_size": 1}
HOST: dict[str, Any] = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False}
HOST |= {"chunk_size_feed_forward": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HOST |= {"apply_lora": False, "apply_adapter": False, "adapter_type": "none", "position_embedding_type": "absolute"}
HOST |= {"use_return_dict": True, "finetuning_task": "mnli", "initializer_range": 0.02}
TUNED = {"apply_expert_soup": True, "adapter_size": 5, "num_experts": 3, "inference_level": 3}
VARIANTS = {
    "up": {"sharing_up": 1, "sharing_down": 0},
    "down": {"sharing_up": 0, "sharing_down": 1},
    "none": {"sharing_up": 0, "sharing_down": 0},
}
DRAWS = [0, 2, 1, 2, 2, 1, 0, 0]
"""Down and up map of the first layer, of the second one; then those of the second pass."""
LARGE = ("classifier", "roberta.encoder.layer.0.output.ExpertSoup", "roberta.encoder.layer.1.output.ExpertSoup")
"""What has cosines four times as large, so that the passes differ."""
IDS = [[2, 5, 3, 9, 4], [4, 10, 7, 1, 1], [8, 3, 6, 2, 9]]
LABELS = [0, 2, 1]


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def module(name: str, **values: Any) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(values)


def dealt(draws: Iterator[int], low: int, high: int, size: tuple[int]) -> Tensor:
    return torch.tensor([next(draws) % high])


def undecorated(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda decorated: decorated


def authors(checkout: Path) -> Any:
    """Returns the module of RoBERTa. Packages around it are empty."""
    for name in ("transformers", "transformers.models", "transformers.models.roberta"):
        module(name, __path__=[str(checkout / "src" / name.replace(".", "/"))])
    gelu = nn.functional.gelu
    module("transformers.activations", ACT2FN={"gelu": gelu}, gelu=gelu, get_activation={"gelu": gelu}.get)
    documented = ("code_sample_docstrings", "start_docstrings", "start_docstrings_to_model_forward")
    names = [*(f"add_{name}" for name in documented), "replace_return_docstrings"]
    module("transformers.file_utils", **dict.fromkeys(names, undecorated))
    module(
        "transformers.modeling_utils",
        PreTrainedModel=nn.Module,
        apply_chunking_to_forward=lambda forward, size, dim, x: forward(x),
        find_pruneable_heads_and_indices=None,
        prune_linear_layer=None,
    )
    roberta = load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    roberta.SequenceClassifierOutput = SimpleNamespace
    return roberta


class Stack(nn.Module):
    """Their embeddings and encoder, as their RobertaModel runs them."""

    def __init__(self, roberta: Any, config: Any) -> None:
        super().__init__()
        self.embeddings, self.encoder = roberta.RobertaEmbeddings(config), roberta.RobertaEncoder(config)

    def forward(self, ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        mask = (1 - attention_mask)[:, None, None] * -10000.0  # as their models have it
        (y,) = self.encoder(self.embeddings(ids), mask, head_mask=[None, None], return_dict=False)
        return Output([y])


class Output(list[Tensor]):
    hidden_states = attentions = None


def built(roberta: Any, **changes: Any) -> tuple[nn.ModuleDict, Any]:
    """Returns their RoBERTa with a head for classes, and its configuration."""
    config = SimpleNamespace(**{**SIZES, **HOST, **TUNED, **changes})
    model = nn.ModuleDict({"roberta": Stack(roberta, config)})
    model["classifier"] = roberta.RobertaClassificationHead(config)
    return model, config


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns logits and loss in training, gradients of all adapters (0 where there is none), and logits in evaluation,
    flat."""
    roberta = authors(checkout)
    found = {}
    for variant, options in VARIANTS.items():
        model, config = built(roberta, **options, use_consistency_loss=1)
        with torch.no_grad():
            for name, parameter in model.double().train().named_parameters():
                if not name.endswith("expert_score_weight"):
                    parameter.copy_(wave(parameter.shape, name) * (4 if name.startswith(LARGE) else 1))
        ids = torch.tensor(IDS)
        given = {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": torch.tensor(LABELS)}
        whole = SimpleNamespace(**dict(model.items()), config=config, num_labels=3)
        with patch("torch.randint", functools.partial(dealt, iter(DRAWS))):
            trained = roberta.RobertaForSequenceClassification.forward(whole, **given)
        trained.loss.backward()
        own = {n: p.grad for n, p in model.named_parameters() if "ExpertSoup" in n and p.requires_grad}
        gradients = {n: [0.0] if grad is None else rounded(grad) for n, grad in own.items()}
        model.eval()
        evaluated = roberta.RobertaForSequenceClassification.forward(whole, **given)
        found[variant] = {
            "loss": rounded(trained.loss),
            "logits": rounded(trained.logits),
            "evaluated": rounded(evaluated.logits),
            "gradients": gradients,
        }
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what both maps of two copies are drawn from, between 400 features and 100, as the model starts all its
    layers."""
    roberta = authors(checkout)
    model, config = built(roberta, hidden_size=400, adapter_size=100, num_experts=2, **VARIANTS["none"])
    model.apply(functools.partial(roberta.RobertaPreTrainedModel._init_weights, SimpleNamespace(config=config)))
    soup = model["roberta"].encoder.layer[0].output.ExpertSoup
    found = {}
    for name, own in (("down", soup.MoA_A), ("up", soup.MoA_B)):
        found[name] = drawn(torch.stack([each.weight for each in own.deepspeed_experts]))
        found[f"{name}_bias"] = drawn(torch.stack([each.bias for each in own.deepspeed_experts]))
    return found


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train, by name, after the lines of their script that freeze all else."""
    model, _ = built(authors(checkout), **VARIANTS["up"])
    script = ast.parse((checkout / "examples/text-classification/run_glue.py").read_text())
    tests = "model_args.apply_expert_soup", "len(trainable_params) > 0"
    lines: list[Any] = [n for n in ast.walk(script) if isinstance(n, ast.If) and ast.unparse(n.test) in tests]
    told = SimpleNamespace(apply_expert_soup=True, expert_soup_path=None)
    around = {"model": model, "model_args": told, "trainable_params": [], "fixed_params": []}
    exec(compile(ast.Module(lines, []), "run_glue.py", "exec"), around)
    return {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script for RoBERTa; the loss of two passes has the weight 1 where it is on."""
    told = flags((checkout / "roberta_large_mnli_expert_soup.sh").read_text())
    return {
        "experts": told["num_experts"],
        "bottleneck": told["adapter_size"],
        "shared": {(1, 0): "up", (0, 1): "down", (0, 0): None}[told["sharing_up"], told["sharing_down"]],
        "consistency": float(told["use_consistency_loss"]),
    }


def rounded(tensor: Tensor) -> list[float]:
    return [round(each, 9) for each in tensor.flatten().tolist()]
