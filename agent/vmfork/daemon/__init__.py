# SPDX-License-Identifier: Apache-2.0
"""vmforkd, the detector: one thread that waits, decides, publishes and starts the reaction."""
