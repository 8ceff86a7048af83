"""How objects are kept in S3: storage class and server-side encryption, from the environment.

==============================  ==================================================================
``NBDSERVE_S3_STORAGE_CLASS``   of bulk data, such as ``STANDARD_IA``; what is small stays in the
                                bucket's own class
``NBDSERVE_S3_SSE``             ``AES256`` (SSE-S3) or ``aws:kms`` (SSE-KMS), of all that is put
``NBDSERVE_S3_SSE_KMS_KEY_ID``  the key of ``aws:kms``; without it the account's own
``NBDSERVE_S3_SSE_C_KEY_FILE``  a file with 64 hexadecimal digits, the key of SSE-C: all that is
                                put is encrypted with it, and nothing can be read without it
==============================  ==================================================================

They belong to a bucket, as AWS_ENDPOINT_URL does, and not to a command, so whoever opens the store
has them: the cron job that writes, and the daemon that reads for a volume restored lazily. A key
itself is in neither environment nor command line, for the reasons in nbdserve/repository_keys.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.errors import InvalidError, StorageError

STORAGE_CLASS = "NBDSERVE_S3_STORAGE_CLASS"
SSE = "NBDSERVE_S3_SSE"
KMS_KEY_ID = "NBDSERVE_S3_SSE_KMS_KEY_ID"
CUSTOMER_KEY_FILE = "NBDSERVE_S3_SSE_C_KEY_FILE"

_CLASS = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_ARCHIVES = {"GLACIER", "DEEP_ARCHIVE"}
_KEY_ID = re.compile(r"[!-~]{1,2048}\Z")
_KEY = re.compile(rb"[0-9A-Fa-f]{64}\r?\n?\Z")


@dataclass(frozen=True)
class S3Settings:
    """See the module's text. ``bulk``: keys that begin with it take the storage class."""

    storage_class: str | None = None
    encryption: str | None = None
    kms_key_id: str | None = None
    customer_key: bytes | None = field(default=None, repr=False)
    bulk: str = ""

    def for_put(self, key: str) -> dict[str, Any]:
        """Parameters of a PUT of ``key``."""
        given = self.for_get()
        if self.storage_class is not None and key.startswith(self.bulk):
            given["StorageClass"] = self.storage_class
        if self.encryption is not None:
            given["ServerSideEncryption"] = self.encryption
        if self.kms_key_id is not None:
            given["SSEKMSKeyId"] = self.kms_key_id
        return given

    def for_get(self) -> dict[str, Any]:
        """Parameters of a GET or HEAD."""
        if self.customer_key is None:
            return {}
        return {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": self.customer_key}

    def check_put(self, answer: Mapping[str, Any], name: str) -> None:
        """StorageError when the store ``name`` took an object, but did not encrypt it as told."""
        if self.encryption is not None and answer.get("ServerSideEncryption") != self.encryption:
            raise StorageError(
                f"{name} ignores server-side encryption with {self.encryption}, and stored an"
                f" object without: unset {SSE}, or choose what the server supports"
            )
        if self.customer_key is not None and not answer.get("SSECustomerKeyMD5"):
            raise StorageError(
                f"{name} ignores server-side encryption with a customer's key, and stored an"
                f" object without: unset {CUSTOMER_KEY_FILE}"
            )

    @property
    def named(self) -> str:
        """The variables that are in force, for messages; empty when none is."""
        found = {
            STORAGE_CLASS: self.storage_class,
            SSE: self.encryption,
            KMS_KEY_ID: self.kms_key_id,
            CUSTOMER_KEY_FILE: self.customer_key,
        }
        return ", ".join(name for name, value in found.items() if value is not None)


def settings_from_environment(
    storage_class: str | None = None,
    bulk: str = "",
    environment: Mapping[str, str] = os.environ,
) -> S3Settings:
    """What the environment says; ``storage_class`` wins over it. InvalidError.

    An empty variable is one that is not set.
    """
    storage_class = storage_class or environment.get(STORAGE_CLASS) or None
    encryption = environment.get(SSE) or None
    kms_key_id = environment.get(KMS_KEY_ID) or None
    key_file = environment.get(CUSTOMER_KEY_FILE) or None
    if storage_class is not None:
        check_storage_class(storage_class)
    if encryption not in (None, "AES256", "aws:kms"):
        raise InvalidError(f"{SSE} is {encryption[:40]!r}: use AES256 or aws:kms")
    if kms_key_id is not None and encryption != "aws:kms":
        raise InvalidError(f"{KMS_KEY_ID} names a key of KMS: set {SSE}=aws:kms as well")
    if kms_key_id is not None and not _KEY_ID.match(kms_key_id):
        raise InvalidError(f"{KMS_KEY_ID} is not the id of a key")
    if key_file is not None and encryption is not None:
        raise InvalidError(f"{SSE} and {CUSTOMER_KEY_FILE} exclude each other: unset one")
    key = _read_key(key_file) if key_file is not None else None
    return S3Settings(storage_class, encryption, kms_key_id, key, bulk)


def check_storage_class(name: str) -> str:
    """Return ``name`` when data may be stored in that class, else InvalidError."""
    if not _CLASS.match(name):
        raise InvalidError(f"{name[:70]!r} is not a storage class such as STANDARD_IA")
    if name.upper() in _ARCHIVES:
        raise InvalidError(
            f"storage class {name} is an archive, from which nothing can be read for hours:"
            " restore, verify and gc could not work; GLACIER_IR is read at once"
        )
    return name


def _read_key(path: str) -> bytes:
    where = f"the key file {path} that {CUSTOMER_KEY_FILE} names"
    try:
        with open(path, "rb") as file:
            content = file.read(100)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no path"
        raise InvalidError(f"cannot read {where}: {reason.lower()}") from None
    if not _KEY.match(content):
        raise InvalidError(f"{where} does not hold 64 hexadecimal digits: openssl rand -hex 32")
    return bytes.fromhex(content.decode("ascii").strip())
