"""backup --policy, its hooks, two runs at once, and what monitoring is told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.errors import UnavailableError
from nbdserve.control import history
from nbdserve.hooks import commands
from snapshots.repository import Repository
from tests.nbdserve.volume_content import read, write

from .conftest import CommandLine
from .holding import held

MIB = 1 << 20
PROGRAM = [sys.executable, "-m", "nbdserve"]
# The command line, which at this point says so and goes on when its input ends.
HELD = """
import sys
import nbdserve.cli.backup_run as backup_run
real = backup_run.{name}
def held(*arguments, **more):
    print("held", flush=True)
    sys.stdin.read()
    return real(*arguments, **more)
backup_run.{name} = held
from nbdserve.cli import main
main()
"""


class Policies:
    """A configuration file whose policies are written by the test, and their repository."""

    def __init__(self, cli: CommandLine, directory: Path) -> None:
        self.cli = cli
        self.file = directory / "nbdserve.toml"
        self.notes = directory / "notes"
        self.url = f"file://{directory}/repository"
        cli.done("repo", "init", self.url)

    def write(self, volumes: list[str], *more: str, name: str = "p", url: str = "") -> None:
        lines = [
            "[[policy]]", f'name = "{name}"', f"volumes = {json.dumps(volumes)}",
            f'repository = "{url or self.url}"', *more, "",
        ]  # fmt: skip
        with self.file.open("a") as file:
            file.write("\n".join(lines))

    def hooks(self, freeze: str = "true", thaw: str = "true", seconds: int = 60) -> list[str]:
        """Keys of hooks that note that they were run, and what for."""
        note = f"echo $NBDSERVE_HOOK $NBDSERVE_VOLUMES $NBDSERVE_POLICY >>{self.notes}"
        return [
            f"{hook}_command = {json.dumps(['sh', '-c', f'{note}; {script}'])}"
            for hook, script in (("freeze", freeze), ("thaw", thaw))
        ] + [f"freeze_timeout = {seconds}"]

    def noted(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def run(self, status: int = 0, *more: str) -> Any:
        """The report of the policy's run."""
        outcome = self.cli("backup", "--policy", "p", "--json", *more)
        assert outcome.status == status, outcome
        report = json.loads(outcome.out)
        assert set(report) == {
            "policy", "repository", "status", "error", "started", "finished", "snapshot", "hooks",
            "backups",
        }  # fmt: skip
        errors = [line for line in outcome.err.splitlines() if "warning" not in line]
        assert errors == ([] if status == 0 else [f"nbdserve: {report['error']}"])
        return report

    def repository(self) -> list[tuple[str, str]]:
        listed = self.cli.json("repo", "list", self.url)["snapshots"]
        return [(entry["volume"], entry["snapshot"]) for entry in listed]


