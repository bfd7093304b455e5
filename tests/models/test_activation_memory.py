"""What a forward keeps for its backward, counted by hand."""

from pathlib import Path
from typing import Any

import torch
from looking import folder_of, real
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

import peftcore
from peftcore.models.activation_memory import kept, named_tensors


def test_what_a_forward_keeps_by_hand() -> None:
    """The input, for the first weight's gradient, and what ReLU returns, which it and the second layer share."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return model(inputs["x"])

    inputs = {"x": torch.ones(3, 4)}
    assert kept(named_tensors(model), run, inputs) == 4 * (3 * 4 + 3 * 8)
    model[0].requires_grad_(False)
    assert kept(named_tensors(model), run, inputs) == 4 * 3 * 8
    model.requires_grad_(False)
    assert kept(named_tensors(model), run, inputs) == 0


def test_blocks_that_run_again_are_counted_as_torch_keeps_them(tmp_path: Path) -> None:
    """Checkpointed for real, a forward saves what is outside of blocks (hooks see that) and the inputs of each; then
    one block saves what it saves alone."""
    torch.manual_seed(0)
    folder = folder_of("llama", tmp_path)
    model: Any = real("llama", folder)
    peftcore.apply(model, "lora", rank=2)
    inputs = {"input_ids": torch.zeros(3, 7, dtype=torch.long), "use_cache": False}
    own = {each.untyped_storage()._cdata for each in named_tensors(model).values()}
    calls: list[tuple[Any, Any]] = []
    layers = model.model.layers
    hooks = [each.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True) for each in layers]

    def saved(run: Any) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            found.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with saved_tensors_hooks(save, lambda tensor: tensor):
            output = run()
        return {key: each for key, each in found.items() if key not in own} if output is not None else {}

    model.gradient_checkpointing_enable({"use_reentrant": False})
    outside = saved(lambda: model(**inputs))
    model.gradient_checkpointing_disable()
    for hook in hooks:
        hook.remove()
    for args, kwargs in calls:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, torch.Tensor):
                outside.setdefault(each.untyped_storage()._cdata, each)
    args, kwargs = calls[-1]
    block = saved(lambda: layers[-1](*args, **kwargs))
    total = {**outside, **block}.values()
    expected = sum(each.untyped_storage().nbytes() for each in total)
    assert kept(named_tensors(model), lambda each: model(**each), inputs, layers) == expected
    assert expected < kept(named_tensors(model), lambda each: model(**each), inputs)
