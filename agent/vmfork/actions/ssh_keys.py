# SPDX-License-Identifier: Apache-2.0
"""One ssh host key: what it is now, and a new pair of the same kind prepared beside it.

ssh-keygen does all cryptography. Nothing here changes a file that is in use: a new pair is made under temporary
names, verified and synced, and put in place by `install`.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

from vmfork.actions import files
from vmfork.actions.commands import Commands
from vmfork.errors import ActionError
from vmfork.paths import Paths

_ALGORITHMS = {
    "ssh-rsa": "rsa",
    "ssh-dss": "dsa",
    "ssh-ed25519": "ed25519",
    "ecdsa-sha2-nistp256": "ecdsa",
    "ecdsa-sha2-nistp384": "ecdsa",
    "ecdsa-sha2-nistp521": "ecdsa",
}
_NAME = re.compile(r"ssh_host_(rsa|dsa|ecdsa|ed25519)_key")
_LISTING = re.compile(r"(\d+) (SHA256:\S+) ?(.*?) \((\S+)\)$")
_MAX_PUBLIC = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HostKey:
    """An existing host key. `public` is its "type base64" line without comment, empty where no key can be read.

    `path` and `public_path` are where the halves really are, links followed. `fingerprint` is the SHA256 one, empty
    with `public`.
    """

    path: str
    public_path: str
    algorithm: str
    bits: int
    comment: str
    public: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPair:
    """A pair under temporary names, complete on disk, that may replace `old` by two renames."""

    old: HostKey
    private: str
    public_file: str
    public: str
    fingerprint: str


def inspect(run: Commands, paths: Paths, path: str) -> HostKey | None:
    """The host key at a path; None where there is none. ActionError for a key of a kind that cannot be made again.

    A key that was cut short by a crash is told by its public half, else by its name, so that it can be made whole.
    """
    real, real_public = files.resolve(paths, path), files.resolve(paths, path + ".pub")
    if not os.path.lexists(real):
        return None
    if not os.path.isfile(real):
        raise ActionError(f"{path}: is not a regular file")
    derived = run.run("ssh-keygen", "-y", "-P", "", "-f", real)
    if not derived.ok and "passphrase" in derived.complaint:
        raise ActionError(f"{path}: is encrypted, so it cannot be replaced by one that its agent can use")
    public_text = _read(real_public)
    public = _line(derived.text) if derived.ok else _line(public_text)
    if not public:
        named = _NAME.fullmatch(os.path.basename(path))
        if named is None:
            raise ActionError(f"{path}: is not a private key that can be read, and its name does not tell its type")
        return HostKey(
            path=real, public_path=real_public, algorithm=named[1], bits=0, comment="", public="", fingerprint=""
        )
    algorithm = _ALGORITHMS.get(public.split()[0])
    if algorithm is None:
        raise ActionError(f"{path}: a key of type {public.split()[0]} cannot be made again here")
    bits, fingerprint = listing(run, public)
    return HostKey(
        path=real,
        public_path=real_public,
        algorithm=algorithm,
        bits=bits,
        comment=_comment(public_text) or (_comment(derived.text) if derived.ok else ""),
        public=public,
        fingerprint=fingerprint,
    )


def prepare(run: Commands, old: HostKey, *, timeout: float) -> NewPair:
    """Make a new pair of the same kind under temporary names. ActionError leaves nothing behind."""
    private, public_file = files.temporary_name(old.path), files.temporary_name(old.public_path)
    generated = private + ".pub"
    discard(private, generated, public_file)
    size = ("-b", str(old.bits)) if old.bits and old.algorithm in ("rsa", "ecdsa") else ()
    try:
        made = ("ssh-keygen", "-q", "-t", old.algorithm, *size, "-N", "", "-C", old.comment, "-f", private)
        run.check(*made, timeout=timeout)
        public = _line(run.check("ssh-keygen", "-y", "-P", "", "-f", private).text)
        text = _read(generated)
        if not public or public != _line(text):
            raise ActionError(f"{old.path}: ssh-keygen made a pair whose halves do not match")
        if public == old.public:
            raise ActionError(f"{old.path}: ssh-keygen made the old key again: the random generator is broken")
        _, fingerprint = listing(run, public)
        with files.reported(old.path):
            _finish(private, old.path)
            files.prepare(old.public_path, text.encode(), mode=0o644)
    except BaseException:
        discard(private, public_file)
        raise
    finally:
        discard(generated)
    return NewPair(old=old, private=private, public_file=public_file, public=public, fingerprint=fingerprint)


def install(pair: NewPair) -> None:
    """Put a pair in place: the private half first.

    Between the two renames sshd finds a private key with another's public half; it then complains, ignores the public
    file and serves the new key (sshd.c, "Public key for %s does not match private key"). The other order would leave
    the shared identity in service. No file is missing or empty at any instant, and a repeat makes both new.
    """
    with files.reported(pair.old.path):
        os.rename(pair.private, pair.old.path)
        os.rename(pair.public_file, pair.old.public_path)
        for directory in {os.path.dirname(pair.old.path), os.path.dirname(pair.old.public_path)}:
            files.fsync_directory(directory)


def verify(run: Commands, pair: NewPair) -> None:
    """ActionError unless the installed halves are both the new key."""
    derived = run.check("ssh-keygen", "-y", "-P", "", "-f", pair.old.path)
    if _line(derived.text) != pair.public or _line(_read(pair.old.public_path)) != pair.public:
        raise ActionError(f"{pair.old.path}: is not the pair that was put there")


def listing(run: Commands, public: str) -> tuple[int, str]:
    """Size in bits and SHA256 fingerprint of a public key line, or of a certificate line."""
    finished = run.check("ssh-keygen", "-l", "-E", "sha256", "-f", "-", stdin=public.encode() + b"\n")
    found = _LISTING.match(finished.text.strip())
    if found is None:
        raise ActionError("ssh-keygen -l answered something that is not understood")
    return int(found[1]), found[2]


def discard(*leftovers: str) -> None:
    """Remove temporary files of this run or of a killed one."""
    for path in leftovers:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _finish(private: str, present: str) -> None:
    """Give the new private half the attributes of the present one, without access for others, and sync it."""
    fd = os.open(private, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        files.take_attributes(fd, present, mode=0o600)
        status = os.fstat(fd)
        # A group of its own may read host keys (ssh_keys on Fedora); sshd refuses a key that root's group can read.
        os.fchmod(fd, status.st_mode & (0o640 if status.st_gid else 0o600))
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_PUBLIC).decode("utf-8", "replace")
    except OSError:
        return ""


def _line(text: str) -> str:
    words = text.strip().split(None, 2)
    return " ".join(words[:2]) if len(words) > 1 and "\n" not in " ".join(words[:2]) else ""


def _comment(text: str) -> str:
    words = text.strip().splitlines()[0].split(None, 2) if text.strip() else []
    return words[2] if len(words) > 2 else ""