@pytest.fixture
def policies(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policies:
    made = Policies(cli, tmp_path)
    made.file.touch()
    monkeypatch.setenv("NBDSERVE_CONFIG", str(made.file))
    for name in ("a", "b", "other"):
        cli.done("volume", "create", name, "--size", "4M")
        write(cli.data, name, 0, os.urandom(MIB))
    return made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def snapshots(cli: CommandLine) -> list[Any]:
    found: list[Any] = cli.json("snapshot", "list")["snapshots"]
    return found


def test_a_policy_says_what_the_options_say(policies: Policies, cli: CommandLine) -> None:
    policies.write(["?", "o*"], 'exclude = ["oth*"]', "keep_last = 2", 'limit_upload = "1T"')
    contents = {name: read(cli.data, name) for name in ("a", "b")}
    made = [policies.run()["snapshot"] for _ in range(3)]
    report = policies.run()
    assert (report["policy"], report["repository"]) == ("p", policies.url)
    assert (report["status"], report["error"], report["hooks"]) == ("done", None, None)
    assert report["started"] < report["finished"]
    assert [entry["volume"] for entry in report["backups"]] == ["a", "b"]
    assert all(entry["prune"]["deleted"] == 1 for entry in report["backups"])
    kept = [made[-1], report["snapshot"]]
    assert policies.repository() == [(volume, name) for volume in ("a", "b") for name in kept]
    for volume, content in contents.items():
        cli.done("repo", "restore", policies.url, f"{volume}@{kept[0]}", f"{volume}-restored")
        assert read(cli.data, f"{volume}-restored") == content


def test_the_key_of_a_policy(policies: Policies, cli: CommandLine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the test\n")
    url = f"file://{tmp_path}/encrypted"
    cli.done("repo", "init", url, "--passphrase-file", secret)
    policies.write(["a"], f'passphrase_file = "{secret}"', url=url)
    assert policies.run()["status"] == "done"


def test_volumes_that_are_not_there(policies: Policies, cli: CommandLine) -> None:
    policies.write(["a", "gone", "x*"])
    report = policies.run(1)
    assert report["error"] == "volume gone is not backed up: it does not exist"
    assert report["backups"][0] == {
        "volume": "gone",
        "snapshot": None,
        "error": "it does not exist",
    }
    assert [entry["volume"] for entry in report["backups"]] == ["gone", "a"]
    assert len(policies.repository()) == 1
    policies.write(["x*", "y*"], name="none")
    outcome = cli("backup", "--policy", "none")
    assert outcome.status == 1
    assert outcome.line == "policy none: no volume matches x*, y*"


def test_a_volume_that_cannot_be_read(policies: Policies, cli: CommandLine) -> None:
    (identifier,) = [v["id"] for v in cli.json("volume", "list")["volumes"] if v["name"] == "b"]
    record = cli.data / "volumes" / identifier
    content = bytearray(record.read_bytes())
    content[-1] ^= 1
    record.write_bytes(content)
    policies.write(["?"])
    report = policies.run(1)
    assert "volume b is not backed up: it cannot be read" in report["error"]
    assert [entry["volume"] for entry in report["backups"]] == ["b", "a"]
    assert len(policies.repository()) == 1


def test_a_volume_that_fails_keeps_no_other(
    policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Repository.push

    def fail_for_a(self: Repository, source: Any, *more: Any, **others: Any) -> Any:
        if source.volume == "a":
            raise UnavailableError("the store went away")
        return push(self, source, *more, **others)

    monkeypatch.setattr(Repository, "push", fail_for_a)
    policies.write(["a", "b"])
    report = policies.run(1)
    assert report["status"] == "failed"
    assert [volume for volume, _ in policies.repository()] == ["b"]


def test_a_repository_that_cannot_be_opened(policies: Policies, cli: CommandLine) -> None:
    policies.write(["a"], *policies.hooks(), url="file:///nowhere/at/all")
    report = policies.run(1)
    assert (report["status"], report["backups"], report["hooks"]) == ("failed", [], None)
    assert (snapshots(cli), policies.noted()) == ([], [])
    (record,) = cli.json("status")["history"]
    assert (record["volume"], record["last_success"]) == ("a", None)
    assert record["failure"] == report["error"]


def test_hooks_run_around_the_snapshot(policies: Policies) -> None:
    policies.write(["a", "b"], *policies.hooks())
    report = policies.run()
    assert policies.noted() == ["freeze a b p", "thaw a b p"]
    assert report["hooks"]["freeze"]["status"] == report["hooks"]["thaw"]["status"] == 0


def test_hooks_of_a_backup_without_a_policy(policies: Policies, cli: CommandLine) -> None:
    script = f"sh -c 'echo $NBDSERVE_HOOK $NBDSERVE_VOLUMES >>{policies.notes}'"
    hooks = ["--freeze-command", script, "--thaw-command", script, "--freeze-timeout", "60"]
    cli.done("backup", "b", "a", "--repo", policies.url, *hooks)
    assert policies.noted() == ["freeze b a", "thaw b a"]


def test_what_does_not_freeze_is_not_backed_up(policies: Policies, cli: CommandLine) -> None:
    policies.write(["a"], *policies.hooks(freeze="exit 9"))
    report = policies.run(1)
    assert "status 9" in report["error"]
    assert report["hooks"]["freeze"]["status"] == 9
    assert report["hooks"]["thaw"]["status"] == 0
    assert policies.noted() == ["freeze a p", "thaw a p"]
    assert (snapshots(cli), policies.repository()) == ([], [])
    assert "status 9" in cli.json("status")["history"][0]["failure"]


def test_a_snapshot_that_fails_thaws(policies: Policies, cli: CommandLine) -> None:
    """Its name is taken by the freeze command."""
    take = f"{' '.join(PROGRAM)} snapshot create a@$NBDSERVE_SNAPSHOT"
    policies.write(["a"], *policies.hooks(freeze=take))
    report = policies.run(1)
    assert "exists already" in report["error"]
    assert policies.noted() == ["freeze a p", "thaw a p"]
    assert policies.repository() == []


def test_a_thaw_that_fails_is_loud_and_the_backup_goes_on(
    policies: Policies,
) -> None:
    policies.write(["a"], *policies.hooks(thaw="exit 7"))
    begun = time.monotonic()
    report = policies.run(1)
    assert time.monotonic() - begun >= sum(commands.PAUSES)
    assert report["error"].startswith("THAW FAILED, 5 times")
    assert "status 7" in report["error"]
    assert report["hooks"]["thaw"]["attempts"] == 5
    assert len(policies.repository()) == 1


def test_a_snapshot_that_comes_too_late_does_not_count(
    policies: Policies, cli: CommandLine
) -> None:
    policies.write(["a"], *policies.hooks(seconds=1))
    code = HELD.format(name="Freezing.__exit__").replace("sys.stdin.read()", "time.sleep(2)")
    done = subprocess.run(
        [sys.executable, "-c", f"import time{code}", "backup", "--policy", "p"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "freeze_timeout" in done.stderr
    assert policies.noted() == ["freeze a p", "thaw a p"]
    assert (snapshots(cli), policies.repository()) == ([], [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_backup_that_is_ended_while_frozen(
    policies: Policies, cli: CommandLine, number: signal.Signals
) -> None:
    policies.write(["a"], *policies.hooks())
    with held(HELD.format(name="Freezing.__exit__"), "backup", "--policy", "p") as process:
        assert policies.noted() == ["freeze a p"]
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait()
        else:
            process.communicate(timeout=60)
            assert process.returncode == 143
        wait_for(lambda: policies.noted() == ["freeze a p", "thaw a p"])
    assert policies.repository() == []
    if number == signal.SIGTERM:
        assert cli.json("status")["history"][0]["failure"] == "it was interrupted"


@pytest.mark.parametrize("serves", [True, False], ids=["daemon", "no daemon"])
def test_of_two_runs_one_says_who_runs_or_waits(
    policies: Policies, cli: CommandLine, serves: bool
) -> None:
    policies.write(["a"])
    policies.write(["a", "b"], name="q")
    policies.write(["b"], name="r")
    if serves:
        daemon = subprocess.Popen(
            [*PROGRAM, "serve", "--workers", "1", "--listen", f"unix:{cli.data}/nbd.sock"],
            stdout=subprocess.PIPE,
        )
        assert daemon.stdout is not None
        assert b"nbd.sock" in daemon.stdout.readline()
    try:
        with held(HELD.format(name="push"), "backup", "--policy", "p") as first:
            report = policies.run(os.EX_TEMPFAIL)
            assert (report["status"], report["backups"]) == ("skipped", [])
            assert f"policy p is being run by process {first.pid} since 20" in report["error"]
            other = cli("backup", "--policy", "q")
            assert other.status == os.EX_TEMPFAIL
            assert other.err.startswith(
                "nbdserve: nothing is backed up: volume a is being backed up"
            )
            assert "for policy p" in other.err
            assert cli("backup", "a", "--repo", policies.url, "--wait", "1s").status == 75
            cli.done("backup", "--policy", "r")
            waiting = subprocess.Popen(
                [*PROGRAM, "backup", "--policy", "p", "--wait", "60s", "--json"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert waiting.stderr is not None
            assert "waiting, for policy p is being run" in waiting.stderr.readline()
            first.communicate("", timeout=60)
            assert first.returncode == 0
            out, _ = waiting.communicate(timeout=60)
        assert (waiting.returncode, json.loads(out)["status"]) == (0, "done")
        assert [volume for volume, _ in policies.repository()] == ["a", "a", "b"]
        failures = [record["failure"] for record in cli.json("status")["history"]]
        assert failures == [None, None], "what was skipped has not failed"
    finally:
        if serves:
            daemon.terminate()
            daemon.communicate(timeout=60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "p", "a"], "VOL"),
        (["--policy", "p", "--repo", "file:///r"], "--repo"),
        (["--policy", "p", "--keep-last", "4"], "--keep-last"),
        (["--policy", "p", "--limit-upload", "4M"], "--limit-upload"),
        (["--policy", "p", "--storage-class", "STANDARD"], "--storage-class"),
        (["--policy", "p", "--passphrase-file", "x"], "--passphrase-file"),
        (["--policy", "p", "--freeze-command", "x"], "--freeze-command"),
        (["--policy", "p", "--wait", "soon"], "soon"),
        ([], "--policy"),
        (["a"], "--repo"),
        (["a", "--repo", "file:///r", "--config", "x"], "--config"),
        (["a", "--repo", "file:///r", "--freeze-command", "x"], "--thaw-command"),
        (["a", "--repo", "file:///r", "--freeze-timeout", "0"], "--freeze-timeout"),
    ],
)
def test_wrong_usage(policies: Policies, arguments: list[str], words: str) -> None:
    policies.write(["a"])
    outcome = policies.cli("backup", *arguments)
    assert outcome.status == 2
    assert words in outcome.line


def test_a_policy_that_is_not_there(
    policies: Policies, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies.write(["a"])
    assert cli("backup", "--policy", "q").line == f"no policy 'q' in {policies.file}: p"
    assert "does not exist" in cli("backup", "--policy", "q", "--config", "/nowhere").line
    monkeypatch.delenv("NBDSERVE_CONFIG")
    assert "no configuration file" in cli("backup", "--policy", "p").line


def test_monitoring(policies: Policies, cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    policies.write(["?"], 'schedule = "daily 02:15"')
    policies.write(["a", "gone"], name="q")
    assert cli("policy", "check", "p").status == 0, "the volumes are new"
    broken = cli("policy", "check")
    assert broken.status == 1
    assert broken.err == "nbdserve: policy q: volume gone: it does not exist\n"
    policies.run()
    cli.done("policy", "check", "p")
    listed = cli.json("policy", "list")["policies"]
    assert [entry["policy"] for entry in listed] == ["p", "q"]
    assert [volume["volume"] for volume in listed[0]["volumes"]] == ["a", "b"]
    assert all(volume["last_success"].endswith("Z") for volume in listed[0]["volumes"])
    assert "daily 02:15" in cli.done("policy", "list")

    # A day and a half later; then after a run that failed.
    file = cli.data / history.FILE
    document = json.loads(file.read_text())
    for record in document["records"]:
        record["last_success"] -= 1.5 * 86400
    file.write_text(json.dumps(document))
    late = cli("policy", "check", "p")
    assert late.status == 1
    assert "policy p: volume a: a backup is overdue: the last is of 20" in late.err
    assert "and 1 more" in late.err

    def fail(*arguments: Any, **more: Any) -> None:
        raise UnavailableError("the store went away")

    with monkeypatch.context() as patched:
        patched.setattr(Repository, "push", fail)
        policies.run(1)
    assert "the last backup failed: the store went away" in cli("policy", "check", "p").err
    policies.run()
    cli.done("policy", "check", "p")


def test_crontab_and_timer(policies: Policies, cli: CommandLine) -> None:
    policies.write(["a"], 'schedule = "daily 02:15"')
    policies.write(["b"], name="never")
    lines = cli.done("policy", "crontab", "--user", "root", "--data", "/some/where").splitlines()
    assert lines[1:] == [
        f"NBDSERVE_CONFIG={policies.file}",
        "NBDSERVE_DATA=/some/where",
        "15 2 * * * root nbdserve backup --policy p",
    ]
    assert cli.done("policy", "timer", "p").splitlines()[-1] == "OnCalendar=*-*-* 02:15:00"
    assert cli("policy", "timer", "never").line == "policy never has no schedule"
