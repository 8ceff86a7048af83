"""Which client may have which export, and how many at once.

An ``ExportRule`` is for all volumes whose names its pattern matches, and for their snapshots. The
first rule that is for an export holds, and no other; an export without one is anybody's whom a
listener lets in.

Rules are asked before the registry: a client that may not have ``web*`` gets the same answer
whether there is a volume of that name or not, so it cannot find out by asking. The answers where
the rule wants a certificate with one of the given names ("TLS support", "NBD_OPT_LIST"):

- Without TLS where TLS is to be had: ERR_TLS_REQD, which the specification allows for exports that
  are TLS-only or not there, and as an answer to INFO and GO only (the handshake sees to that).
- Without TLS where TLS is off, or with TLS and no certificate of such a name: ERR_POLICY.
- LIST leaves such exports out.

An export has ``max_connections`` of a rule by itself, and so has each snapshot. The one too many is
answered ERR_POLICY.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate

from nbdserve.protocol.constants import OptionReply
from nbdserve.protocol.handshake import TlsMode
from nbdserve.protocol.options import quoted
from nbdserve.server.identity import Identity
from snapshots.limits import NO_LIMITS, Limits


class PermissionRefusedError(Exception):
    """The client may not have the export: the reply to its option, and a text for it."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


@dataclass(frozen=True)
class ExportRule:
    """``pattern`` is of the shell's kind (``*``, ``?``, ``[a-z]``), over names of volumes.

    ``certificates`` are the names of which a client's certificate has to have one, in lower case;
    none: no certificate is asked for. ``limits`` and ``max_connections`` (None: without a limit)
    are of each volume, and of each snapshot, by itself.
    """

    pattern: str
    certificates: frozenset[str] = frozenset()
    max_connections: int | None = None
    limits: Limits = NO_LIMITS


class Permissions:
    """The rules of one server, and the number of connections that each open export has."""

    def __init__(self, rules: Sequence[ExportRule] = ()) -> None:
        self._open: Counter[str] = Counter()
        self.change(rules)

    def change(self, rules: Sequence[ExportRule]) -> None:
        """The rules from now on; connections that are open stay, and are counted."""
        self._rules = [(re.compile(translate(rule.pattern)), rule) for rule in rules]

    def select(self, names: Iterable[str], client: Identity) -> list[str]:
        """Those of the names that the client may have."""
        return [name for name in names if _admits(self._rule(name), client)]

    def check(self, name: str, client: Identity, tls: TlsMode) -> None:
        """Raise PermissionRefusedError unless the client may have the export, if there is one."""
        if _admits(self._rule(name), client):
            return
        if not client.secure and tls is not TlsMode.OFF:
            raise PermissionRefusedError(
                OptionReply.ERR_TLS_REQD,
                f"export {quoted(name)} wants TLS: NBD_OPT_STARTTLS comes first",
            )
        raise PermissionRefusedError(
            OptionReply.ERR_POLICY,
            f"export {quoted(name)} is for clients with certain certificates only",
        )

    def limits(self, name: str) -> Limits:
        """The limits of an export."""
        rule = self._rule(name)
        return NO_LIMITS if rule is None else rule.limits

    def enter(self, name: str) -> None:
        """Count a connection that is about to open the export; raises PermissionRefusedError."""
        rule = self._rule(name)
        most = None if rule is None else rule.max_connections
        if most is not None and self._open[name] >= most:
            raise PermissionRefusedError(
                OptionReply.ERR_POLICY,
                f"export {quoted(name)} has all the connections that it may have, {most}",
            )
        self._open[name] += 1

    def leave(self, name: str) -> None:
        """The connection that entered is over, or could not open the export."""
        if self._open[name] > 1:
            self._open[name] -= 1
        else:
            del self._open[name]

    def _rule(self, name: str) -> ExportRule | None:
        volume, _, _ = name.partition("@")
        return next((rule for pattern, rule in self._rules if pattern.match(volume)), None)


def _admits(rule: ExportRule | None, client: Identity) -> bool:
    if rule is None or not rule.certificates:
        return True
    return client.secure and not rule.certificates.isdisjoint(client.certificate_names)
