"""The manual pages: clean for groff and mandoc, and of the command line as it is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from nbdserve.cli.application import application
from nbdserve.configuration import exports, file, listeners
from scripts.manual.pages import FILE_FORMATS, WRITTEN, make_pages
from scripts.manual.roff import sections_of

PROJECT = Path(__file__).resolve().parents[2]
DATE = "2026-01-31"
PAGES = {page.file_name: page.text(DATE) for page in make_pages(application)}


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def require(*programs: str) -> None:
    """Skip the test without these programs, unless this is continuous integration."""
    for program in programs:
        if shutil.which(program) is None:
            assert os.environ.get("CI") != "true", program
            pytest.skip(f"{program} not found: run scripts/install-test-dependencies")


def shown(page: Path, width: int = 2000) -> str:
    """A page as man shows it, without emphasis; a wide one has no line broken."""
    done = subprocess.run(
        ["groff", "-man", "-ww", "-P-cbou", "-Tutf8", f"-rLL={width}n", page],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.replace("\N{HYPHEN}", "-").replace("\N{MINUS SIGN}", "-")


def commands_of(
    command: click.Command, words: tuple[str, ...] = ()
) -> dict[tuple[str, ...], click.Command]:
    """Every command that is not a group, by its words."""
    if not isinstance(command, click.Group):
        return {words: command}
    found = {}
    context = click.Context(command)
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        assert below is not None
        if not below.hidden:
            found.update(commands_of(below, (*words, name)))
    return found


COMMANDS = commands_of(application)


def test_groff_and_mandoc_have_nothing_to_complain_about(pages: Path) -> None:
    require("groff", "mandoc")
    for page in sorted(pages.iterdir()):
        shown(page, 78)
        # "style" would complain about pages referred to that are not installed.
        lint = subprocess.run(
            ["mandoc", "-T", "lint", "-W", "warning", page],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (lint.stdout, lint.returncode) == ("", 0)


def test_every_option_of_every_command_is_on_its_page(pages: Path) -> None:
    require("groff")
    texts = {page.name: shown(page) for page in pages.iterdir()}
    assert len(COMMANDS) > 20
    for words, command in COMMANDS.items():
        text = texts[f"nbdserve-{words[0]}.1"]
        assert f"nbdserve {' '.join(words)}" in text
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                for name in parameter.opts:
                    assert re.search(rf"^ +(--?\w+, )*{re.escape(name)}\b", text, re.MULTILINE), (
                        words,
                        name,
                    )
                    explained = " ".join((parameter.help or "").split())
                    assert explained.replace("…", "...") in " ".join(text.split()), (words, name)


def test_what_is_written_by_hand_is_about_pages_that_there_are() -> None:
    known = {Path(name).stem for name in PAGES} | {"common"}
    assert {file.stem for file in WRITTEN.glob("*.md")} <= known


def test_no_page_names_an_option_that_no_command_has() -> None:
    known = {"--help", "--version"}
    for command in [application, *COMMANDS.values()]:
        for parameter in command.params:
            known.update(parameter.opts)
    for written in WRITTEN.glob("*.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", written.read_text()))
        assert named <= known, written.name


def test_the_page_of_the_configuration_file_has_every_key(pages: Path) -> None:
    text = PAGES["nbdserve.toml.5"]
    assert set(FILE_FORMATS) == {"nbdserve.toml"}
    for key in {*file.KEYS, *listeners.LISTENER_KEYS, *exports.EXPORT_KEYS}:
        assert re.search(rf"(?<!\w){key}(?!\w)", text), key


def test_text_is_never_taken_for_a_request() -> None:
    ((_, text),) = sections_of("```\n.de x\n'br\n\\fIplain\n```\n")
    assert text.splitlines()[2:5] == [r"\&.de x", r"\(aqbr", r"\efIplain"]
    ((_, text),) = sections_of(".TH is no request - 'here'\n")
    assert text == r"\&.TH is no request \- \(aqhere\(aq"


def test_what_has_no_counterpart_is_refused() -> None:
    for markdown in ("1. one\n2. two\n", "> said\n", "[a link](elsewhere.md)\n", "<b>x</b>\n"):
        with pytest.raises(ValueError, match="in a manual page"):
            sections_of(markdown)


def test_the_date_is_that_of_the_source(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "scripts.manual", tmp_path / "made"],
        cwd=PROJECT,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1769817600"},
        check=True,
    )
    made = {file.name: file.read_text() for file in tmp_path.glob("made/man/man?/*")}
    assert made == PAGES
