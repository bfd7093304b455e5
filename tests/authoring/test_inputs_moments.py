"""Second moments of inputs, against the inputs themselves."""

import pytest
import torch
from exported_hosts import IDS, llama, logits, noisy

import peftcore
from peftcore.authoring.inputs import second_moments
from peftcore.errors import CalibrationError


def test_they_are_those_of_the_inputs_with_the_adapter_and_without_padding() -> None:
    model = llama().train()
    injection = noisy(model, "lora", target=["q_proj", "down_proj"])
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    batches = [{"input_ids": IDS, "attention_mask": mask}, {"input_ids": IDS[:1]}]
    found = second_moments(injection, batches)
    assert set(found) == {graft.site.path for graft in injection.grafts} and model.training
    path, seen = "model.layers.1.mlp.down_proj", []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.eval()
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    hook.remove()
    x = torch.cat([seen[0][mask.bool()], seen[1].flatten(0, 1)])
    torch.testing.assert_close(found[path], x.T @ x / len(x))
    with peftcore.activate(model):
        assert not torch.allclose(logits(model), logits(llama()) + 1)  # the base is as it was
        torch.testing.assert_close(logits(model), logits(llama()))


def test_without_batches_it_is_refused() -> None:
    with pytest.raises(CalibrationError):
        second_moments(noisy(llama(), "lora"), [])
