# SPDX-License-Identifier: Apache-2.0
"""The reactor: runs the hooks for one fork, in order, bounded in time and output, and reports what each did."""
