"""``nbdserve repo``."""

import click

from nbdserve.cli.key_options import RepositoryGroup

_COMMANDS = {
    "init": "nbdserve.cli.repositories:init",
    "list": "nbdserve.cli.repositories:list_",
    "push": "nbdserve.cli.repositories:push",
    "restore": "nbdserve.cli.restoring:restore",
    "delete": "nbdserve.cli.repositories:delete",
    "verify": "nbdserve.cli.repositories:verify",
    "gc": "nbdserve.cli.repositories:gc",
    "prune": "nbdserve.cli.pruning:prune",
    "protect": "nbdserve.cli.pruning:protect",
    "unprotect": "nbdserve.cli.pruning:unprotect",
    "diff": "nbdserve.cli.comparing:diff",
    "export": "nbdserve.cli.images:export",
    "import": "nbdserve.cli.images:import_",
    "key": "nbdserve.cli.keys:key",
}


@click.group(cls=RepositoryGroup, lazy=_COMMANDS)
def repo() -> None:
    """Repositories: snapshots in a directory or in S3.

    URL is file:///directory or s3://bucket/prefix.
    """
