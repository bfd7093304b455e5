"""Presets of this plugin: names of papers for options of methods, a line each."""

from peftcore.author import Preset

PRESETS = {
    "lotr": Preset("fact_tt", "2402.01376"),
}
