"""Labels that nbdserve itself gives to snapshots."""

from typing import Final

BACKUP: Final = "backup"
"""``nbdserve backup`` made it; the value is the id of the repository that it was pushed to."""
