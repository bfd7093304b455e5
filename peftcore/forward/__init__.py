"""All that happens in a forward: what was chosen, what acts at a module, the class swap, what is kept and recomputed.

It may import `roles`, and what is below. In the order of reading:

- `active_adapters`: which adapters are active, on which rows of a batch.
- `context`: one forward of the model, which backward may repeat.
- `save_pretrained`: other libraries' saving writes the bare base.
- `host_state`: what peftcore remembers of a model.
- `mount`: one operator at one module.
- `cache`: effective weights in evaluation.
- `recompute`: effective weights in training, made again in backward.
- `expert_updates`: low-rank updates of stacked experts.
- `view`: a module with other tensors, for one forward.
- `plan`: what acts at one module under one choice.
- `slot`: what one module carries.
- `routing`: rows of a batch that go to different adapters.
- `batched_updates`: low-rank updates of many adapters in one product.
- `attention`: edits inside attention.
- `run`: what runs there.
- `class_swap`: how a module gets another forward.
- `adapter_modules`: the modules in which operators live.
"""
