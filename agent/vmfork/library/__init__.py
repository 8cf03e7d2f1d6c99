# SPDX-License-Identifier: Apache-2.0
"""What other programs import through `vmfork`: guards, watchers, callbacks, waiting, reseeding.

Standard library only. Each module is imported when one of its names is first used, and no module here may load more
at import than that name needs.
"""
