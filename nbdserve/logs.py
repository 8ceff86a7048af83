"""Logs go to standard error, a line an event, from all processes alike."""

import logging
import time


def write_logs(level: str) -> None:
    """Write events of ``level`` and above from now on."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
