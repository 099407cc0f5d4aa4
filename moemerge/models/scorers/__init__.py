"""Scorers: whatever gives an answer to a prompt a number. Each kind is a row of options/scorers.py."""

from moemerge.models.scorers.base import Loaded, Scorer, open_scorer

__all__ = ["Loaded", "Scorer", "open_scorer"]
