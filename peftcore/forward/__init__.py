"""The forward of an adapted model: which injections are active, the class swap, effective weights, recompute.

It may import `roles`, and what is below. In the order of reading:

- `active_adapters`: which adapters are active, on which rows of a batch.
- `checkpoints`: which forward a checkpoint repeats inside backward.
- `counted_draws`: random numbers that are functions of what they are for.
- `draws`: random numbers of adapters that rows go to.
- `repeats`: how a batch repeats what a call tells.
- `tokens`: the tokens of one forward, and what was decided when they were new.
- `context`: the context of one forward of the model, which backward may repeat.
- `routing`: rows of a batch that go to different adapters.
- `own_losses`: the losses that methods add to the model's.
- `routers`: operators that give shares of experts, and what is summed up of them.
- `taps`: what one operator leaves for another in the same forward.
- `recorder`: opens and closes the context of each forward, and knows which one backward repeats.
- `scopes`: for whom a choice holds, and until when.
- `cache`: what is computed from weights, kept while nobody writes to them.
- `instance_methods`: methods of a model that do something else while it is adapted.
- `save_pretrained`: other libraries' saving writes the bare base.
- `admission`: the mark by which transformers' Trainer takes an adapted quantized model.
- `adapter_modules`: the modules in which operators live, and what loading into them lacks.
- `generate`: one call of `generate` computes effective weights once, and its prompt is known.
- `merged_choice`: which choices are right while adapters are merged.
- `unused_parameters`: adapters that train and do not act, where that fails.
- `residency`: which adapters have their values on the model, within a limit.
- `host_state`: the state that peftcore keeps on an adapted model.
- `mount`: one operator at one tensor or around one module.
- `recompute`: effective weights in training, computed again in backward.
- `expert_updates`: lazy weights for low-rank updates of stacked experts.
- `view`: a module with other tensors, for one forward.
- `plan`: the plan of one module under one choice.
- `slot`: the operators and plans of one module.
- `cached_weights`: the promise of a user that nothing is written for a while.
- `alike`: equal operators of several adapters, which run as one.
- `batched_updates`: low-rank updates of many adapters in one product.
- `attention`: edits inside attention.
- `transformers_attention`: edits in attentions of transformers.
- `multihead_attention`: edits in torch's own attention.
- `attention_calls`: the ways in which attention modules call edits.
- `call`: one call of an adapted module, with what acts there.
- `class_swap`: how a module gets another forward.
"""
