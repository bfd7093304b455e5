"""What one forward knows: its inputs, tokens and random numbers, and what operators leave in it.

In the order of reading:

- `checkpoints`: which forward a checkpoint repeats inside backward.
- `counted_draws`: random numbers that are functions of what they are for.
- `draws`: random numbers of adapters that rows go to.
- `repeats`: how a batch repeats the entries of a value that a call passes.
- `tokens`: the tokens of one forward, and what was decided when they were new.
- `context`: the context of one forward of the model, which backward may repeat.
- `taps`: values that one operator leaves for another in the same forward.
- `routers`: operators that return shares of experts, and statistics of them.
"""
