"""How experts of one MoE differ, and what can be learned from their disagreement."""
