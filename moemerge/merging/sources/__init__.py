"""What a merge takes: the experts of a MoE, whole models, native MoEs."""
