"""How experts of one MoE differ, and what their disagreement tells."""
