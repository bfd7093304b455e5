"""What is neither mixer nor feed-forward has a role by its place: before the blocks, inside them, behind them."""

import pytest
from core_toys import WIDTH, transformer
from torch import nn
from zoo_maps import host_of

from peftcore.roles import derive


def roles(model: nn.Module) -> dict[str, str]:
    return {entry.path: entry.role for entry in derive(model).entries}


def test_norms_are_told_by_where_they_stand() -> None:
    found = roles(transformer())
    assert found["layers.0.attn_norm"] == found["layers.1.mlp_norm"] == "norm"
    assert found["norm"] == "norm.final"


def test_tables_and_heads() -> None:
    found = roles(transformer())
    assert found["embed_tokens"] == "embed" and found["classifier"] == "head"


def test_positions_by_their_name_whatever_holds_them() -> None:
    model = transformer()
    model.positions = nn.Embedding(5, WIDTH)
    model.pos_embed = nn.Parameter(nn.Embedding(5, WIDTH).weight[None].detach())
    found = roles(model)
    assert found["positions"] == found["pos_embed"] == "embed.pos"


@pytest.mark.parametrize(
    ("host", "path", "role"),
    [
        ("bert", "embeddings.token_type_embeddings", "embed.type"),
        ("bert", "embeddings.LayerNorm", "norm.embed"),
        ("vit", "embeddings.patch_embeddings.projection", "patch"),
    ],
)
def test_inputs_of_surveyed_hosts(host: str, path: str, role: str) -> None:
    assert [entry.role for entry in host_of(host).entries if entry.path.endswith(path)] == [role]


class Merges(nn.Module):
    """Four neighbours of a sequence side by side, in half of their features: what Swin has between stages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.lower = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)


def merging(merges: nn.Module, inside: bool) -> dict[str, str]:
    """The roles below a module of that name, in each block or behind the first stage of two."""
    first, second = transformer(), transformer()
    if inside:
        for block in first.layers:
            block.merging = merges
    stage = nn.ModuleDict({"blocks": first.layers} | ({} if inside else {"merging": merges}))
    model = nn.ModuleDict({"stages": nn.ModuleList([stage, nn.ModuleDict({"blocks": second.layers})])})
    return {path: role for path, role in roles(model).items() if "merging" in path}


def test_what_merges_patches_is_told_by_what_it_is() -> None:
    between = merging(Merges(WIDTH), inside=False)
    assert between["stages.0.merging.lower"] == "down" and between["stages.0.merging.norm"] == "norm"
    assert merging(nn.Conv2d(WIDTH, 2 * WIDTH, 2, stride=2), inside=False) == {"stages.0.merging": "down"}
    assert "down" not in merging(nn.Linear(WIDTH, WIDTH), inside=False).values()
    assert "down" not in merging(nn.Linear(2 * WIDTH, WIDTH), inside=True).values()  # two branches in one
    model = transformer()
    model.merging = nn.Linear(2 * WIDTH, WIDTH)  # behind everything: no patches any more
    assert roles(model)["merging"] != "down"
