# SPDX-License-Identifier: Apache-2.0
"""Directory trees made of Debian packages by mmdebstrap: guests, kernels, and a newer QEMU.

Two shapes: an installed system (`installed=True`, maintainer scripts run, native architecture), or packages merely
unpacked side by side (no script runs, so any architecture will do). Needs root; everything comes from one mirror.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import cache
from lab.host import LabError, tool

# Guests are small and short-lived: nobody reads manual pages or changes the language in them.
_LEAN = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/i18n/*")
# Where a guest finds the packages that its archive offers: it has no network.
_OFFER = "srv/archive"
_KEEP_OFFER = """
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
rm -f "$1"/var/cache/apt/archives/*.deb
apt-get --quiet --quiet --yes --no-install-recommends --download-only install {packages}
mkdir -p "$1/{offer}"
mv "$1"/var/cache/apt/archives/*.deb "$1/{offer}/"
cd "$1/{offer}"
{index} packages . >Packages
echo "deb [trusted=yes] file:/{offer} ./" >"$1/etc/apt/sources.list"
"""
# What a merged-/usr system has and base-files would create in a maintainer script.
_MERGED = ("bin", "sbin", "lib", "lib64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """A selection of Debian packages with their dependencies, without recommendations.

    `offered` are not installed: they lie in an archive in the tree, with what they need, the only one its apt knows.
    """

    name: str
    suite: str
    architecture: str
    include: tuple[str, ...]
    backports: bool = False
    installed: bool = False
    offered: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Changes whenever the tree would be built differently."""
        described = asdict(self)
        recipe = (_KEEP_OFFER,) if described.pop("offered") else ()
        return cache.key_of(described, _LEAN, _MERGED, *((self.offered, recipe) if recipe else ()))


def mirror() -> str:
    """Where packages come from: VMFORK_LAB_MIRROR, else what this Debian host uses. LabError where neither is known."""
    chosen = os.environ.get("VMFORK_LAB_MIRROR")
    if chosen:
        return chosen
    query = ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Identifier: Packages"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    for line in answer.stdout.splitlines():
        origin, label, uri = line.split("|", 2)
        if (origin, label) == ("Debian", "Debian") and uri.startswith("http"):
            return uri.rstrip("/")
    raise LabError("this host's apt knows no Debian archive; name one in VMFORK_LAB_MIRROR")


def unpack(packages: Packages, directory: Path) -> None:
    """Fill `directory`, which exists and is empty, with the packages.

    Raises LabError with the end of mmdebstrap's output when the archive does not answer or lacks a package.
    """
    suites = [packages.suite]
    options = []
    if packages.backports:
        suites.append(f"{packages.suite}-backports")
        options.append(f'--aptopt=APT::Default-Release "{packages.suite}-backports"')
    options += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEAN]
    if packages.offered:
        script = _KEEP_OFFER.format(packages=" ".join(packages.offered), offer=_OFFER, index=tool("apt-ftparchive"))
        options.append(f"--customize-hook={script}")
    command = [
        tool("mmdebstrap"), "--quiet", "--mode=root",
        f"--variant={'essential' if packages.installed else 'extract'}",
        f"--architectures={packages.architecture}",
        f"--include={','.join(packages.include)}",
        *options,
        packages.suite,
        os.fspath(directory),
        *(f"deb {mirror()} {suite} main" for suite in suites),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise LabError(f"mmdebstrap failed for {packages.name} ({packages.suite}):\n{done.stdout[-2000:]}")
    if not packages.installed:
        _merge_usr(directory)


def tree(packages: Packages, *, estimate: str = "") -> Path:
    """The cached tree of these packages; built when it is not there."""

    def build(partial: Path) -> None:
        root = partial / "root"
        root.mkdir(mode=0o755)
        unpack(packages, root)

    return cache.artefact(packages.name, packages.key, build, estimate=estimate) / "root"


def _merge_usr(root: Path) -> None:
    for name in _MERGED:
        if (root / "usr" / name).is_dir() and not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
