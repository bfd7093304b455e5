"""Presets of this plugin. Each line maps a name from a paper to a method with options."""

from peftcore.author import Preset

PRESETS = {
    "lotr": Preset("fact_tt", "2402.01376"),
}
