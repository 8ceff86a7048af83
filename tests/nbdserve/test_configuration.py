"""The daemon's configuration: addresses, the file, and which source wins."""

import os
import pwd
import re
from ipaddress import ip_network
from pathlib import Path

import pytest

from backends.errors import InvalidError, NotFoundError
from nbdserve.addresses import Address, TcpAddress, UnixAddress, parse_address
from nbdserve.configuration.exports import EXPORT_KEYS
from nbdserve.configuration.file import KEYS, read_file
from nbdserve.configuration.listeners import (
    LISTENER_KEYS,
    ListenerConfiguration,
)
from nbdserve.configuration.settings import Configuration, Settings, combine
from nbdserve.configuration.tls import TlsConfiguration, TlsSettings
from nbdserve.configuration.watching import WatchingSettings
from nbdserve.protocol.handshake import TlsMode
from nbdserve.server.entrance import MAX_CONNECTIONS, AccessList
from nbdserve.server.permissions import ExportRule
from snapshots.limits import Limits


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10809", TcpAddress("127.0.0.1", 10809)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("[::1]:65535", TcpAddress("::1", 65535)),
        ("unix:/run/nbd.sock", UnixAddress(Path("/run/nbd.sock"))),
        ("unix:relative:name", UnixAddress(Path("relative:name"))),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "127.0.0.1", "127.0.0.1:", ":10809", "host:port", "host:-1", "host:65536",
        "host:1_0", "host:\u0661", "::1:10809", "unix:", "unix:\0", "10809", "[]:1",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("example.org", False),
    ],
)  # fmt: skip
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert TcpAddress(host, 1).is_loopback is loopback


def addresses(configuration: Configuration) -> list[Address]:
    return [listener.address for listener in configuration.listeners]


def read(tmp_path: Path, content: str, *listen: str) -> Configuration:
    """The configuration of a file with that content, and of `--listen`."""
    path = tmp_path / "file"
    path.write_text(content)
    return combine(Settings(Path("/data"), listen or None), read_file(path))


def refusal(tmp_path: Path, content: str) -> str:
    with pytest.raises(InvalidError) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('data = "/from/file"\nlisten = ["unix:/a", "[::1]:1"]\nlog_level = "error"\n')
    file = read_file(path)
    alone = combine(Settings(), file)
    assert alone.data == Path("/from/file")
    assert addresses(alone) == [UnixAddress(Path("/a")), TcpAddress("::1", 1)]
    assert alone.logs.level == "error"
    both = combine(Settings(Path("/from/line"), ("unix:/b",), "debug"), file)
    assert both.data == Path("/from/line")
    assert addresses(both) == [UnixAddress(Path("/b"))]
    assert both.logs.level == "debug"


def test_defaults() -> None:
    configuration = combine(Settings(data=Path("/data")), Settings())
    assert [str(address) for address in addresses(configuration)] == [
        "127.0.0.1:10809",
        "unix:/data/nbd.sock",
    ]
    for listener in configuration.listeners:
        assert listener == ListenerConfiguration(listener.address)
        assert listener.socket_mode == 0o600
        assert listener.max_connections == MAX_CONNECTIONS
        assert listener.lacks is None
    assert configuration.logs.level == "info"
    assert configuration.handshake_timeout == 30
    assert configuration.exports == ()
    with pytest.raises(InvalidError, match="--data"):
        combine(Settings(), Settings())


FILES = TlsSettings(certificate=Path("/cert"), key=Path("/key"))


def with_tls(command_line: TlsSettings, file: TlsSettings) -> TlsConfiguration | None:
    configuration = combine(Settings(Path("/data"), tls=command_line), Settings(tls=file))
    (tls,) = {listener.tls for listener in configuration.listeners}
    return tls


