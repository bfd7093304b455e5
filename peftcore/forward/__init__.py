"""The forward of an adapted model: which injections are active, the class swap, the effective-weight cache, recompute.

It may import `roles`, and what is below. In the order of reading:

- `active_adapters`: which adapters are active, on which rows of a batch.
- `context`: the context of one forward of the model, which backward may repeat.
- `save_pretrained`: other libraries' saving writes the bare base.
- `host_state`: the state that peftcore keeps on an adapted model.
- `mount`: one operator at one tensor or around one module.
- `cache`: the cache of effective weights in evaluation.
- `recompute`: effective weights in training, computed again in backward.
- `expert_updates`: lazy weights for low-rank updates of stacked experts.
- `view`: a module with other tensors, for one forward.
- `plan`: the plan of one module under one choice.
- `slot`: the operators, plans and cache of one module.
- `routing`: rows of a batch that go to different adapters.
- `batched_updates`: low-rank updates of many adapters in one product.
- `attention`: edits inside attention.
- `run`: the forward of an adapted module.
- `class_swap`: how a module gets another forward.
- `adapter_modules`: the modules in which operators live.
"""
