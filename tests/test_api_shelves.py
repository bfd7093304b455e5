"""Users import from `peftcore`, authors from `peftcore.author`: each name is in one of the two, and on one shelf."""

import subprocess
import sys
from collections import Counter

import pytest

import peftcore
import peftcore.author
from peftcore.author import blocks, essentials, formats, sequences, weights

SHELVES = (essentials, weights, blocks, sequences)
MOST = 45
"""Names that a user meets."""


def test_users_meet_few_names() -> None:
    assert len(peftcore.__all__) <= MOST


def test_a_name_is_on_one_shelf() -> None:
    names = [name for shelf in SHELVES for name in shelf.__all__]
    assert not [name for name, count in Counter([*names, *peftcore.__all__]).items() if count > 1]
    assert names == peftcore.author.__all__ or sorted(names) == sorted(peftcore.author.__all__)
    assert all(hasattr(formats, name) for name in formats.__all__)


@pytest.mark.parametrize("name", ["Method", "Site", "hookimpl"])
def test_a_name_that_moved_is_found_with_a_warning(name: str) -> None:
    with pytest.warns(FutureWarning, match=f"import {name} from peftcore.author"):
        assert getattr(peftcore, name) is getattr(peftcore.author, name)


def test_authors_names_are_there_when_they_are_asked_for() -> None:
    script = "import peftcore, sys; assert 'peftcore.author' not in sys.modules; peftcore.author.Method"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_name_of_nobody_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        peftcore.nothing  # noqa: B018
