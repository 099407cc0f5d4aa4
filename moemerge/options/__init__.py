"""What can be set: one file per stage, and the recipe. Imports nothing heavy."""
