"""Keys of an encrypted repository: its master key, wrapped by a secret, in an object each.

All that is sealed hangs on the master key, 256 random bits that never change. An object
``keys/<id>`` holds it once more, for one passphrase or key file; ``docs/format-repository.md`` has
the layout. The wrapping key comes from scrypt, with the parameters in the object, or from the key
file; it is used for nothing else, as ``salt`` and id are new for each object. A value that
comes from the same derivation, ``commitment``, tells a wrong secret from a damaged object, and
makes sure that the object opens with one secret only. Behind the record is a MAC by the master key,
so that somebody who has it can tell whether the object was made by somebody who had it.

scrypt's parameters are bounded before it is run: whoever can write to the bucket must not be
able to take all memory and time of those who open the repository.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from backends.errors import CorruptError, InvalidError, UnavailableError
from snapshots.repository import envelope
from snapshots.repository.envelope import Kind
from snapshots.repository.layout import KEYS
from snapshots.repository.sealed_objects import MASTER_KEY_SIZE, NONCE, TAG, Sealer, derive_key
from snapshots.repository.secret import KEY_FILE, PASSPHRASE, Secret

SCRYPT_N = 1 << 17  # with r = 8 and p = 1: 128 MiB, and a second of a slow processor
SCRYPT_R = 8
SCRYPT_P = 1

_MAX_COST = 1 << 22  # of N·r·p: 512 MiB, and four times the work of the above
_MAX_FACTOR = 64  # of r and p
_SALT_SIZE = 32
_MAC_SIZE = 32
_COMMITMENT_SIZE = 32
_NONCE = bytes(NONCE)  # a wrapping key seals one message only


@dataclass(frozen=True)
class KeySlot:
    """One object under ``keys/``. ``kind`` is the secret's; a key file has n, r and p of 0."""

    id: str
    repository_id: str
    kind: str
    created: float
    salt: bytes
    n: int
    r: int
    p: int
    commitment: bytes = field(repr=False)
    wrapped: bytes = field(repr=False)

    @property
    def key(self) -> str:
        """The object's key."""
        return KEYS + self.id

    def encode(self, sealer: Sealer) -> bytes:
        """The object, with the MAC of the master key's holder."""
        record = envelope.seal(
            Kind.KEY,
            {
                "repository": bytes.fromhex(self.repository_id),
                "kind": self.kind,
                "created": self.created,
                "salt": self.salt,
                "n": self.n,
                "r": self.r,
                "p": self.p,
                "commitment": self.commitment,
                "wrapped": self.wrapped,
            },
        )
        return record + _mac(sealer, self.key, record)

    @classmethod
    def decode(cls, content: bytes, slot_id: str, where: str) -> KeySlot:
        """Decode and check an object, but for its MAC; raises CorruptError or InvalidError."""
        fields = envelope.unseal(Kind.KEY, content[:-_MAC_SIZE], where)
        kind = fields.text("kind")
        if kind not in (PASSPHRASE, KEY_FILE):
            raise InvalidError(f"{where}: its kind {kind[:40]!r} needs a newer nbdserve")
        slot = cls(
            slot_id,
            fields.push("repository"),
            kind,
            fields.number("created"),
            fields.binary("salt"),
            fields.integer("n", 0, _MAX_COST),
            fields.integer("r", 0, _MAX_FACTOR),
            fields.integer("p", 0, _MAX_FACTOR),
            fields.binary("commitment"),
            fields.binary("wrapped"),
        )
        sizes = (len(slot.salt), len(slot.commitment), len(slot.wrapped))
        if sizes != (_SALT_SIZE, _COMMITMENT_SIZE, MASTER_KEY_SIZE + TAG):
            raise CorruptError(f"{where}: its fields have wrong lengths")
        if kind == PASSPHRASE and not (
            slot.n > 1
            and slot.n & (slot.n - 1) == 0
            and slot.r > 0
            and slot.p > 0
            and slot.n * slot.r * slot.p <= _MAX_COST
        ):
            raise CorruptError(f"{where}: its scrypt parameters are out of bounds")
        return slot

    def open(self, secret: Secret, where: str) -> bytes | None:
        """The master key; None when ``secret`` is another one. CorruptError when it is damaged."""
        if secret.kind != self.kind:
            return None
        commitment, wrapping_key = self.derive(secret)
        if not hmac.compare_digest(commitment, self.commitment):
            return None
        try:
            return AESGCM(wrapping_key).decrypt(_NONCE, self.wrapped, None)
        except InvalidTag:
            raise CorruptError(f"{where}: the wrapped key is damaged") from None

    def derive(self, secret: Secret) -> tuple[bytes, bytes]:
        """The commitment and the wrapping key that ``secret`` gives. scrypt takes a while."""
        stretched = secret.value
        if self.kind == PASSPHRASE:
            memory = 128 * self.r * (self.n + self.p) + (1 << 20)
            try:
                stretched = hashlib.scrypt(
                    secret.value,
                    salt=self.salt,
                    n=self.n,
                    r=self.r,
                    p=self.p,
                    maxmem=memory,
                    dklen=32,
                )
            except (MemoryError, ValueError):
                raise UnavailableError(
                    f"key {self.id} cannot be tried: scrypt needs {memory >> 20} MiB of memory"
                ) from None
        purpose = b"nbdserve key " + bytes.fromhex(self.repository_id) + self.key.encode()
        derived = derive_key(stretched, self.salt, purpose, _COMMITMENT_SIZE + 32)
        return derived[:_COMMITMENT_SIZE], derived[_COMMITMENT_SIZE:]


def make_slot(master_key: bytes, repository_id: str, secret: Secret, created: float) -> KeySlot:
    """Wrap the master key with another secret, or with the same one once more."""
    cost = (SCRYPT_N, SCRYPT_R, SCRYPT_P) if secret.kind == PASSPHRASE else (0, 0, 0)
    slot = KeySlot(
        secrets.token_hex(8),
        repository_id,
        secret.kind,
        created,
        os.urandom(_SALT_SIZE),
        *cost,
        b"",
        b"",
    )
    commitment, wrapping_key = slot.derive(secret)
    wrapped = AESGCM(wrapping_key).encrypt(_NONCE, master_key, None)
    return KeySlot(**{**vars(slot), "commitment": commitment, "wrapped": wrapped})


def is_authentic(content: bytes, slot_id: str, sealer: Sealer) -> bool:
    """Tell whether the object was made by somebody who had the master key."""
    record, mac = content[:-_MAC_SIZE], content[-_MAC_SIZE:]
    return hmac.compare_digest(mac, _mac(sealer, KEYS + slot_id, record))


def _mac(sealer: Sealer, key: str, record: bytes) -> bytes:
    mac_key = sealer.derive(b"nbdserve keys", 32)
    return hmac.digest(mac_key, key.encode() + b"\0" + record, "sha256")
