# SPDX-License-Identifier: Apache-2.0
"""The fork lab: builds Debian guests, boots them in QEMU under TCG, and forks them for real.

From the bottom up: `host` (what must be installed), `cache` (finished artefacts, built once), `archive` (roots from
Debian's archive), `kernel`, `initramfs`, `payload` (vmfork as users install it), `image`; then `qemu` (the process),
`qmp`, `qtest`, `channel` (commands in the guest, answered in frames by `guest_channel.py`), `devicetree` and `vmclock`
(what a hypervisor would show a guest); and on top `guest`: boot, run, save, restore, fork in place, report. Beside it
`switch`: a network for guests in a namespace of its own, with a DHCP server.
"""
