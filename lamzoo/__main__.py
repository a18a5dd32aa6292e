"""``python -m lamzoo``: the command line, as ``torchrun -m lamzoo`` and ``accelerate launch -m lamzoo`` start it."""

from lamzoo.cli import main

if __name__ == "__main__":
    main()
