"""How the daemon can be watched: the HTTP listener, and requests worth a line in the log."""

from dataclasses import dataclass
from typing import Final

from backends.errors import InvalidError
from nbdserve.addresses import Address, TcpAddress, parse_address
from nbdserve.configuration.table import Table
from nbdserve.server.slow import DEFAULT_SECONDS

WATCHING_KEYS: Final = ("http", "http_hosts", "slow_request_seconds", "web")
MAX_SLOW_SECONDS: Final = 3600.0


@dataclass(frozen=True)
class WatchingSettings:
    """One source's say; None where it says nothing.

    ``http`` is where metrics and health are served; ``http_hosts`` are names that clients may know
    it by. Requests that take ``slow_request_seconds`` are in the log; 0: none are.
    ``web``: the page is served as well.
    """

    http: str | None = None
    http_hosts: tuple[str, ...] | None = None
    slow_request_seconds: float | None = None
    web: bool | None = None


NOTHING_OF_WATCHING: Final = WatchingSettings()


@dataclass(frozen=True)
class WatchingConfiguration:
    """``http`` None: no listener."""

    http: Address | None = None
    http_hosts: tuple[str, ...] = ()
    slow_request_seconds: float = DEFAULT_SECONDS
    web: bool = False

    @property
    def is_open(self) -> bool:
        """Whether other machines can read what is served."""
        return isinstance(self.http, TcpAddress) and not self.http.is_loopback


def read_watching(table: Table) -> WatchingSettings:
    http = table.text("http", "HOST:PORT or unix:PATH")
    if http is not None:
        try:
            parse_address(http)
        except InvalidError as error:
            table.refuse(table.problem("http", f"'http': {error}"))
            http = None
    return WatchingSettings(
        http,
        table.texts("http_hosts", "each a name of this host"),
        table.seconds("slow_request_seconds", MAX_SLOW_SECONDS),
        table.flag("web"),
    )


def combine_watching(
    command_line: WatchingSettings, file: WatchingSettings
) -> WatchingConfiguration:
    http = command_line.http or file.http
    hosts = command_line.http_hosts if command_line.http_hosts is not None else file.http_hosts
    slow = command_line.slow_request_seconds
    if slow is None:
        slow = file.slow_request_seconds
    web = bool(file.web if command_line.web is None else command_line.web)
    if web and http is None:
        raise InvalidError(
            "the page is served by the HTTP listener: give --http, for example 127.0.0.1:10810"
        )
    return WatchingConfiguration(
        None if http is None else parse_address(http),
        hosts or (),
        DEFAULT_SECONDS if slow is None else slow,
        web,
    )
