"""An envelope from a foreign file: what most places have, and overrides for the others."""

import pytest
import torch

from peftcore.contract.config import matches
from peftcore.files.envelope import SavedSite
from peftcore.files.formats.composing import composed, literally, with_overrides

SITE = SavedSite(module_path="first", tensor="weight")


@pytest.mark.parametrize("path", ["layers.0", "a*b", "odd[1]?"])
def test_a_path_is_meant_as_it_stands(path: str) -> None:
    assert matches(path, literally(path))
    assert not any(matches(path.replace(sign, "x"), literally(path)) for sign in path if sign in "*?[")


def test_what_most_have_and_overrides() -> None:
    places = {"a": {"rank": 4, "alpha": 8.0}, "b": {"rank": 4, "alpha": 8.0}, "c[0]": {"rank": 2, "alpha": 8.0}}
    assert with_overrides(places) == {"rank": 4, "alpha": 8.0, "overrides": {"c[[]0]": {"rank": 2}}}
    assert with_overrides({"a": places["a"]}) == {"rank": 4, "alpha": 8.0}


def test_one_method_is_itself_and_several_are_a_union() -> None:
    lora, ia3 = {"method": "lora", "rank": 2}, {"method": "ia3"}
    one = composed([lora], [{"": [SITE]}], dtypes=[torch.float16], target=["first"])
    assert one.method == "lora" and one.config == lora and one.selections == {"": (SITE,)} and one.dtype == "float32"
    both = composed([lora, ia3], [{"": [SITE]}, {}], dtypes=[torch.float64], target=None, train=["second.bias"])
    assert both.method == "config_union" and both.config["parts"] == [lora, ia3]
    assert both.selections == {"0/": (SITE,)} and both.train == ("second.bias",) and both.dtype == "float64"
