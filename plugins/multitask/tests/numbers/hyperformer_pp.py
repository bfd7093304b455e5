"""What the adapters of HyperFormer's authors give behind attention and feed-forward of two layers, for rows of two
tasks, on tensors of sines; what the networks start from, what trains, and their options:
``python -m peftcore.testing.freeze hyperformer_pp.py CHECKOUT``."""

import ast
import inspect
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "rabeehk/hyperformer", "56b0f99", "hyperformer/adapters/adapter_modeling.py")
VERSIONS = ("torch", "transformers")
WIDTH, TASKS = 6, 3
PLACES = ("self_attention", "feed_forward")


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


@torch.no_grad()
def waves(parameters: list[Tensor]) -> None:
    """The first is sin(0), sin(0.5), ..., the next has a step of 0.53."""
    for index, each in enumerate(parameters):
        each.copy_(wave(*each.shape, step=0.5 + 0.03 * index))


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns what goes through four adapters one after the other, each twice as large beforehand, and the gradients of
    input and parameters, flat: with the network of HyperFormer++, and with generators of each adapter. Parameters are
    in the order of `parts` in the test."""
    modeling = load(checkout / SOURCE.script, root=checkout)
    control = load(checkout / "hyperformer/adapters/adapter_controller.py", root=checkout)
    utils = load(checkout / "hyperformer/adapters/adapter_utils.py", root=checkout)
    configs = load(checkout / "hyperformer/adapters/adapter_configuration.py", root=checkout)
    config: Any = configs.MetaAdapterConfig()
    config.device, config.input_dim, config.reduction_factor, config.non_linearity = "cpu", WIDTH, 3, "gelu_new"
    config.tasks, config.task_to_embeddings, config.conditional_layer_norm = ["0", "1", "2"], None, True
    config.task_embedding_dim, config.task_hidden_dim, config.projected_task_embedding_dim = 4, 5, 3
    found = {}
    for kind in ("shared", "apart"):
        config.train_task_embeddings = kind == "apart"
        tasks = utils.TaskEmbeddingController(config).double()
        table = [tasks.task_to_embeddings[name] for name in config.tasks]
        joined = nn.Parameter(wave(TASKS, 4, step=0.5))  # one table, of which the code has the rows apart
        with torch.no_grad():
            for row, value in zip(table, joined, strict=True):
                row.copy_(value)
        if kind == "shared":
            network = modeling.AdapterLayersOneHyperNetController(config, 2).double()
            parameters = [
                network.layer_id_embeddings.weight,
                network.adapters_block_type.weight,
                *network.task_hypernet.parameters(),
                *network.LayerNorm.parameters(),
                *network.down_sampler_hyper_net.parameters(),
                *network.up_sampler_hyper_net.parameters(),
                *network.post_layernorm_hypernet.parameters(),
            ]
        else:
            adapters = [control.MetaAdapterController(config).double() for _ in range(4)]
            parameters = [*tasks.task_hyper_net.parameters()]
            for each in adapters:
                parts = (each.meta_down_sampler, each.meta_up_sampler, each.post_layernorm_hypernet)
                parameters += itertools.chain.from_iterable(part.parameters() for part in parts)
        assert len(parameters) == len({*map(id, parameters)})
        waves([joined, *parameters])
        x = wave(2, 3, WIDTH, step=0.9).requires_grad_()
        rows = []
        for row, task in zip(x, ("2", "0"), strict=True):
            h, embedding = row[None], tasks(task)
            for layer, (place, name) in itertools.product(range(2), enumerate(PLACES)):
                if kind == "shared":
                    block = network(embedding, layer)
                    h = control.MetaLayersAdapterController(config)(2 * h, getattr(block, name))
                else:
                    h = adapters[2 * layer + place](embedding, 2 * h)
            rows.append(h)
        y = torch.cat(rows)
        (y * wave(2, 3, WIDTH, step=0.3)).sum().backward()
        gradients = [torch.zeros(4) if row.grad is None else row.grad for row in table]
        found[kind] = {"y": y.flatten().tolist(), "x": x.grad.flatten().tolist()}
        found[kind]["0"] = torch.stack([each.double() for each in gradients]).flatten().tolist()
        found[kind] |= {str(number): each.grad.flatten().tolist() for number, each in enumerate(parameters, 1)}
    return found


def shared(checkout: Path, tasks: int, input_dim: int, reduction: int, widths: tuple[int, int, int]) -> tuple[Any, Any]:
    """Returns a function that makes the network of a stack of two layers, and the controller of the tasks' embeddings:
    for widths of embeddings, inside and in front of the generators."""
    modeling = load(checkout / SOURCE.script, root=checkout)
    utils = load(checkout / "hyperformer/adapters/adapter_utils.py", root=checkout)
    config: Any = load(checkout / "hyperformer/adapters/adapter_configuration.py", root=checkout).MetaAdapterConfig()
    config.device, config.input_dim, config.reduction_factor, config.non_linearity = "cpu", input_dim, reduction, "relu"
    config.tasks, config.task_to_embeddings = [str(task) for task in range(tasks)], None
    config.conditional_layer_norm = True
    config.task_embedding_dim, config.task_hidden_dim, config.projected_task_embedding_dim = widths
    return lambda: modeling.AdapterLayersOneHyperNetController(config, 2), utils.TaskEmbeddingController(config)


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the parts of a network are drawn from, for 200 features and a bottleneck of 200, and embeddings: of
    layers and places, wide ones."""
    make, tasks = shared(checkout, 200, 200, 1, (100, 200, 100))
    network, (wide, _) = make(), shared(checkout, 1, 6, 3, (10_000, 1, 1))
    first, _, second = network.task_hypernet.task_embeding_generator
    parameters = [*first.parameters(), *second.parameters(), *network.LayerNorm.parameters()]
    for part in (network.down_sampler_hyper_net, network.up_sampler_hyper_net, network.post_layernorm_hypernet):
        parameters += part.parameters()
    names = ("reader.first", "reader.second", "norm", "down", "down_bias", "up", "up_bias", "gain", "shift")
    both = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    found = dict(zip(both, parameters, strict=True))
    found["tasks"] = torch.stack([*tasks.task_to_embeddings.values()])
    embeddings = wide()
    found |= {"layer": embeddings.layer_id_embeddings.weight, "place": embeddings.adapters_block_type.weight}
    return {name: drawn(each) for name, each in found.items()}


