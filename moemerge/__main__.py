"""`python -m moemerge`: the same as the command `moemerge`."""

from moemerge.run.cli import main

if __name__ == "__main__":
    main()
