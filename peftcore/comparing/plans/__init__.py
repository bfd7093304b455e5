"""Plans: the changes of a method to a model and their costs, known before anything is trained.

It may import the core, `quiet` and `models`. In the order of reading:

- `recorded`: a method as the user asks for it, recorded on a model and not done.
- `costs`: what it would add, and what a step of training would take.
- `estimates`: what steps of a run would take with other settings, within seconds.
"""
