"""Peft's type LORA, which covers many of our methods: the shared translation, and a module for each variant.

- `variant`: the base class of variants
- `plain`: LoRA itself, and methods that are written as LoRA
- `dora`, `bd_lora`, `monteclora`, `alora`, `velora`, `mica`: variants by an option of peft's or by further tensors
- `decomposed`: PiSSA and OLoRA, which peft subtracts from the base, alone and combined with DoRA
- `kasa`: KaSA, for which peft subtracts another part of the base
- `layouts`: layouts of A and B in the file, by layer
- `layer_replication`: layers that a model runs again
- `translation`: the translation, which chooses the variant
"""
