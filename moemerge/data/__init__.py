"""Preference data: rows, pairs, tokens, RewardBench, the synthetic world. Imports options."""
