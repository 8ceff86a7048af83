"""Where the key of an encrypted repository comes from.

A passphrase comes from a file, or from the output of a command, such as one that asks a password
manager; a key file is a secret itself. Each is named by an option or by the environment:

========================  ==============================
``--passphrase-file``     ``NBDSERVE_PASSPHRASE_FILE``
``--passphrase-command``  ``NBDSERVE_PASSPHRASE_COMMAND``
``--repo-key-file``       ``NBDSERVE_REPO_KEY_FILE``
=========================  ==============================

The passphrase itself is in neither: every user of the machine sees command lines, and all that a
command starts inherits its environment.
"""

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backends.errors import InvalidError, NotFoundError, StorageError, one_line
from snapshots.repository.secret import Secret, key_file, new_key_file, passphrase_line

_MOST = 64 << 10  # bytes that are read of a file or a command


@dataclass(frozen=True)
class KeySource:
    """Which file or command has the secret; at most one of them."""

    passphrase_file: str | None = None
    passphrase_command: str | None = None
    repo_key_file: str | None = None

    def secret(self) -> Secret | None:
        """Read the secret, None when none is named; StorageErrors name the file or command."""
        named = [value for value in vars(self).values() if value is not None]
        if len(named) > 1:
            raise InvalidError(
                "a passphrase file, a passphrase command and a key file exclude each other: "
                "name one of them"
            )
        if self.passphrase_file is not None:
            where = f"passphrase file {self.passphrase_file}"
            return passphrase_line(_read(self.passphrase_file, where), where)
        if self.passphrase_command is not None:
            return passphrase_line(_run(self.passphrase_command), "what --passphrase-command says")
        if self.repo_key_file is not None:
            where = f"key file {self.repo_key_file}"
            return key_file(_read(self.repo_key_file, where), where)
        return None

    def make_key_file(self) -> bool:
        """Make the key file when one is named that does not exist; tell whether it was made."""
        if self.repo_key_file is None:
            return False
        try:
            descriptor = os.open(self.repo_key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return False
        except (OSError, ValueError) as error:
            raise InvalidError(
                f"cannot make the key file {self.repo_key_file}: {_reason(error)}"
            ) from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(new_key_file())
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(Path(self.repo_key_file).absolute().parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return True


def source_from_environment(environment: Mapping[str, str] = os.environ) -> KeySource:
    """What the environment names. An empty variable is one that is not set."""
    return KeySource(
        environment.get("NBDSERVE_PASSPHRASE_FILE") or None,
        environment.get("NBDSERVE_PASSPHRASE_COMMAND") or None,
        environment.get("NBDSERVE_REPO_KEY_FILE") or None,
    )


def _read(path: str, where: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST + 1)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {where}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read the {where}: {_reason(error)}") from None
    if len(content) > _MOST:
        raise InvalidError(f"the {where} is too long")
    return content


def _run(command: str) -> bytes:
    """The output of a command, which may use the terminal; no shell is involved."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InvalidError(f"--passphrase-command cannot be understood: {error}") from None
    if not words:
        raise InvalidError("--passphrase-command is empty")
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot run {words[0]!r} for the passphrase: {_reason(error)}"
        ) from None
    if done.returncode:
        raise StorageError(
            f"{words[0]!r}, which is to say the passphrase, failed with status {done.returncode}"
        )
    if len(done.stdout) > _MOST:
        raise InvalidError(f"{words[0]!r} says more than a passphrase")
    return done.stdout


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return one_line(error)
