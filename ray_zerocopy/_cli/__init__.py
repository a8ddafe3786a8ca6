"""The command line: `python -m ray_zerocopy`."""
