"""`python -m ray_zerocopy doctor` and `python -m ray_zerocopy memory`."""

from ._cli.commands import main

__all__ = ["main"]

if __name__ == "__main__":
    main(prog_name="python -m ray_zerocopy")
