"""The dtype under autocast, on devices where there is one."""

import torch

from peftcore.utils.autocast import autocasts, cast_operands, full_precision


def test_autocast_is_seen_where_it_is_on() -> None:
    assert not autocasts("cpu") and not autocasts("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert autocasts("cpu") and not autocasts("meta")


def test_products_of_parameters_alone_are_not_rounded() -> None:
    x = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
        with full_precision(x):
            assert torch.equal(x @ x, x.mm(x)) and (x @ x).dtype is torch.float32


def test_operands_are_cast_as_a_linear_layer_casts_them() -> None:
    x, weight, bias = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)
    assert all(one is other for one, other in zip(cast_operands(x, weight, bias), (x, weight, bias), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        cast = cast_operands(x, weight)
        assert cast[2] is None and {each.dtype for each in cast if each is not None} == {torch.bfloat16}
