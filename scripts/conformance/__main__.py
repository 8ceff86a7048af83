"""The command line, as ``nbd-conformance`` runs it."""

import sys

from .program import main

sys.exit(main())
