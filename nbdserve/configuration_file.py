"""The configuration file: TOML, of which every key is optional but those that name something::

    data = "/var/lib/nbdserve"
    listen = ["127.0.0.1:10809", "unix:/run/nbdserve/nbd.sock"]
    log_level = "info"
    workers = 2
    tls = "required"
    tls_certificate = "/etc/nbdserve/server-cert.pem"
    tls_key = "/etc/nbdserve/server-key.pem"
    tls_client_ca = "/etc/nbdserve/ca-cert.pem"
    handshake_timeout = 30

    [[listener]]
    address = "0.0.0.0:10810"
    allow_networks = ["10.0.0.0/8", "fd00::/8"]
    max_connections = 200

    [[listener]]
    address = "unix:/run/nbdserve/qemu.sock"
    tls = "off"
    allow_users = ["libvirt-qemu", 1000]
    socket_mode = "0660"
    socket_group = "kvm"

    [[export]]
    name = "web*"
    allow_certificates = ["backup.example.com"]
    max_connections = 4

Errors name the file, the table, the key and what is allowed.
"""

import grp
import pwd
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Final

from backends.errors import InvalidError, NotFoundError
from nbdserve.addresses import TcpAddress, UnixAddress, parse_address
from nbdserve.configuration import (
    LOG_LEVELS,
    MAX_WORKERS,
    TLS_MODES,
    ListenerSettings,
    Settings,
    TlsSettings,
)
from nbdserve.server.entrance import AccessList
from nbdserve.server.permissions import ExportRule

_TLS_KEYS: Final = ("tls", "tls_certificate", "tls_key", "tls_client_ca")
KEYS: Final = (
    "data",
    "listen",
    "log_level",
    "workers",
    *_TLS_KEYS,
    "handshake_timeout",
    "listener",
    "export",
)
LISTENER_KEYS: Final = (
    "address",
    *_TLS_KEYS,
    "allow_networks",
    "allow_users",
    "socket_mode",
    "socket_group",
    "max_connections",
)
EXPORT_KEYS: Final = ("name", "allow_certificates", "max_connections")
MAX_HANDSHAKE_TIMEOUT: Final = 3600
MOST_CONNECTIONS: Final = 1_000_000

_UNIX_ONLY: Final = ("allow_users", "socket_mode", "socket_group")
_PATTERN: Final = re.compile(r"[A-Za-z0-9._*?\[\]!-]+", re.ASCII)
_MODE: Final = re.compile(r"0?[0-7]{3}", re.ASCII)
_MOST_USERS: Final = (1 << 32) - 2
_MAPPED: Final = ip_network("::ffff:0:0/96")


