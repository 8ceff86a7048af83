"""The configuration file: TOML, of which every key is optional but those that name something::

    data = "/var/lib/nbdserve"
    listen = ["127.0.0.1:10809", "unix:/run/nbdserve/nbd.sock"]
    log_level = "info"
    log_format = "text"
    workers = 2
    tls = "required"
    tls_certificate = "/etc/nbdserve/server-cert.pem"
    tls_key = "/etc/nbdserve/server-key.pem"
    tls_client_ca = "/etc/nbdserve/ca-cert.pem"
    handshake_timeout = 30
    drain_seconds = 30
    http = "127.0.0.1:10810"
    http_hosts = ["storage-1.example.com"]
    slow_request_seconds = 2.5
    web = true

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
    iops = 500
    iops_burst = 5000
    bandwidth = "50M"
    bandwidth_burst = "500M"

    [[policy]]
    name = "nightly"
    volumes = ["web*", "guest"]
    exclude = ["web-scratch"]
    repository = "s3://backups/host-1"
    schedule = "daily 02:15"
    keep_daily = 7
    keep_monthly = 12
    passphrase_file = "/etc/nbdserve/passphrase"
    freeze_command = ["/etc/nbdserve/quiesce", "freeze"]
    thaw_command = ["/etc/nbdserve/quiesce", "thaw"]
    freeze_timeout = 30

    [space]
    max_overcommit = 3.0
    warn_free = "10%"
    critical_free = "20G"
    min_free = "1G"

Errors name the file, the line, the table, the key and what is allowed; all are found at once.

A daemon that is told neither a file nor a data directory is the system's, and reads DEFAULT_FILE.
"""

import re
import tomllib
from pathlib import Path
from typing import Final

from backends.errors import InvalidError, NotFoundError
from nbdserve.addresses import parse_address
from nbdserve.configuration.exports import EXPORT_KEYS, read_export
from nbdserve.configuration.lines import find_lines
from nbdserve.configuration.listeners import LISTENER_KEYS, read_listener
from nbdserve.configuration.policies import POLICY_KEYS, check_policies, read_policy
from nbdserve.configuration.problems import ConfigurationError, Problems
from nbdserve.configuration.settings import (
    LOG_FORMATS,
    LOG_LEVELS,
    MAX_DRAIN_SECONDS,
    MAX_HANDSHAKE_TIMEOUT,
    MAX_WORKERS,
    Settings,
)
from nbdserve.configuration.space import (
    NOTHING_OF_SPACE,
    SPACE_KEYS,
    SpaceSettings,
    read_space,
)
from nbdserve.configuration.table import Source, Table
from nbdserve.configuration.tls import TLS_KEYS, read_tls
from nbdserve.configuration.watching import WATCHING_KEYS, read_watching

DEFAULT_FILE: Final = Path("/etc/nbdserve/nbdserve.toml")

KEYS: Final = (
    "data",
    "listen",
    "log_level",
    "log_format",
    "workers",
    *TLS_KEYS,
    "handshake_timeout",
    "drain_seconds",
    *WATCHING_KEYS,
    "listener",
    "export",
    "policy",
    "space",
)
TABLES: Final = {
    "listener": LISTENER_KEYS,
    "export": EXPORT_KEYS,
    "policy": POLICY_KEYS,
    "space": SPACE_KEYS,
}
"""The keys of each table that KEYS has."""

_AT: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def read_file(path: Path) -> Settings:
    """The settings in a file. NotFoundError, or ConfigurationError with all that is wrong."""
    text = _read_text(path)
    problems = Problems(path)
    values = _parse(path, text)  # before the lines are looked for, which takes valid TOML
    table = Table(Source(path, find_lines(text), problems), values, KEYS)
    settings = Settings(
        data=table.path("data", "the path of a directory"),
        listen=_read_listen(table),
        log_level=table.choice("log_level", LOG_LEVELS),
        log_format=table.choice("log_format", LOG_FORMATS),
        tls=read_tls(table),
        workers=table.number("workers", MAX_WORKERS),
        handshake_timeout=table.number("handshake_timeout", MAX_HANDSHAKE_TIMEOUT, "seconds"),
        drain_seconds=table.number("drain_seconds", MAX_DRAIN_SECONDS, "seconds"),
        watching=read_watching(table),
        listeners=table.each("listener", "address", LISTENER_KEYS, read_listener),
        exports=table.each("export", "name", EXPORT_KEYS, read_export),
        space=table.one("space", SPACE_KEYS, read_space) or NOTHING_OF_SPACE,
        policies=table.each("policy", "name", POLICY_KEYS, read_policy),
    )
    problems.attempt(lambda: check_policies(table.where, settings.policies))
    problems.check()
    return settings


def read_data_directory(path: Path) -> Path | None:
    """What a file says of ``data``, whatever else is in it; None when it says nothing."""
    data = _parse(path, _read_text(path)).get("data")
    return Path(data) if isinstance(data, str) and data else None


def read_space_policy(path: Path) -> SpaceSettings:
    """What a file says of space, whatever else is in it. NotFoundError or InvalidError."""
    text = _read_text(path)
    values = _parse(path, text)
    problems = Problems(path)
    own = {key: value for key, value in values.items() if key == "space"}
    table = Table(Source(path, find_lines(text), problems), own, KEYS)
    found = table.one("space", SPACE_KEYS, read_space)
    problems.check()
    return found or NOTHING_OF_SPACE


def _parse(path: Path, text: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(path, text, str(error)) from None
    except RecursionError:
        raise _not_toml(path, text, "lists and tables are nested too deeply") from None


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise InvalidError(f"configuration file {path}: {error.strerror}") from None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidError(f"{path}:{line}: not TOML: the text is not UTF-8") from None


def _not_toml(path: Path, text: str, reason: str) -> ConfigurationError:
    match = _AT.search(reason)
    line = match[1] if match is not None and match[1] else max(1, len(text.splitlines()))
    return ConfigurationError([f"{path}:{line}: not TOML: {_AT.sub('', reason)}"])


def _read_listen(table: Table) -> tuple[str, ...] | None:
    key = "listen"
    texts = table.texts(key, "each HOST:PORT or unix:PATH")
    for item, text in enumerate(texts or ()):
        try:
            parse_address(text)
        except InvalidError as error:
            table.refuse(table.problem(key, f"{key!r}: {error}", item))
            return None
    return texts
