# SPDX-License-Identifier: Apache-2.0
"""The fork lab: builds Debian guests, boots them in QEMU under TCG, and forks them for real.

From the bottom up: `host` (what must be installed), `deadline`, `cache` (finished artefacts, built once), `workspace`
(one run's disks), `archive` (roots from Debian's archive), `kernel`, `initramfs`, `bytecode`, `payload` (vmfork as
users install it), `image`; then `qemu` (the process), `qmp`, `qtest`, `channel` (commands in the guest, answered in
frames by `guest_channel`), `board` and `vmclock` (what a hypervisor shows an arm64 guest); then `guest`: boot, run,
save, restore, fork, report, and `guests`: the kinds there are. Beside it `switch`: a network for guests in a namespace
of its own, with a DHCP server. On top, for the matrix: `view` (what vmfork says), `guest_probe` (a program with random
state), `clones`, `latency` and `plugin` (fixtures).
"""
