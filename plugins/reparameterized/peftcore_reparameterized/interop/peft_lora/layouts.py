"""Layouts of A and B in a file of peft's LoRA, which depend on the adapted layer.

A and B of an embedding have different names. Stacked experts are concatenated: A is [experts * rank, in], and B is
[out, rank * experts]. B of a convolution has a kernel of size 1, and A of a grouped convolution reads all channels. At
the output projection of torch's attention, peft adds the update twice, in forward and in a merge. So there, peftcore's
B is twice that of the file.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Size, Tensor

from peftcore.author import Site, Transposed
from peftcore.author.formats import Found
from peftcore.errors import ExportError

A_NAME, B_NAME, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
TABLE_A, TABLE_B = "lora_embedding_A", "lora_embedding_B"
FACTORS = (A_NAME, B_NAME, BIAS, TABLE_A, TABLE_B)
PACKED, BEHIND = "in_proj_weight", "out_proj.weight"
"""Two tensors of torch's attention. peft adapts either both or none of them."""


def read_factors(site: Site, A: Size, B: Size, found: Found) -> dict[str, Tensor]:
    """Returns peftcore's A and B, of the given shapes, from the tensors in a file."""
    if site.layer.one_hot:
        tensors = {"A": found.take(TABLE_A, A), "B": found.take(TABLE_B, B)}
    elif site.batch:
        experts, out, rank = B
        turned = _turned(site)
        out, inputs = (A[-1], out) if turned else (out, A[-1])
        side_by_side = found.take(B_NAME, (out, rank, experts), (out, rank * experts))
        down = found.take(A_NAME, (experts, rank, inputs), (experts * rank, inputs))
        up = side_by_side.permute(2, 0, 1)
        tensors = {"A": up.mT, "B": down.mT} if turned else {"A": down, "B": up}
    else:
        tensors = {"A": found.take(A_NAME, A), "B": found.take(B_NAME, B, (*B, *(1 for _ in site.kernel)))}
    if site.tensor == BEHIND:
        tensors["B"] = 2 * tensors["B"]
    return tensors


def write_factors(site: Site, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Returns A and B in peft's layout, by peft's names."""
    if site.tensor == BEHIND:
        B = B / 2
    if site.layer.one_hot:
        return {TABLE_A: A, TABLE_B: B}
    if site.batch:
        A, B = (B.mT, A.mT) if _turned(site) else (A, B)
        return {A_NAME: A.flatten(0, 1), B_NAME: B.permute(1, 2, 0).flatten(1)}
    return {A_NAME: A, B_NAME: B.view(*B.shape, *(1 for _ in site.kernel))}


def check_attention(sites: Iterable[Site]) -> None:
    """Verify that both tensors of torch's attention are adapted, or none.

    Raises:
        ExportError: only one of them is adapted.
    """
    tensors = [(site.module_path, site.tensor) for site in sites]
    for path, tensor in tensors:
        other = {PACKED: BEHIND, BEHIND: PACKED}.get(tensor)
        if other is not None and (path, other) not in tensors:
            raise ExportError(f"peft adapts all of {path}, but {other} is left out here")


def _turned(site: Site) -> bool:
    """Whether peft confuses inputs and outputs of stacked experts. It relies on the attribute `is_transposed` of a
    module, which the modules of Llama 4 lack."""
    return isinstance(site.layer, Transposed) and not getattr(site.module, "is_transposed", False)
