"""Where a branch of a block begins and ends, and what is read at its beginning comes to its end."""

from typing import Any, Literal

import pytest
import torch
from core_toys import Layer, token_ids, transformer
from torch import Tensor, nn

import peftcore
from peftcore.author import Method, MethodConfig, Tags
from peftcore.authoring.branches import AtBranchEnd, BranchSite, Bypass, branch, branch_end, is_post_norm
from peftcore.errors import InactiveSite, UnsupportedSite
from peftcore.registry.plugins import layer_of
from peftcore.roles import derive
from peftcore.targets.resolver import Resolver

X = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8)


class BesideConfig(MethodConfig):
    """Options of the toy."""

    method: Literal["toy_bypass"] = "toy_bypass"
    stream: bool = False
    """Whether it reads in front of the norm."""


class Seen(Bypass):
    """Adds a gain times what the branch reads."""

    def __init__(self, site: BranchSite, config: BesideConfig) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.ones(site.width))

    def beside(self, x: Tensor) -> Tensor:
        return x * self.gain


class Beside(Method):
    name = "toy_bypass"
    Config = BesideConfig
    tags = Tags(category="additive", paper="none", identity_at_init=False)
    target = "mlp.down"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            place = branch(surgeon, site, before_norm=config.stream)
            surgeon.graft(place, Seen, config, place.places)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return site.width


def watched(layer: nn.Module, block: str, norm: str) -> dict[str, Tensor]:
    """What will go into the norm in front of a block, and in and out of the block."""
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        seen.update(read=(*args, *kwargs.values())[0], returned=output)

    layer.get_submodule(norm).register_forward_hook(lambda module, args, output: seen.update(stream=args[0]))
    layer.get_submodule(block).register_forward_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    ("target", "block", "norm"), [("mlp.down", "mlp", "mlp_norm"), ("attn.out", "self_attn", "attn_norm")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_branch_reads_is_added_to_what_it_returns(target: str, block: str, norm: str, stream: bool) -> None:
    host, twin = transformer(1), transformer(1)
    injection = peftcore.apply(host, Beside, target=target, stream=stream)
    assert [operator.gain.numel() for operator in injection.operators.values()] == [8]
    adapted, bare = (watched(each.layers[0], block, norm) for each in (host, twin))
    host(token_ids()), twin(token_ids())
    assert torch.equal(adapted["read"], bare["read"])
    added = adapted["stream" if stream else "read"]
    torch.testing.assert_close(adapted["returned"], bare["returned"] + added)


class Kept(Seen):
    """Keeps of a branch's output a share that it reads."""

    def kept(self, h: Tensor, read: Tensor) -> Tensor:
        return h * self.laid_out(read.movedim(self.layer.channel_dim, -1).sum(-1, keepdim=True))


class Keeping(Method):
    name = "toy_keeping"
    Config = type(
        "Config", (BesideConfig,), {"__annotations__": {"method": Literal["toy_keeping"]}, "method": "toy_keeping"}
    )
    tags, target, parameter_count = Beside.tags, Beside.target, staticmethod(Beside.parameter_count)

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            place = branch(surgeon, site, before_norm=config.stream, adds=False)
            surgeon.graft(place, Kept, config, place.places)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_a_branch_puts_out_may_be_kept_in_part(scaled: bool) -> None:
    """Where the host scales it by code, in front of that: the sum with the stream is nothing to take a part of."""
    host, twin = (with_layers(ScalingLayer if scaled else Layer) for _ in range(2))
    twin.load_state_dict(host.state_dict())
    notes = peftcore.plan(host, Keeping, stream=True).notes
    peftcore.apply(host, Keeping, stream=True)
    adapted, bare = (watched(each.layers[0], "mlp", "mlp_norm") for each in (host, twin))
    host(token_ids()), twin(token_ids())
    share = adapted["stream"].sum(-1, keepdim=True)
    torch.testing.assert_close(adapted["returned"], share * bare["returned"] + adapted["stream"])
    assert ("scales outputs of branches" in "".join(notes)) is scaled


OTHERS: dict[str, dict[str, Any]] = {
    "a norm of its own": {"method": "ln_tuning"},
    "a scaled norm": {"method": "ssf", "target": "norm"},
    "an update of the first matrix": {"method": "lora", "target": "mlp.up"},
    "scaled inputs": {"method": "ia3", "target": "mlp.up", "scale_inputs": ["mlp.up"]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [True, False], ids=["applied first", "applied last"])
@pytest.mark.parametrize("other", OTHERS)
def test_what_others_do_at_its_beginning_is_no_concern(other: str, first: bool, stream: bool) -> None:
    """In a stack, in rows of a route, in branches of a composition: it reads what goes into the branch."""

    def adapted(*names: str) -> nn.Module:
        model = transformer(depth=2).eval()
        made = {"bypass": {"method": Beside, "stream": stream}, "other": OTHERS[other]}
        for name in ("bypass", "other") if first else ("other", "bypass"):
            if name in names:
                injection = peftcore.apply(model, name=name, seed=1, **made[name])
                for seed, parameter in enumerate(injection.parameters()):
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        return model

    ids = token_ids()
    both, alone, bare = adapted("bypass", "other"), adapted("bypass"), adapted("other")
    with torch.no_grad():
        with peftcore.route(both, ["bypass", "other"][: len(ids)] + [None] * (len(ids) - 2)):
            found = both(ids)
        torch.testing.assert_close(found[0], alone(ids)[0])
        torch.testing.assert_close(found[1], bare(ids)[1])
        stacked = both(ids)
        peftcore.injections(bare)["other"].bake()  # what it does to weights, the bypass does not see either
        into = peftcore.apply(bare, Beside, name="bypass", seed=1, stream=stream)
        for mine, theirs in zip(into.parameters(), peftcore.injections(both)["bypass"].parameters(), strict=True):
            mine.copy_(theirs)
        torch.testing.assert_close(stacked, bare(ids))


def test_a_module_that_ends_no_branch_is_one_by_itself() -> None:
    host, twin = transformer(), transformer()
    peftcore.apply(host, Beside, target="layers.0.self_attn.q_proj")
    q_proj = twin.layers[0].self_attn.q_proj
    torch.testing.assert_close(host.layers[0].self_attn.q_proj(X), q_proj(X) + X)


def test_what_cannot_go_past_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="as many tokens"):
        peftcore.apply(transformer(), Beside, target="embed_tokens")
    host = transformer()
    peftcore.apply(host, Beside, target="classifier")
    with pytest.raises(UnsupportedSite, match="a bypass cannot be added"):
        host(token_ids())


@pytest.mark.parametrize("first", [True, False])
def test_torchs_layers_say_where_their_norms_stand(first: bool) -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, norm_first=first), 2, enable_nested_tensor=False
    )
    resolver = Resolver(encoder, derive(encoder), layer_of)
    assert is_post_norm(resolver, "layers.0") is not first


