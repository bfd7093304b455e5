"""Names of words in files, and what is known of them without a host."""

import pytest
import torch
from torch import Size

from peftcore.errors import ExportError
from peftcore.files.formats.bundled_embeddings import bundled, counts, is_known, taken_apart


def test_a_word_ends_at_the_first_dot() -> None:
    assert taken_apart("bundle_emb.<cat>.string_to_param.*") == ("<cat>", "string_to_param.*")
    assert [is_known(f"bundle_emb.cat.{kind}") for kind in ("clip_l", "clip_g_out", "string_to_param", "llama")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_vectors_are_counted() -> None:
    shapes = {"bundle_emb.cat.clip_l": Size([3, 8]), "bundle_emb.dog.clip_l": Size([8]), "lora_te_x.alpha": Size([])}
    assert counts(shapes) == {"cat": 3, "dog": 1}


def test_vectors_of_a_word_are_gathered_in_their_order() -> None:
    vectors = torch.arange(6.0).view(3, 2)
    tensors = bundled("lora_te1", [("a", 7), ("b", 8), ("a", 9)], vectors)
    assert {name: value.tolist() for name, value in tensors.items()} == {
        "bundle_emb.a.clip_l": [[0, 1], [4, 5]], "bundle_emb.b.clip_l": [[2, 3]],
    }  # fmt: skip
    assert list(bundled("lora_te", [("a", 7)], vectors[:1])) == ["bundle_emb.a.string_to_param.*"]
    with pytest.raises(ExportError, match="not of 'lora_unet'"):
        bundled("lora_unet", [("a", 7)], vectors[:1])
