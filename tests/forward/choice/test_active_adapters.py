"""A choice is a value: it says what acts, and holds from where it was made."""

import threading

import torch
from call_toys import adapted, in_the_middle
from core_toys import token_ids

from peftcore import Stack, Sum, activate
from peftcore.forward.choice.active_adapters import Choice, Route


def test_a_choice_in_the_middle_of_a_forward_holds_from_there() -> None:
    model, (_, two) = adapted("lora", "dora")
    ids = token_ids(2)
    with torch.no_grad():
        first = model.layers[0](model.embed_tokens(ids))
        with activate(model, two.name):
            expected = model.lm_head(model.norm(model.layers[1](first)))
        assert not torch.equal(model(ids)["logits"], expected)
        in_the_middle(model, lambda: activate(model, two.name))
        assert torch.equal(model(ids)["logits"], expected)


def test_a_choice_in_the_middle_of_another_threads_forward_holds_from_the_next_one() -> None:
    """Half of each would be the output of nothing."""
    model, (one, two) = adapted("lora", "dora")
    ids, found = token_ids(2), []
    with torch.no_grad():
        both = model(ids)["logits"]
        in_the_middle(model, lambda: (half.set(), chosen.wait(30)))
        half, chosen = threading.Event(), threading.Event()

        def other() -> None:
            with torch.no_grad():
                found.extend([model(ids)["logits"], model(ids)["logits"]])

        thread = threading.Thread(target=other)
        thread.start()
        half.wait(30)
        activate(model, two.name)
        chosen.set()
        thread.join(30)
        assert torch.equal(found[0], both) and torch.equal(found[1], model(ids)["logits"])
        assert not torch.equal(found[0], found[1]) and not one.active


def test_rows_of_a_name_become_bare_and_the_others_keep_theirs() -> None:
    route = Route(("a", "b", "c"), torch.tensor([2, 0, 1, -1, 1]), 2, (2, 0, 1, -1, 1))
    for name, left, positions in (("a", ("b", "c"), [1, -1, 0, -1, 0]), ("b", ("a", "c"), [1, 0, -1, -1, -1])):
        found = route.without(name)
        assert found.names == left and found.copies == 2
        assert found.index.tolist() == list(found.positions) == positions
    assert route.without("b").without("a").without("c").positions == (-1,) * 5
    assert route.without("d") is route
    assert Route(("a",), torch.tensor([0, -1])).without("a").index.tolist() == [-1, -1]
    with torch.inference_mode():
        assert not Route(("a", "b"), torch.tensor([0, 1])).without("a").index.is_inference()


def test_a_choice_without_a_name_keeps_the_rest() -> None:
    context = {"task": "rte"}
    routed = Choice(("a", "c"), Route(("a", "b"), torch.tensor([0, 1]), 1, (0, 1)), context).without("a")
    assert routed.active == ("c",) and routed.route.names == ("b",) and routed.context is context
    assert routed.acting == routed.bound == ("b",)
    composition = Stack(Sum("a", "b"), "c")
    composed = Choice(("a", "b", "c"), None, context, composition).without("b")
    assert composed.acting == ("a", "c") and composed.composition is composition and composed.bound == ("a", "b", "c")
    assert composed.key != Choice(("a", "b", "c"), None, context, composition).key
    assert Choice(("a",)).bound == () and Choice(("a",)).without("a").acting == ()


def test_a_route_of_tokens_is_that_of_its_rows_when_all_have_begun() -> None:
    split = Route(("a", "b"), torch.tensor([0, 1]), 1, (0, 1), since=(2, 0))
    assert split.by_tokens(0, 3, 2).positions == (-1, -1, 0, 1, 1, 1) and split.by_tokens(0, 3, 2).tokens == 3
    assert split.by_tokens(0, 2, 4).positions == (-1, 1) and split.by_tokens(0, 2, 4).tokens == 0
    assert split.by_tokens(2, 5, 2).positions == (0, 1)
    assert split.by_tokens(1, 2, 2).index.tolist() == [-1, 0, 1, 1]
    assert split.without("a").by_tokens(0, 2, 2).positions == (-1, 0)


def test_a_route_that_is_kept_does_not_grow_with_every_length() -> None:
    split = Route(("a", "b"), torch.tensor([0, 1]), 1, (0, 1), since=(2, 0))
    found = [split.by_tokens(0, length, 2) for length in range(3, 60)]
    assert split.by_tokens(0, 59, 2) is found[-1]
    assert sum(len(vars(split)[name]) for name in ("_known", "_routes", "_last")) == 1
