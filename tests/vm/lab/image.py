# SPDX-License-Identifier: Apache-2.0
"""What a guest boots: a kernel, an initial RAM file system, and for a systemd guest a disk.

An image is a base from the archive plus vmfork's packages plus the lab's own few files. It is made in seconds and
keyed by all of that. A systemd guest has vmfork installed by dpkg in a chroot; a mini guest, which may be of another
architecture, has it unpacked, and starts nothing by itself but the lab's channel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from lab import archive, cache, initramfs
from lab.bytecode import compile_tree
from lab.host import LabError, tool
from lab.kernel import Kernel, contents, load_order
from lab.payload import Payload, unpack

_PROGRAMS = "usr/lib/vmfork-lab"
_CHANNEL = Path(__file__).with_name("guest_channel.py")
_PROBE = Path(__file__).with_name("guest_probe.py")
# Built into newer cloud kernels but for the disk driver; the console is the channel.
_VIRTIO = ("virtio_pci", "virtio_console")
_DISK_MODULES = (*_VIRTIO, "virtio_blk", "ext4")
_DISK_MIB = 900
_NOT_IN_MEMORY = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/i18n", "usr/share/zoneinfo",
    "usr/share/lintian", "usr/share/bug", "usr/share/perl5", "usr/share/perl", "usr/share/mime", "usr/lib/udev/hwdb.d",
    "usr/share/bash-completion", "usr/share/zsh", "usr/lib/modules",
    "var/lib/apt", "var/lib/dpkg", "var/cache", "dev", "proc", "sys", "run", "tmp",
)  # fmt: skip

_DISK_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /dev /root
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do [ -e "$module" ] && /bin/busybox insmod "$module"; done
until [ -e /dev/vda ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox sh
exec /bin/busybox switch_root /root /sbin/init
"""

# Process 1 of a mini guest: mounts, modules, the channel; then it collects orphans for as long as the guest lives.
_MINI_INIT = """#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /root /var/lib /var/log
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs -o mode=755 tmpfs /run
/bin/busybox chmod 1777 /tmp
# Linux 7.3 makes the root of an initial RAM file system writable by all.
/bin/busybox chmod 755 /
/bin/busybox --install -s /usr/bin 2>/dev/null
for module in /modules/*.ko; do [ -e "$module" ] && insmod "$module"; done
ip link set lo up
hostname lab-mini
python3 /usr/lib/vmfork-lab/guest_channel.py &
while :; do wait; sleep 1; done
"""

# From the first moment to the last, so that a boot that fails can be looked into.
_CHANNEL_UNIT = """[Unit]
Description=Command channel of the fork lab
DefaultDependencies=no
After=systemd-journald.socket

[Service]
ExecStart=/usr/bin/python3 /usr/lib/vmfork-lab/guest_channel.py
Restart=always

[Install]
WantedBy=sysinit.target
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What QEMU is given. `disk` is None for a mini guest; `command_line` is what the kernel needs for this image."""

    kernel: Path
    initrd: Path
    disk: Path | None
    command_line: str
    has_systemd: bool


def systemd_image(
    name: str, base: archive.Packages, kernel: Kernel, made: Payload | None, *, modules: tuple[str, ...] = ()
) -> Image:
    """A disk with a whole Debian system; `modules` are loaded at boot beside those that vmfork itself asks for."""
    scripts = (_DISK_INIT, _CHANNEL_UNIT, _CHANNEL.read_text(), _PROBE.read_text(), _DISK_MIB, _DISK_MODULES, modules)
    key = cache.key_of(base.key, kernel.key, made.key if made else None, scripts)

    def build(partial: Path) -> None:
        source = archive.tree(base, estimate="about 1 minute")
        root = partial / "root"
        subprocess.run(["cp", "-a", "--reflink=auto", os.fspath(source), os.fspath(root)], check=True)
        _add_kernel_modules(root, kernel)
        _configure(root, modules)
        if made:
            _install(root, made)
        _mark_up_to_date(root)
        _make_disk(root, partial / "disk.img")
        _make_disk_initrd(root, kernel, partial / "initrd")
        cache.remove(root)

    found = cache.artefact(name, key, build, estimate="about 20 s")
    return Image(
        kernel=kernel.image,
        initrd=found / "initrd",
        disk=found / "disk.img",
        command_line="root=/dev/vda rw systemd.show_status=0",
        has_systemd=True,
    )


