"""Helpers for authors of methods.

It may import `files` and the layers below. In the order of reading:

- `branches`: adapters at the end of a branch (the attention or feed-forward of a block), or parallel to it.
- `block_sites`: the blocks of a model as target modules.
- `feed_forwards`: whole feed-forward networks as target modules.
- `prompts`: finds the positions of the prompt among the tokens that pass through a block, and builds attention masks.
- `activations`: activation functions by name.
- `inputs`: statistics of the inputs of linear layers over the user's data.
- `instance_prompts`: soft prompts that depend on the text after them.
- `pass_cache`: a separate cache for an extra pass over the model, or for a network in parallel with it.
- `guests`: a smaller network of the model's family that runs in parallel with the model.
- `borrowed_layers`: a parallel network that uses the model's layers, each with a low-rank update.
- `streams`: extra rows in parallel with the tokens of a diffusion transformer.
- `row_logits`: the model's predictions at the virtual tokens of a soft prompt.
- `hybrid_parts`: helpers for hybrids, which are methods that combine other methods.
- `budgets`: the number of trainable values of a method in well-known models.
"""
