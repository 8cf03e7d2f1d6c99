# SPDX-License-Identifier: Apache-2.0
"""Debian's cloud kernels: an image to boot and its modules, taken out of their packages.

Modules are found by name and brought in the order in which they must be loaded; their dependencies are read from the
modules themselves, so the host needs no kmod and the kernel no `depmod`.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab import archive, cache
from lab.host import LabError


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An unpacked kernel: `image` to boot, `modules` as in /usr/lib/modules/`release`, `config` as in /boot."""

    image: Path
    config: Path
    modules: Path
    release: str
    key: str


def cloud_kernel(suite: str, architecture: str, *, backports: bool = False) -> Kernel:
    """The newest cloud kernel of a suite, or of its backports."""
    packages = archive.Packages(
        name=f"kernel-{suite}{'-backports' if backports else ''}-{architecture}",
        suite=suite,
        architecture=architecture,
        include=(f"linux-image-cloud-{architecture}",),
        backports=backports,
    )
    key = cache.key_of(packages.key, "image, configuration and modules")
    found = cache.artefact(packages.name, key, lambda partial: _pick(packages, partial), estimate="about 20 s")
    release = (found / "release").read_text().strip()
    return Kernel(image=found / "vmlinuz", config=found / "config", modules=found / "modules", release=release, key=key)


def _pick(packages: archive.Packages, partial: Path) -> None:
    root = partial / "root"
    root.mkdir()
    archive.unpack(packages, root)
    base = root / "lib/modules"
    found = [path for path in base.iterdir() if (path / "kernel").is_dir()]
    if len(found) != 1:
        raise LabError(f"{packages.name}: expected one kernel, found {[path.name for path in found]}")
    release = found[0].name
    # Since Linux 6.18 Debian ships these two beside the modules; before that in /boot, where they are still looked for.
    for name in ("vmlinuz", "config"):
        places = [found[0] / name, root / "boot" / f"{name}-{release}"]
        place = next((path for path in places if path.is_file()), None)
        if place is None:
            raise LabError(f"{packages.name}: no {name} for {release}")
        shutil.move(place, partial / name)
    modules = partial / "modules"
    modules.mkdir()
    for name in ("kernel", "modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.move(found[0] / name, modules / name)
    (partial / "release").write_text(release)
    cache.remove(root)


def load_order(kernel: Kernel, names: tuple[str, ...]) -> list[Path]:
    """The files of these modules and of all that they depend on, each after its dependencies.

    What is built into the kernel needs no file; a name that is neither raises LabError.
    """
    builtin = {_plain(line) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}
    files = {_plain(path.name): path for path in (kernel.modules / "kernel").rglob("*.ko*")}
    order: list[Path] = []

    def add(name: str) -> None:
        if name in builtin:
            return
        if name not in files:
            raise LabError(f"kernel {kernel.release} has no module {name}")
        if files[name] not in order:
            for dependency in _depends(files[name]):
                add(dependency)
            order.append(files[name])

    for name in names:
        add(_plain(name))
    return order


def _plain(name: str) -> str:
    return name.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _depends(module: Path) -> list[str]:
    match = re.search(rb"\0depends=([^\0]*)\0", contents(module))
    return [_plain(name) for name in match.group(1).decode().split(",") if name] if match else []


def contents(module: Path) -> bytes:
    """A module's ELF file, decompressed: busybox's insmod understands no xz."""
    match module.suffix:
        case ".xz":
            return lzma.decompress(module.read_bytes())
        case ".gz":
            return gzip.decompress(module.read_bytes())
        case _:
            return module.read_bytes()
