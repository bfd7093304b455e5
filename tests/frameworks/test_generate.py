"""Generation on an adapted host: it sees the adapter, cached and uncached agree, and so do merged and unmerged."""

import pytest
import torch

import peftcore
from peftcore.testing import HOSTS
from peftcore.testing.kit import fill

pytest.importorskip("transformers")

METHODS = ("lora", "dora", "ia3", "houlsby_adapter", "ln_tuning")


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    ids = inputs["input_ids"]
    return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("host", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_generation_sees_the_adapter(method: str, host: str) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS[host].build()
    model.eval()
    base = generate(model, inputs, output_scores=True, return_dict_in_generate=True)
    injection = peftcore.apply(model, method)
    fill(injection)
    adapted = generate(model, inputs, output_scores=True, return_dict_in_generate=True)
    assert (adapted.scores[0] - base.scores[0]).abs().max() > 1e-3
    assert torch.equal(generate(model, inputs, use_cache=False), adapted.sequences)
    with injection.disabled():
        assert torch.equal(generate(model, inputs), base.sequences)
    if injection.method.tags.mergeable:
        injection.merge()
        assert torch.equal(generate(model, inputs), adapted.sequences)
