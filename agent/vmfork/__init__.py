# SPDX-License-Identifier: Apache-2.0
"""vmfork: know that the virtual machine you run in was forked."""

__version__ = "0.1.0"
