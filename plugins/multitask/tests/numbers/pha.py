"""What the authors' encoder and decoder give for four texts of three tasks, with their two losses and the gradients of
all that trains, on tensors of sines; what they start from, what trains, and their options:
``python -m peftcore.testing.freeze pha.py CHECKOUT``."""

import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Block, T5LayerFF, T5Stack

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "Bumble666/PHA", "bbb4169", "modeling/adapter_t5.py")
VERSIONS = ("torch", "transformers")
TASKS = ["2", "0", "2", "1"]
IDS = [[5, 1, 3, 8], [2, 9, 4, 0], [7, 7, 1, 0], [3, 6, 0, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
ANSWERS = [[0, 4, 2], [0, 8, 5], [0, 1, 1], [0, 3, 9]]
SIZES = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": 2, "vocab_size": 10, "dropout_rate": 0.0}


class Stack(T5Stack):
    """The stack of transformers, made as it was made in the authors' version."""

    def __init__(self, config: Any, embed_tokens: Any = None) -> None:
        super().__init__(config)
        self.embed_tokens = embed_tokens


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


@torch.no_grad()
def waves(parameters: list[Any], first: float, size: float) -> None:
    """The first has a step of `first`, each next one of 0.003 more."""
    for index, each in enumerate(parameters):
        each.copy_(size * wave(*each.shape, step=first + 0.003 * index))


def thin(tensor: Tensor) -> list[float]:
    """Some numbers of a tensor, and its norm."""
    flat = tensor.detach().flatten()
    return [*flat[:: len(flat) // 16 | 1].tolist(), flat.norm().item()]


def parts(path: Path, names: set[str], known: dict[str, Any]) -> Any:
    """Returns classes and functions of a file, also methods; the file imports what transformers no longer has."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [each for each in ast.walk(tree) if getattr(each, "name", "") in names]  # type: ignore[misc]
    exec(compile(tree, str(path), "exec"), known)  # code of a checkout that whoever runs this has chosen
    return SimpleNamespace(**{name: known[name] for name in names}, known=known)


def stacks(checkout: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """Returns their encoder and decoder, and what the file of them defines."""
    generators = load(checkout / "modeling/adapter_generators.py", root=checkout)
    layers = load(checkout / "modeling/adapter_layer.py", root=checkout)
    known = {"torch": torch, "nn": nn, "T5Stack": Stack, "T5Block": T5Block, "T5LayerFF": T5LayerFF}
    known |= {"ParameterGenerator": generators.ParameterGenerator, "AdapterLayer": layers.AdapterLayer}
    names = {"T5LayerFFWithAdapter", "T5BlockWithAdapter", "T5StackWithAdapter", "mean_pooling"}
    theirs = parts(checkout / SOURCE.script, names, known)
    told = {"encoder_adapter": "manual", "decoder_adapter": "pro-hyper", "tasks": ["0", "1", "2"]}
    told |= {"encoder_adapter_dim": 2, "decoder_adapter_dim": 2, "hypernetwork_bottleneck": 128}
    config = {
        **SIZES,
        **told,
        "adapter_norm_input": True,
        "process_encoder_output": True,
        "use_cache": False,
        **changes,
    }
    table = nn.Embedding(10, config["d_model"])
    encoder, decoder = (
        theirs.T5StackWithAdapter(T5Config(**config, is_decoder=decodes, is_encoder_decoder=False), table)
        for decodes in (False, True)
    )
    return encoder, decoder, theirs.known


def run(encoder: Any, decoder: Any) -> Tensor:
    """Returns the states of the decoder."""
    mask = torch.tensor(MASK)
    states = encoder(input_ids=torch.tensor(IDS), attention_mask=mask, tasks=TASKS)[0]
    told = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    found: Tensor = decoder(input_ids=torch.tensor(ANSWERS), tasks=TASKS, **told)[0]
    return found


def lost(checkout: Path, known: dict[str, Any]) -> Tensor:
    """Returns the two losses of what ran last."""
    losses = parts(
        checkout / "third_party/trainers/t5_trainer.py",
        {"_ins_ins_loss", "_pro_ins_loss"},
        {"torch": torch, "F": nn.functional},
    )
    vectors, indices, every = (known[name] for name in ("sample2", "indices", "taskemb"))
    found: Tensor = losses._ins_ins_loss(None, vectors, indices) + losses._pro_ins_loss(None, vectors, indices, every)
    return found


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the states of the decoder, the loss, and gradients, thinned: of the embedded words, and of parameters in
    the order of `parts` in the test."""
    encoder, decoder, known = stacks(checkout)
    encoder, decoder, table = encoder.double().train(), decoder.double().train(), encoder.embed_tokens
    base = [dict(Stack(stack.config, table).named_parameters()) for stack in (encoder, decoder)]
    hosts = [
        stack.get_parameter(name)
        for stack, known_names in zip((encoder, decoder), base, strict=True)
        for name in sorted(known_names)
        if not name.startswith("embed_tokens")
    ]
    waves([table.weight, *hosts], first=0.31, size=0.5)
    makes, own = decoder.param_gen, [block.layer[-1].adapter_layer for block in encoder.block]
    head = makes.decoder
    trained: list[Any] = [decoder.adapter_task_embedding.weight, *decoder.mlp.parameters()]
    for layer in (head.linear1, head.linear2, head.LayerNorm, head.bias_down, head.bias_up):
        trained += layer.parameters()
    for each in own:
        trained += [each.adapter_down_manual.weight, each.adapter_down_manual.bias]
        trained += [each.adapter_up_manual.weight, each.adapter_up_manual.bias]
    trained += [makes.layer_embed.weight, head.weight_down.bias, head.weight_up.bias]
    waves([*trained, head.weight_down.weight, head.weight_up.weight], first=0.53, size=0.3)
    y = run(encoder, decoder)
    loss = lost(checkout, known)
    ((y * wave(*y.shape, step=0.23)).sum() + loss).backward()
    found = {"y": thin(y), "loss": [loss.item()], "words": thin(table.weight.grad)}
    every_one = [*trained, head.weight_down.weight, head.weight_up.weight]
    return {**found, **{str(number): thin(each.grad) for number, each in enumerate(every_one)}}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what tensors are drawn from: widths of 256, 200 tasks, and a decoder of 200 narrow layers."""
    sizes = {"d_model": 256, "encoder_adapter_dim": 256, "decoder_adapter_dim": 256, "num_layers": 1}
    encoder, decoder, _ = stacks(checkout, **sizes, tasks=[str(task) for task in range(200)])
    own, head = encoder.block[0].layer[-1].adapter_layer, decoder.param_gen.decoder
    found = {"own.down": own.adapter_down_manual, "own.up": own.adapter_up_manual}
    found |= {"down": head.weight_down, "down_bias": head.bias_down, "up": head.weight_up, "up_bias": head.bias_up}
    biases = {f"{name}.bias": drawn(each.bias) for name, each in found.items()}
    more = {"first": head.linear1, "second": head.linear2, "retriever.first": decoder.mlp[0]}
    more |= {"retriever.second": decoder.mlp[2], "prototypes": decoder.adapter_task_embedding}
    more |= {"place": stacks(checkout, num_layers=200)[1].param_gen.layer_embed}
    return {f"{name}.weight": drawn(each.weight) for name, each in {**found, **more}.items()} | biases


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers of the encoder train, and of the decoder: of what their script unfreezes, what has a
    gradient; the decoder's adapters have matrices besides that nothing reads."""
    encoder, decoder, known = stacks(checkout)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    names = {f"unfreeze_adapter_params_{each}" for each in model}
    freeze = parts(checkout / "third_party/utils/utils.py", {"freeze_params"}, {"nn": nn}).freeze_params
    unfreeze = parts(checkout / "utils/utils.py", names, {})
    freeze(model)
    for name in names:
        getattr(unfreeze, name)(model)
    (run(encoder, decoder).square().sum() + lost(checkout, known)).backward()
    return {
        name: sum(each.numel() for each in stack.parameters() if each.grad is not None) for name, stack in model.items()
    }


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration for GLUE, and the widths that their code writes out."""
    told = json.loads((checkout / "configs/experiments/glue_t5_base.json").read_text())
    _, decoder, _ = stacks(checkout, decoder_adapter_dim=told["decoder_adapter_dim"], tasks=told["tasks"])
    head = decoder.param_gen.decoder
    return {
        "tasks": len(told["tasks"]),
        "bottleneck": told["decoder_adapter_dim"],
        "task_width": decoder.adapter_task_embedding.embedding_dim,
        "hidden": head.linear1.out_features,
        "code": head.linear2.out_features,
    }
