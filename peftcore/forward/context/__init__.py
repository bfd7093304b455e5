"""The context of one forward: its inputs, tokens and random numbers, and the values that operators store in it.

In the order of reading:

- `activation_checkpoints`: finds the forward that a checkpoint repeats inside backward.
- `counter_based_random`: random numbers that are functions of a seed and of a position.
- `row_random_numbers`: random numbers of the adapters of a route.
- `repeats`: how many times a batch repeats the entries of a value from `peftcore.call`.
- `tokens`: the tokens of one forward, and the columns at which adapters begin to act.
- `context`: the context of one forward of the model, which backward may repeat.
- `taps`: values that one operator stores for another in the same forward.
- `routers`: operators that assign tokens to experts, and statistics of the assignments.
"""
