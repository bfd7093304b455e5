"""Presets of this plugin. Each is the name that a paper gives to certain options of a method."""

from peftcore.author import Preset

PRESETS = {
    "qoft": Preset("oft", "2506.19847", {"series": 5}, target="all-linear"),
}
