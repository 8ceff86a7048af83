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

    [space]
    max_overcommit = 3.0
    warn_free = "10%"
    critical_free = "20G"
    min_free = "1G"

Errors name the file, the table, the key and what is allowed.
"""

import tomllib
from pathlib import Path
from typing import Final

from backends.errors import InvalidError, NotFoundError
from nbdserve.configuration.exports import EXPORT_KEYS, read_export
from nbdserve.configuration.listeners import LISTENER_KEYS, read_listener
from nbdserve.configuration.settings import LOG_LEVELS, MAX_WORKERS, Settings
from nbdserve.configuration.space import SPACE_KEYS, read_space
from nbdserve.configuration.table import Table
from nbdserve.configuration.tls import TLS_KEYS, read_tls

KEYS: Final = (
    "data",
    "listen",
    "log_level",
    "workers",
    *TLS_KEYS,
    "handshake_timeout",
    "listener",
    "export",
    "space",
)
MAX_HANDSHAKE_TIMEOUT: Final = 3600


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
    table = Table(f"{path}", values, KEYS)
    return Settings(
        data=table.path("data", "the path of a directory"),
        listen=table.texts("listen", "each HOST:PORT or unix:PATH"),
        log_level=table.choice("log_level", LOG_LEVELS),
        tls=read_tls(table),
        space=read_space(table.table("space", SPACE_KEYS)),
        workers=table.number("workers", MAX_WORKERS),
        handshake_timeout=table.number("handshake_timeout", MAX_HANDSHAKE_TIMEOUT, "seconds"),
        listeners=tuple(map(read_listener, table.tables("listener", "address", LISTENER_KEYS))),
        exports=tuple(map(read_export, table.tables("export", "name", EXPORT_KEYS))),
    )
