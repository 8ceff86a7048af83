"""Opening repositories from the command line, encrypted ones included.

The key's options win over the environment. Where nothing is named and the repository is encrypted,
a terminal is asked.
"""

import sys

import click

from nbdserve.cli.background import let_guests_go_first
from nbdserve.cli.keeping import given_storage_class, given_time
from nbdserve.cli.key_options import given_key_options
from nbdserve.cli.limits import limited
from nbdserve.repository_keys import KeySource, source_from_environment
from snapshots import repository as repositories
from snapshots.repository import Key, ObjectLock, Repository, Secret
from snapshots.repository.secret import passphrase


def open_repository(url: str) -> Repository:
    """Open the repository at ``url`` with the key that options, environment or terminal give.

    Its bandwidth is limited when the command was told to, and from here on guests go first.
    """
    let_guests_go_first()
    store = repositories.open_store(url, storage_class=given_storage_class(), at=given_time())
    return repositories.open_in_store(limited(store), _given_key(url))


def init_repository(
    url: str, chunk_size: int, encrypt: bool, object_lock: ObjectLock | None = None
) -> Repository:
    """Make a repository: encrypted when asked for, or when a key is named."""
    repositories.check_chunk_size(chunk_size)
    if object_lock is not None:
        repositories.check_object_lock(object_lock)
    source = _source()
    if source == KeySource():
        secret = _ask_twice("new passphrase") if encrypt else None
    else:
        secret = _new_secret(source)
    return repositories.init_repository(url, chunk_size, secret, object_lock)


def new_secret(passphrase_file: str | None, key_file: str | None) -> Secret:
    """The secret that these files hold, or that is typed twice; makes a missing key file."""
    source = KeySource(passphrase_file=passphrase_file, repo_key_file=key_file)
    return _ask_twice("new passphrase") if source == KeySource() else _new_secret(source)


def _new_secret(source: KeySource) -> Secret:
    if source.make_key_file():
        click.echo(
            f"nbdserve: made the key file {source.repo_key_file}: keep a copy in another place",
            err=True,
        )
    secret = source.secret()
    assert secret is not None
    return secret


def _source() -> KeySource:
    given = given_key_options()
    return KeySource(**given) if given else source_from_environment()


def _given_key(url: str) -> Key:
    source = _source()
    if source != KeySource():
        return source.secret()
    if not _on_terminal():
        return None
    return lambda: passphrase(_ask(f"passphrase of {url}"), "the passphrase")


def _ask_twice(what: str) -> Secret:
    if not _on_terminal():
        raise click.UsageError(
            "no passphrase: give a file that has it, a key file, or use a terminal",
            click.get_current_context(),
        )
    typed = click.prompt(what, hide_input=True, confirmation_prompt=True, err=True)
    return passphrase(typed, "the passphrase")


def _ask(what: str) -> str:
    typed: str = click.prompt(what, hide_input=True, err=True)
    return typed


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