def test_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text('data = "/x"\nworkers = 7\n')
    assert combine(Settings(), read_file(path)).workers == 7
    assert combine(Settings(workers=1), read_file(path)).workers == 1
    for cores, workers in ((1, 1), (2, 2), (4, 4), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert combine(Settings(Path("/x")), Settings()).workers == workers


def test_tls_is_required_once_there_is_a_certificate(tmp_path: Path) -> None:
    nothing = TlsSettings()
    assert with_tls(nothing, nothing) is None
    required = TlsConfiguration(TlsMode.REQUIRED, Path("/cert"), Path("/key"), None)
    assert with_tls(FILES, nothing) == with_tls(nothing, FILES) == required
    path = tmp_path / "file"
    path.write_text(
        'tls = "optional"\ntls_certificate = "/cert"\ntls_key = "/key"\ntls_client_ca = "/ca"\n'
    )
    file = read_file(path).tls
    assert with_tls(nothing, file) == TlsConfiguration(
        TlsMode.OPTIONAL, Path("/cert"), Path("/key"), Path("/ca")
    )
    line = TlsSettings("required", key=Path("/other"))
    assert with_tls(line, file) == TlsConfiguration(
        TlsMode.REQUIRED, Path("/cert"), Path("/other"), Path("/ca")
    )
    assert with_tls(TlsSettings("off"), file) is None


@pytest.mark.parametrize(
    "settings",
    [
        TlsSettings("required"),
        TlsSettings("optional"),
        TlsSettings(certificate=Path("/cert")),
        TlsSettings(key=Path("/key")),
        TlsSettings(client_ca=Path("/ca")),
        TlsSettings("required", key=Path("/key"), client_ca=Path("/ca")),
    ],
)
def test_tls_without_a_certificate_or_key_says_what_to_give(settings: TlsSettings) -> None:
    with pytest.raises(InvalidError, match="--tls-certificate and --tls-key"):
        with_tls(settings, TlsSettings())


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        ("port = 1", ["'port'", "did you mean 'export'?"]),
        ("absent = 1", ["'absent'", *KEYS]),
        ("data = 1", ["'data'", "string"]),
        ('data = ""', ["'data'"]),
        ('listen = "127.0.0.1:1"', ["'listen'", "list"]),
        ("listen = []", ["'listen'"]),
        ("listen = [1]", ["'listen'"]),
        ("workers = 0", ["'workers'", "from 1 to 64"]),
        ("workers = 65", ["'workers'", "from 1 to 64"]),
        ("workers = true", ["'workers'", "from 1 to 64"]),
        ('workers = "2"', ["'workers'", "from 1 to 64"]),
        ("log_level = true", ["'log_level'", "debug, info, warning, error"]),
        ('log_level = "loud"', ["'log_level'", "debug, info, warning, error"]),
        ('tls = "yes"', ["'tls'", "off, optional, required"]),
        ("tls = true", ["'tls'", "off, optional, required"]),
        ("tls_key = 1", ["'tls_key'", "file"]),
        ("handshake_timeout = 0", ["'handshake_timeout'", "seconds from 1 to 3600"]),
        ("handshake_timeout = 1.5", ["'handshake_timeout'", "seconds from 1 to 3600"]),
        ("listener = 1", ["'listener'", "[[listener]]"]),
        ("[listener]", ["'listener'", "[[listener]]"]),
        ("[[listener]]", ["[[listener]] number 1", "'address'", "HOST:PORT or unix:PATH"]),
        ("[[export]]", ["[[export]] number 1", "'name'", "web*"]),
        ("export = [1]", ["'export'", "[[export]]"]),
        ("data = ", ["TOML"]),
        ("[data]\nx = 1", ["'data'"]),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, content: str, mentions: list[str]) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(InvalidError) as caught:
        read_file(path)
    for word in [str(path), *mentions]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


LISTENERS = """
listen = ["127.0.0.1:1"]
tls = "required"
tls_certificate = "/cert"
tls_key = "/key"
tls_client_ca = "/ca"

[[listener]]
address = "0.0.0.0:2"
tls = "optional"
tls_client_ca = "/other-ca"
allow_networks = ["10.0.0.0/8", "fd00::/8", "192.0.2.1", "::ffff:198.51.100.0/120"]
max_connections = 200

[[listener]]
address = "unix:/run/nbd.sock"
tls = "off"
allow_users = ["root", 12345]
socket_mode = "0660"
socket_group = "root"

[[listener]]
address = "[::]:3"
tls_certificate = "/cert-3"
tls_key = "/key-3"
"""


def test_each_listener_has_its_own(tmp_path: Path) -> None:
    common = TlsConfiguration(TlsMode.REQUIRED, Path("/cert"), Path("/key"), Path("/ca"))
    configuration = read(tmp_path, LISTENERS)
    assert configuration.listeners == (
        ListenerConfiguration(TcpAddress("127.0.0.1", 1), common),
        ListenerConfiguration(
            TcpAddress("0.0.0.0", 2),
            TlsConfiguration(TlsMode.OPTIONAL, Path("/cert"), Path("/key"), Path("/other-ca")),
            AccessList(
                tuple(map(ip_network, ("10.0.0.0/8", "fd00::/8", "192.0.2.1", "198.51.100.0/24")))
            ),
            max_connections=200,
        ),
        ListenerConfiguration(
            UnixAddress(Path("/run/nbd.sock")),
            None,
            AccessList(users=frozenset({0, 12345})),
            socket_mode=0o660,
            socket_group=0,
        ),
        ListenerConfiguration(
            TcpAddress("::", 3),
            TlsConfiguration(TlsMode.REQUIRED, Path("/cert-3"), Path("/key-3"), Path("/ca")),
        ),
    )


