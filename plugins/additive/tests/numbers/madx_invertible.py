"""What AdapterHub's `adapters` predicts with invertible adapters in two small models, in float64, all numbers waves:
``python -m peftcore.testing.freeze madx_invertible.py CHECKOUT``, with the CHECKOUT of `adapters_package`."""

from pathlib import Path
from typing import Any

import torch
from adapters_package import IDS, SIZES, rounded, wave, waves

from peftcore.registry.evidence import Source

SOURCE = Source("adapters 1.3", "adapter-hub/adapters", "88f18eb", "src/adapters/methods/modeling.py")
VERSIONS = ("adapters", "transformers", "torch")


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns the logits, ``[2, 5, 11]``, and gradients of all adapter tensors, flat, by method and host; in training,
    without dropout."""
    import adapters
    import transformers
    from adapters import BnConfig, SeqBnInvConfig

    assert Path(adapters.__file__).is_relative_to(checkout.resolve())
    nowhere = {"mh_adapter": False, "output_adapter": False, "non_linearity": "relu", "reduction_factor": 2}
    configs = {
        "madx_invertible": BnConfig(**nowhere, inv_adapter="nice", inv_adapter_reduction_factor=2),
        "madx": SeqBnInvConfig(reduction_factor=2),
    }
    found: dict[str, dict[str, Any]] = {}
    for method, config in configs.items():
        for host in ("bert", "llama"):
            if host == "bert":
                without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
                model = adapters.BertAdapterModel(transformers.BertConfig(**SIZES, **without))
                model.add_masked_lm_head("words")
            else:
                model = adapters.LlamaAdapterModel(transformers.LlamaConfig(**SIZES))
                model.add_causal_lm_head("words", layers=1, activation_function=None)
            model = model.double()
            waves(model.base_model.parameters(), 0.1)
            head = model.heads["words"]
            last = head[len(head) - 1]
            waves((p for p in head.parameters() if p is not last.weight), 0.7)
            with torch.no_grad():
                table = model.get_input_embeddings().weight
                last.weight.copy_(table if host == "bert" else wave(last.weight, 0.9))
                if host == "llama":
                    last.bias.zero_()  # transformers' own head has none
            model.add_adapter("trained", config=config)
            model.train_adapter("trained")
            own = [(name, p) for name, p in model.double().named_parameters() if ".trained." in name]
            own.sort(key=lambda entry: "invertible" not in entry[0])
            waves((p for _, p in own), 0.2)
            y = model.train()(input_ids=torch.tensor(IDS)).logits
            (y.square() * wave(y, 0.3)).sum().backward()
            found.setdefault(method, {})[host] = {
                "output": rounded(y),
                "gradients": {name: rounded(p.grad) for name, p in own},
            }
    return found
