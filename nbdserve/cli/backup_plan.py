"""What a backup is to do: as the command line says, or a policy of the configuration file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from backends.errors import InvalidError, NotFoundError
from nbdserve.cli.keeping import use_storage_class
from nbdserve.cli.key_options import use_key_options
from nbdserve.cli.limits import use_limits
from nbdserve.configuration.policies import Policy, parse_command
from nbdserve.control.client import Client, path
from nbdserve.hooks.freezing import DEFAULT_SECONDS, Hooks
from snapshots.names import check_name
from snapshots.repository.retention import Rules, parse_duration, parse_limit


@dataclass(frozen=True)
class Selection:
    """The volumes to be backed up, and why others cannot be that should be."""

    volumes: list[str]
    lost: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """``given`` are the volumes that the command line names; with a ``policy`` it finds them."""

    url: str
    rules: Rules
    hooks: Hooks | None
    given: tuple[str, ...] = ()
    policy: Policy | None = None

    @property
    def policy_name(self) -> str | None:
        return None if self.policy is None else self.policy.name

    def select(self, client: Client) -> Selection:
        """What there is now. NotFoundError when that is nothing, or not all that was named."""
        if self.policy is None:
            for volume in self.given:
                client.get(path("volumes", volume))
            return Selection([*self.given])
        listed = client.get(path("volumes"))
        volumes = [found["name"] for found in listed["volumes"]]
        unreadable = {
            found["name"]: f"it cannot be read: {found['problem']}"
            for found in listed["unreadable"]
            if found["name"] is not None and found["name"] not in volumes
        }
        lost = {name: unreadable[name] for name in self.policy.select(unreadable)}
        for name in self.policy.missing([*volumes, *unreadable]):
            lost[name] = "it does not exist"
        selected = self.policy.select(volumes)
        if not selected and not lost:
            patterns = ", ".join(self.policy.volumes)
            raise NotFoundError(f"policy {self.policy.name}: no volume matches {patterns}")
        return Selection(selected, lost)


def plan_of_policy(policy: Policy) -> Plan:
    """The plan; from here on this command opens repositories as the policy says."""
    use_key_options(policy.key)
    use_limits(policy.limits)
    if policy.storage_class is not None:
        use_storage_class(policy.storage_class)
    rules: dict[str, Any] = {
        name: parse_duration(text) if name == "within" else parse_limit(text)
        for name, text in policy.keep.items()
    }
    return Plan(policy.repository, Rules(**rules), policy.hooks, policy=policy)


def plan_of_options(volumes: tuple[str, ...], url: str, rules: Rules, hooks: Hooks | None) -> Plan:
    """The plan for volumes that are named; InvalidError."""
    names = tuple(check_name("volume", volume) for volume in dict.fromkeys(volumes))
    return Plan(url, rules, hooks, names)


def given_hooks(given: Mapping[str, Any]) -> Hooks | None:
    """The hooks among the options of a command; UsageError."""
    commands: dict[str, tuple[str, ...]] = {}
    for name in ("freeze_command", "thaw_command"):
        text = given[name]
        if text is not None:
            try:
                commands[name] = parse_command(text)
            except InvalidError as error:
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option}: {error}") from None
    seconds = given["freeze_timeout"]
    if not commands and seconds is None:
        return None
    if len(commands) < 2:
        raise click.UsageError(
            "--freeze-command, --thaw-command: there is no freeze without a thaw",
            click.get_current_context(),
        )
    return Hooks(commands["freeze_command"], commands["thaw_command"], seconds or DEFAULT_SECONDS)
