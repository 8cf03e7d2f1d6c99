# SPDX-License-Identifier: Apache-2.0
"""Hook 60-session-keys on real apache2, postfix, dovecot and exim4: a TLS 1.3 ticket from before is refused after.

The servers run out of unpacked packages with their configuration in the test's directory, on ports of 127.0.0.1.
"""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.netns import driver
from support.tickets import TicketClient, certificate, free_port, open_directory
from support.unpacked import Unpacked, unpack
from vmfork.actions.processes import wait_until

APACHE = """
ServerRoot {top}
ServerName localhost
PidFile {top}/pid
DefaultRuntimeDir {top}
ErrorLog {top}/error.log
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule socache_shmcb_module /usr/lib/apache2/modules/mod_socache_shmcb.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
User www-data
Group www-data
Listen 127.0.0.1:{port}
SSLEngine on
SSLCertificateFile {top}/cert.pem
SSLCertificateKeyFile {top}/key.pem
DocumentRoot {top}
"""

POSTFIX = """
compatibility_level = 3.6
queue_directory = {top}/queue
data_directory = {top}/data
daemon_directory = /usr/lib/postfix/sbin
command_directory = /usr/sbin
mail_owner = postfix
setgid_group = postdrop
inet_protocols = ipv4
myhostname = localhost.localdomain
alias_maps =
maillog_file = {top}/maillog
maillog_file_prefixes = {top}
smtpd_tls_cert_file = {top}/cert.pem
smtpd_tls_key_file = {top}/key.pem
smtpd_tls_security_level = may
smtpd_peername_lookup = no
"""

POSTFIX_SERVICES = """
127.0.0.1:{port} inet n - n - - smtpd -o smtpd_tls_wrappermode=yes
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
anvil unix - - n - 1 anvil
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
pickup unix n - n 60 1 pickup
proxymap unix - - n - - proxymap
postlog unix-dgram n - n - 1 postlogd
"""

DOVECOT = """
base_dir = {top}/run
state_dir = {top}/state
log_path = {top}/log
protocols = imap
listen = 127.0.0.1
ssl = required
ssl_cert = <{top}/cert.pem
ssl_key = <{top}/key.pem
mail_location = maildir:{top}/mail
service imap-login {{
  # One process for many clients, as busy servers have it: with the default each has a key of its own.
  service_count = 0
  chroot =
  inet_listener imap {{
    port = 0
  }}
  inet_listener imaps {{
    port = {port}
    ssl = yes
  }}
}}
passdb {{
  driver = static
  args = password=p
}}
userdb {{
  driver = static
  args = uid=dovecot gid=dovecot home={top}/mail
}}
"""

EXIM = """
primary_hostname = localhost
spool_directory = {top}/spool
log_file_path = {top}/spool/%slog
pid_file_path = {top}/spool/exim.pid
daemon_smtp_ports = {port}
tls_on_connect_ports = {port}
local_interfaces = 127.0.0.1
tls_advertise_hosts = *
tls_certificate = {top}/cert.pem
tls_privatekey = {top}/key.pem
tls_resumption_hosts = *
host_lookup =
rfc1413_hosts =
smtp_enforce_sync = false
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How a server is set up, started, broken, and what a client says to it."""

    packages: tuple[str, ...]
    users: tuple[str, ...]
    files: Mapping[str, str]
    start: tuple[str, ...]
    farewell: bytes
    noop: bytes
    answer: bytes
    breakage: tuple[str, str]
    complaint: str
    owned: Mapping[str, str]


