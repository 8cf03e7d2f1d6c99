# SPDX-License-Identifier: Apache-2.0
"""Varlink over a unix stream socket: JSON objects ended by NUL, served and called without any event-loop library.

The rooms above use `server` (vmforkd) or `client` (vmforkctl, the reactor, the library); nothing is imported here, so
that a client pays for no server.
"""
