"""Which pages there are, and what is in them.

nbdserve(1) has the commands in brief; each of them, alone or a group, has a page of its own, and
nbdserve.toml(5) is the configuration file. Synopsis, commands and options are what click knows, so
that they cannot be out of date. A file ``docs/man/PAGE.md`` adds to that: what it says before its
first heading ends the description, its sections follow the options. ``docs/man/common.md`` has the
sections that all pages of section 1 end with.

An option that at least three commands of a page have in the same words is described once, under
COMMON OPTIONS.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from scripts.manual.roff import bold, escape, join, paragraph, sections_of, syntax

PROJECT = Path(__file__).resolve().parents[2]
WRITTEN = PROJECT / "docs" / "man"
FILE_FORMATS = {"nbdserve.toml": "the configuration file of nbdserve"}
EXAMPLE = PROJECT / "scripts" / "systemd" / "nbdserve.toml"
"""The configuration file as it is installed, which has every key."""
COMMON = "common"
SEE_ALSO = "SEE ALSO"

Record = tuple[str, str]
"""An option as click's help shows it, and its explanation."""


def version() -> str:
    """The version, from the one place that has it."""
    project: str = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    return project


@dataclass(frozen=True)
class Leaf:
    """A command that is not a group: ``words`` call it."""

    words: str
    command: click.Command
    context: click.Context

    @property
    def usage(self) -> str:
        return " ".join([self.words, *self.command.collect_usage_pieces(self.context)])

    def records(self) -> list[Record]:
        """Its options, but ``--help``, which every command has."""
        options = (p for p in self.command.get_params(self.context) if isinstance(p, click.Option))
        records = (p.get_help_record(self.context) for p in options if "--help" not in p.opts)
        return [record for record in records if record is not None]


@dataclass
class Page:
    """One page: ``sections`` in order, each a title and man(7)."""

    name: str
    section: int
    brief: str
    sections: list[tuple[str, str]] = field(default_factory=list)

    @property
    def file_name(self) -> str:
        return f"{self.name}.{self.section}"

    def add(self, title: str, *blocks: str) -> None:
        """A section, or more text for the one of that title."""
        for index, (known, text) in enumerate(self.sections):
            if known == title:
                self.sections[index] = (title, join([text, *blocks]))
                return
        self.sections.append((title, join(blocks)))

    def text(self, date: str) -> str:
        """The page; ``date`` is ISO 8601."""
        title, source = escape(self.name.upper()), f"nbdserve {version()}"
        head = [
            r".\" Made by python -m scripts.manual: change the command or docs/man instead.",
            f'.TH {title} {self.section} "{date}" "{source}" "nbdserve"',
            ".ad l",
            ".SH NAME",
            rf"{escape(self.name)} \- {escape(self.brief)}",
        ]
        body = [f'.SH "{escape(title)}"\n{text}' for title, text in self.sections]
        return "\n".join([*head, *body, ""])


def make_pages(application: click.Group) -> list[Page]:
    """All pages, as the commands and docs/man/ are now."""
    context = click.Context(application, info_name="nbdserve")
    commands = dict(_commands_of(application, context))
    pages = [_make_main_page(application, context, commands)]
    pages += [_make_command_page(name, command, context) for name, command in commands.items()]
    for page in pages:
        _add_written(page)
        for title, text in sections_of((WRITTEN / f"{COMMON}.md").read_text()):
            page.add(title, text)
    for name, brief in FILE_FORMATS.items():
        page = Page(name, 5, brief)
        _add_written(page)
        if EXAMPLE.exists():
            ((_, text),) = sections_of(f"```\n{EXAMPLE.read_text()}```\n")
            page.add("A COMPLETE FILE", text)
        pages.append(page)
    for page in pages:
        _add_references(page, pages)
    return pages


