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
