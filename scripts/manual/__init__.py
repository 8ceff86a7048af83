"""Manual pages and completion scripts, made of the command line itself.

The pages also have what docs/man/ says by hand.
"""
