"""Reward models on disk and in memory: opening, loading, scoring, the MoE layer and its classes."""
