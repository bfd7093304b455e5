"""A tensor-parallel model of transformers, in two processes, computes, trains and saves as the whole model does; what
would meet pieces is refused."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RANKS, outcomes_of, shared_folder
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import peftcore
from peftcore.errors import MergeError, PeftcoreError, RouteError, UnsupportedHost, UnsupportedSite

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
]

LINEAR = ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
"""Cut by rows, by columns, and with an output that is gathered."""
BY_ROWS = ["q_proj", "k_proj", "up_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"target": LINEAR},
    "dora": {"target": LINEAR},
    "oft": {"target": LINEAR},
    "vera": {"target": LINEAR},  # shared, and drawn
    "ia3": {"target": [*BY_ROWS, "down_proj"]},  # down_proj has no bias
    "bitfit": {"target": [*BY_ROWS, "down_proj"], "add_missing_bias": True},  # new ones, one of which is added to a sum
    "linear_probe": {},
    "lora and a head": {"target": BY_ROWS, "train": ["lm_head"]},
}
REFUSED: dict[str, tuple[dict[str, Any], type[PeftcoreError], str]] = {
    "prompt_tuning": ({}, UnsupportedHost, "tensor-parallel"),
    "prefix_tuning": ({}, UnsupportedHost, "tensor-parallel"),
    "houlsby_adapter": ({}, UnsupportedSite, "tensor-parallel"),
    "ln_tuning": ({}, UnsupportedHost, "tensor-parallel"),
    "bitfit": ({"target": ["o_proj"]}, UnsupportedHost, "bias of .*o_proj is added after the outputs"),
    "ia3": ({"target": ["o_proj"]}, UnsupportedHost, "bias of .*o_proj is added after the outputs"),
    "lora": ({"target": ["embed_tokens"]}, UnsupportedHost, "tensor-parallel"),
    "lora that drops": ({"target": ["q_proj"], "dropout": 0.1}, UnsupportedSite, "use dropout=0"),
    "lora and a norm": ({"train": ["model.norm"]}, UnsupportedHost, "tensor-parallel"),
}
IDS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 4, 6]])


def begin() -> None:
    import transformers

    dist.init_process_group("gloo")
    transformers.logging.disable_progress_bar()


@functools.cache
def folder() -> str:
    """A small Llama with biases in its attention, noise in all tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make() -> str:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, vocab_size=32, attention_bias=True)
        )  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        name = tempfile.mkdtemp()
        model.save_pretrained(name)
        return name

    found = shared_folder(make)
    dist.barrier()
    return found


def whole_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float64)


def parallel_model() -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=RANKS)
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float64, distributed_config=config)


def adapted(method: str) -> tuple[Any, peftcore.Injection, Any, peftcore.Injection]:
    """The whole model and the parallel one, with the same values in their adapters, noise in all tensors. The processes
    have different seeds."""
    models = whole_model(), parallel_model()
    torch.manual_seed(dist.get_rank())
    one, other = (peftcore.apply(each, method.split(" ")[0], dtype=torch.float64, **METHODS[method]) for each in models)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, parameter in zip(one.parameters(), other.parameters(), strict=True):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
            mine.copy_(parameter)
        buffers = [[b for _, module in each.modules() for b in module.buffers()] for each in (one, other)]
        for buffer, theirs in zip(*buffers, strict=True):
            buffer.copy_(theirs)
    return models[0], one, models[1], other


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def check(method: str) -> None:
    """Two steps, then evaluation, generation, and the file in both kinds of model."""
    whole, one, parallel, other = adapted(method)
    bare = logits(whole_model())
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (one, other)]
    for _ in range(2):
        losses = [model.train()(input_ids=IDS, labels=IDS).loss for model in (whole, parallel)]
        torch.testing.assert_close(losses[1], losses[0])
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for mine, parameter in zip(one.parameters(), other.parameters(), strict=True):
            assert mine.grad is not None and mine.grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, mine.grad)
        for optimizer in optimizers:
            optimizer.step()
    expected = logits(whole)
    assert (expected - bare).abs().max() > 0.01
    torch.testing.assert_close(logits(parallel), expected)
    made = [each.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0) for each in (whole, parallel)]
    assert torch.equal(*made)
    with other.disabled():
        torch.testing.assert_close(logits(parallel), bare)
    saved = Path(folder(), method)
    other.save(saved)
    dist.barrier()
    for model in (whole_model(), parallel_model()):
        peftcore.load(model, saved)
        torch.testing.assert_close(logits(model), expected)
    with pytest.raises(MergeError, match="sharded"):
        other.merge()
    other.remove()
    torch.testing.assert_close(logits(parallel), bare)


def check_start() -> None:
    """Whatever seed each process has, the first one's start is everybody's."""
    model = parallel_model()
    torch.manual_seed(dist.get_rank())
    injection = peftcore.apply(model, "lora", target=["q_proj"])
    for module in dict(injection.modules()).values():
        for each in (*module.parameters(), *module.buffers()):
            theirs = each.detach().clone()
            dist.broadcast(theirs, 1)
            assert torch.equal(each, theirs)


def check_refused() -> None:
    """Nothing was changed then."""
    model = parallel_model()
    before = [(type(module), module.__dict__.get("forward")) for module in model.modules()]
    for name, (options, error, words) in REFUSED.items():
        with pytest.raises(error, match=words):
            peftcore.apply(model, name.split(" ")[0], **options)
            pytest.fail(name)
        assert [(type(module), module.__dict__.get("forward")) for module in model.modules()] == before, name
    peftcore.apply(model, "lora", name="one", target=["q_proj"])
    with pytest.raises(RouteError, match="tensor-parallel"):
        peftcore.route(model, ["one", None])
    with pytest.raises(UnsupportedSite, match="not a linear layer that is called"):
        peftcore.apply(model, "corda", target=["q_proj"], data=[{"input_ids": IDS}])


def check_cut_twice() -> None:
    """What tensor parallelism and FSDP2 have cut, one after the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("fsdp", "tp"))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        weight = DTensor.from_local(torch.randn(2, 4), mesh["tp"], [Shard(0)])
        layer.weight = nn.Parameter(weight)
        layer.bias = nn.Parameter(DTensor.from_local(torch.randn(4), mesh["tp"], [Replicate()]))
    fully_shard(model, mesh=mesh["fsdp"])
    with pytest.raises(UnsupportedHost, match="tensor-parallel and sharded"):
        peftcore.apply(model, "lora", target=["0"])


def clear() -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(folder())


CASES = {
    "start": check_start,
    "refused": check_refused,
    "cut twice": check_cut_twice,
    **{method: functools.partial(check, method) for method in METHODS},
    "clear": clear,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__name__)


@pytest.mark.parametrize("case", CASES)
def test_two_processes(outcomes: dict[str, str], case: str) -> None:
    assert not outcomes[case]
