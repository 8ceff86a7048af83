"""The example of a configuration file: it loads, and has every key that there is."""

import re
import tomllib
from pathlib import Path
from typing import Any

from nbdserve.configuration.file import KEYS, TABLES, read_file
from nbdserve.configuration.settings import Configuration, Settings, combine

PROJECT = Path(__file__).resolve().parents[3]
EXAMPLE = PROJECT / "scripts" / "systemd" / "nbdserve.toml"
COMMENTED_OUT = re.compile(r"^#(?=\S)", re.MULTILINE)


def configuration(tmp_path: Path, text: str) -> Configuration:
    file = tmp_path / "nbdserve.toml"
    file.write_text(text)
    return combine(Settings(), read_file(file))


def test_as_it_is(tmp_path: Path) -> None:
    found = combine(Settings(), read_file(EXAMPLE))
    assert found.data == Path("/var/lib/nbdserve")
    # What it leaves out is the default.
    bare = configuration(
        tmp_path,
        'data = "/var/lib/nbdserve"\nlisten = ["127.0.0.1:10809", "unix:/run/nbdserve/nbd.sock"]\n',
    )
    assert found == bare


def test_with_every_key(tmp_path: Path) -> None:
    text = COMMENTED_OUT.sub("", EXAMPLE.read_text())
    assert configuration(tmp_path, text).exports
    values: dict[str, Any] = tomllib.loads(text)
    assert list(KEYS) == sorted(values, key=KEYS.index)
    for name, keys in TABLES.items():
        tables = values[name] if isinstance(values[name], list) else [values[name]]
        assert set().union(*tables) == set(keys), name


def test_what_is_commented_out_is_the_default(tmp_path: Path) -> None:
    """As far as it is one: files and tables are examples."""
    text = EXAMPLE.read_text().partition("#tls = ")[0]
    without = re.compile(r"^#(workers|http|http_hosts|web) =.*\n", re.MULTILINE).sub("", text)
    assert configuration(tmp_path, COMMENTED_OUT.sub("", without)) == configuration(tmp_path, text)


def test_the_documents_have_every_key() -> None:
    pages = ("configuration", "schedules", "space")
    document = "".join((PROJECT / "docs" / f"{page}.md").read_text() for page in pages)
    for key in (*KEYS, *(key for keys in TABLES.values() for key in keys)):
        assert any(f"`{form}`" in document for form in (key, f"[[{key}]]", f"[{key}]")), key
