"""nbd-conformance as a program: URIs, options, what it prints, exit status; and its catalogue."""

import ast
import json
import re
import runpy
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.conformance import program
from scripts.conformance.catalogue import CHECKS
from scripts.conformance.report import format_row
from scripts.conformance.tls import Tls, TlsError, gather
from scripts.conformance.uri import Uri, UriError, parse_uri
from scripts.conformance.verdicts import Level, Result, Verdict
from tests.scripts.scripted_server import EINVAL, ENOSPC, Ended, Server, Session, serving

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def server() -> Iterator[Server]:
    with (
        tempfile.TemporaryDirectory(prefix="nbd-conformance-test-") as directory,
        serving(Path(directory)) as running,
    ):
        yield running


# URIs


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://host", Uri(False, "host", 10809, "", "")),
        ("nbd://host/", Uri(False, "host", 10809, "", "")),
        ("nbd://host:1/disk", Uri(False, "host", 1, "", "disk")),
        ("nbd://[::1]:1//disk/1", Uri(False, "::1", 1, "", "/disk/1")),
        ("nbd://host/a%20b%40c", Uri(False, "host", 10809, "", "a b@c")),
        ("nbd+unix:///disk?socket=/s", Uri(False, "", 10809, "/s", "disk")),
        ("nbd+unix://?socket=/a%20b+c", Uri(False, "", 10809, "/a b+c", "")),
        (
            "nbds://host/d?tls-certificates=/c&tls-hostname=h&tls-verify-peer=false&more=1",
            Uri(True, "host", 10809, "", "d", "/c", "h", False),
        ),
        ("nbds+unix:///d?socket=/s", Uri(True, "", 10809, "/s", "d")),
    ],
)
def test_uri(text: str, uri: Uri) -> None:
    assert parse_uri(text) == uri


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://host/disk", "begins with nbd://"),
        ("disk", "begins with nbd://"),
        ("nbd+unix:///disk", "socket=PATH"),
        ("nbd://host/disk?socket=/s", r"nbd\+unix"),
        ("nbd:///disk", "no host"),
        ("nbd://host:port/disk", "port"),
        ("nbd://host:99999/disk", "ort"),
        ("nbds://host/disk?tls-psk-file=/k", "pre-shared"),
    ],
)
def test_uri_that_is_none(text: str, said: str) -> None:
    with pytest.raises(UriError, match=said):
        parse_uri(text)


def test_uri_is_shown_without_what_is_not_needed() -> None:
    for text in ("nbd://host:1/disk", "nbds+unix:///disk?socket=/s", "nbd://[::1]:2/disk"):
        assert str(parse_uri(text)) == text


# TLS


def test_options_win_over_the_uri(tmp_path: Path) -> None:
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
        (tmp_path / name).write_text("")
    uri = parse_uri(f"nbds://host/d?tls-certificates={tmp_path}")
    found = gather(uri, Tls())
    assert found == Tls(
        f"{tmp_path}/ca-cert.pem",
        f"{tmp_path}/client-cert.pem",
        f"{tmp_path}/client-key.pem",
        "host",
    )
    given = Tls("ca", "certificate", "key", "name", False)
    assert gather(uri, given) == given


def test_names_are_verified_where_there_is_one() -> None:
    assert Tls(server_name="host").context().check_hostname
    assert not Tls().context().check_hostname
    assert Tls().context().verify_mode is ssl.CERT_REQUIRED
    assert Tls(verify=False, server_name="host").context().verify_mode is ssl.CERT_NONE
    assert Tls().context().minimum_version is ssl.TLSVersion.TLSv1_2


def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"absent\.pem"):
        Tls(ca=str(tmp_path / "absent.pem")).context()
    with pytest.raises(TlsError, match="not a directory"):
        gather(parse_uri(f"nbds://host/d?tls-certificates={tmp_path}/absent"), Tls())


# The catalogue


def test_names_are_unique_and_sentences_said() -> None:
    names = Counter(check.name for check in CHECKS)
    assert [name for name, number in names.items() if number > 1] == []
    for check in CHECKS:
        assert re.fullmatch(r"[A-Za-z_-]+/[a-z0-9-]+", check.name), check.name
        assert len(check.sentence) > 20, check.name


def test_levels_are_those_of_the_words() -> None:
    """A sentence with MUST is no SHOULD, and the other way round."""
    for check in CHECKS:
        if "MUST" not in check.sentence and "SHOULD" in check.sentence:
            assert check.level is not Level.MUST, check.name
        if "SHOULD" not in check.sentence and re.search(r"server (also )?MUST", check.sentence):
            assert check.level is Level.MUST, check.name


def test_the_program_is_for_python_3_9_and_imports_nothing_of_ours() -> None:
    files = [*(SCRIPTS / "conformance").rglob("*.py"), SCRIPTS / "nbd-conformance"]
    assert len(files) > 30
    for file in files:
        tree = ast.parse(file.read_text(), str(file), feature_version=(3, 9))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module or ""]
            else:
                continue
            for name in names:
                assert name.partition(".")[0] in sys.stdlib_module_names, (file, name)