def test_an_address_on_the_command_line_keeps_its_table(tmp_path: Path) -> None:
    listeners = read(tmp_path, LISTENERS, "unix:/run/nbd.sock", "127.0.0.1:9").listeners
    assert [str(found.address) for found in listeners] == ["unix:/run/nbd.sock", "127.0.0.1:9"]
    assert listeners[0].access.users == {0, 12345}
    assert listeners[0].tls is None
    assert listeners[1].tls is not None
    assert not listeners[1].access.limits
    # In both lists of the file, too.
    content = 'listen = ["[::1]:1"]\n[[listener]]\naddress = "[::1]:1"\nmax_connections = 3\n'
    (only,) = read(tmp_path, content).listeners
    assert only.max_connections == 3


def test_what_the_network_is_warned_of(tmp_path: Path) -> None:
    ca = 'tls_certificate = "/cert"\ntls_key = "/key"\ntls_client_ca = "/ca"\n'
    no_ca = 'tls_certificate = "/cert"\ntls_key = "/key"\n'
    both = "encryption or authentication, or an access list"
    for lines, lacks in (
        ("", both),
        (ca, None),
        (no_ca, "authentication (tls_client_ca), or an access list"),
        (ca + 'tls = "optional"\n', both),
        ('allow_networks = ["10.0.0.0/8"]\n', None),
        ('allow_networks = ["10.0.0.0/8", "::/0"]\n', both),
    ):
        for address in ("0.0.0.0:1", "[::]:1", "192.0.2.1:1", "example.org:1"):
            (listener,) = read(tmp_path, f'[[listener]]\naddress = "{address}"\n{lines}').listeners
            assert listener.lacks == lacks
        (local,) = read(tmp_path, f'[[listener]]\naddress = "[::1]:1"\n{lines}').listeners
        assert local.lacks is None


def test_rules_for_exports(tmp_path: Path) -> None:
    configuration = read(
        tmp_path,
        LISTENERS
        + """
[[export]]
name = "web*"
allow_certificates = ["Backup.example.com", "test client"]
max_connections = 4

[[export]]
name = "public-[a-c]?"
iops = 500
iops_burst = 2000
bandwidth = "50M"
bandwidth_burst = 1000
""",
    )
    assert configuration.exports == (
        ExportRule("web*", frozenset({"backup.example.com", "test client"}), 4),
        ExportRule("public-[a-c]?", limits=Limits(500, 2000, 50 << 20, 1000)),
    )


@pytest.mark.parametrize(
    ("lines", "mentions"),
    [
        ("port = 1", ["unknown key 'port'", *LISTENER_KEYS]),
        ('tls = "yes"', ["'tls'", "off, optional, required"]),
        ('tls = "required"', ["tls_certificate and tls_key"]),
        ('tls_certificate = "/cert"', ["certificate and its key"]),
        ('tls = "off"\ntls_client_ca = "/ca"', ["has files for TLS", "tls = 'required'"]),
        ("allow_networks = []", ["'allow_networks'", "10.0.0.0/8"]),
        ('allow_networks = "10.0.0.0/8"', ["'allow_networks'", "list"]),
        ('allow_networks = ["10.0.0.1/8"]', ["'allow_networks'", "10.0.0.1/8 has host bits set"]),
        ('allow_networks = ["example.org"]', ["'allow_networks'", "'example.org'"]),
        ('allow_networks = [""]', ["'allow_networks'"]),
        ("allow_networks = [1]", ["'allow_networks'", "strings"]),
        ('allow_users = ["root"]', ["'allow_users' is for Unix sockets", "allow_networks"]),
        ('socket_mode = "0666"', ["'socket_mode' is for Unix sockets"]),
        ('socket_group = "root"', ["'socket_group' is for Unix sockets"]),
        ("max_connections = 0", ["'max_connections'", "from 1 to"]),
    ],
)
def test_what_is_no_listener(tmp_path: Path, lines: str, mentions: list[str]) -> None:
    line = refusal(tmp_path, f'[[listener]]\naddress = "192.0.2.1:7"\n{lines}\n')
    for word in ["[[listener]] '192.0.2.1:7'", *mentions]:
        assert word in line
    assert re.match(rf"{tmp_path}/file:[1-3]: \[\[listener]] ", line)


