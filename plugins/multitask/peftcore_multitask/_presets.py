"""Presets of this plugin. Each line maps a name from a paper to a method with options."""

from peftcore.author import Preset

STACK = (
    'apply "pfeiffer_adapter" twice under two names, and peftcore.activate(model, peftcore.Stack(first, second)); '
    "peftcore.load(model, folder) loads the first one from its file"
)
FROM_ANOTHER_TASK = (
    "train prompt_tuning on the nearest of other tasks and save it; here peftcore.load(model, folder, trainable=True) "
    "goes on from there"
)
STACK_NOTE = "No method of its own: two adapters, the second behind the first, as MAD-X puts a task's on a language's."
SPOT_NOTE = (
    "Training that goes on from the prompt of another task; the paper's search for the nearest one, by the cosine of "
    "prompts, is not here."
)

PRESETS = {
    "adapter_stack": Preset("pfeiffer_adapter", "2005.00052", workflow=STACK, note=STACK_NOTE),
    "c_poly": Preset("polytropon", "2312.03248", {"skills": 3, "own_skills": 1}),
    "hyperformer": Preset("hyperformer_pp", "2106.04489", {"shared": False}),
    "mhr": Preset("polytropon", "2211.03831", {"splits": 8}),
    "mix_of_show": Preset("regmean", "2305.18292", {"off_diagonal": 1.0, "unseen": "base"}),
    "spot": Preset("prompt_tuning", "2110.07904", workflow=FROM_ANOTHER_TASK, note=SPOT_NOTE),
}
