"""The LoRAs that the network of Text-to-LoRA's authors makes of two vectors for a small Llama, and what a layer gives
with them, on tensors of sines: ``python -m peftcore.testing.freeze text_to_lora.py CHECKOUT``."""

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
from peftcore.testing.checkouts import load

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


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns A and B of each layer and kind for two vectors, and what the query projection of the second layer adds
    for a row of each, in evaluation; and gradients of all parameters of the network, by number, of large ones every
    n-th value; all flat."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    root = checkout / "src"
    module = load(checkout / SOURCE.script, root=root, absent=ABSENT)
    hooks = load(root / "hyper_llm_modulator/hooks.py", root=root)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    config = peft.LoraConfig(r=RANK, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj"])
    config.target_modules = ["q_proj", "v_proj"]  # peft makes a set of it, which has no order
    model = peft.get_peft_model(llama, config)
    network: Any = module.HyperModulator(
        model,
        output_space="lora",
        module_names=[],
        match_lora_init=True,
        task_emb_size=VECTOR,
        zero_init_head=True,
        latent_size=LATENT,
        head_in_size=HEAD,
        head_use_bias=True,
    )
    network = network.double().eval()
    read, depth, kind = network.task_encoder.mlp, network.layer_depth_encoder, network.layer_type_encoder
    assert [*network.target_modules] == ["q_proj", "v_proj"]
    parameters = [*read.parameters(), depth[0].weight, kind[0].weight, *depth[1].parameters(), *kind[1].parameters()]
    heads = [network.heads[name] for name in ("q_proj", "v_proj")]
    for part in (network.mixer, network.mlp1, network.mlp2, network.mlp3, *heads):
        parameters += part.parameters()
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
