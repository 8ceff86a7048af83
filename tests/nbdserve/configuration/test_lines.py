"""Where everything in a TOML document is: as tomllib reads it, and on the right line."""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.configuration.lines import Place, find_lines


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of what tomllib returned."""
    yield place
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*place, number))


@pytest.mark.parametrize(
    ("text", "place", "line"),
    [
        ("", (), 1),
        ("a = 1", ("a",), 1),
        ("# one\n\n  a = 1 # b = 2\nb = 2", ("b",), 4),
        ("a = 1\r\nb = 2\r\n", ("b",), 2),
        ("[t]\na = 1", ("t",), 1),
        ("[t]\na = 1", ("t", "a"), 2),
        ("[a.b]\n[a]\nc = 1", ("a",), 2),
        ("[ a . 'b.c' ]\nd = 1", ("a", "b.c", "d"), 2),
        ("a . b = 1\na . c = 2", ("a", "c"), 2),
        ('"quoted \\u0041" = 1', ("quoted A",), 1),
        ("'' = 1", ("",), 1),
        ("a = [\n1,\n# 2,\n3,\n]\nb = 4", ("a", 1), 4),
        ("a = [\n1,\n# 2,\n3,\n]\nb = 4", ("b",), 6),
        ("a = [[1,\n2], [\n3]]", ("a", 1, 0), 3),
        ("a = [ # [\n]\nb = 1", ("b",), 3),
        ("a = {b = 1, c.d = [\n{e = 2}]}", ("a", "c", "d", 0, "e"), 2),
        ("a = { }\nb = 1", ("b",), 2),
        ('a = """\n[x]\ny = 1\n"""\nb = 1', ("b",), 5),
        ('a = """x\\"""\n""""\nb = 1', ("b",), 3),
        ("a = '''\n''\\'''''\nb = 1", ("b",), 3),
        ('a = """"""\nb = 1', ("b",), 2),
        ('a = "# \\" [no]"\nb = 1', ("b",), 2),
        ("a = '# \\'\nb = 1", ("b",), 2),
        ("a = 1979-05-27 07:32:00 # x\nb = inf", ("b",), 2),
        ("[[l]]\n[[l]]\na = 1\n[l.t]\nb = 1\n[[l.m]]\nc = 1", ("l", 1, "a"), 3),
        ("[[l]]\n[[l]]\na = 1\n[l.t]\nb = 1\n[[l.m]]\nc = 1", ("l", 1, "t", "b"), 5),
        ("[[l]]\n[[l]]\na = 1\n[l.t]\nb = 1\n[[l.m]]\nc = 1", ("l", 1, "m", 0, "c"), 7),
        ("[[l]]\n[[l]]\na = 1\n", ("l",), 1),
        ("[[l]]\n[[l]]\na = 1\n", ("l", 1), 2),
    ],
)
def test_examples(text: str, place: Place, line: int) -> None:
    found = find_lines(text)
    assert found[place] == line
    assert set(found) == set(places(tomllib.loads(text)))


class Writer:
    """Writes a random document in which each key and each item of a list is a number of its own."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.text = ""
        self.count = 0

    def choose(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    def mark(self) -> str:
        self.count += 1
        return f"m{self.count}m"

    def key(self) -> str:
        return self.choose("{}", '"{}"', "'{}'", '"\\u005B{}"', "'# {} ='").format(self.mark())

    def dotted(self) -> str:
        dot = self.choose(".", " . ", "\t.")
        return dot.join(self.key() for _ in range(self.draw(st.integers(1, 3))))

    def blank(self) -> str:
        return self.choose("", " ", "\n", "\r\n", ' # ]}\'""" [[x]] = {\n', "\n\n\t")

    def value(self, depth: int = 0) -> str:
        kind = self.draw(st.integers(0, 5 if depth > 2 else 7))
        if kind == 6:
            items = [
                f"{self.blank()}{self.item(depth)}{self.blank()}"
                for _ in range(self.draw(st.integers(0, 3)))
            ]
            tail = "," + self.blank() if items and self.draw(st.booleans()) else self.blank()
            return f"[{','.join(items)}{tail}]"
        if kind == 7:
            pairs = [
                f"{self.dotted()} = {self.value(depth + 1)}"
                for _ in range(self.draw(st.integers(0, 3)))
            ]
            return f"{{ {', '.join(pairs)} }}"
        return [
            self.choose("1", "0x1F", "1e3", "true", "07:32:00", "1979-05-27 07:32:00Z"),
            '"' + "".join(self.choose("a", "#", "'", "\\\\", '\\"', "[", "=") for _ in "123") + '"',
            "'" + "".join(self.choose("a", "#", '"', "\\", "]", "\t") for _ in "123") + "'",
            '"""' + "".join(self.choose("\n", "x", "#", '""a', "\\\\", '\\"') for _ in "12345")
            + self.choose('"""', '""""', '"""""'),
            "'''" + "".join(self.choose("\n", "x", "#", "''a", "\\", "[[") for _ in "12345")
            + self.choose("'''", "''''", "'''''"),
            "1",
        ][kind]  # fmt: skip

    def item(self, depth: int) -> str:
        """One that can be told by its text, where it begins."""
        mark = self.mark()
        return self.choose(
            f'"{mark}"', f"'{mark}'", f'"""{mark}\n\n"""', f"[{self.value(depth + 1)}]"
        )

    def document(self) -> str:
        text = ""
        headers: list[str] = []
        for _ in range(self.draw(st.integers(0, 8))):
            kind = self.draw(st.integers(0, 4))
            if kind == 0:
                text += f"[{self.choose('', ' ')}{self.dotted()}]"
            elif kind == 1:
                name = self.dotted()
                headers.append(name)
                text += f"[[{name}]]"
            elif kind == 2 and headers:
                text += self.choose("[[{}]]", "[{}.k" + self.mark() + "]").format(
                    self.draw(st.sampled_from(headers))
                )
            else:
                text += f"{self.choose('', '  ')}{self.dotted()} = {self.value()}"
            text += self.choose("\n", "\r\n", ' # [x] """\n', "\n\n")
        return text


@st.composite
def documents(draw: st.DrawFn) -> str:
    return Writer(draw).document()


@given(documents())
def test_random_documents(text: str) -> None:
    values = tomllib.loads(text)
    found = find_lines(text)
    assert set(found) == set(places(values))
    lines = text.replace("\r\n", "\n").split("\n")
    for place, line in found.items():
        last = place[-1] if place else None
        if isinstance(last, str):
            assert last.removeprefix("[").removeprefix("# ").removesuffix(" =") in lines[line - 1]
        elif last is not None:
            value: Any = values
            for part in place:
                value = value[part]
            if isinstance(value, str) and (mark := re.match(r"m\d+m", value)) is not None:
                assert mark[0] in lines[line - 1]
