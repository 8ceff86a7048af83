"""What a server offers, found out once before the checks: they are skipped where it is not.

Nothing here is a verdict. A server that answers a question with nonsense does not offer what was
asked for; the check of that very thing says what was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .constants import DEFAULT_MAX_PAYLOAD, Flag


class TlsMode(Enum):
    """The three modes of section "Server-side requirements"."""

    NOTLS = "NOTLS"
    SELECTIVE = "SELECTIVETLS"
    FORCED = "FORCEDTLS"


@dataclass
class Facts:
    """Sizes in bytes; ``flags`` with the most that could be negotiated, ``plain_flags`` without."""

    newstyle: bool = False
    handshake_flags: int = 0
    tls: TlsMode = TlsMode.NOTLS
    info: bool = False
    size: int = 0
    flags: Flag = Flag.HAS_FLAGS
    plain_flags: Flag = Flag.HAS_FLAGS
    minimum_block: int = 1
    preferred_block: int = 4096
    max_payload: int = DEFAULT_MAX_PAYLOAD
    block_size_said: bool = False
    structured: bool = False
    extended: bool = False
    contexts: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    serves_any_name: bool = False
    refusal: str = ""
    """Why the export cannot be opened; then nothing of the transmission phase can be checked."""
    broken: bool = False
    """That is because the server broke a rule then and there: what was skipped was not tried."""
    notes: list[str] = field(default_factory=list)

    def describe(self) -> list[tuple[str, str]]:
        """Facts for people, as (what, how)."""
        style = "newstyle" if self.newstyle else "none that is known"
        if self.handshake_flags & 1:
            style = "fixed newstyle"
        replies = ["simple"]
        replies += ["structured"] if self.structured else []
        replies += ["extended"] if self.extended else []
        blocks = f"{self.minimum_block}, {self.preferred_block}, {self.max_payload}"
        names = [str(flag.name) for flag in Flag if self.flags & flag]
        return [
            ("handshake", style),
            ("TLS", self.tls.value),
            ("export", self.refusal or f"{self.size} bytes"),
            ("transmission flags", " ".join(names) or "none"),
            ("replies", ", ".join(replies)),
            ("block sizes", blocks if self.block_size_said else f"{blocks} (default)"),
            ("metadata contexts", ", ".join(self.contexts) or "none"),
        ]
