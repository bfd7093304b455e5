"""A union of methods: the kit's promises, for a list of methods; a LoRA and tokens beside those of peft in one config.
(tests/training/test_optimizer_hybrids.py has more.)"""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn

import peftcore
from peftcore.errors import CompositionError
from peftcore.testing import HOSTS, against, conformance
from peftcore.testing.kit import fill

ROWS = "what the adapters keep beside the host there, 32 rows of 8 features, has the shape of a weight"


@conformance(
    "config_union",
    options={"*": {"parts": [{"method": "lora"}, {"method": "houlsby_adapter", "up_init_std": 0.0}]}},
    expected_failures={"effective_weights_do_not_outlive_their_use-unet": ROWS},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """The rows of a table, or A and B."""
    layer: Any = theirs.get_submodule(site.module_path)
    if site.path.endswith("embed_tokens"):
        tokens = layer.token_adapter.trainable_tokens_delta[ADAPTER]
        yield Pair(f"{site.path}.value", operator.value, tokens, lambda t: t)
    else:
        yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
        yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@against("peft 0.21", "config_union")
def test_beside_peft(train: bool) -> None:
    """Outputs, gradients and merged weights, of what peft can hold in one config."""
    model, inputs = HOSTS["llama"].build()
    inputs["input_ids"][:, :3] = torch.tensor([3, 5, 7])
    target, tokens = ["q_proj", "v_proj"], [3, 5, 7, 9]
    parts = [
        {"method": "trainable_tokens", "token_indices": tokens},
        {"method": "lora", "rank": 3, "alpha": 5.0, "target": target},
    ]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=target, trainable_token_indices={"embed_tokens": tokens})

    def run(adapted: nn.Module) -> Tensor:
        return adapted(**inputs).logits

    Both(model.train(train), "config_union", {"parts": parts}, config, pairs).assert_same(run)


@pytest.mark.parametrize(
    ("parts", "where"),
    [
        ([{"method": "ln_tuning"}, {"method": "bitfit"}], r"embeddings.LayerNorm.bias"),
        ([{"method": "bitfit"}, {"method": "ln_tuning"}], r"embeddings.LayerNorm.bias"),
        ([{"method": "lora", "target": "attn.q"}, {"method": "full_ft", "target": "attn.q"}], r"layer.0.*query"),
        (
            [{"method": "lora", "target": "attn.q"}, {"method": "config_union", "parts": [{"method": "full_ft"}]}],
            "query",
        ),
    ],
)
def test_a_part_that_would_lose_what_it_trains_is_refused(parts: list[dict[str, Any]], where: str) -> None:
    """One value acts where two would be trained; the host stays as it was."""
    model, _ = HOSTS["bert"].build()
    before = list(model.state_dict())
    with pytest.raises(CompositionError, match=rf"part 0 \({parts[0]['method']}\) and part 1 .* both act on .*{where}"):
        peftcore.apply(model, "config_union", parts=parts)
    assert list(model.state_dict()) == before
    with pytest.raises(CompositionError, match="both act on"):
        peftcore.plan(model, "config_union", parts=parts)


@pytest.mark.parametrize(
    "parts",
    [
        [{"method": "ln_tuning"}, {"method": "bitfit", "target": "all-linear"}],
        [{"method": "full_ft", "target": "attn.q"}, {"method": "lora", "target": "attn.q"}],
    ],
)
def test_parts_that_add_to_what_another_one_trains_all_learn(parts: list[dict[str, Any]]) -> None:
    model, inputs = HOSTS["bert"].build()
    injection = peftcore.apply(model, "config_union", parts=parts)
    fill(injection)
    HOSTS["bert"].output(model(**inputs)).square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in injection.parameters())
