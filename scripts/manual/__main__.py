"""``python -m scripts.manual SHARE``: write what systems look for below SHARE, say /usr/share.

That is manual pages and completion scripts; what was there of the former is removed first, for
commands go, too. The date in the pages is that of SOURCE_DATE_EPOCH, else today's.
"""

import os
import shutil
import sys
import time
from pathlib import Path

from nbdserve.cli.application import application
from nbdserve.cli.completion import script_for
from scripts.manual.pages import make_pages

SCRIPTS = {
    "bash": "bash-completion/completions/nbdserve",
    "zsh": "zsh/site-functions/_nbdserve",
    "fish": "fish/vendor_completions.d/nbdserve.fish",
}


def main() -> int:
    """Write all of it; the exit status."""
    if len(sys.argv) != 2:
        print("usage: python -m scripts.manual SHARE", file=sys.stderr)
        return 2
    share = Path(sys.argv[1])
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    date = time.strftime("%Y-%m-%d", time.gmtime(None if epoch is None else int(epoch)))
    shutil.rmtree(share / "man", ignore_errors=True)
    for page in make_pages(application):
        _write(share / "man" / f"man{page.section}" / page.file_name, page.text(date))
    for shell, file in SCRIPTS.items():
        _write(share / file, script_for(shell, application))
    return 0


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


sys.exit(main())
