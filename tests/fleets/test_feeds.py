"""One adapter's data: its order is its own."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from peftcore.errors import TrainingError
from peftcore.fleets.feeds import Feed


def shuffled() -> DataLoader[Any]:
    return DataLoader([{"x": torch.tensor(float(n))} for n in range(7)], batch_size=2, shuffle=True)  # type: ignore[arg-type]


def taken(feed: Feed, count: int) -> list[list[float]]:
    batches = [feed.take() for _ in range(count)]
    return [each["x"].tolist() for each in batches if each is not None]


def test_the_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = taken(Feed(shuffled(), 3, once=False), 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert taken(Feed(shuffled(), 3, once=False), 8) == first
    assert first[:4] != first[4:] and sorted(x for each in first[:4] for x in each) == list(range(7))
    assert taken(Feed(shuffled(), 4, once=False), 8) != first


def test_it_goes_on_where_another_one_was() -> None:
    feed = Feed(shuffled(), 3, once=False)
    taken(feed, 6)
    assert (feed.epoch, feed.position) == (1, 2)
    other = Feed(shuffled(), 3, once=False)
    other.go_to(1, 2)
    assert taken(other, 5) == taken(feed, 5)
    with pytest.raises(TrainingError, match="fewer batches than the 9"):
        other.go_to(0, 9)


def test_once_ends_with_the_epoch_and_what_can_be_gone_through_once_too() -> None:
    batches = [{"x": torch.tensor([float(n)])} for n in range(3)]
    feed = Feed(batches, 0, once=True)
    assert len(taken(feed, 5)) == 3 and feed.take() is None and feed.ended
    feed = Feed(iter(batches), 0, once=False)
    assert len(taken(feed, 5)) == 3 and feed.ended
    assert len(taken(Feed(batches, 0, once=False), 8)) == 8
    assert Feed([], 0, once=False).take() is None


def test_a_function_gives_each_epoch_its_batches() -> None:
    feed = Feed(lambda epoch: [{"x": torch.tensor([float(epoch)])}] * 2, 0, once=False)
    assert taken(feed, 5) == [[0.0], [0.0], [1.0], [1.0], [2.0]]
