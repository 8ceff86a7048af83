"""man(7): text that is safe in it, and Markdown as it.

Of Markdown the pages use paragraphs, code, emphasis, fenced blocks and lists; a list whose items
begin with code and a colon becomes one of tagged paragraphs. Anything else is an error: a page that
silently lacks a table would be worse.
"""

import re
from collections.abc import Iterator, Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token

_SPECIAL = {
    "\\": r"\e",
    "-": r"\-",
    "'": r"\(aq",
    '"': r"\(dq",
    "`": r"\(ga",
    "^": r"\(ha",
    "~": r"\(ti",
    "…": "...",  # roff's own ellipsis is three dots as well
}
_OPTION = re.compile(r"(?<![\w-])(--?[A-Za-z][\w-]*)")
_PLACEHOLDER = re.compile(r"(?<![\w@-])([A-Z][A-Z0-9]+(?:[@:][A-Z]+)*)(?![\w-])")


def escape(text: str) -> str:
    """``text`` for the inside of a line; a line of its own also needs :func:`guard`."""
    return "".join(
        _SPECIAL.get(character)
        or (character if character < "\x7f" else f"\\[u{ord(character):04X}]")
        for character in text
    )


def guard(line: str) -> str:
    """An escaped line that roff does not take for a request."""
    return rf"\&{line}" if line.startswith((".", "'")) else line


def bold(text: str) -> str:
    """A word of the command line, which must not be hyphenated, or several."""
    return rf"\fB\%{escape(text)}\fP"


def syntax(text: str) -> str:
    """Usage or an option: names of options in bold, what stands for something else in italics."""
    pieces = _OPTION.split(text)
    return "".join(
        bold(piece) if index % 2 else _italic_placeholders(piece)
        for index, piece in enumerate(pieces)
    )


def _italic_placeholders(text: str) -> str:
    pieces = _PLACEHOLDER.split(text)
    return "".join(
        rf"\fI{escape(piece)}\fP" if index % 2 else escape(piece)
        for index, piece in enumerate(pieces)
    )


def paragraph(text: str) -> str:
    """Running text, its options in bold."""
    pieces = _OPTION.split(" ".join(text.split()))
    return guard("".join(bold(p) if i % 2 else escape(p) for i, p in enumerate(pieces)))


def join(blocks: Sequence[str]) -> str:
    """Blocks with space between them; those that make it themselves begin with a request."""
    lines: list[str] = []
    for index, block in enumerate(blocks):
        if index and not block.startswith((".TP", ".SS")):
            lines.append(".PP")
        lines.append(block)
    return "\n".join(lines)


def sections_of(markdown: str) -> list[tuple[str, str]]:
    """The sections of a document as (title, man(7)); what comes before a title has title ``""``.

    ValueError: it has something that has no counterpart here.
    """
    tokens = MarkdownIt("commonmark").parse(markdown)
    sections: list[tuple[str, list[Token]]] = [("", [])]
    rest = iter(tokens)
    for token in rest:
        if token.type == "heading_open":
            sections.append((next(rest).content, []))
            next(rest)
        else:
            sections[-1][1].append(token)
    return [(title, join(list(_blocks(iter(found))))) for title, found in sections if found]


def _blocks(tokens: Iterator[Token]) -> Iterator[str]:
    for token in tokens:
        match token.type:
            case "paragraph_open":
                yield guard(_inline(next(tokens)))
                next(tokens)
            case "fence":
                lines = (guard(escape(line)) for line in token.content.splitlines())
                yield "\n".join([".RS 4", ".EX", *lines, ".EE", ".RE"])
            case "bullet_list_open":
                yield from _items(tokens)
            case _:
                raise ValueError(f"{token.type} in a manual page, line {(token.map or [0])[0] + 1}")


def _items(tokens: Iterator[Token]) -> Iterator[str]:
    """The items of a list whose beginning was taken."""
    for token in tokens:
        if token.type == "bullet_list_close":
            return
        assert token.type == "list_item_open", token
        inside = []
        for part in tokens:
            if part.type == "list_item_close":
                break
            inside.append(part)
        tag = _take_tag(inside)
        head = r".TP 2" "\n" r"\(bu" if tag is None else f".TP\n{tag}"
        yield f"{head}\n" + "\n.IP\n".join(_blocks(iter(inside)))


def _take_tag(item: Sequence[Token]) -> str | None:
    """What an item begins with, in man(7): words of code and a colon, which are taken away.

    None when it begins in another way.
    """
    children = item[1].children or []
    for index, child in enumerate(children):
        if child.type == "text" and index and child.content.startswith(":"):
            child.content = child.content[1:].lstrip()
            tag = ", ".join(bold(c.content) for c in children[:index] if c.type == "code_inline")
            del children[:index]
            return tag
        if child.type != "code_inline" and child.content != ", ":
            return None
    return None


def _inline(token: Token) -> str:
    written = []
    for child in token.children or []:
        match child.type:
            case "text":
                written.append(escape(child.content))
            case "code_inline":
                written.append(bold(child.content))
            case "softbreak":
                written.append(" ")
            case "em_open":
                written.append(r"\fI")
            case "strong_open":
                written.append(r"\fB")
            case "em_close" | "strong_close":
                written.append(r"\fP")
            case _:
                raise ValueError(f"{child.type} in a manual page: {token.content}")
    return "".join(written)
