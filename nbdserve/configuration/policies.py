"""Which volumes are backed up where, and how: the tables ``[[policy]]``, for ``nbdserve backup``.

The keys are named as the command's options are. The daemon runs no policy: cron and systemd do.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from backends.bandwidth import check_rate
from backends.errors import InvalidError
from backends.s3_settings import check_storage_class
from nbdserve.configuration.schedules import MEANING, Schedule, parse_schedule
from nbdserve.configuration.table import Table
from nbdserve.hooks.freezing import DEFAULT_SECONDS, MOST_SECONDS, Hooks
from snapshots.names import check_name, parse_size

KEEP_KEYS: Final = (
    "keep_last",
    "keep_hourly",
    "keep_daily",
    "keep_weekly",
    "keep_monthly",
    "keep_yearly",
    "keep_within",
)
KEY_KEYS: Final = ("passphrase_file", "passphrase_command", "repo_key_file")
POLICY_KEYS: Final = (
    "name",
    "volumes",
    "exclude",
    "repository",
    *KEEP_KEYS,
    "schedule",
    *KEY_KEYS,
    "limit_upload",
    "limit_download",
    "storage_class",
    "freeze_command",
    "thaw_command",
    "freeze_timeout",
)

_PATTERN: Final = re.compile(r"[A-Za-z0-9._*?\[\]!-]+", re.ASCII)
_WILD: Final = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Policy:
    """One table.

    ``keep`` has the rules by their names without ``keep_``, as texts; ``key`` the one of KEY_KEYS
    that is given; ``limits`` bytes a second of ``upload`` and ``download``.
    """

    name: str
    volumes: tuple[str, ...]
    repository: str
    exclude: tuple[str, ...] = ()
    keep: Mapping[str, str] = field(default_factory=dict)
    schedule: Schedule | None = None
    key: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    storage_class: str | None = None
    hooks: Hooks | None = None

    def select(self, volumes: Iterable[str]) -> list[str]:
        """Those of the volumes that it is for, in their order."""
        return [
            volume
            for volume in volumes
            if _matches(volume, self.volumes) and not _matches(volume, self.exclude)
        ]

    def missing(self, volumes: Sequence[str]) -> list[str]:
        """The volumes that it names, without a pattern, and that do not exist."""
        return [
            name
            for name in dict.fromkeys(self.volumes)
            if not _WILD.search(name) and name not in volumes and not _matches(name, self.exclude)
        ]


def _matches(volume: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(volume, pattern) for pattern in patterns)


def check_policies(where: str, policies: Sequence[Policy]) -> None:
    """InvalidError when two of them have one name."""
    names = [policy.name for policy in policies]
    for name in names:
        if names.count(name) > 1:
            raise InvalidError(f"{where}: two tables [[policy]] are named {name!r}")


def read_policy(table: Table) -> Policy:
    name = _checked(
        table, "name", lambda text: check_name("policy", text),
        table.required_text("name", "the policy's, as in 'nbdserve backup --policy nightly'"),
    )  # fmt: skip
    volumes = _patterns(table, "volumes")
    if not volumes:
        raise table.problem("volumes", "'volumes' is missing: names and patterns, as in ['web*']")
    repository = table.required_text("repository", "a URL such as 's3://backups/web'")
    if "@" in repository or not repository.startswith(("s3://", "file:///")):
        raise table.error("repository", "a URL such as 's3://backups/web' or 'file:///srv/backups'")
    key = {key: text for key in KEY_KEYS if (text := table.text(key, "as the option of that name"))}
    if len(key) > 1:
        raise table.problem(min(key), f"{' and '.join(map(repr, key))} exclude each other")
    schedule = table.text("schedule", MEANING)
    limits = {name: _rate(table, f"limit_{name}") for name in ("upload", "download")}
    storage_class = table.text("storage_class", "a storage class of S3")
    if storage_class is not None:
        _checked(table, "storage_class", check_storage_class, storage_class)
    return Policy(
        name=name,
        volumes=volumes,
        repository=repository,
        exclude=_patterns(table, "exclude"),
        keep=_read_rules(table),
        schedule=None
        if schedule is None
        else _checked(table, "schedule", parse_schedule, schedule),
        key=key,
        limits={name: rate for name, rate in limits.items() if rate is not None},
        storage_class=storage_class,
        hooks=_read_hooks(table),
    )


def _patterns(table: Table, key: str) -> tuple[str, ...]:
    patterns = table.texts(key, "names of volumes and patterns") or ()
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise table.error(
                key,
                "a list of names of volumes and of patterns over them: letters, digits, '.', '_',"
                " '-', '*', '?' and '[a-z]'",
            )
    return patterns


def _read_rules(table: Table) -> dict[str, str]:
    given = {key: table.text_or_number(key, "a number or a text") for key in KEEP_KEYS}
    rules = {key: str(value) for key, value in given.items() if value is not None}
    if rules:
        # What reads repositories takes long to import, and the daemon has no need of it.
        from snapshots.repository.retention import parse_duration, parse_limit  # noqa: PLC0415

        for key, text in rules.items():
            _checked(table, key, parse_duration if key == "keep_within" else parse_limit, text)
    return {key.removeprefix("keep_"): text for key, text in rules.items()}


def _rate(table: Table, key: str) -> int | None:
    text = table.text(key, "bytes a second, such as '50M'")
    if text is None:
        return None
    rate: int = _checked(table, key, lambda given: check_rate(parse_size(given)), text)
    return rate


def _read_hooks(table: Table) -> Hooks | None:
    freeze, thaw = _command(table, "freeze_command"), _command(table, "thaw_command")
    seconds = table.number("freeze_timeout", MOST_SECONDS, "seconds")
    if freeze is None and thaw is None:
        if seconds is not None:
            raise table.problem(
                "freeze_timeout", "'freeze_timeout' is of no use without freeze_command"
            )
        return None
    if freeze is None or thaw is None:
        lacking = "thaw_command" if thaw is None else "freeze_command"
        raise table.problem(lacking, f"{lacking!r} is missing: there is no freeze without a thaw")
    return Hooks(freeze, thaw, seconds or DEFAULT_SECONDS)


def _command(table: Table, key: str) -> tuple[str, ...] | None:
    value = table.command(key)
    if value is None or not isinstance(value, str):
        return value
    words: tuple[str, ...] = _checked(table, key, parse_command, value)
    return words


def parse_command(text: str) -> tuple[str, ...]:
    """The words of a command, as a shell takes them apart; InvalidError. No shell runs it."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise InvalidError(f"it cannot be understood: {error}") from None
    if not words:
        raise InvalidError("it is empty")
    if "\0" in text:
        raise InvalidError("it has a NUL in it")
    return words


def _checked(table: Table, key: str, check: Any, value: str) -> Any:
    try:
        return check(value)
    except InvalidError as error:
        raise table.problem(key, f"{key!r}: {error}") from None