def mini_image(
    name: str, base: archive.Packages, kernel: Kernel, made: Payload | None, *, modules: tuple[str, ...] = ()
) -> Image:
    """A guest that lives in its memory: Python, busybox, vmfork, and one script as process 1."""
    scripts = (
        _MINI_INIT,
        "links are followed",
        "bytecode",
        _CHANNEL.read_text(),
        _PROBE.read_text(),
        _NOT_IN_MEMORY,
        modules,
    )
    key = cache.key_of(base.key, kernel.key, made.key if made else None, scripts)

    def build(partial: Path) -> None:
        source = _with_bytecode(base)
        extra = partial / "extra"
        extra.mkdir()
        if made:
            unpack(made, extra)
            compile_tree(extra, python_root=_native(base))
        with initramfs.Archive(partial / "initrd") as target:
            target.tree(source, skip=_NOT_IN_MEMORY)
            target.tree(extra, skip=_NOT_IN_MEMORY)
            target.directory("dev")
            target.device("dev/console", major=5, minor=1)
            target.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
            target.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
            target.file("etc/machine-id", b"1" * 32 + b"\n")
            _add_programs(target, kernel, (*_VIRTIO, *modules))
            target.file("init", _MINI_INIT.encode(), mode=0o755)
        cache.remove(extra)

    found = cache.artefact(name, key, build, estimate="about 5 s")
    return Image(
        kernel=kernel.image, initrd=found / "initrd", disk=None, command_line="rdinit=/init", has_systemd=False
    )


def _with_bytecode(base: archive.Packages) -> Path:
    source = archive.tree(base, estimate="about 20 s")
    native = _native(base)

    def build(partial: Path) -> None:
        # Device nodes stay where they are: devtmpfs makes its own.
        (partial / "root").mkdir()
        for path in source.iterdir():
            if path.name != "dev":
                subprocess.run(["cp", "-a", os.fspath(path), os.fspath(partial / "root")], check=True)
        compile_tree(partial / "root", python_root=native)

    key = cache.key_of(base.key, native.parent.name, "bytecode")
    return cache.artefact(f"compiled-{base.name}", key, build, estimate="about 10 s") / "root"


def _native(base: archive.Packages) -> Path:
    """The same packages for this host, whose Python runs here."""
    name = base.name.replace(base.architecture, "amd64")
    return archive.tree(replace(base, name=name, architecture="amd64"), estimate="about 20 s")


def _add_programs(target: initramfs.Archive, kernel: Kernel, modules: tuple[str, ...]) -> None:
    for program in (_CHANNEL, _PROBE):
        target.file(f"{_PROGRAMS}/{program.name}", program.read_bytes())
    for number, module in enumerate(load_order(kernel, modules)):
        target.file(f"modules/{number:02}-{module.name.partition('.')[0]}.ko", contents(module))


def _add_kernel_modules(root: Path, kernel: Kernel) -> None:
    target = root / "usr/lib/modules" / kernel.release
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(kernel.modules, target)
    shutil.copy(kernel.config, root / "boot" / f"config-{kernel.release}")
    _chroot(root, "depmod", kernel.release)


def _configure(root: Path, modules: tuple[str, ...]) -> None:
    programs = root / _PROGRAMS
    programs.mkdir(parents=True)
    for program in (_CHANNEL, _PROBE):
        shutil.copy(program, programs)
    unit = root / "etc/systemd/system/lab-channel.service"
    unit.write_text(_CHANNEL_UNIT)
    _chroot(root, "systemctl", "enable", unit.name)
    (root / "etc/machine-id").write_text("1" * 32 + "\n")
    (root / "etc/hostname").write_text("lab\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost lab\n")
    (root / "etc/modules-load.d/lab.conf").write_text("".join(f"{name}\n" for name in modules))
    # The serial console belongs to the log; a login there would only cost time.
    for name in ("serial-getty@.service", "getty@.service"):
        (root / "etc/systemd/system" / name).symlink_to("/dev/null")


def _install(root: Path, made: Payload) -> None:
    for package in made.packages:
        shutil.copy(package, root)
    _chroot(root, "dpkg", "--install", *(f"/{package.name}" for package in made.packages))
    for package in made.packages:
        (root / package.name).unlink()


def _mark_up_to_date(root: Path) -> None:
    # Older than /usr, these two make systemd rebuild caches of the whole system at every first boot.
    for name in ("etc/.updated", "var/.updated"):
        (root / name).touch()
    usr = root / "usr"
    os.utime(usr, ns=(0, min(usr.stat().st_mtime_ns, (root / "etc/.updated").stat().st_mtime_ns)))
    for name in ("etc/.updated", "var/.updated"):
        os.utime(root / name, ns=(0, usr.stat().st_mtime_ns))


def _make_disk(root: Path, disk: Path) -> None:
    command = [tool("mke2fs"), "-q", "-t", "ext4", "-d", os.fspath(root), os.fspath(disk), f"{_DISK_MIB}M"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"mke2fs: {done.stderr}")


def _make_disk_initrd(root: Path, kernel: Kernel, initrd: Path) -> None:
    with initramfs.Archive(initrd) as target:
        target.directory("dev")
        target.device("dev/console", major=5, minor=1)
        target.file("bin/busybox", (root / "usr/bin/busybox").read_bytes(), mode=0o755)
        _add_programs(target, kernel, _DISK_MODULES)
        target.file("init", _DISK_INIT.encode(), mode=0o755)


def _chroot(root: Path, *argv: str) -> None:
    # Beside the tools themselves nothing of the host's environment belongs into an image.
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    command = [tool("chroot"), os.fspath(root), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(argv)} in the image failed:\n{done.stdout}{done.stderr}"[:3000])
