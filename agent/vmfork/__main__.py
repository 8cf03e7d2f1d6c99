# SPDX-License-Identifier: Apache-2.0
"""`python3 -m vmfork` is vmforkctl."""

from __future__ import annotations

import signal
import sys

# Before the other imports, which take most of the time of a short run: ^C ends it by the signal, without a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from vmfork.cli import main  # noqa: E402

sys.exit(main())
