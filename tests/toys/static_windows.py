"""What the kit finds of networks beside a model whose attention looks through a window."""

REFUSED = {
    "generation_in_other_ways_does_not_depend_on_the_cache-mistral": "the masks of a static cache speak of the window "
    "alone, so nothing tells which of the tokens before it are padding; it is refused"
}
"""The check of the kit that fails there for methods that attend once more, and why."""
