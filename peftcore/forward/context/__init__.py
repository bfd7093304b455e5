"""The context of one forward: its inputs, tokens and random numbers, and the values that operators store in it.

In the order of reading:

- `activation_checkpoints`: which forward a checkpoint repeats inside backward.
- `counter_based_random`: random numbers that are functions of their seed, draw, row and place.
- `row_random_numbers`: random numbers of the adapters of a route.
- `repeats`: how a batch repeats the entries of a value that a call passes.
- `tokens`: the tokens of one forward, and decisions kept about earlier tokens.
- `context`: the context of one forward of the model, which backward may repeat.
- `taps`: values that one operator stores for another in the same forward.
- `routers`: operators that return shares of experts, and statistics of them.
"""
