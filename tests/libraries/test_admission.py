"""The mark by which transformers' Trainer takes an adapted quantized model."""

import copy
import gc
import pickle

import pytest
import transformers

import peftcore
from peftcore.libraries.admission import Admitted, await_trainer, has_trainer


class Callback:
    """Something that waits for a Trainer."""


def model() -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))


def test_an_adapted_model_says_yes_while_a_callback_waits_and_only_then() -> None:
    host = model()
    injection = peftcore.apply(host, "lora")
    assert not host._hf_peft_config_loaded
    callback = Callback()
    await_trainer(callback)
    assert host._hf_peft_config_loaded and host.model._hf_peft_config_loaded and not model()._hf_peft_config_loaded
    has_trainer()
    assert not host._hf_peft_config_loaded
    await_trainer(callback)
    del callback
    gc.collect()
    assert not host._hf_peft_config_loaded
    injection.remove()
    assert "_hf_peft_config_loaded" not in vars(host) and "_hf_peft_config_loaded" not in vars(host.model)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))])
def test_copies_have_a_mark_of_their_own(way) -> None:
    host = model()
    peftcore.apply(host, "lora")
    twin = way(host)
    mark = vars(twin)["_hf_peft_config_loaded"]
    assert isinstance(mark, Admitted) and mark.model is twin
    with pytest.raises(TypeError, match="not a function"):
        mark()