def test_a_norm_behind_the_blocks_tells_that_theirs_stand_in_front() -> None:
    model, bare = transformer(), transformer()
    bare.norm = nn.Identity()
    for host, expected in ((model, False), (bare, True)):
        assert is_post_norm(Resolver(host, derive(host), layer_of), "layers.0") is expected


class DroppingLayer(Layer):
    """Its dropout ends both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.self_attn(hidden=self.attn_norm(x)))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class SometimesLayer(DroppingLayer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(hidden=self.attn_norm(x))
        y = self.mlp(self.mlp_norm(x))
        if x.shape[1] > 4:
            y = self.drop(y)
        return x + y


class ScalingLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.self_attn(hidden=self.attn_norm(x))
        return x + 0.5 * self.mlp(self.mlp_norm(x))


def with_layers(kind: type[Layer]) -> nn.Module:
    host = transformer(2)
    torch.manual_seed(1)
    host.layers = nn.ModuleList(kind() for _ in range(2))
    return host.eval()


class OneMore(AtBranchEnd):
    """Adds a number to what a branch gives to the stream."""

    def __init__(self, site: BranchSite, config: BesideConfig) -> None:
        super().__init__(site)
        self.number = nn.Parameter(torch.ones(1))

    def adapt(self, h: Tensor) -> Tensor:
        return h + self.number.to(h.dtype)


class Behind(Method):
    name = "toy_behind"
    Config = type(
        "Config", (BesideConfig,), {"__annotations__": {"method": Literal["toy_behind"]}, "method": "toy_behind"}
    )
    tags = Tags(category="additive", paper="none", identity_at_init=False)
    target = ("attn.output", "mlp.output")

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            place = branch_end(surgeon, site)
            surgeon.graft(place, OneMore, config, place.places)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 1


def test_what_ends_two_branches_is_told_whose_end_it_is() -> None:
    """One more behind the dropout, for each of the two; within a composition the module draws once."""
    host = with_layers(DroppingLayer)
    seen: list[Tensor] = []
    host.layers[0].drop.register_forward_hook(lambda module, args, y: seen.append(y - args[0]))
    injection = peftcore.apply(host, Behind)
    assert len(injection.operators) == 4
    host(token_ids())
    assert len(seen) == 2 and all(torch.allclose(each, torch.ones(1)) for each in seen)
    outputs = []
    peftcore.apply(host, Behind, name="second")
    for choice in ("toy_behind", peftcore.Average("toy_behind", "second")):
        torch.manual_seed(0)
        with peftcore.activate(host.train(), choice):
            outputs.append(host(token_ids()))
    torch.testing.assert_close(*outputs)


def test_an_end_that_never_runs_is_an_error() -> None:
    """The code says that the module is the end, and on short sequences it is not called."""
    host = with_layers(SometimesLayer)
    peftcore.apply(host, Behind, target="mlp.output")
    with pytest.raises(InactiveSite, match=r"layers\.0\.mlp\.down"):
        host(token_ids(length=3))


@pytest.mark.parametrize("method", [Behind, Beside])
def test_what_no_module_does_is_said(method: type[Method]) -> None:
    """A bypass of the last branch joins what the layer returns; of what is read in between, nothing returns the sum."""
    host = with_layers(ScalingLayer)
    notes = peftcore.plan(host, method, target="mlp.output").notes
    assert ("scales" in "".join(notes)) is (method is Behind)
    [note] = peftcore.plan(host, method, target="attn.output").notes
    assert "scales outputs of branches" in note and "layers.*.self_attn" in note
