"""A choice is a value: it says what acts, and holds from where it was made."""

import torch
from call_toys import adapted, in_the_middle
from core_toys import token_ids

from peftcore import activate


def test_a_choice_in_the_middle_of_a_forward_holds_from_there() -> None:
    model, (_, two) = adapted("lora", "dora")
    ids = token_ids(2)
    with torch.no_grad():
        first = model.layers[0](model.embed_tokens(ids))
        with activate(model, two.name):
            expected = model.lm_head(model.norm(model.layers[1](first)))
        assert not torch.equal(model(ids)["logits"], expected)
        in_the_middle(model, lambda: activate(model, two.name))
        assert torch.equal(model(ids)["logits"], expected)
