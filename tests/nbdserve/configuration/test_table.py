"""Errors of the configuration file: where they are, all at once, and what is allowed."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.errors import InvalidError
from nbdserve.configuration.file import read_data_directory, read_file
from nbdserve.configuration.lines import find_lines
from nbdserve.configuration.problems import ConfigurationError, Problems
from nbdserve.configuration.settings import Settings, combine
from nbdserve.configuration.table import Source, Table


@pytest.fixture
def problems(tmp_path: Path) -> Callable[[str], list[str]]:
    """What is wrong with a file of that content: lines without the directory."""

    def problems(content: str) -> list[str]:
        path = tmp_path / "nbdserve.toml"
        path.write_text(content)
        with pytest.raises(ConfigurationError) as caught:
            combine(Settings(Path("/data")), read_file(path))
        assert not [line for line in caught.value.problems if "\n" in line]
        return [line.replace(f"{tmp_path}/", "") for line in caught.value.problems]

    return problems


MANY = """\
log_leve = "info"
workers = "two"
listen = [
    "127.0.0.1:10809",
    "nowhere",
]

[[listener]]
address = "0.0.0.0:10810"
tls = "yes"
max_connections = 0
allow_networks = [
    "10.0.0.0/8",
    "10.0.0.1/8",
]

[[listener]]
tls = "off"

[[export]]
name = "web*"
max_connection = 4

[[export]]
name = "a/b"
"""


def test_all_that_is_wrong_with_a_file(problems: Callable[[str], list[str]]) -> None:
    assert problems(MANY) == [
        "nbdserve.toml:1: unknown key 'log_leve'; did you mean 'log_level'?",
        "nbdserve.toml:5: 'listen': listen address 'nowhere' is neither HOST:PORT nor unix:PATH",
        "nbdserve.toml:2: 'workers' must be a number from 1 to 64",
        "nbdserve.toml:10: [[listener]] '0.0.0.0:10810': 'tls' must be one of off, optional,"
        " required",
        "nbdserve.toml:14: [[listener]] '0.0.0.0:10810': 'allow_networks' must be a list of"
        " addresses or networks such as '10.0.0.0/8' and 'fd00::/8': 10.0.0.1/8 has host bits set",
        "nbdserve.toml:17: [[listener]] number 2: 'address' is missing: HOST:PORT or unix:PATH",
        "nbdserve.toml:22: [[export]] 'web*': unknown key 'max_connection'; did you mean"
        " 'max_connections'?",
        "nbdserve.toml:25: [[export]] 'a/b': 'name' must be a pattern over names of volumes, of"
        " letters, digits, '.', '_', '-', '*', '?' and '[a-z]'; their snapshots are included",
    ]


def test_one_line_says_how_many_there_are(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a = 1\nb = 2\nworkers = 0\n")
    with pytest.raises(InvalidError) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{path}:1: unknown key 'a'; the keys are data, listen, ")
    assert str(caught.value).endswith(f" (and 2 more problems, see nbdserve config check {path})")


def test_what_is_wrong_with_the_whole(problems: Callable[[str], list[str]]) -> None:
    """Nothing of it is one key's fault; each is said once."""
    assert problems(
        'tls = "required"\nlisten = ["[::1]:1", "[::1]:2"]\n'
        '[[listener]]\naddress = "[::1]:3"\ntls = "off"\ntls_client_ca = "/ca"\n'
    ) == [
        "TLS needs a certificate: give --tls-certificate and --tls-key, or tls_certificate and"
        " tls_key in the file",
        "nbdserve.toml:3: [[listener]] '[::1]:3' has files for TLS, which is off: write tls ="
        " 'required'",
    ]
    table = '[[listener]]\naddress = "[::1]:7"\n'
    assert problems(table + table) == [
        "nbdserve.toml:3: [[listener]] '[::1]:7': the file has two [[listener]] tables for [::1]:7"
    ]


@pytest.mark.parametrize(
    ("content", "line", "mentions"),
    [
        (b"data = 1\ndata = 2\n", 2, "Cannot overwrite a value"),
        (b"\n\na = ", 3, "Invalid value"),
        (b'a = """\n\n', 2, "Unterminated string"),
        (b"a = 1\n\xff\n", 2, "UTF-8"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, 1, "nested too deeply"),
    ],
)
def test_what_is_no_toml(tmp_path: Path, content: bytes, line: int, mentions: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (read_file, read_data_directory):
        with pytest.raises(InvalidError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:{line}: not TOML: ")
        assert mentions in str(caught.value)
        assert not re.search(r"at line|\n", str(caught.value))


def test_the_data_directory_is_found_whatever_else_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('data = "/x"\nworkers = 0\n')
    assert read_data_directory(path) == Path("/x")
    path.write_text("data = 7\n")
    assert read_data_directory(path) is None


def test_one_table(tmp_path: Path) -> None:
    text = 'space.warn = "x"\n'

    def read(text: str) -> tuple[str | None, list[str]]:
        problems = Problems()
        source = Source(Path("file"), find_lines(text), problems)
        table = Table(source, tomllib.loads(text), ["space"])
        found = table.one("space", ["warn"], lambda space: space.required_text("warn", "a word"))
        try:
            problems.check()
        except ConfigurationError as error:
            return found, list(error.problems)
        return found, []

    assert read(text) == ("x", [])
    assert read("") == (None, [])
    assert read("\n[space]\n") == (None, ["file:2: [space]: 'warn' is missing: a word"])
    assert read("space = 1") == (None, ["file:1: 'space' must be written as a table, [space]"])
    assert read("[space]\nwarm = 1\nwarn = 'y'") == (
        "y",
        ["file:2: [space]: unknown key 'warm'; did you mean 'warn'?"],
    )
