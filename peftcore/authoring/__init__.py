"""Helpers for authors of methods.

It may import `files`, and what is below. In the order of reading:

- `branches`: adapters parallel to a branch of a block.
- `blocks`: the blocks of a model as target modules.
- `feed_forwards`: whole feed-forwards as target modules.
- `prompts`: the tokens that go through a block: where the prompt begins and ends, which token sees which.
- `inputs`: the inputs of linear layers, as a look at data sees them.
- `instance_prompts`: soft prompts that look at the text behind them.
- `pass_cache`: a cache of its own for an extra pass over the model, or for a network beside it.
- `guests`: a smaller network of the model's own family, beside it.
- `borrowed_layers`: a network beside the model whose layers are the model's, with updates of its own.
- `streams`: rows beside the tokens of a diffusion transformer.
- `row_logits`: what a model predicts at the rows of a soft prompt.
- `hybrid_parts`: methods that are made of methods.
- `budgets`: trainable values of a method in well-known models.
"""