@pytest.mark.parametrize(
    ("lines", "mentions"),
    [
        ('allow_networks = ["10.0.0.0/8"]', ["'allow_networks' is for TCP", "allow_users"]),
        ("allow_users = []", ["'allow_users'", "names of users, or their numbers"]),
        ("allow_users = [true]", ["'allow_users'", "names of users, or their numbers"]),
        ("allow_users = [-1]", ["'allow_users'", "-1 is no number of a user"]),
        ('allow_users = ["no-such-user"]', ["there is no user 'no-such-user'"]),
        ('allow_users = ["1000"]', ["there is no user '1000'", "a number has no quotes"]),
        ('allow_users = ["a\\u0000"]', ["there is no user"]),
        ("socket_mode = 660", ["'socket_mode'", "a string", "'0660'"]),
        ('socket_mode = "rw"', ["'socket_mode'", "'0660'"]),
        ('socket_mode = "1666"', ["'socket_mode'", "'0660'"]),
        ('socket_group = "no-such-group"', ["there is no group 'no-such-group'"]),
        ("socket_group = true", ["'socket_group'", "name of a group"]),
        ("socket_group = 4294967295", ["'socket_group'", "no number of a group"]),
    ],
)
def test_what_is_no_listener_on_a_socket(tmp_path: Path, lines: str, mentions: list[str]) -> None:
    line = refusal(tmp_path, f'[[listener]]\naddress = "unix:/x"\n{lines}\n')
    for word in [f"{tmp_path}/file:3: [[listener]] 'unix:/x'", *mentions]:
        assert word in line


@pytest.mark.parametrize(
    ("lines", "mentions"),
    [
        ('name = "web@snapshot"', ["'name'", "pattern", "snapshots are included"]),
        ('name = "web/*"', ["'name'", "pattern"]),
        ('name = ""', ["'name'"]),
        ("name = 1", ["[[export]] number 1", "'name'", "string"]),
        (
            'name = "web"\ncertificates = []',
            ["unknown key 'certificates'; did you mean 'allow_certificates'?"],
        ),
        ('name = "web"\nallow_certificates = []', ["[[export]] 'web'", "'allow_certificates'"]),
        ('name = "web"\nmax_connections = 0', ["'max_connections'", "from 1 to"]),
        ('name = "web"\niops = 0', ["[[export]] 'web'", "'iops'", "from 1 to"]),
        ('name = "web"\niops = "fast"', ["'iops'", "requests a second"]),
        ('name = "web"\nbandwidth = "fast"', ["'bandwidth'", "'50M'"]),
        ('name = "web"\nbandwidth = 0', ["'bandwidth'", "from 1 to"]),
        ('name = "web"\nbandwidth_burst = "1G"', ["[[export]] 'web'", "without bandwidth"]),
        ('name = "a"\nallow_certificates = ["x"]', ["'a'", "no listener asks", "tls_client_ca"]),
    ],
)
def test_what_is_no_rule_for_exports(tmp_path: Path, lines: str, mentions: list[str]) -> None:
    line = refusal(tmp_path, f"[[export]]\n{lines}\n")
    for word in mentions:
        assert word in line


def test_two_tables_for_one_address(tmp_path: Path) -> None:
    table = '[[listener]]\naddress = "[::1]:7"\n'
    line = refusal(tmp_path, table + table)
    assert "two [[listener]] tables for [::1]:7" in line and str(tmp_path) in line
    assert "port is at most 65535" in refusal(tmp_path, table.replace("7", "99999"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        read_file(tmp_path / "absent")
    with pytest.raises(InvalidError, match=str(tmp_path)):
        read_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidError, match="binary"):
        read_file(tmp_path / "binary")


def test_the_file_in_the_documents(tmp_path: Path) -> None:
    """Every key for listeners and exports is in it."""
    document = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
    (content,) = re.findall(r"^```toml\n(.*?)^```$", document.read_text(), re.M | re.S)
    configuration = read(tmp_path, content)
    network, owner, users = configuration.listeners
    assert network.tls is not None and network.tls.client_ca is not None and network.access.limits
    assert (owner.tls, owner.access.users, owner.socket_mode) == (None, None, 0o600)
    assert users.access.users == {0, pwd.getpwnam("backup").pw_uid, 64055}
    assert users.socket_mode == 0o660
    assert [rule.pattern for rule in configuration.exports] == ["web*"]
    for key in (*LISTENER_KEYS, *EXPORT_KEYS):
        assert f"{key} = " in content or key == "tls"
        assert f"`{key}`" in document.read_text()


def test_the_page_is_a_part_of_the_http_listener(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text('http = "127.0.0.1:10810"\nweb = true\n')
    here = Settings(data=tmp_path)
    assert combine(here, read_file(file)).watching.web
    assert not combine(here, Settings()).watching.web
    refused = Settings(data=tmp_path, watching=WatchingSettings(web=False))
    assert not combine(refused, read_file(file)).watching.web
    asked = Settings(data=tmp_path, watching=WatchingSettings(web=True))
    with pytest.raises(InvalidError, match="give --http, for example"):
        combine(asked, Settings())
    for value in ("1", '"yes"', "[]"):
        file.write_text(f"web = {value}\n")
        with pytest.raises(InvalidError, match="'web' must be true or false"):
            read_file(file)
