"""The tables [[policy]] of the configuration file, and schedules."""

import shutil
import subprocess
from pathlib import Path

import pytest

from backends.errors import InvalidError
from nbdserve.configuration.file import read_file
from nbdserve.configuration.policies import POLICY_KEYS, Policy
from nbdserve.configuration.schedules import parse_schedule
from nbdserve.hooks.freezing import Hooks

LEAST = 'name = "p"\nvolumes = ["a"]\nrepository = "s3://b/c"\n'
WHOLE = """
name = "nightly"
volumes = ["web*", "guest"]
exclude = ["web-scratch*"]
repository = "s3://backups/host-1"
keep_last = 2
keep_monthly = "unlimited"
keep_within = "1y6m"
schedule = "daily 02:15"
passphrase_command = "pass show nbdserve"
limit_upload = "20M"
storage_class = "STANDARD_IA"
freeze_command = ["ssh", "guest", "fsfreeze -f /"]
thaw_command = "ssh guest 'fsfreeze -u /'"
freeze_timeout = 12
"""


def read(tmp_path: Path, *tables: str) -> tuple[Policy, ...]:
    file = tmp_path / "nbdserve.toml"
    file.write_text("".join(f"[[policy]]\n{table}" for table in tables))
    return read_file(file).policies


def test_a_whole_policy(tmp_path: Path) -> None:
    assert read(tmp_path, WHOLE, LEAST) == (
        Policy(
            name="nightly",
            volumes=("web*", "guest"),
            repository="s3://backups/host-1",
            exclude=("web-scratch*",),
            keep={"last": "2", "monthly": "unlimited", "within": "1y6m"},
            schedule=parse_schedule("daily 02:15"),
            key={"passphrase_command": "pass show nbdserve"},
            limits={"upload": 20 << 20},
            storage_class="STANDARD_IA",
            hooks=Hooks(("ssh", "guest", "fsfreeze -f /"), ("ssh", "guest", "fsfreeze -u /"), 12),
        ),
        Policy("p", ("a",), "s3://b/c"),
    )


def test_which_volumes(tmp_path: Path) -> None:
    (policy,) = read(tmp_path, WHOLE)
    volumes = ["guest", "guest2", "Web", "web", "web-scratch-1", "web1"]
    assert policy.select(volumes) == ["guest", "web", "web1"]
    assert policy.missing(volumes) == []
    assert policy.missing(["web"]) == ["guest"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "p"', "", "[[policy]] number 1: 'name' is missing"),
        ('name = "p"', 'name = "a b"', "policy name 'a b' is not allowed"),
        ('volumes = ["a"]', "", "[[policy]] 'p': 'volumes' is missing"),
        ('volumes = ["a"]', "volumes = []", "'volumes' must be a list"),
        ('volumes = ["a"]', 'volumes = ["a b"]', "'volumes' must be a list of names"),
        ("s3://b/c", "http://b", "'repository' must be a URL"),
        ("s3://b/c", "s3://me:secret@b", "'repository' must be a URL"),
        ("", "keep_last = 0", "'keep_last': '0' is no number of snapshots"),
        ("", "keep_last = true", "'keep_last' must be a number or a text"),
        ("", 'keep_within = "soon"', "'keep_within': 'soon' is no duration"),
        ("", 'schedule = "at times"', "'schedule': 'at times' is no schedule: write every 15m"),
        ("", 'passphrase_file = "a"\nrepo_key_file = "b"', "exclude each other"),
        ("", 'limit_upload = "fast"', "'limit_upload': size 'fast'"),
        ("", 'storage_class = "GLACIER"', "'storage_class': "),
        ("", 'freeze_command = "true"', "'thaw_command' is missing"),
        ("", 'thaw_command = "true"', "'freeze_command' is missing"),
        ("", "freeze_command = []\nthaw_command = ['true']", "'freeze_command' must be a list"),
        ("", "freeze_command = \"'\"\nthaw_command = 'true'", "cannot be understood"),
        ("", "freeze_command = \" \"\nthaw_command = 'true'", "'freeze_command': it is empty"),
        ("", "freeze_timeout = 5", "'freeze_timeout' is of no use"),
        ("", "freeze_timeout = 0", "'freeze_timeout' must be a number of seconds from 1 to"),
        ("", "when = 'now'", "unknown key 'when'; the keys are " + ", ".join(POLICY_KEYS)),
    ],
)
def test_errors_name_the_place(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = LEAST.replace(old, new) if old else f"{LEAST}{new}\n"
    with pytest.raises(InvalidError) as caught:
        read(tmp_path, text)
    line = str(caught.value)
    assert words in line
    assert str(tmp_path / "nbdserve.toml") in line
    assert "secret" not in line
    assert len(line.splitlines()) == 1


def test_two_of_a_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"two tables .* are named 'p'"):
        read(tmp_path, LEAST, LEAST)


@pytest.mark.parametrize(
    ("text", "cron", "calendar", "seconds"),
    [
        ("every 1m", "* * * * *", "*-*-* *:00/01:00", 60),
        ("every 15m", "*/15 * * * *", "*-*-* *:00/15:00", 900),
        ("Every  6H", "0 */6 * * *", "*-*-* 00/06:00:00", 21600),
        ("hourly", "0 * * * *", "*-*-* *:00:00", 3600),
        ("hourly :15", "15 * * * *", "*-*-* *:15:00", 3600),
        ("daily", "0 0 * * *", "*-*-* 00:00:00", 86400),
        ("daily 02:15", "15 2 * * *", "*-*-* 02:15:00", 86400),
        ("weekly", "0 0 * * 1", "Mon *-*-* 00:00:00", 7 * 86400),
        ("weekly sun 23:59", "59 23 * * 0", "Sun *-*-* 23:59:00", 7 * 86400),
        ("monthly", "0 0 1 * *", "*-*-01 00:00:00", 31 * 86400),
        ("monthly 28 02:15", "15 2 28 * *", "*-*-28 02:15:00", 31 * 86400),
    ],
)
def test_schedules(text: str, cron: str, calendar: str, seconds: int) -> None:
    schedule = parse_schedule(text)
    assert (schedule.text, schedule.cron) == (text, cron)
    assert (schedule.calendar, schedule.seconds) == (calendar, seconds)
    if shutil.which("systemd-analyze"):
        command = ["systemd-analyze", "calendar", calendar]
        subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(
    "text",
    [
        "", "every 7m", "every 60m", "every 5h", "every 0m", "every 15", "hourly 15", "hourly :60",
        "daily 24:00", "daily 2:15", "weekly 02:15", "weekly day 02:15", "monthly 29 02:15",
        "monthly 0 02:15", "yearly", "* * * * *", "daily 02:15\n* * * * *", "daily 0\u0662:15",
    ],
)  # fmt: skip
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(InvalidError, match="is no schedule"):
        parse_schedule(text)
