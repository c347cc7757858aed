"""The command line: commands, their arguments and the interactive mode."""