def _make_main_page(
    application: click.Group, context: click.Context, commands: dict[str, click.Command]
) -> Page:
    help_text = _paragraphs(application)
    page = Page("nbdserve", 1, _lower_first(help_text[0].rstrip(".")))
    page.add(
        "SYNOPSIS", _usage_block(["nbdserve [OPTIONS] COMMAND [ARGS]...", "nbdserve --version"])
    )
    page.add("DESCRIPTION", *map(paragraph, help_text))
    page.add(
        "COMMANDS",
        *(
            f".TP\n{bold(f'nbdserve-{name}')}(1)\n{paragraph(_brief(command))}"
            for name, command in commands.items()
        ),
    )
    leaf = Leaf("nbdserve", application, context)
    page.add("OPTIONS", *_describe(leaf.records()))
    return page


def _make_command_page(name: str, command: click.Command, parent: click.Context) -> Page:
    page = Page(f"nbdserve-{name}", 1, _lower_first(_brief(command).rstrip(".")))
    leaves = list(_leaves_of(f"nbdserve {name}", command, parent))
    page.add("SYNOPSIS", _usage_block([leaf.usage for leaf in leaves]))
    page.add("DESCRIPTION", *map(paragraph, _paragraphs(command)))
    if not isinstance(command, click.Group):
        page.add("OPTIONS", *_describe(leaves[0].records()))
        return page
    often = Counter(record for leaf in leaves for record in leaf.records())
    common = [record for record, count in often.items() if count >= 3]
    blocks = []
    for leaf in leaves:
        blocks.append(f".SS {syntax(leaf.usage)}")
        blocks += map(paragraph, _paragraphs(leaf.command))
        blocks += _describe([record for record in leaf.records() if record not in common])
        shared = [record[0].split()[0].rstrip(",") for record in leaf.records() if record in common]
        if shared:
            blocks.append(paragraph(f"Also {', '.join(shared)}; see COMMON OPTIONS."))
    page.add("COMMANDS", _join_subsections(blocks))
    if common:
        page.add("COMMON OPTIONS", *_describe(common))
    return page


def _join_subsections(blocks: list[str]) -> str:
    """As ``join``, without space behind the title of a subsection, which has its own."""
    text = join(blocks)
    return re.sub(r"^(\.SS .*)\n\.PP$", r"\1", text, flags=re.MULTILINE)


def _add_written(page: Page) -> None:
    """Add what docs/man/ says by hand about this page, which may be nothing."""
    file = WRITTEN / f"{page.name}.md"
    if not file.exists():
        return
    for title, text in sections_of(file.read_text()):
        page.add(title or "DESCRIPTION", text)


def _add_references(page: Page, pages: list[Page]) -> None:
    """Name all other pages, at the end."""
    others = (f"{bold(other.name)}({other.section})" for other in pages if other is not page)
    page.add(SEE_ALSO, ",\n".join(others))
    page.sections.sort(key=lambda section: section[0] == SEE_ALSO)  # which is stable


def _commands_of(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is not None and not command.hidden:
            yield name, command


def _leaves_of(words: str, command: click.Command, parent: click.Context) -> Iterator[Leaf]:
    """The command, or all commands below it, in the order of the help."""
    context = click.Context(command, info_name=words.rpartition(" ")[2], parent=parent)
    if not isinstance(command, click.Group):
        yield Leaf(words, command, context)
        return
    for name, below in _commands_of(command, context):
        yield from _leaves_of(f"{words} {name}", below, context)


def _usage_block(usages: list[str]) -> str:
    return "\n.br\n".join(syntax(usage) for usage in usages)


def _describe(records: list[Record]) -> list[str]:
    return [f".TP\n{syntax(option)}\n{paragraph(text)}" for option, text in records]


def _paragraphs(command: click.Command) -> list[str]:
    """The help of a command, a paragraph each."""
    help_text = (command.help or "").partition("\f")[0].replace("\b\n", "")
    return [" ".join(part.split()) for part in help_text.split("\n\n") if part.strip()]


def _brief(command: click.Command) -> str:
    """The first sentence of a command's help."""
    return command.get_short_help_str(limit=1000)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
