"""What K-Adapter's authors make of a small RoBERTa, in float64, all numbers waves, and at which layers of a large one
their scripts have adapters: ``python -m peftcore.testing.freeze k_adapter.py CHECKOUT``.

Their adapters are 768 wide; smaller ones of the same class take their places.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "microsoft/K-Adapter", "43651cd", "pytorch_transformers/my_modeling_roberta.py")
VERSIONS = ("torch",)
ABSENT = ("boto3", "botocore", "botocore.config", "botocore.exceptions", "six")
SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
SIZES |= {"max_position_embeddings": 16, "type_vocab_size": 1}
WITHOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PRETRAINING = ("sklearn", "sklearn.metrics", "tensorboardX", "utils_glue")
LAYERS = [0, 2]
SMALL = {"adapter_size": 4, "hidden_size": 4, "intermediate_size": 16, "num_attention_heads": 2, **WITHOUT}
IDS = [[8, 5, 3, 9, 4], [8, 10, 7, 6, 2]]


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[tuple[str, Tensor]], start: float) -> None:
    """Fill tensors in the order of their names."""
    for index, (_, tensor) in enumerate(sorted(tensors)):
        tensor.copy_(0.5 * wave(tensor, start + 0.37 * index))


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]


def adapted(module: Any, fusion: str, chains: Iterable[str]) -> Any:
    """Returns their RoBERTa with so many chains, in training."""
    config = module.RobertaConfig(vocab_size_or_config_json_file=11, **SIZES, **WITHOUT, layer_norm_eps=1e-5)
    config.output_hidden_states = True
    module.RobertaModel.from_pretrained = lambda *args, **kwargs: module.RobertaModel(config)
    whole = module.RobertaModelwithAdapter
    whole.load_pretrained_adapter = lambda self, chain, path: chain
    args = SimpleNamespace(adapter_size=4, adapter_list=LAYERS, adapter_skip_layers=0, adapter_transformer_layers=2)
    args.device, args.freeze_bert, args.freeze_adapter, args.fusion_mode = "cpu", False, False, fusion
    args.meta_fac_adaptermodel, args.meta_lin_adaptermodel = ("fac" in chains, "lin" in chains)
    model = whole(args)
    for index, name in enumerate(chains):
        chain = getattr(model, f"{name}_adapter")
        small = type("Small", (chain.adapter_config,), SMALL)
        chain.adapter = nn.ModuleList([module.Adapter(args, small) for _ in LAYERS])
        waves(chain.double().named_parameters(), 0.9 + index)
    waves(model.model.double().named_parameters(), 0.4)
    return model.double().train()


def package(checkout: Path) -> Any:
    """Returns their library as a package whose own imports do not run."""
    made: Any = ModuleType("pytorch_transformers")
    made.__path__ = [str(checkout / "pytorch_transformers")]
    sys.modules[made.__name__] = made
    return made


def pretraining(checkout: Path) -> tuple[Any, Any, Any]:
    """Returns the script that trains an adapter, the model that it reads, and the chain beside that."""
    their = package(checkout)
    modeling = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    config = modeling.RobertaConfig(vocab_size_or_config_json_file=11, **SIZES | {"hidden_size": 64}, **WITHOUT)
    modeling.RobertaModel.from_pretrained = lambda *args, **kwargs: modeling.RobertaModel(config)
    their.RobertaModel = modeling.RobertaModel
    their.RobertaTokenizer = their.AdamW = their.WarmupLinearSchedule = None
    script = load(checkout / "fac-adapter.py", root=checkout, absent=PRETRAINING)
    args = SimpleNamespace(adapter_size=768, adapter_list=[0, 1, 2], adapter_skip_layers=0)
    args.adapter_transformer_layers = 2
    model = script.PretrainedModel()
    return script, model, script.AdapterModel(args, config, 5)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the features ``[2, 5, 8]`` for both ways to join chains, and gradients of the words, and of the one chain
    and its linear layer, flat; and the numbers of layers by script for pre-training."""
    package(checkout)
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    found: dict[str, Any] = {}
    for fusion, chains in {"concat": ["fac"], "add": ["fac", "lin"]}.items():
        model = adapted(module, fusion, chains)
        own: dict[str, nn.Parameter] = {}
        if fusion == "concat":
            waves(model.task_dense_fac.named_parameters(), 0.2)
            own = {**dict(model.fac_adapter.named_parameters()), **dict(model.task_dense_fac.named_parameters())}
        (y,) = model(torch.tensor(IDS))
        (y.square() * wave(y, 0.3)).sum().backward()
        words = model.model.embeddings.word_embeddings.weight
        found[fusion] = {"output": rounded(y), "words": rounded(words.grad)}
        found[fusion]["gradients"] = {name: rounded(p.grad) for name, p in own.items()}
    found["layers"] = {}
    for script in sorted(checkout.glob("run_pretrain_*.sh")):
        if told := re.search(r'--adapter_list "([\d,]+)"', script.read_text(encoding="utf-8")):
            found["layers"][script.name] = [int(each) for each in told[1].split(",")]
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what tensors of a chain start from that is 768 wide beside a model that is 64 wide, by the names here;
    those of all transformer blocks together."""
    chain = pretraining(checkout)[2]
    adapters, names = list(chain.adapter), ("query", "key", "value")
    blocks = [block for adapter in adapters for block in adapter.encoder.layer]
    inner = [getattr(block.attention.self, name) for block in blocks for name in names]
    out = [block.attention.output.dense for block in blocks]
    found = {
        "down.weight": adapters[0].down_project.weight,
        "down.bias": torch.cat([adapter.down_project.bias for adapter in adapters]),
        "up.weight": adapters[0].up_project.weight,
        "up.bias": torch.cat([adapter.up_project.bias for adapter in adapters]),
        "qkv.weight": inner[0].weight,
        "out.weight": out[0].weight,
        "attention.bias": torch.cat([layer.bias for layer in (*inner, *out)]),
        "feed_forward.0.weight": blocks[0].intermediate.dense.weight,
        "feed_forward.0.bias": torch.cat([block.intermediate.dense.bias for block in blocks]),
        "feed_forward.2.weight": blocks[0].output.dense.weight,
        "norm1.weight": torch.cat([block.attention.output.LayerNorm.weight for block in blocks]),
        "norm1.bias": torch.cat([block.attention.output.LayerNorm.bias for block in blocks]),
        "norm2.weight": torch.cat([block.output.LayerNorm.weight for block in blocks]),
        "norm2.bias": torch.cat([block.output.LayerNorm.bias for block in blocks]),
        "joint.weight": chain.com_dense.weight,
    }
    return {name: drawn(tensor) for name, tensor in found.items()}


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns the names of what requires a gradient in the model, and of what their optimizer of the chain gets."""
    script, model, chain = pretraining(checkout)
    given: list[dict[str, Any]] = []

    class Made(Exception):
        """Their optimizer is made."""

    def optimizer(groups: list[dict[str, Any]], **words: Any) -> None:
        given.extend(groups)
        raise Made

    script.AdamW = optimizer
    args = SimpleNamespace(per_gpu_train_batch_size=1, n_gpu=0, local_rank=-1, max_steps=0)
    args.gradient_accumulation_steps = args.num_train_epochs = 1
    args.learning_rate, args.weight_decay, args.adam_epsilon = 5e-5, 0.0, 1e-8
    try:
        script.train(args, [0], [0], (model, chain), None)
    except Made:
        optimized = {id(p) for group in given for p in group["params"] if p.requires_grad}
    return {
        "model": [name for name, p in model.named_parameters() if p.requires_grad],
        "chain": sorted(name for name, p in chain.named_parameters() if id(p) in optimized),
    }


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command for pre-training, those that their chain has for all, and how their scripts
    for tasks join it."""
    told = flags((checkout / "run_pretrain_fac-adapter.sh").read_text(encoding="utf-8"))
    config = pretraining(checkout)[2].adapter[0].adapter_config
    task = (checkout / "examples/run_finetune_openentity_adapter.py").read_text(encoding="utf-8")
    fusion = re.search(r"'--fusion_mode', type=str, default='(\w+)'", task)
    assert fusion is not None and config.attention_probs_dropout_prob == config.hidden_dropout_prob
    return {
        "layers": [int(each) for each in str(told["adapter_list"]).strip("()").split(",")],
        "width": told["adapter_size"],
        "depth": told["adapter_transformer_layers"],
        "heads": config.num_attention_heads,
        "dropout": config.hidden_dropout_prob,
        "fusion": fusion[1],
    }