# The program


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / "nbd-conformance", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_it_runs_from_wherever_it_is_copied_to(server: Server, tmp_path: Path) -> None:
    shutil.copy(SCRIPTS / "nbd-conformance", tmp_path)
    shutil.copytree(SCRIPTS / "conformance", tmp_path / "conformance")
    done = subprocess.run(
        [sys.executable, "-I", tmp_path / "nbd-conformance", "--only", "READ", server.uri],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "pass   MUST    NBD_CMD_READ/chunks-cover-the-request" in done.stdout
    assert "0 failed (0 MUST, 0 SHOULD, 0 RULE)" in done.stdout
    assert done.stderr == ""


def test_usage(tmp_path: Path) -> None:
    for arguments, said in (
        ((), "no URI"),
        (("http://host",), "nbd://"),
        (("--only", "no-such-check", "nbd://host"), "no-such-check"),
        (("--timeout", "0", "nbd://host"), "seconds"),
        (("--tls-ca", "absent.pem", "nbds://host/d"), "absent.pem"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_no_connection(tmp_path: Path) -> None:
    done = run(f"nbd+unix:///disk?socket={tmp_path}/absent")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "No such file" in done.stderr


def test_no_such_export(server: Server) -> None:
    done = run(server.uri.replace("disk", "absent"))
    assert done.returncode == 3
    assert "'absent'" in done.stderr
    assert "'disk'" in done.stderr


def test_tls_where_there_is_none(server: Server) -> None:
    done = run(server.uri.replace("nbd", "nbds", 1))
    assert done.returncode == 3
    assert "does not offer TLS" in done.stderr


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for check in CHECKS:
        assert check.name in listed
    assert program.main(["--list", "--only", "NBD_CMD_DISC/*answered"]) == 0
    assert capsys.readouterr().out.count("NBD_CMD_DISC/") == 1


def test_json(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--json", "--only", "NBD_CMD_WRITE/reads-back", server.uri]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["findings"] == {"MUST": 0, "SHOULD": 0, "RULE": 0}
    (check,) = document["checks"]
    assert check["verdict"] == "skip"
    assert "--write" in check["reason"]
    assert document["server"]["export"] == "8388608 bytes"


def test_markdown(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--markdown", "--only", "NBD_OPT_LIST/", server.uri]) == 0
    assert "| NBD_OPT_LIST | with-data | SHOULD | pass |" in capsys.readouterr().out


class WrongErrors(Session):
    def judge(self, flags: int, command: int, offset: int, length: int) -> int:
        error = super().judge(flags, command, offset, length)
        return EINVAL if error == ENOSPC else error


def test_exit_status_of_findings(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="nbd-conformance-test-") as directory:
        with serving(Path(directory), WrongErrors) as server:
            arguments = ["--write", "--only", "error-values/write-beyond", server.uri]
            assert program.main(arguments) == 0  # a SHOULD
            said = capsys.readouterr().out
            assert "FAIL   SHOULD  error-values/write-beyond" in said
            for word in ("rule:", "sent:", "expected:", "came:"):
                assert word in said
            assert program.main(["--strict", *arguments]) == 1
        capsys.readouterr()

        class NoAck(Session):
            def on_abort(self) -> None:
                self.reply(2, 1 << 31 | 1)

        with serving(Path(directory), NoAck) as server:
            assert program.main(["--quiet", "--only", "NBD_OPT_ABORT", server.uri]) == 1
            assert "pass " not in capsys.readouterr().out


def test_a_server_that_lets_nobody_in_has_not_passed(capsys: pytest.CaptureFixture[str]) -> None:
    class ClosesAtGo(Session):
        def on_info(self, option: int, data: bytes) -> bool:
            raise Ended

    with (
        tempfile.TemporaryDirectory(prefix="nbd-conformance-test-") as directory,
        serving(Path(directory), ClosesAtGo) as server,
    ):
        assert program.main(["--only", "NBD_CMD_READ", server.uri]) == 1
    printed = capsys.readouterr()
    assert "0 passed" in printed.out
    assert "most was not checked" in printed.err


def test_a_mistake_of_the_program_is_none_of_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("scripts.conformance.transmission.Transmission.check_in_step", broken)
    assert program.main(["--only", "NBD_CMD_READ/length-zero", server.uri]) == 1
    said = capsys.readouterr().out
    assert "ERROR" in said
    assert "a mistake in nbd-conformance" in said
    assert "0 failed" in said


def test_what_a_server_says_does_not_reach_the_terminal_raw(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Escapes(Session):
        def on_malformed(self, option: int) -> None:
            self.reply(option, 1 << 31 | 2, b"\x1b[2J\xc2\x9b1m\a")

    with (
        tempfile.TemporaryDirectory(prefix="nbd-conformance-test-") as directory,
        serving(Path(directory), Escapes) as server,
    ):
        for options in ([], ["--json"], ["--markdown"]):
            program.main([*options, "--only", "malformed-info-is-invalid", server.uri])
            printed = capsys.readouterr().out
            assert "[2J" in printed
            assert all(letter.isprintable() or letter == "\n" for letter in printed)


def test_a_row_of_a_failure_keeps_every_word() -> None:
    long = " ".join(f"word{number}" for number in range(100))
    row = format_row(
        Result("a/b", "A", Level.MUST, Level.MUST, "rule", Verdict.FAIL, 0.1, sent=long,
               expected="this", came="that")
    )  # fmt: skip
    assert row.split("sent:")[1].split("expected:")[0].split() == long.split()


# The table of servers


def test_the_document_has_what_the_table_needs() -> None:
    table = runpy.run_path(str(SCRIPTS / "conformance-table"), run_name="table")
    text = table["DOCUMENT"].read_text()
    assert text.count(table["MARK"]) == 1
    made = text.partition(table["MARK"])[2]
    for server in table["SERVERS"]:
        assert server.name in made
    names = set(re.findall(r"^\| [^|]+ \| ([a-z0-9-]+) \| (?:MUST|SHOULD|RULE) \|", made, re.M))
    assert names == {check.name.partition("/")[2] for check in CHECKS}
