"""Surgery: installs operators in a model and removes them, all or nothing.

It may import `forward` and the layers below. In the order of reading:

- `defaults`: default targets of a method, and notices for the user about them.
- `seeding`: random numbers by seed and path.
- `table_rows`: rows of token tables that are saved with an adapter.
- `adapted_models`: models that share modules; a shared module may have the operators of one of them.
- `parallel_models`: the operators that are allowed in tensor-parallel models, which compute with pieces of their
  weights.
- `surgeon`: the verbs of `Method.inject`, which record operators.
- `forced_attributes`: attributes that some modules must have while a model is adapted.
- `installation`: installs and removes recorded operators.
- `watched_sites`: an error for target modules that were taken out of the model, or that never ran.
- `sharding`: the memory that each process needs if a planned model is sharded.
- `planning`: the result of `plan`, a dry run of `apply`.
"""
