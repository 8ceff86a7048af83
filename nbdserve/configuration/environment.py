"""The configuration file that the environment names, NBDSERVE_CONFIG, or else the system's.

Commands that do the daemon's work in its stead keep to the policy in it, as the daemon would; those
that connect to the daemon of this machine look there for its addresses.
"""

import os
from pathlib import Path

from backends.errors import StorageError
from nbdserve.configuration import file
from nbdserve.configuration.listeners import ListenerConfiguration
from nbdserve.configuration.settings import Settings, combine
from nbdserve.configuration.space import NOTHING_OF_SPACE, combine_space
from snapshots.space import DEFAULT_POLICY, SpacePolicy

VARIABLE = "NBDSERVE_CONFIG"


def named_file() -> Path | None:
    """The file that the environment names, or the system's, where there is one."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return file.DEFAULT_FILE if file.DEFAULT_FILE.exists() else None


def policy_of(data: Path) -> SpacePolicy:
    """The policy of a data directory; the default where no file, or one of another, is named.

    A file that the environment names has to be right. The system's says nothing of a directory that
    it does not name, and what else is wrong with it does not matter. NotFoundError, InvalidError.
    """
    path = named_file()
    if path is None:
        return DEFAULT_POLICY
    if path != file.DEFAULT_FILE:
        settings = file.read_file(path)
        if settings.data is not None and settings.data.absolute() != data.absolute():
            return DEFAULT_POLICY
        return combine_space(NOTHING_OF_SPACE, settings.space)
    if not _system_serves(data):
        return DEFAULT_POLICY
    return combine_space(NOTHING_OF_SPACE, file.read_space_policy(path))


def listeners_of(data: Path) -> tuple[ListenerConfiguration, ...]:
    """Where the daemon of a data directory listens, unless its command line says otherwise.

    A file counts as it does for ``policy_of``, but has to be right as a whole, the system's too.
    """
    path = named_file()
    settings = Settings()
    if path is not None and (path != file.DEFAULT_FILE or _system_serves(data)):
        named = file.read_file(path)
        if named.data is None or named.data.absolute() == data.absolute():
            settings = named
    return combine(Settings(data=data), settings).listeners


def _system_serves(data: Path) -> bool:
    """Whether the system's file can be read, and names this data directory."""
    try:
        stated = file.read_data_directory(file.DEFAULT_FILE)
    except StorageError:
        return False
    return stated is not None and stated.absolute() == data.absolute()
