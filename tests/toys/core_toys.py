"""Small hosts and small methods for the core's own tests: one method for each mechanism, none of them from a plugin."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import peftcore
from peftcore.author import Method, MethodConfig, Operator, Replacement, Tags, WeightOperator
from peftcore.contract.operators import on_first

WIDTH = 8


class Attention(nn.Module):
    """Attention with separate projections, called with keywords only, as transformers does."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, *, hidden: Tensor) -> Tensor:
        q, k, v = (
            p(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.self_attn = Attention(width)
        self.mlp = Mlp(width)
        self.attn_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(hidden=self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Two layers between a table and a head; token ids in, logits of the first token out."""

    def __init__(self, width: int = WIDTH, depth: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x)[:, 0])


class TiedLanguageModel(nn.Module):
    """The head's weight is the table's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.inner(self.embed_tokens(ids))))


class Perceptron(nn.Module):
    """Two named linear layers."""

    def __init__(self, inputs: int = 4, hidden: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def transformer(depth: int = 2) -> Transformer:
    """A seeded host in eval mode."""
    torch.manual_seed(0)
    return Transformer(depth=depth).eval()


def perceptron() -> Perceptron:
    """A seeded host in eval mode."""
    torch.manual_seed(0)
    return Perceptron().eval()


def token_ids(rows: int = 2, length: int = 5) -> Tensor:
    return torch.arange(rows * length).view(rows, length) % 11


class DoublingConfig(MethodConfig):
    """No options."""

    method: Literal["toy_doubling"] = "toy_doubling"


class DoublingOperator(Operator):
    """y -> gain * y. Only a forward: it cannot be merged, nor act on a tensor that is read."""

    def __init__(self, site: Any, config: DoublingConfig) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_first(call(*args, **kwargs), lambda y: y * self.gain)


class Doubling(Method):
    """An onion layer."""

    name = "toy_doubling"
    Config = DoublingConfig
    tags = Tags(category="additive", paper="none", identity_at_init=False)
    target = "attn.q"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, DoublingOperator, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 1


class ShiftConfig(MethodConfig):
    """Options of the shift."""

    method: Literal["toy_shift"] = "toy_shift"
    start: float = 1.0
    """Where the shift starts."""


class ShiftOperator(WeightOperator):
    """W -> W + shift, element by element."""

    def __init__(self, site: Any, config: ShiftConfig) -> None:
        super().__init__(site)
        self.shift = nn.Parameter(torch.full(tuple(site.weight_shape), config.start))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.shift


class Shift(Method):
    """A reparameterization of any tensor."""

    name = "toy_shift"
    Config = ShiftConfig
    tags = Tags(category="reparameterized", paper="none", mergeable=True, identity_at_init=False)
    target = "attn.q"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, ShiftOperator, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return site.numel


class SwapConfig(MethodConfig):
    """No options."""

    method: Literal["toy_swap"] = "toy_swap"


class Swap(Method):
    """Replacements of whole tensors."""

    name = "toy_swap"
    Config = SwapConfig
    tags = Tags(category="selective", paper="none", mergeable=True)
    target = "attn.q"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            made = surgeon.replace(site)
            assert isinstance(made, Replacement)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return site.numel


class SharedConfig(MethodConfig):
    """Options of the shared bases."""

    method: Literal["toy_shared"] = "toy_shared"
    rank: int = 2
    """Rank of the shared bases."""


class Bases(nn.Module):
    """Two frozen random matrices for all sites of a host."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("A", torch.randn(rank, inputs) / math.sqrt(inputs))
        self.register_buffer("B", torch.randn(outputs, rank) / math.sqrt(rank))


class SharedOperator(Operator):
    """y + b * (B (d * (A x))): two vectors of its own, two matrices of everybody."""

    def __init__(self, site: Any, config: SharedConfig, bases: Any) -> None:
        super().__init__(site)
        self.bases = bases
        self.d = nn.Parameter(torch.ones(config.rank))
        self.b = nn.Parameter(torch.zeros(site.out_features))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.bases.module.A) * self.d
        return call(x) + self.b * nn.functional.linear(low, self.bases.module.B)


class SharedBases(Method):
    """State that sites share, through `own`."""

    name = "toy_shared"
    Config = SharedConfig
    tags = Tags(category="reparameterized", paper="none")
    target = ("attn.q", "attn.v")

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            bases = surgeon.own("bases", lambda s=site: Bases(s.in_features, s.out_features, config.rank))
            surgeon.graft(site, lambda s, c, bases=bases: SharedOperator(s, c, bases), config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return config.rank + site.out_features


@torch.no_grad()
def stir(injection: Any, scale: float = 0.1, seed: int = 3) -> None:
    """Move every parameter of an injection by seeded noise, so that identity at the start hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in injection.parameters():
        parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that `remove` and a failed `apply` must leave as it was in a host, by identity and by bits."""
    return {
        "modules": [(path, id(module), type(module)) for path, module in model.named_modules(remove_duplicate=False)],
        "attributes": [(path, sorted(vars(module))) for path, module in model.named_modules()],
        "parameters": [
            (name, id(value), value.requires_grad, value._version)
            for name, value in model.named_parameters(remove_duplicate=False)
        ],
        "bits": {name: value.detach().clone().numpy().tobytes() for name, value in model.state_dict().items()},
        "order": list(model.state_dict()),
        "training": [(path, module.training) for path, module in model.named_modules()],
        "hooks": [
            (path, list(module._forward_hooks), list(module._forward_pre_hooks))
            for path, module in model.named_modules()
        ],
    }


def run_without_gradients(model: nn.Module, *inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


ALL = ["lora", "dora", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "linear_probe"]


def irregular() -> Transformer:
    """A host in a state that no rule describes: some parameters frozen, some modules in eval, hooks of its own."""
    model = transformer().train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    model.layers[1].eval()
    model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: None)
    model.register_forward_pre_hook(lambda module, args: None)
    return model


class Fragile(Shift.Config):
    """Options of the method that breaks."""

    method: Any = "toy_fragile"
    stage: str = "inject"
    """Where it breaks."""


class BreakingOperator(peftcore.author.WeightOperator):
    built = 0

    def __init__(self, site: Any, config: Any) -> None:
        super().__init__(site)
        BreakingOperator.built += 1
        if config.stage == "operator" and BreakingOperator.built % 2 == 0:
            raise ZeroDivisionError("operator")
        self.shift = nn.Parameter(torch.zeros(tuple(site.weight_shape)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.shift


def schema_of_hums() -> dict[str, str]:
    """The schema of a file, as a plugin names it."""
    return {"type": "object"}
