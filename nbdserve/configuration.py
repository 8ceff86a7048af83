"""What the daemon is told: the command line, which wins, and a file (see configuration_file.py).

Each source is read into ``Settings``; ``combine`` makes the ``Configuration`` of both:

- The settings of TLS are those of all listeners, key by key, unless a listener has its own.
- ``--listen`` takes the place of all the addresses that the file names. A table of the file holds
  for its address nevertheless: naming it once more must not let more clients in.
- A listener that the file has no table for lets in whoever can connect.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backends.errors import InvalidError
from nbdserve.addresses import Address, UnixAddress, parse_address
from nbdserve.protocol.handshake import TlsMode
from nbdserve.server.connection import HANDSHAKE_TIMEOUT
from nbdserve.server.entrance import EVERYBODY, MAX_CONNECTIONS, AccessList
from nbdserve.server.listening import OWNER_ONLY
from nbdserve.server.permissions import ExportRule

DEFAULT_ADDRESS: Final = "127.0.0.1:10809"
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
TLS_MODES: Final = tuple(mode.value for mode in TlsMode)
MAX_WORKERS: Final = 64
MOST_BY_DEFAULT: Final = 4

_GIVE_FILES: Final = (
    "give --tls-certificate and --tls-key, or tls_certificate and tls_key in the file"
)


@dataclass(frozen=True)
class TlsSettings:
    """One source's say about TLS; ``mode`` is one of TLS_MODES."""

    mode: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


@dataclass(frozen=True)
class ListenerSettings:
    """What the file says about one listener; None where it says nothing.

    ``socket_mode`` (permission bits) and ``socket_group`` (a number) are of a Unix socket's file;
    ``where`` names the table in errors.
    """

    where: str
    address: Address
    tls: TlsSettings = TlsSettings()
    access: AccessList = EVERYBODY
    socket_mode: int | None = None
    socket_group: int | None = None
    max_connections: int | None = None


@dataclass(frozen=True)
class Settings:
    """One source's say; None where it says nothing. ``handshake_timeout`` is in seconds."""

    data: Path | None = None
    listen: tuple[str, ...] | None = None
    log_level: str | None = None
    tls: TlsSettings = TlsSettings()
    workers: int | None = None
    handshake_timeout: int | None = None
    listeners: tuple[ListenerSettings, ...] = ()
    exports: tuple[ExportRule, ...] = ()


@dataclass(frozen=True)
class TlsConfiguration:
    """Files in PEM. Without ``client_ca``, clients are not asked who they are."""

    mode: TlsMode
    certificate: Path
    key: Path
    client_ca: Path | None


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


@dataclass(frozen=True)
class Configuration:
    """What the daemon runs with.

    ``workers`` is the number of processes that serve volumes; 1 is the daemon itself.
    ``handshake_timeout`` is in seconds. The first of ``exports`` that is for a volume holds.
    """

    data: Path
    listeners: tuple[ListenerConfiguration, ...]
    log_level: str
    workers: int = 1
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    exports: tuple[ExportRule, ...] = ()


def combine(command_line: Settings, file: Settings) -> Configuration:
    """The configuration; what the command line says wins."""
    data = command_line.data or file.data
    if data is None:
        raise InvalidError(
            "no data directory: give --data DIR, set NBDSERVE_DATA or write 'data' in the"
            " configuration file"
        )
    # Absolute, since its parts are shown to people and to other processes.
    data = data.absolute()
    tls = _override(file.tls, command_line.tls)
    listeners = tuple(
        _combine_listener(found, tls) for found in _listeners(command_line, file, data)
    )
    _check_certificates_can_be_shown(file.exports, listeners)
    return Configuration(
        data=data,
        listeners=listeners,
        log_level=command_line.log_level or file.log_level or "info",
        workers=command_line.workers or file.workers or default_workers(),
        handshake_timeout=file.handshake_timeout or HANDSHAKE_TIMEOUT,
        exports=file.exports,
    )


def default_workers() -> int:
    """One for each core that this process may use, up to MOST_BY_DEFAULT."""
    return min(len(os.sched_getaffinity(0)), MOST_BY_DEFAULT)


def _listeners(command_line: Settings, file: Settings, data: Path) -> list[ListenerSettings]:
    """Where to listen, and what the file says about it."""
    tables: dict[Address, ListenerSettings] = {}
    for table in file.listeners:
        if table.address in tables:
            raise InvalidError(
                f"{table.where}: the file has two [[listener]] tables for {table.address}"
            )
        tables[table.address] = table
    wanted = [parse_address(text) for text in command_line.listen or file.listen or ()]
    if command_line.listen is None:
        wanted += tables
    if not wanted:
        wanted = [parse_address(DEFAULT_ADDRESS), UnixAddress(data / "nbd.sock")]
    return [
        tables.get(address) or ListenerSettings(f"listener {address}", address)
        for address in dict.fromkeys(wanted)
    ]


def _combine_listener(own: ListenerSettings, common: TlsSettings) -> ListenerConfiguration:
    try:
        tls = _combine_tls(_override(common, own.tls))
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


def _override(common: TlsSettings, own: TlsSettings) -> TlsSettings:
    return TlsSettings(
        own.mode or common.mode,
        own.certificate or common.certificate,
        own.key or common.key,
        own.client_ca or common.client_ca,
    )


def _combine_tls(wanted: TlsSettings) -> TlsConfiguration | None:
    mode, certificate, key = wanted.mode, wanted.certificate, wanted.key
    if mode == TlsMode.OFF.value:
        return None
    if certificate is None and key is None:
        if mode is not None or wanted.client_ca is not None:
            raise InvalidError(f"TLS needs a certificate: {_GIVE_FILES}")
        return None
    if certificate is None or key is None:
        raise InvalidError(f"TLS needs both a certificate and its key: {_GIVE_FILES}")
    return TlsConfiguration(
        TlsMode.REQUIRED if mode is None else TlsMode(mode), certificate, key, wanted.client_ca
    )


def _check_certificates_can_be_shown(
    exports: Sequence[ExportRule], listeners: Sequence[ListenerConfiguration]
) -> None:
    if any(found.tls is not None and found.tls.client_ca is not None for found in listeners):
        return
    for rule in exports:
        if rule.certificates:
            raise InvalidError(
                f"exports named {rule.pattern!r} want clients' certificates, and no listener asks"
                " for any: give a tls_client_ca"
            )
