"""Files of peft's type LORA, which covers many methods of peftcore: the shared translation, and modules for its
variants.

- `variant`: the base class of variants
- `plain`: LoRA itself, and methods that are written as LoRA
- `dora`, `bd_lora`, `monteclora`, `alora`, `velora`, `mica`: variants that an option of peft or additional tensors
  select
- `decomposed`: PiSSA and OLoRA, whose initial update peft subtracts from the base, alone and combined with DoRA
- `kasa`: KaSA, for which peft subtracts another part of the base
- `layouts`: layouts of A and B in the file, by layer
- `layer_replication`: layers that a model runs repeatedly
- `translation`: the translation, which chooses the variant
"""
