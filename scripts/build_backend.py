"""What builds wheels (PEP 517): setuptools, after the files that are made from the command line.

Manual pages and completion scripts are made by the program itself, so building a wheel needs what
running it needs. They are written to ``build/share/``, as pyproject.toml lists them. An editable
installation goes without.
"""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 - the hooks that stay setuptools' own
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

PROJECT = Path(__file__).resolve().parents[1]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What setuptools needs, what the program needs, and the reader of docs/man/."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    development = project["optional-dependencies"]["dev"]
    reader = [needed for needed in development if needed.startswith("markdown-it-py")]
    needed: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    return [*needed, *project["dependencies"], *reader]


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """Make the files, then let setuptools build, without what an older build has left."""
    shutil.rmtree(PROJECT / "build" / "lib", ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "scripts.manual", PROJECT / "build" / "share"],
        cwd=PROJECT,
        check=True,
    )
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name
