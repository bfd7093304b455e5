"""DyT: the conformance kit; a training step of the authors' code with its loss and gradients, its start, what trains
and its options; the equation a second time in float64, in training and where norms stand behind branches; its losses in
a route, with padding and under checkpoints; which tokens always go through, and what is refused."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropped_hosts import assert_same, filled, rewrite
from dropped_hosts import image_model as dropped_model
from numbers_of import module_of
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, SequenceError, TrainingError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import without_fast_paths

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "dyt.json"
NAMES = {"adaptmlp.down_proj": "down", "adaptmlp.up_proj": "up", "mlp_token_select.mlp_head": "gate"}
AUTHORS: Any = {"repository": "NUS-HPC-AI-Lab/Dynamic-Tuning", "commit": "d1744f0"}
AUTHORS |= {"script": "models/vision_transformer_IN21K.py"}
ALONE: dict[str, Any] = {"complete": 0.0, "dropout": 0.0, "dtype": "float64"}


# Most hosts of the kit have no logits of classes; and a share that they cannot have exactly leaves a gradient.
@conformance("dyt", options={"*": {"complete": 0.0, "rate": 0.33}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def named(operator: nn.Module, theirs: str) -> nn.Parameter:
    """The tensor of an operator by the name that the authors gave it in their block."""
    part, _, kind = theirs.rpartition(".")
    name = NAMES[part] if NAMES[part] == "gate" else f"{NAMES[part]}.{kind}"
    return operator.get_parameter("gate_bias" if (name, kind) == ("gate", "bias") else name)


def by_their_names(injection: peftcore.Injection) -> dict[str, nn.Parameter]:
    """Returns the tensors of operators by the names that the authors gave them in their model."""
    end, parts = ".mlp.fc2", [f"{part}.{kind}" for part in NAMES for kind in ("weight", "bias")]
    operators = {path.removesuffix(end): each for path, each in injection.operators.items() if path.endswith(end)}
    return {f"{path}.{part}": named(each, part) for path, each in operators.items() for part in parts}


@against("authors", "dyt", **AUTHORS)
def test_a_step_of_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their loss of two passes with its gradients, the logits and the shares of both modes, with the same draws."""
    numbers, script = frozen(NUMBERS), module_of("dyt")
    model = timm.models.VisionTransformer(**script.SIZES).double()
    injection = peftcore.apply(
        model, "dyt", bottleneck=script.BOTTLENECK, rate=script.RATE, dropout=0.0, dtype="float64"
    )
    theirs = by_their_names(injection)
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *theirs.items()):
            if ".peft." not in name:
                parameter.copy_(script.wave(parameter.shape, name).view_as(parameter))
    monkeypatch.setattr(torch.Tensor, "exponential_", script.drawing())
    labels = script.LABELS
    with peftcore.call(model.train(), labels=labels):
        logits = model(script.images())
    loss = F.cross_entropy(logits, labels) + injection.losses()
    loss.backward()
    found = {"loss": loss, "train": logits} | {name: each.grad.flatten() for name, each in theirs.items()}
    found["eval"] = model.eval()(script.images())
    assert found.keys() == {name for name in numbers if "share" not in name}
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=name)


