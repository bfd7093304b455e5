"""Random numbers depend on (seed, path), and drawing them moves nothing else."""

import torch

from peftcore.surgery.seeding import preserved_rng, seed_by_path


def drawn(seed: int, path: str) -> torch.Tensor:
    with preserved_rng():
        seed_by_path(seed, path)
        return torch.randn(4)


def test_numbers_depend_on_seed_and_path_alone() -> None:
    first = drawn(0, "layers.0.q_proj")
    torch.manual_seed(99)
    assert torch.equal(drawn(0, "layers.0.q_proj"), first)
    assert not torch.equal(drawn(1, "layers.0.q_proj"), first)
    assert not torch.equal(drawn(0, "layers.1.q_proj"), first)


def test_the_global_generator_stays_where_it_is() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    drawn(0, "anywhere")
    assert torch.equal(torch.randn(3), expected)
