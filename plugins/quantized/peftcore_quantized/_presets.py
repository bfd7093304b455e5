"""Presets of this plugin: names of papers for options of methods, a line each."""

from peftcore.author import Preset

PRESETS = {
    "qoft": Preset("oft", "2506.19847", {"series": 5}, target="all-linear"),
}
