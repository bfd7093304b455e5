"""What the adapters of HyperFormer's authors give behind attention and feed-forward of two layers, for rows of two
tasks, on tensors of sines: ``python -m peftcore.testing.freeze hyperformer_pp.py CHECKOUT``."""

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
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