def trains(checkout: Path) -> dict[str, Any]:
    """Returns how many numbers of the networks and embeddings of three tasks train, and which tensors of a T5 besides,
    with the options of their configuration."""
    told = json.loads((checkout / "hyperformer/configs/hyperformer++.json").read_text())
    sizes = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": 2, "vocab_size": 10}
    model: Any = T5ForConditionalGeneration(T5Config(**sizes))
    make, model.task_embedding_controller = shared(checkout, TASKS, 8, 4, (4, 5, 3))
    model.encoder.networks, model.decoder.networks = make(), make()
    known: dict[str, Any] = {"T5LayerNorm": T5LayerNorm, "nn": nn, "AdapterLayersHyperNetController": ()}
    known |= {"MetaAdapterController": (), "AdapterController": ()}
    known["AdapterLayersOneHyperNetController"] = type(model.encoder.networks)
    for path, name in (("third_party/utils/utils.py", "freeze_params"), ("utils/utils.py", "freezing_params")):
        tree = ast.parse((checkout / "hyperformer" / path).read_text())
        tree.body = [each for each in tree.body if getattr(each, "name", "") == name]
        exec(compile(tree, path, "exec"), known)  # its file imports what transformers no longer has
    off = ("freeze_model", "freeze_model_but_lm_head", "freeze_embeds", "freeze_encoder", "unfreeze_model")
    off = (*off, "freeze_model_but_task_embeddings", "unique_hyper_net")
    options = SimpleNamespace(**{**dict.fromkeys(off, False), **told})
    known["freezing_params"](model, options, options, options)
    trained = {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
    own = [name for name in trained if "networks" in name or name.startswith("task_embedding")]
    return {"own": sum(map(trained.pop, own)), "others": sorted(trained)}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration, for the 768 features of T5-base, and its program's own."""
    told = json.loads((checkout / "hyperformer/configs/hyperformer++.json").read_text())
    own = load(checkout / "hyperformer/adapters/adapter_configuration.py", root=checkout).MetaAdapterConfig
    linear = load(checkout / "hyperformer/adapters/adapter_utils.py", root=checkout).linear_layer
    std = inspect.signature(linear).parameters["std"].default
    return {
        "tasks": len(told["tasks"]),
        "shared": told["efficient_unique_hyper_net"],
        "bottleneck": 768 // told["reduction_factor"],
        "task_width": told["task_embedding_dim"],
        "hidden": own.task_hidden_dim,
        "code": told["projected_task_embedding_dim"],
        "activation": {"gelu_new": "gelu_tanh"}[told["non_linearity"]],
        "init_std": std,
        "gain_std": std,
        "train_layer_norm": told["unfreeze_layer_norms"],
    }
