"""`python -m nanogpt`: the command `nanogpt`, also where scripts are not on the path."""

from nanogpt.cli import main

if __name__ == "__main__":
    main()
