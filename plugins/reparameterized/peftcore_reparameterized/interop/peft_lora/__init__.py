"""Peft's type LORA, which is many of our methods: what all have in common, and a module for each variant.

- `variant`: the base class of variants
- `plain`: LoRA itself, and methods that are written as LoRA
- `dora`, `bd_lora`, `monteclora`, `alora`, `velora`, `mica`: variants by an option of peft's or by further tensors
- `decomposed`: PiSSA and OLoRA, which peft takes out of the base, alone and beside DoRA
- `kasa`: KaSA, for which peft takes another part out of the base
- `layouts`: how A and B lie in the file, by layer
- `layer_replication`: layers that a model runs again
- `translation`: the translation, which chooses the variant
"""
