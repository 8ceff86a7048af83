"""What can be seen to be wrong with a configuration before a daemon is started with it."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from backends.errors import InvalidError
from nbdserve.addresses import UnixAddress
from nbdserve.configuration.problems import Problems
from nbdserve.configuration.settings import Configuration
from nbdserve.server.tls import load_tls

_LONGEST_SOCKET_PATH = 107  # bytes: sun_path of unix(7)


def check_configuration(configuration: Configuration) -> None:
    """Raise ConfigurationError with all that is wrong with files, directories and host names."""
    problems = Problems()
    for tls in dict.fromkeys(found.tls for found in configuration.listeners):
        if tls is not None:
            try:
                load_tls(tls.mode, tls.certificate, tls.key, tls.client_ca)
            except InvalidError as error:
                problems.add(error)
    for line in (*_of_data(configuration.data), *_of_addresses(configuration)):
        problems.add(InvalidError(line))
    problems.check()


def _of_data(data: Path) -> Iterator[str]:
    if data.is_dir():
        if not os.access(data, os.R_OK | os.W_OK | os.X_OK):
            yield f"data directory {data}: no permission to use it"
    elif data.exists():
        yield f"data directory {data} is not a directory"
    elif not data.parent.is_dir():
        yield f"data directory {data} cannot be made: {data.parent} does not exist"


def _of_addresses(configuration: Configuration) -> Iterator[str]:
    for listener in configuration.listeners:
        address = listener.address
        if not isinstance(address, UnixAddress):
            try:
                socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                yield f"cannot listen on {address}: {reason}"
        elif len(os.fsencode(address.path)) > _LONGEST_SOCKET_PATH:
            yield f"cannot listen on {address}: a path has at most {_LONGEST_SOCKET_PATH} bytes"
        elif address.path.parent != configuration.data and not address.path.parent.is_dir():
            yield f"cannot listen on {address}: {address.path.parent} is no directory"
