"""``python -m nbdserve``: the same as the command ``nbdserve``."""

from nbdserve.cli import main

main()
