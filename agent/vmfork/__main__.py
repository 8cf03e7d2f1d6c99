# SPDX-License-Identifier: Apache-2.0
"""`python3 -m vmfork` is vmforkctl."""

from __future__ import annotations

import sys

from vmfork.cli import main

sys.exit(main())
