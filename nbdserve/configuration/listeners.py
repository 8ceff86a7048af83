"""Where the daemon listens, and who is let in there: the tables ``[[listener]]``."""

import grp
import pwd
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Final

from backends.errors import InvalidError
from nbdserve.addresses import Address, TcpAddress, UnixAddress, parse_address
from nbdserve.configuration.table import Table
from nbdserve.configuration.tls import (
    NOTHING_OF_TLS,
    TLS_KEYS,
    TlsConfiguration,
    TlsSettings,
    combine_tls,
    override,
    read_tls,
)
from nbdserve.protocol.handshake import TlsMode
from nbdserve.server.entrance import EVERYBODY, MAX_CONNECTIONS, AccessList
from nbdserve.server.listening import OWNER_ONLY

DEFAULT_ADDRESS: Final = "127.0.0.1:10809"
MOST_CONNECTIONS: Final = 1_000_000
LISTENER_KEYS: Final = (
    "address",
    *TLS_KEYS,
    "allow_networks",
    "allow_users",
    "socket_mode",
    "socket_group",
    "max_connections",
)

_UNIX_ONLY: Final = ("allow_users", "socket_mode", "socket_group")
_MODE: Final = re.compile(r"0?[0-7]{3}", re.ASCII)
_MOST_USERS: Final = (1 << 32) - 2
_MAPPED: Final = ip_network("::ffff:0:0/96")


@dataclass(frozen=True)
class ListenerSettings:
    """What the file says about one listener; None where it says nothing.

    ``socket_mode`` (permission bits) and ``socket_group`` (a number) are of a Unix socket's file;
    ``where`` names the table in errors.
    """

    where: str
    address: Address
    tls: TlsSettings = NOTHING_OF_TLS
    access: AccessList = EVERYBODY
    socket_mode: int | None = None
    socket_group: int | None = None
    max_connections: int | None = None


@dataclass(frozen=True)
class ListenerConfiguration:
    """One address and who is let in there; ``tls`` is None when it is off.

    ``socket_mode`` and ``socket_group`` (None: that of the process) are of a Unix socket's file.
    """

    address: Address
    tls: TlsConfiguration | None = None
    access: AccessList = EVERYBODY
    socket_mode: int = OWNER_ONLY
    socket_group: int | None = None
    max_connections: int = MAX_CONNECTIONS

    @property
    def lacks(self) -> str | None:
        """What keeps nobody on the network out: a text for a warning, None when there is nothing.

        An access list is enough, and so are client certificates that are required.
        """
        if isinstance(self.address, UnixAddress) or self.address.is_loopback or self.access.limits:
            return None
        if self.tls is None or self.tls.mode is not TlsMode.REQUIRED:
            return "encryption or authentication, or an access list"
        return None if self.tls.client_ca else "authentication (tls_client_ca), or an access list"


def read_listener(table: Table) -> ListenerSettings:
    text = table.required_text("address", "HOST:PORT or unix:PATH")
    try:
        address = parse_address(text)
    except InvalidError as error:
        raise table.problem("address", str(error)) from None
    for key in _UNIX_ONLY:
        if isinstance(address, TcpAddress) and table.has(key):
            raise table.problem(key, f"{key!r} is for Unix sockets; there is allow_networks")
    if isinstance(address, UnixAddress) and table.has("allow_networks"):
        raise table.problem("allow_networks", "'allow_networks' is for TCP; there is allow_users")
    return ListenerSettings(
        table.where,
        address,
        read_tls(table),
        AccessList(_read_networks(table), _read_users(table)),
        _read_mode(table),
        _read_group(table),
        table.number("max_connections", MOST_CONNECTIONS),
    )


def _read_networks(table: Table) -> tuple[IPv4Network | IPv6Network, ...] | None:
    key = "allow_networks"
    meaning = "addresses or networks such as '10.0.0.0/8' and 'fd00::/8'"
    texts = table.texts(key, meaning)
    if texts is None:
        return None
    networks: list[IPv4Network | IPv6Network] = []
    for item, text in enumerate(texts):
        try:
            network = ip_network(text)
        except ValueError as error:
            raise table.error(key, f"a list of {meaning}: {error}", item) from None
        if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):  # type: ignore[arg-type]
            mapped = network.network_address.ipv4_mapped
            assert mapped is not None
            network = IPv4Network((mapped, network.prefixlen - 96))
        networks.append(network)
    return tuple(networks)


def _read_users(table: Table) -> frozenset[int] | None:
    key = "allow_users"
    items = table.items(key, (str, int), "names of users, or their numbers without quotes")
    if items is None:
        return None
    return frozenset(
        _number_of(table, key, value, "user", lambda name: pwd.getpwnam(name).pw_uid, item)
        for item, value in enumerate(items)
    )


def _read_group(table: Table) -> int | None:
    key = "socket_group"
    value = table.text_or_number(key, "the name of a group, or its number without quotes")
    if value is None:
        return None
    return _number_of(table, key, value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _number_of(
    table: Table,
    key: str,
    value: object,
    kind: str,
    look_up: Callable[[str], int],
    item: int | None = None,
) -> int:
    """The number of a user or group; ``item`` is which of the key's list it is."""
    if isinstance(value, int):
        if not 0 <= value <= _MOST_USERS:
            raise table.problem(key, f"{key!r}: {value} is no number of a {kind}", item)
        return value
    try:
        return look_up(str(value))
    except (KeyError, ValueError):  # the latter for NUL characters
        text = f"{key!r}: there is no {kind} {value!r}; a number has no quotes"
        raise table.problem(key, text, item) from None


def _read_mode(table: Table) -> int | None:
    key, meaning = "socket_mode", "permissions in octal such as '0660'"
    text = table.text(key, meaning)
    if text is None:
        return None
    if not _MODE.fullmatch(text):
        raise table.error(key, f"a string: {meaning}")
    return int(text, 8)


def find_listeners(
    command_line: Sequence[str] | None,
    listen: Sequence[str] | None,
    tables: Sequence[ListenerSettings],
    data: Path,
) -> list[ListenerSettings]:
    """Where to listen, and what the file says about it; None where a source says nothing.

    ``listen`` and ``tables`` are the file's.
    """
    by_address: dict[Address, ListenerSettings] = {}
    for table in tables:
        if table.address in by_address:
            raise InvalidError(
                f"{table.where}: the file has two [[listener]] tables for {table.address}"
            )
        by_address[table.address] = table
    wanted = [parse_address(text) for text in command_line or listen or ()]
    if command_line is None:
        wanted += by_address
    if not wanted:
        wanted = [parse_address(DEFAULT_ADDRESS), UnixAddress(data / "nbd.sock")]
    return [
        by_address.get(address) or ListenerSettings(f"listener {address}", address)
        for address in dict.fromkeys(wanted)
    ]


def combine_listener(own: ListenerSettings, common: TlsSettings) -> ListenerConfiguration:
    try:
        tls = combine_tls(override(common, own.tls))
    except InvalidError as error:
        if own.tls == TlsSettings():
            raise
        raise InvalidError(f"{own.where}: {error}") from None
    files = (own.tls.certificate, own.tls.key, own.tls.client_ca)
    if tls is None and any(file is not None for file in files):
        raise InvalidError(f"{own.where} has files for TLS, which is off: write tls = 'required'")
    return ListenerConfiguration(
        own.address,
        tls,
        own.access,
        OWNER_ONLY if own.socket_mode is None else own.socket_mode,
        own.socket_group,
        own.max_connections or MAX_CONNECTIONS,
    )
