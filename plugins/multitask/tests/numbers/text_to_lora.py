"""The LoRAs that the network of Text-to-LoRA's authors makes of two vectors for a small Llama, and what a layer gives
with them, on tensors of sines; what the network starts from, what trains, and its options:
``python -m peftcore.testing.freeze text_to_lora.py CHECKOUT``."""

import ast
import dataclasses
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "SakanaAI/text-to-lora", "8ba7749", "src/hyper_llm_modulator/hyper_modulator.py")
VERSIONS = ("torch", "transformers", "peft")
VECTOR, LATENT, HEAD, RANK = 5, 12, 6, 2
ABSENT = ("hyper_llm_modulator.utils", "hyper_llm_modulator.utils.model_loading")
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def wave(shape: Sequence[int], k: float) -> Tensor:
    """Returns sin(k), sin(2 k), ... in a shape."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k + k).view(tuple(shape))


def modulator(
    checkout: Path, rank: int = RANK, vector: int = VECTOR, latent: int = LATENT, layers: int = 2
) -> tuple[Any, Any]:
    """Returns their network, and the model that it is for."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    module = load(checkout / SOURCE.script, root=checkout / "src", absent=ABSENT)
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers}))
    config = peft.LoraConfig(r=rank, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj"])
    config.target_modules = ["q_proj", "v_proj"]  # peft makes a set of it, which has no order
    model = peft.get_peft_model(llama, config)
    return module.HyperModulator(
        model,
        output_space="lora",
        module_names=[],
        match_lora_init=True,
        task_emb_size=vector,
        zero_init_head=True,
        latent_size=latent,
        head_in_size=HEAD,
        head_use_bias=True,
    ), llama


def ordered(network: Any) -> list[Tensor]:
    """Returns its parameters, in the order of `parameters` in the test."""
    read, depth, kind = network.task_encoder.mlp, network.layer_depth_encoder, network.layer_type_encoder
    assert [*network.target_modules] == ["q_proj", "v_proj"]
    parameters = [*read.parameters(), depth[0].weight, kind[0].weight, *depth[1].parameters(), *kind[1].parameters()]
    heads = [network.heads[name] for name in ("q_proj", "v_proj")]
    for part in (network.mixer, network.mlp1, network.mlp2, network.mlp3, *heads):
        parameters += part.parameters()
    return parameters


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns A and B of each layer and kind for two vectors, and what the query projection of the second layer adds
    for a row of each, in evaluation; and gradients of all parameters of the network, by number, of large ones every
    n-th value; all flat."""
    network, llama = modulator(checkout)
    hooks = load(checkout / "src/hyper_llm_modulator/hooks.py", root=checkout / "src")
    network = network.double().eval()
    parameters = ordered(network)
    trained = {id(each) for each in network.parameters() if each.requires_grad}
    assert {id(each) for each in parameters} == trained and len(parameters) == len(trained)
    with torch.no_grad():
        for index, each in enumerate(parameters):
            each.copy_(wave(each.shape, 0.3 + 0.07 * index))
    vectors = wave((2, VECTOR), 0.9)
    told = network.task_encoder(vectors)["encoded_task_emb"]
    found: dict[str, Tensor] = {}
    for name in ("q_proj", "v_proj"):
        for layer in range(2):
            A, B = network.get_delta_weights(torch.tensor([layer, layer]), name, told, factorized=True)
            found |= {f"{layer}/{name}/A": A, f"{layer}/{name}/B": B}
            if (name, layer) == ("q_proj", 1):
                x = wave((2, 3, 8), 0.4)
                hooks.get_layers = lambda _: llama.model.layers
                hooks.add_lora_hooks(None, [name], [layer], A.mT, B.mT, network.scaling, 0.0, training=False)
                projection = llama.double().model.layers[layer].self_attn.q_proj
                bare = torch.nn.functional.linear(x, projection.base_layer.weight)
                found["added"] = projection(x) - bare
    sum((each * wave(each.shape, 0.2)).sum() for each in found.values()).backward()
    gradients = {str(index): each.grad.flatten() for index, each in enumerate(parameters)}
    some = {name: each[:: 1 + len(each) // 100] for name, each in gradients.items()}
    return {name: each.flatten().tolist() for name, each in (found | some).items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what parameters of 4000 numbers or more are drawn from, or what all of one are, by their places in the
    order of the test, and what the biases of heads give for A and B: for 300 layers and a rank of 600."""
    network, _ = modulator(checkout, rank=600, vector=200, latent=200, layers=300)
    every = ordered(network)
    found = {str(index): drawn(each) for index, each in enumerate(every[:-4])}
    for name, (_, bias) in {"q_proj": every[-4:-2], "v_proj": every[-2:]}.items():
        found |= {f"{name}/A": drawn(bias[: 600 * SIZES["hidden_size"]])}
        found |= {f"{name}/B": drawn(bias[600 * SIZES["hidden_size"] :])}
    found |= {f"{name}/head": drawn(every[at]) for name, at in (("q_proj", -4), ("v_proj", -2))}
    return {name: told for name, told in found.items() if told.get("count", 4000) >= 4000}


def trains(checkout: Path) -> int:
    """Returns how many numbers of the network train."""
    return sum(each.numel() for each in modulator(checkout)[0].parameters() if each.requires_grad)


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script, with the program's own where it says nothing, and the dropout of the
    network, which the code writes out."""
    told = flags((checkout / "scripts/train_t2l_mistral.sh").read_text())
    module = load(checkout / "src/hyper_llm_modulator/configs.py", root=checkout / "src")
    own = {each.name: each.default for kind in vars(module).values() if dataclasses.is_dataclass(kind)
           for each in dataclasses.fields(kind)}  # fmt: skip
    path = checkout / "src/hyper_llm_modulator/utils/model_loading.py"
    tree = ast.parse(path.read_text())
    tree.body = [each for each in tree.body if getattr(each, "name", "") == "get_peft_config"]
    found: dict[str, Any] = {"PeftType": peft.PeftType, "_get_peft_config": peft.get_peft_config}
    exec(compile(tree, str(path), "exec"), found)  # its file imports a package that is not there
    lora = found["get_peft_config"]("", "lora")
    return {
        "rank": lora.r,
        "alpha": lora.lora_alpha,
        "dropout": lora.lora_dropout,
        "latent": told.get("hypernet_latent_size", own["hypernet_latent_size"]),
        "head_width": told.get("head_in_size", own["head_in_size"]),
        "decay": told.get("l2_reg_generated_w", own["l2_reg_generated_w"]),
        "network_dropout": modulator(checkout)[0].mixer[0].p,
    }
