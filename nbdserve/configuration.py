"""What the daemon is told: a TOML file, and the command line, which wins over it.

The file's keys are those of :data:`KEYS`, all of them optional::

    data = "/var/lib/nbdserve"
    listen = ["127.0.0.1:10809", "unix:/run/nbdserve/nbd.sock"]
    log_level = "info"
    workers = 2
    tls = "required"
    tls_certificate = "/etc/nbdserve/server-cert.pem"
    tls_key = "/etc/nbdserve/server-key.pem"
    tls_client_ca = "/etc/nbdserve/ca-cert.pem"
"""

import ipaddress
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.errors import InvalidError, NotFoundError
from nbdserve.protocol.handshake import TlsMode

DEFAULT_ADDRESS = "127.0.0.1:10809"
LOG_LEVELS = ("debug", "info", "warning", "error")
TLS_MODES = tuple(mode.value for mode in TlsMode)
KEYS = (
    "data",
    "listen",
    "log_level",
    "workers",
    "tls",
    "tls_certificate",
    "tls_key",
    "tls_client_ca",
)
MAX_WORKERS = 64
MOST_BY_DEFAULT = 4


@dataclass(frozen=True)
class TcpAddress:
    """``port`` 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. Names other than localhost count as open."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True)
class UnixAddress:
    """The path of a socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:PATH``."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path:
            raise InvalidError(f"listen address {text!r} names no path: write unix:PATH")
        return UnixAddress(Path(path))
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InvalidError(f"listen address {text!r}: write an IPv6 address as [{host}]:PORT")
    if not colon or not host or not (port.isascii() and port.isdigit() and len(port) <= 5):
        raise InvalidError(f"listen address {text!r} is neither HOST:PORT nor unix:PATH")
    if int(port) > 65535:
        raise InvalidError(f"listen address {text!r}: a port is at most 65535")
    return TcpAddress(host, int(port))


@dataclass(frozen=True)
class TlsSettings:
    """One source's say about TLS; ``mode`` is one of TLS_MODES."""

    mode: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


@dataclass(frozen=True)
class Settings:
    """One source's say; None where it says nothing."""

    data: Path | None = None
    listen: tuple[str, ...] | None = None
    log_level: str | None = None
    tls: TlsSettings = TlsSettings()
    workers: int | None = None


@dataclass(frozen=True)
class TlsConfiguration:
    """Files in PEM. Without ``client_ca``, clients are not asked who they are."""

    mode: TlsMode
    certificate: Path
    key: Path
    client_ca: Path | None


@dataclass(frozen=True)
class Configuration:
    """What the daemon runs with; ``tls`` is None when it is off.

    ``workers`` is the number of processes that serve volumes; 1 is the daemon itself.
    """

    data: Path
    listen: tuple[Address, ...]
    log_level: str
    tls: TlsConfiguration | None = None
    workers: int = 1


def read_file(path: Path) -> Settings:
    """The settings in a TOML file; errors name the file, the key and what is allowed."""
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
    for key in values:
        if key not in KEYS:
            allowed = ", ".join(KEYS)
            raise InvalidError(f"{path}: unknown key {key!r}; the keys are {allowed}")
    data = _text(path, values, "data", "the path of a directory")
    level = _text(path, values, "log_level", f"one of {', '.join(LOG_LEVELS)}")
    if level is not None and level not in LOG_LEVELS:
        raise InvalidError(f"{path}: 'log_level' must be one of {', '.join(LOG_LEVELS)}")
    return Settings(
        None if data is None else Path(data),
        _listen(path, values),
        level,
        _tls(path, values),
        _workers(path, values),
    )


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
    texts: Sequence[str] = command_line.listen or file.listen or ()
    addresses = tuple(parse_address(text) for text in texts)
    default = (parse_address(DEFAULT_ADDRESS), UnixAddress(data / "nbd.sock"))
    return Configuration(
        data=data,
        listen=addresses or default,
        log_level=command_line.log_level or file.log_level or "info",
        tls=_combine_tls(command_line.tls, file.tls),
        workers=command_line.workers or file.workers or default_workers(),
    )


def default_workers() -> int:
    """One for each core that this process may use, up to MOST_BY_DEFAULT."""
    return min(len(os.sched_getaffinity(0)), MOST_BY_DEFAULT)


def _combine_tls(command_line: TlsSettings, file: TlsSettings) -> TlsConfiguration | None:
    mode = command_line.mode or file.mode
    certificate = command_line.certificate or file.certificate
    key = command_line.key or file.key
    client_ca = command_line.client_ca or file.client_ca
    if mode == TlsMode.OFF.value:
        return None
    if certificate is None and key is None:
        if mode is not None or client_ca is not None:
            raise InvalidError("TLS needs a certificate: give --tls-certificate and --tls-key")
        return None
    if certificate is None or key is None:
        raise InvalidError(
            "TLS needs both a certificate and its key: give --tls-certificate and --tls-key"
        )
    return TlsConfiguration(
        TlsMode.REQUIRED if mode is None else TlsMode(mode), certificate, key, client_ca
    )


def _text(path: Path, values: dict[str, object], key: str, meaning: str) -> str | None:
    value = values.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidError(f"{path}: {key!r} must be a string: {meaning}")
    return value


def _tls(path: Path, values: dict[str, object]) -> TlsSettings:
    mode = _text(path, values, "tls", f"one of {', '.join(TLS_MODES)}")
    if mode is not None and mode not in TLS_MODES:
        raise InvalidError(f"{path}: 'tls' must be one of {', '.join(TLS_MODES)}")
    files = [
        None if name is None else Path(name)
        for name in (
            _text(path, values, key, "the path of a file in PEM")
            for key in ("tls_certificate", "tls_key", "tls_client_ca")
        )
    ]
    return TlsSettings(mode, *files)


def _workers(path: Path, values: dict[str, object]) -> int | None:
    value = values.get("workers")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_WORKERS:
        raise InvalidError(f"{path}: 'workers' must be a number from 1 to {MAX_WORKERS}")
    return value


def _listen(path: Path, values: dict[str, object]) -> tuple[str, ...] | None:
    value = values.get("listen")
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise InvalidError(
            f"{path}: 'listen' must be a list of strings, each HOST:PORT or unix:PATH"
        )
    return tuple(value)
