"""The command line: one module a command group, and ``main``, where every error ends.

Results go to standard output and nothing else does; progress, warnings and errors go to standard
error. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated;
75 when ``backup`` did nothing because another one is under way.
"""

from nbdserve.cli.application import main

__all__ = ["main"]
