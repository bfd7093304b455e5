"""Models from where the user keeps them: with their weights, or as skeletons for what only looks.

It may import the core, `errors`, `packages`, `quiet` and `data`. No code of a repository runs, and no pickle is read.
In the order of reading:

- `files`: configurations, and the classes that they name.
- `naming`: what a MODEL names, one class a kind.
- `loading`: models and tokenizers to train, by folder, file, package or name.
- `opening`: models of any library in folders, opened and written again.
- `example_inputs`: inputs of a forward, from a configuration.
- `skeletons`: models without their weights, from a configuration.
- `talking`: conversations with a language model and its adapter.
- `activations`: the memory that a forward keeps for its backward.
"""
