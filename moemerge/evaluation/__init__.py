"""What is measured: probes, test sets, gold scores, the verdict, the model card."""
