"""``nbdserve repo key``."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from backends.errors import InvalidError
from nbdserve.cli.key_options import RepositoryGroup
from nbdserve.cli.options import json_option
from nbdserve.cli.output import print_listing, print_result, seconds_of
from nbdserve.cli.unlocking import new_secret, open_repository
from nbdserve.control.documents import timestamp

if TYPE_CHECKING:  # it imports cryptography, which a repository without encryption does not need
    from snapshots.repository.keyring import KeyInfo, Keyring

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_COLUMNS = {
    "id": lambda key: key["id"],
    "kind": lambda key: key["kind"],
    "created": lambda key: seconds_of(key["created"]) if key["created"] else "-",
    "used now": lambda key: "yes" if key["current"] else "-",
    "problem": lambda key: key["problem"] or "-",
}


def _new_options(function: Decorated) -> Decorated:
    for option, text in (
        ("--new-repo-key-file", "Add this key file; one that does not exist is made."),
        ("--new-passphrase-file", "Add the passphrase that is the one line of FILE."),
    ):
        function = click.option(option, metavar="FILE", help=text)(function)
    return function


@click.group(cls=RepositoryGroup)
def key() -> None:
    """The keys of an encrypted repository: passphrases and key files, each opens it."""


@key.command("list")
@click.argument("url")
@json_option
def list_(url: str, as_json: bool) -> None:
    """List the keys of the repository at URL."""
    keys = _keyring(url).list_keys()
    print_listing("keys", [_document(info) for info in keys], as_json, _COLUMNS)


@key.command()
@click.argument("url")
@_new_options
@json_option
def add(
    url: str, new_passphrase_file: str | None, new_repo_key_file: str | None, as_json: bool
) -> None:
    """Let another passphrase or key file open the repository at URL, too.

    A passphrase is asked for when no file is named.
    """
    keyring = _keyring(url)
    added = keyring.add(new_secret(new_passphrase_file, new_repo_key_file))
    print_result({"added": added}, as_json, f"added key {added}")


@key.command()
@click.argument("url")
@click.argument("id_", metavar="ID")
@json_option
def remove(url: str, id_: str, as_json: bool) -> None:
    """Remove a key of the repository at URL; what was read with it stays known to who has it."""
    _keyring(url).remove(id_)
    print_result({"removed": id_}, as_json, f"removed key {id_}")


@key.command()
@click.argument("url")
@_new_options
@json_option
def passwd(
    url: str, new_passphrase_file: str | None, new_repo_key_file: str | None, as_json: bool
) -> None:
    """Put a new passphrase, or key file, in the place of the one given. No data is written."""
    keyring = _keyring(url)
    old = keyring.current
    added = keyring.change(new_secret(new_passphrase_file, new_repo_key_file))
    line = f"added key {added} in the place of {old}"
    print_result({"added": added, "removed": old}, as_json, line)


def _keyring(url: str) -> "Keyring":
    keyring = open_repository(url).keyring
    if keyring is None:
        raise InvalidError(f"the repository at {url} is not encrypted: it has no keys")
    return keyring


def _document(info: "KeyInfo") -> dict[str, Any]:
    created = None if info.created is None else timestamp(info.created)
    return dataclasses.asdict(info) | {"created": created}