def read_file(path: Path) -> Settings:
    """The settings in a file; raises NotFoundError or InvalidError with one line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise InvalidError(f"configuration file {path}: {error.strerror}") from None
    try:
        values = tomllib.loads(content.decode())
    except ValueError as error:  # of TOML and of UTF-8
        raise InvalidError(f"configuration file {path} is not TOML: {error}") from None
    table = _Table(f"{path}", values, KEYS)
    return Settings(
        data=table.path("data", "the path of a directory"),
        listen=table.texts("listen", "each HOST:PORT or unix:PATH"),
        log_level=table.choice("log_level", LOG_LEVELS),
        tls=_read_tls(table),
        workers=table.number("workers", MAX_WORKERS),
        handshake_timeout=table.number("handshake_timeout", MAX_HANDSHAKE_TIMEOUT, "seconds"),
        listeners=tuple(map(_read_listener, table.tables("listener", "address", LISTENER_KEYS))),
        exports=tuple(map(_read_export, table.tables("export", "name", EXPORT_KEYS))),
    )


class _Table:
    """One table of the file; ``where`` names both in errors. A key that is absent is None."""

    def __init__(self, where: str, values: Mapping[str, object], keys: Sequence[str]) -> None:
        self.where = where
        self._values = values
        for key in values:
            if key not in keys:
                raise InvalidError(f"{where}: unknown key {key!r}; the keys are {', '.join(keys)}")

    def error(self, key: str, wanted: str) -> InvalidError:
        return InvalidError(f"{self.where}: {key!r} must be {wanted}")

    def has(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, meaning: str) -> str | None:
        value = self._values.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.error(key, f"a string: {meaning}")
        return value

    def required_text(self, key: str, meaning: str) -> str:
        value = self.text(key, meaning)
        if value is None:
            raise InvalidError(f"{self.where}: {key!r} is missing: {meaning}")
        return value

    def path(self, key: str, meaning: str) -> Path | None:
        value = self.text(key, meaning)
        return None if value is None else Path(value)

    def choice(self, key: str, allowed: Sequence[str]) -> str | None:
        value = self.text(key, f"one of {', '.join(allowed)}")
        if value is not None and value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}")
        return value

    def number(self, key: str, most: int, unit: str = "") -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.error(key, f"a number{unit and ' of '}{unit} from 1 to {most}")
        return value

    def text_or_number(self, key: str, meaning: str) -> str | int | None:
        value = self._values.get(key)
        if value is None or (
            isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        ):
            return value
        raise self.error(key, meaning)

    def items(self, key: str, kinds: type | tuple[type, ...], wanted: str) -> list[object] | None:
        """A list of one or more values of these types, none of them empty."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise self.error(key, f"a list of {wanted}")
        for item in value:
            if not isinstance(item, kinds) or isinstance(item, bool) or item == "":
                raise self.error(key, f"a list of {wanted}")
        return value

    def texts(self, key: str, meaning: str) -> tuple[str, ...] | None:
        value = self.items(key, str, f"strings, {meaning}")
        return None if value is None else tuple(map(str, value))

    def tables(self, key: str, name: str, keys: Sequence[str]) -> "Iterator[_Table]":
        """The tables written ``[[key]]``; errors call each by its value of ``name``."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, f"written as tables, [[{key}]]")
        for number, values in enumerate(value, 1):
            called = values.get(name)
            which = repr(called) if isinstance(called, str) and called else f"number {number}"
            yield _Table(f"{self.where}: [[{key}]] {which}", values, keys)


def _read_tls(table: _Table) -> TlsSettings:
    mode = table.choice("tls", TLS_MODES)
    files = [table.path(key, "the path of a file in PEM") for key in _TLS_KEYS[1:]]
    return TlsSettings(mode, *files)


def _read_listener(table: _Table) -> ListenerSettings:
    text = table.required_text("address", "HOST:PORT or unix:PATH")
    try:
        address = parse_address(text)
    except InvalidError as error:
        raise InvalidError(f"{table.where}: {error}") from None
    for key in _UNIX_ONLY:
        if isinstance(address, TcpAddress) and table.has(key):
            raise InvalidError(
                f"{table.where}: {key!r} is for Unix sockets; there is allow_networks"
            )
    if isinstance(address, UnixAddress) and table.has("allow_networks"):
        raise InvalidError(f"{table.where}: 'allow_networks' is for TCP; there is allow_users")
    return ListenerSettings(
        table.where,
        address,
        _read_tls(table),
        AccessList(_read_networks(table), _read_users(table)),
        _read_mode(table),
        _read_group(table),
        table.number("max_connections", MOST_CONNECTIONS),
    )


def _read_networks(table: _Table) -> tuple[IPv4Network | IPv6Network, ...] | None:
    key = "allow_networks"
    meaning = "addresses or networks such as '10.0.0.0/8' and 'fd00::/8'"
    texts = table.texts(key, meaning)
    if texts is None:
        return None
    networks: list[IPv4Network | IPv6Network] = []
    for text in texts:
        try:
            network = ip_network(text)
        except ValueError as error:
            raise InvalidError(
                f"{table.where}: {key!r} must be a list of {meaning}: {error}"
            ) from None
        if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):  # type: ignore[arg-type]
            mapped = network.network_address.ipv4_mapped
            assert mapped is not None
            network = IPv4Network((mapped, network.prefixlen - 96))
        networks.append(network)
    return tuple(networks)


def _read_users(table: _Table) -> frozenset[int] | None:
    key = "allow_users"
    items = table.items(key, (str, int), "names of users, or their numbers without quotes")
    if items is None:
        return None
    return frozenset(
        _number_of(table, key, item, "user", lambda name: pwd.getpwnam(name).pw_uid)
        for item in items
    )


def _read_group(table: _Table) -> int | None:
    key = "socket_group"
    value = table.text_or_number(key, "the name of a group, or its number without quotes")
    if value is None:
        return None
    return _number_of(table, key, value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _number_of(
    table: _Table, key: str, value: object, kind: str, look_up: Callable[[str], int]
) -> int:
    """The number of a user or group."""
    if isinstance(value, int):
        if not 0 <= value <= _MOST_USERS:
            raise InvalidError(f"{table.where}: {key!r}: {value} is no number of a {kind}")
        return value
    try:
        return look_up(str(value))
    except (KeyError, ValueError):  # the latter for NUL characters
        raise InvalidError(
            f"{table.where}: {key!r}: there is no {kind} {value!r}; a number has no quotes"
        ) from None


def _read_mode(table: _Table) -> int | None:
    key, meaning = "socket_mode", "permissions in octal such as '0660'"
    text = table.text(key, meaning)
    if text is None:
        return None
    if not _MODE.fullmatch(text):
        raise table.error(key, f"a string: {meaning}")
    return int(text, 8)


def _read_export(table: _Table) -> ExportRule:
    pattern = table.required_text("name", "a volume, or a pattern such as 'web*'")
    if not _PATTERN.fullmatch(pattern):
        raise table.error(
            "name",
            "a pattern over names of volumes, of letters, digits, '.', '_', '-', '*', '?' and"
            " '[a-z]'; their snapshots are included",
        )
    names = table.texts("allow_certificates", "each a name that a client's certificate may have")
    return ExportRule(
        pattern,
        frozenset(name.lower() for name in names or ()),
        table.number("max_connections", MOST_CONNECTIONS),
    )