@against("authors", "dyt", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    """Of forty blocks, taken together."""
    model = timm.models.VisionTransformer(**module_of("dyt").MANY)
    tensors = by_their_names(peftcore.apply(model, "dyt", bottleneck=4))
    for name, told in frozen(NUMBERS, "start").items():
        same_start(torch.cat([each.flatten() for key, each in tensors.items() if key.endswith(f".{name}")]), told)


def one_block() -> Any:
    """Returns a transformer as wide as that of the authors."""
    return timm.models.VisionTransformer(**{**module_of("dyt").SIZES, "embed_dim": 768, "depth": 1, "mlp_ratio": 0.1})


@against("authors", "dyt", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the head, which `train` names here."""
    injection = peftcore.apply(one_block(), "dyt", train=["head"])
    found = {name: each.numel() for name, each in by_their_names(injection).items()}
    found |= {f"head.{name}": each.numel() for name, each in injection.model.head.named_parameters()}
    assert found == frozen(NUMBERS, "trains")
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "dyt", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(one_block(), "dyt").config, frozen(NUMBERS, "defaults"))


def gates(x: Tensor, t: dict[str, Tensor], prefix: int, draws: Tensor | None = None) -> Tensor:
    """m by comparing logits, and its gradient as that of the sigmoid; tokens in front always go through."""
    logits = (x * t["gate"]).sum(-1, keepdim=True) + t["gate_bias"]
    inner = logits if draws is None else (logits + draws) / 5.0
    share = 1 / (1 + torch.exp(-inner))
    m = (inner > 0).double() - share.detach() + share
    return m if prefix == 0 else torch.cat([torch.ones_like(m[:, :prefix]), m[:, prefix:]], 1)


def added(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    inner = (x @ t["down.weight"].T + t["down.bias"]).clamp(min=0)
    return 0.1 * (inner @ t["up.weight"].T + t["up.bias"])


def block(self: nn.Module, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
    y = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
    first, second = (torch.empty(len(x), x.shape[1], 1, dtype=x.dtype).exponential_() for _ in range(2))
    draws = second.log() - first.log()  # minus the logarithm of an exponential draw is one of Gumbel's
    return x + gates(x, t, 0, draws) * y + added(x, t)


def test_equation_in_training() -> None:
    """With dropout, layer scale and stochastic depth of the host."""
    model, twin, bare = dropped_model(), dropped_model(), dropped_model()
    injection = peftcore.apply(model, "dyt", bottleneck=3, rate_weight=0.0, prefix_tokens=0, **ALONE)
    copies = filled(injection)
    for tensors, operator in zip(copies.values(), injection.operators.values(), strict=True):
        for key, p in operator.named_parameters():  # else 0.1 hides the adapter, and layer scale the gate
            p.data *= 10 if "up" in key or "gate" in key else 1
            tensors[key].data *= 10 if "up" in key or "gate" in key else 1
    rewrite(twin, block, {path.removesuffix(".mlp.fc2"): [tensors] for path, tensors in copies.items()})
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, twin), lambda each: each(x), bare)


SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}
# Of a host: what its operators' paths end with inside of a block; what reads the stream in front of the feed-forward's
# norm there, and what returns the feed-forward's output as it joins the stream; how many tokens stand before patches.
HOSTED = {
    "swinv2_tiny_window8_256": ("mlp.fc2", "mlp", "norm2", 0),
    "vit": ("mlp.fc2", "layernorm_after", "mlp", 1),
    "bert": ("output.dense", "attention.output.LayerNorm", "output.dense", 0),
    "encoder": ("linear2", "norm1", "linear2", 0),
}


@pytest.mark.parametrize("name", HOSTED)
def test_equation(name: str) -> None:
    """In evaluation, by hooks on a copy; the gate stands behind a norm that stands behind the branch."""
    suffix, reader, end, prefix = HOSTED[name]
    torch.manual_seed(0)
    if name in HOSTS:
        base, inputs = HOSTS[name].build()
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    else:
        base, inputs = timm.create_model(name, **SWIN), {"x": torch.randn(2, 3, 32, 32).double()}
        for parameter in base.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    base = base.double().eval().requires_grad_(False)
    model, copies, open_gates = deepcopy(base), {}, []
    injection = peftcore.apply(model, "dyt", bottleneck=3, **ALONE)
    run = HOSTS[name].output if name in HOSTS else lambda output: output
    with without_fast_paths():
        unchanged = run(base(**inputs))
        for path, tensors in filled(injection).items():
            copies[path], read = tensors, []
            inside = base.get_submodule(path.removesuffix(f".{suffix}"))
            inside.get_submodule(reader).register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))

            def after(module: nn.Module, args: Any, y: Tensor, read: list[Tensor] = read, t: Any = tensors) -> Tensor:
                x = read.pop()
                open_gates.append(gates(x, t, prefix))
                return open_gates[-1] * y + added(x, t)

            inside.get_submodule(end).register_forward_hook(after)
        ours, expected = run(model(**inputs)), run(base(**inputs))
    assert 0 < torch.cat([each.detach().flatten() for each in open_gates]).mean() < 1
    assert (expected - unchanged).abs().max() > 1e-2 * unchanged.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for output in (ours, expected):
        output.square().sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad.any() or (prefix and "gate" in key)  # the head reads one token, which always goes
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-10)


def vit(**options: Any) -> tuple[nn.Module, peftcore.Injection]:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**module_of("dyt").SIZES, **options).double().train()
    injection = peftcore.apply(model, "dyt", bottleneck=4, dropout=0.0, dtype="float64")
    filled(injection)
    return model, injection


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def step(model: nn.Module, injection: peftcore.Injection, labels: Tensor, **route: Any) -> tuple[Tensor, list[Tensor]]:
    """The losses of a step that wait, and their gradients."""
    torch.manual_seed(3)
    with peftcore.call(model, labels=labels):
        model(pictures())
    loss = injection.losses()
    return loss.detach(), list(torch.autograd.grad(loss, list(injection.parameters())))


def test_checkpoints_repeat_both_passes_as_they_were() -> None:
    """In the repeated second pass, too, all tokens go through."""
    labels = torch.tensor([0, 2, 1, 1])
    model, injection = vit()
    expected = step(model, injection, labels)
    model.set_grad_checkpointing()
    found = step(model, injection, labels)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all(each.any() for each in found[1])


def test_a_route_trains_with_the_rows_of_the_adapter() -> None:
    model, injection = vit()
    labels = torch.tensor([0, 2, 1, 1])
    draws = iter(range(1000))

    def equal(tensor: Tensor) -> Tensor:  # draws by token, the same for all rows
        ones = torch.linspace(0.5, 2.0, tensor.shape[1], dtype=tensor.dtype) + next(draws) % 4
        return tensor.copy_(ones[None, :, None].expand_as(tensor))

    def losses(x: Tensor, labels: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch, peftcore.call(model, labels=labels):
            patch.setattr(torch.Tensor, "exponential_", equal)
            model(x)
            return injection.losses()

    alone = losses(pictures()[1:3], labels[1:3])
    with peftcore.route(model, [None, "dyt", "dyt", None]):
        routed = losses(pictures(), labels)
    torch.testing.assert_close(routed, alone, rtol=1e-10, atol=1e-12)


def test_padding_has_no_share() -> None:
    model, _ = HOSTS["bert"].build()
    injection = peftcore.apply(model.train(), "dyt", complete=0.0, rate=0.25, rate_weight=3.0)
    for operator in injection.operators.values():
        operator.gate.data.zero_()
        operator.gate_bias.data.fill_(1e4)  # all go through
    dyt: Any = injection.method
    counts, put = [], dyt.taps.counts.put
    dyt.taps.counts.put = lambda value: (counts.append(value[-1]), put(value))
    model(input_ids=torch.tensor([[5, 7, 9, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    assert [[each.item() for each in pair] for pair in counts] == [[3.0, 3.0]] * len(injection.operators)
    torch.testing.assert_close(injection.losses().detach(), torch.tensor(3.0 * 0.75**2))


def test_which_tokens_always_go_through() -> None:
    """Those in front of patches, registers too; of text none, unless it is said."""
    seen: list[Tensor] = []

    def opened(model: nn.Module, *given: Any, **options: Any) -> list[float]:
        injection = peftcore.apply(model, "dyt", init_bias=-1e4, **options)
        operator: Any = next(iter(injection.operators.values()))
        inner = operator.gates
        operator.gates = lambda x: seen.append(inner(x)) or seen[-1]
        with torch.no_grad():
            model.eval()(*given)
        return seen[-1][0].flatten().tolist()

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    picture = torch.randn(2, 3, 16, 16)
    assert opened(timm.models.VisionTransformer(**sizes), picture) == [1, 0, 0, 0, 0]
    assert opened(timm.models.VisionTransformer(**sizes, reg_tokens=2), picture) == [1, 1, 1, 0, 0, 0, 0]
    assert opened(timm.models.VisionTransformer(**sizes, class_token=False, global_pool="avg"), picture) == [0] * 4
    assert opened(timm.models.VisionTransformer(**sizes), picture, prefix_tokens=3) == [1, 1, 1, 0, 0]
    assert opened(HOSTS["bert"].build()[0], torch.tensor([[5, 6, 7]])) == [0, 0, 0]


@pytest.mark.parametrize("name", ["vit", "timm", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "llama"])
def test_tokens_that_skip_are_not_computed(name: str) -> None:
    """In evaluation, with the outputs of before; in a route all are."""
    torch.manual_seed(0)
    if name in HOSTS:
        model, inputs = HOSTS[name].build()
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    elif name == "timm":
        model, inputs = timm.models.VisionTransformer(**module_of("dyt").SIZES, init_values=0.5), {"x": pictures(2)}
    else:
        model, inputs = timm.create_model(name, **SWIN), {"x": torch.randn(2, 3, 32, 32).double()}
    model, output = model.double().eval(), HOSTS[name].output if name in HOSTS else lambda y: y
    injection, tokens = peftcore.apply(model, "dyt", bottleneck=3, skip=True, **ALONE), []
    filled(injection)
    for path in injection.operators:
        model.get_submodule(path).register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:-1].numel()))
    expected = output(model(**inputs)).detach()  # with gradients all are computed
    (full, tokens[:]), rows = (list(tokens), []), len(expected)
    with torch.no_grad():
        found = output(model(**inputs))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert len(tokens) == len(full) and all(map(int.__le__, tokens, full)) and sum(tokens) < sum(full)
        with peftcore.route(model, [None] * (rows - 1) + ["dyt"]):
            torch.testing.assert_close(output(model(**inputs))[-1], expected[-1], rtol=1e-10, atol=1e-10)


def test_where_tokens_cannot_skip() -> None:
    model, inputs = HOSTS["vit"].build()
    for name in ("one", "other"):
        filled(peftcore.apply(model, "dyt", name=name, skip=True))
    with torch.no_grad(), peftcore.activate(model, "one", "other"), pytest.raises(SequenceError, match="two adapters"):
        model.eval()(**inputs)
    for name, target, reason in (
        ("bert", None, "not a separate module"),
        ("moe", None, "not part of a feed-forward"),
        ("vit", "attn.output", "not part of a feed-forward"),
    ):
        with pytest.raises(UnsupportedSite, match=reason):
            peftcore.apply(HOSTS[name].build()[0], "dyt", skip=True, target=target)
    sizes = {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
    with pytest.raises(UnsupportedSite, match=r"dwconv\.weight may mix tokens"):
        peftcore.apply(timm.models.pvt_v2.PyramidVisionTransformerV2(**sizes), "dyt", skip=True)


def test_refused() -> None:
    model, injection = vit()
    with pytest.raises(TrainingError, match="complete=0"):
        model(pictures())
    with pytest.raises(TrainingError, match="complete=0"), peftcore.call(model, labels=torch.zeros(4, 3).long()):
        model(pictures())
    injection.remove()
    with pytest.raises(ConfigError, match="rate cannot change at single sites"):
        peftcore.apply(model, "dyt", overrides={"blocks.1.mlp.fc2": {"rate": 0.1}})