KINDS = {
    "apache2": Kind(
        packages=("apache2",),
        users=(),
        files={"apache2.conf": APACHE},
        start=("apache2", "-f", "{top}/apache2.conf", "-DFOREGROUND"),
        farewell=b"GET / HTTP/1.0\r\n\r\n",
        noop=b"GET / HTTP/1.0\r\n\r\n",
        answer=b"HTTP/1.1 ",
        breakage=("apache2.conf", "Nonsense\n"),
        complaint="apache2ctl failed",
        owned={},
    ),
    "postfix": Kind(
        packages=("postfix",),
        users=("postfix", "postdrop"),
        files={"main.cf": POSTFIX, "master.cf": POSTFIX_SERVICES},
        start=("postfix", "-c", "{top}", "start"),
        farewell=b"QUIT\r\n",
        noop=b"NOOP\r\n",
        answer=b"220 ",
        breakage=("master.cf", "garbage\n"),
        complaint="postconf failed",
        owned={"data": "postfix", "queue": "root"},
    ),
    "dovecot": Kind(
        packages=("dovecot-imapd",),
        users=("dovecot", "dovenull"),
        files={"dovecot.conf": DOVECOT},
        start=("dovecot", "-F", "-c", "{top}/dovecot.conf"),
        farewell=b"a LOGOUT\r\n",
        noop=b"a LOGIN u p\r\nb NOOP\r\n",
        answer=b"* OK ",
        breakage=("dovecot.conf", "nonsense\n"),
        complaint="doveconf failed",
        owned={"run": "root", "state": "root", "mail": "dovecot"},
    ),
    "exim4": Kind(
        packages=("exim4-daemon-light",),
        users=("Debian-exim",),
        files={"exim.conf": EXIM},
        start=("exim4", "-C", "{top}/exim.conf", "-bdf"),
        farewell=b"QUIT\r\n",
        noop=b"NOOP\r\n",
        answer=b"220 ",
        breakage=("exim.conf", "nonsense\n"),
        complaint="exim4 failed",
        owned={"spool": "Debian-exim"},
    ),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The unpacked packages of a server, downloaded once."""
    have: dict[str, Path] = {}

    def tree(name: str) -> Path:
        if name not in have:
            have[name] = unpack(tmp_path_factory.mktemp(name), *KINDS[name].packages)
        return have[name]

    return tree


class Running:
    """A real server in a directory of its own."""

    def __init__(self, name: str, tree: Path, top: Path) -> None:
        self.name, self.kind, self.top = name, KINDS[name], top
        self.port = free_port()
        self._unpacked = Unpacked(tree, top / "layers", self.kind.users)
        self.client = TicketClient(self.port, self.kind.farewell)

    def start(self, more: str = "") -> None:
        certificate(self.top)[1].chmod(0o644)
        for file, text in self.kind.files.items():
            (self.top / file).write_text(text.format(top=self.top, port=self.port))
        (self.top / next(iter(self.kind.files))).open("a").write(more)
        self._unpacked.__enter__()
        for directory, owner in self.kind.owned.items():
            (self.top / directory).mkdir()
            self._unpacked.run("chown", owner, str(self.top / directory))
        self._unpacked.start(*(word.format(top=self.top) for word in self.kind.start))
        assert wait_until(self.client.answers, timeout=20), self._logs()

    def _logs(self) -> str:
        return "\n".join(path.read_text() for path in self.top.glob("**/*log") if path.is_file())[-4000:]

    def act(self, *argv: str) -> subprocess.CompletedProcess[str]:
        command = driver("session-keys", argv, {"Servers": self.name}, None)
        return self._unpacked.run(*command, check=False)

    def spoil(self) -> None:
        """Break the configuration under the running server."""
        file, text = self.kind.breakage
        with (self.top / file).open("a") as end:
            end.write(text)

    def ticket(self) -> ssl.SSLSession:
        """A ticket that the server takes now."""
        reused, ticket = self.client.resumed(self.client.resumed()[1])
        assert reused, "without a fork, tickets are taken"
        return ticket

    def close(self) -> None:
        self._unpacked.close()


@pytest.fixture(params=sorted(KINDS))
def server(request: pytest.FixtureRequest, trees: Callable[[str], Path]) -> Iterator[Running]:
    with open_directory() as top:
        running = Running(request.param, trees(request.param), top)
        yield running
        running.close()


def test_a_ticket_from_before_is_refused_after_and_no_client_thrown_out(server: Running) -> None:
    server.start()
    stays = TicketClient(server.port, b"").connect()
    # Apache waits for the request, the others greet.
    stays.sendall(server.kind.noop if server.name == "dovecot" else b"")
    assert server.name == "apache2" or stays.recv(200).startswith(server.kind.answer)
    ticket = server.ticket()

    told = server.act("--dry-run")
    assert told.returncode == 0, told.stderr
    assert f"would reload {server.name}" in told.stdout
    assert server.client.resumed(ticket)[0], "a dry run changes nothing"
    ticket = server.ticket()

    done = server.act()
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"reloaded {server.name}" in done.stdout
    assert "verified" in done.stdout
    assert not server.client.resumed(ticket)[0]
    assert server.ticket(), "new tickets are taken again"

    stays.sendall(b"c NOOP\r\n" if server.name == "dovecot" else server.kind.noop)
    assert stays.recv(200)
    stays.close()


def test_a_broken_configuration_is_a_failure_and_the_server_goes_on(server: Running) -> None:
    server.start()
    server.spoil()
    done = server.act()
    assert done.returncode == 1
    assert server.kind.complaint in done.stderr
    assert server.client.answers()


@pytest.mark.parametrize("server", ["apache2"], indirect=True)
def test_apache_forgets_its_shared_sessions_too(server: Running) -> None:
    server.start(f"SSLSessionTickets off\nSSLSessionCache shmcb:{server.top}/sessions(512000)\n")
    ticket = server.ticket()
    assert server.act().returncode == 0
    assert not server.client.resumed(ticket)[0]


@pytest.mark.parametrize("server", ["apache2"], indirect=True)
def test_ticket_keys_of_apache_from_a_file_are_named(server: Running) -> None:
    (server.top / "ticket.key").write_bytes(bytes(range(48)))
    server.start(f"SSLSessionTicketKeyFile {server.top}/ticket.key\n")
    done = server.act("--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"apache2 takes ticket keys from {server.top}/ticket.key" in done.stdout
