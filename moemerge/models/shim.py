"""The few lines beside the weights of a model of our own classes: they say what to install.

Imports nothing heavy.
"""

from __future__ import annotations

import json
from pathlib import Path

from moemerge.models.families.base import PREFIX

SHIM = "moemerge_shim.py"
SHIM_TEXT = '''"""This reward model has parts of moemerge's own (experts, a head): pip install moemerge"""
import moemerge
from moemerge import modelling

Config = modelling.config_class("{family}")
Model = modelling.model_class("{family}")
'''


def install_shim(folder: str | Path) -> None:
    """Write the few lines that tell people without moemerge what to install, and name them in the config.

    Nothing for a model of a class that transformers has.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    family = config["model_type"].removeprefix(PREFIX)
    if family == config["model_type"]:
        return
    (folder / SHIM).write_text(SHIM_TEXT.format(family=family), encoding="utf-8")
    module = SHIM.removesuffix(".py")
    config["auto_map"] = {
        "AutoConfig": f"{module}.Config",
        "AutoModelForSequenceClassification": f"{module}.Model",
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
