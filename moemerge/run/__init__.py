"""What a user starts: the command line, and recipes: checked, planned, run."""
