"""Surgery: installs operators in a model and removes them, all or nothing.

It may import `targets`, and what is below. In the order of reading:

- `seeding`: random numbers by seed and path.
- `table_rows`: rows of token tables that an adapter brings along.
- `adapted_models`: models that share modules, and which of them may act there.
- `parallel_models`: what may act in tensor-parallel models, which compute with pieces of their weights.
- `surgeon`: the verbs of `Method.inject`, which record operators.
- `forced_attributes`: attributes that some modules must have while a model is adapted.
- `installation`: installs and removes recorded operators.
- `placement`: an error for target modules that are in the model no longer.
- `silent_layers`: an error for target modules that never ran.
- `sharding`: what each process holds where a planned model is sharded.
- `planning`: the result of `plan`, a dry run of `apply`.
"""
