# SPDX-License-Identifier: Apache-2.0
"""One QEMU process: started with its sockets already connected, and gone when whoever started it is gone.

The monitor, the guest's channel and qtest are socket pairs that the process inherits: no path, no race, no port. The
guest's serial console goes to a file. The kernel kills the process when the thread that started it ends, so start it
from the main thread.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import archive
from lab.channel import Channel
from lab.guest_channel import PORT_NAME
from lab.host import LabError, tool
from lab.qmp import Qmp
from lab.qtest import Qtest


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulator:
    """How to call one QEMU: the words of the command, and variables of its environment."""

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def host_emulator(architecture: str) -> Emulator:
    """The QEMU that is installed on this host."""
    return Emulator(command=(tool(f"qemu-system-{architecture}"),))


def backports_emulator() -> Emulator:
    """The newest QEMU of Debian 13's backports, unpacked into the cache and run from there by its own loader."""
    packages = archive.Packages(
        name="qemu-trixie-backports",
        suite="trixie",
        architecture="amd64",
        include=("qemu-system-x86",),
        backports=True,
    )
    root = os.fspath(archive.tree(packages, estimate="about 20 s"))
    libraries = f"{root}/usr/lib/x86_64-linux-gnu"
    loader = (f"{root}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", libraries)
    firmware = ("-L", f"{root}/usr/share/qemu", "-L", f"{root}/usr/share/seabios")
    command = (*loader, f"{root}/usr/bin/qemu-system-x86_64", *firmware)
    # Else it looks for its modules where the host's own QEMU keeps those of another version.
    return Emulator(command=command, environment=(("QEMU_MODULE_DIR", f"{libraries}/qemu"),))


class Qemu:
    """A running QEMU with `arguments`; `directory` gets its log files."""

    def __init__(
        self, emulator: Emulator, arguments: Sequence[str], *, directory: Path, name: str, virtio_bus: str = "pci"
    ) -> None:
        self.serial_log = directory / f"{name}.serial.log"
        self.log = directory / f"{name}.qemu.log"
        pairs = {which: socket.socketpair() for which in ("monitor", "channel", "qtest")}
        theirs = {which: pair[1] for which, pair in pairs.items()}
        command = [
            *(tool("setpriv"), "--pdeathsig", "KILL"),
            *emulator.command,
            *("-name", name, "-nodefaults", "-no-user-config", "-display", "none"),
            *(word for which, end in theirs.items()
              for word in ("-chardev", f"socket,id={which},fd={end.fileno()}")),
            *("-mon", "chardev=monitor,mode=control"),
            *("-qtest", "chardev:qtest", "-qtest-log", "none"),
            *("-chardev", f"file,id=console,path={self.serial_log}", "-serial", "chardev:console"),
            *("-device", f"virtio-serial-{virtio_bus}"),
            *("-device", f"virtserialport,chardev=channel,name={PORT_NAME}"),
            *arguments,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            log.write((" ".join(command) + "\n").encode())
            log.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **dict(emulator.environment)},
                pass_fds=[end.fileno() for end in theirs.values()],
            )
        for end in theirs.values():
            end.close()
        self._ends = [pair[0] for pair in pairs.values()]
        self.qmp = Qmp(pairs["monitor"][0])
        self.channel = Channel(pairs["channel"][0])
        self.qtest = Qtest(pairs["qtest"][0])
        try:
            self.qmp.connect()
        except LabError as error:
            self.kill()
            raise LabError(f"QEMU did not start: {self.log.read_text(errors='replace')[-2000:]}") from error

    def wait(self, *, seconds: float) -> int:
        """Wait until the process ends by itself. Raises LabError at the deadline."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"QEMU still runs after {seconds:.0f} s") from error
        self._close()
        return code

    def kill(self) -> None:
        """End the process now, as a power cut does; harmless where it has ended."""
        self._process.kill()
        self._process.wait()
        self._close()

    @property
    def running(self) -> bool:
        """True until the process ended."""
        return self._process.poll() is None

    def _close(self) -> None:
        for end in self._ends:
            end.close()
