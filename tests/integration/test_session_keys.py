# SPDX-License-Identifier: Apache-2.0
"""Hook 60-session-keys on a real nginx: a TLS 1.3 ticket from before the fork is refused after it."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netns import driver
from support.tools import need, need_root
from vmfork.actions.commands import FIXED_PATH
from vmfork.actions.processes import wait_until

CONFIG = """
pid {top}/nginx.pid;
error_log {top}/error.log;
worker_processes 1;
events {{ worker_connections 32; }}
http {{
  access_log off;
  client_body_temp_path {top}/b; proxy_temp_path {top}/p; fastcgi_temp_path {top}/f;
  uwsgi_temp_path {top}/u; scgi_temp_path {top}/s;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {top}/cert.pem;
    ssl_certificate_key {top}/key.pem;
    ssl_protocols TLSv1.3;
    {more}
    return 200 "hello";
  }}
}}
"""


class Nginx:
    """One nginx in a directory of its own, on a loopback port."""

    def __init__(self, top: Path) -> None:
        self.top = top
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = door.getsockname()[1]
        self.child: subprocess.Popen[bytes] | None = None
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        kind = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
        files = ["-keyout", str(top / "key.pem"), "-out", str(top / "cert.pem")]
        subprocess.run(["openssl", *kind.split(), *files], check=True, capture_output=True)
        self.configure("")

    def configure(self, more: str) -> None:
        (self.top / "nginx.conf").write_text(CONFIG.format(top=self.top, port=self.port, more=more))

    def start(self) -> None:
        nginx = need("nginx", package="nginx-light")
        self.child = subprocess.Popen([nginx, "-c", str(self.top / "nginx.conf"), "-g", "daemon off;"])
        assert wait_until(self._answers, timeout=10)

    def stop(self) -> None:
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)
            self.child.wait(10)

    def _answers(self) -> bool:
        try:
            self.resumed(None)
        except OSError:
            return False
        return True

    def resumed(self, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession]:
        """Connect; whether the server took the ticket, and the next one."""
        if session is None:
            self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._client.check_hostname = False
            self._client.verify_mode = ssl.CERT_NONE
        # A session can only be offered by the context that it was made with.
        client = self._client
        with (
            socket.create_connection(("127.0.0.1", self.port), 5) as raw,
            client.wrap_socket(raw, session=session) as wire,
        ):
            wire.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while wire.recv(4096):
                pass
            assert wire.version() == "TLSv1.3"
            assert wire.session is not None
            return bool(wire.session_reused), wire.session


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    need_root()
    need("nginx", package="nginx-light")
    need("openssl", package="openssl")
    # Workers give up root, and must still reach their certificate.
    for directory in (tmp_path, *tmp_path.parents[:3]):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o011)
    server = Nginx(tmp_path)
    yield server
    server.stop()


def act(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        driver("session-keys", argv, {"Servers": "nginx"}, None),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_ticket_from_before_is_refused_after(nginx: Nginx) -> None:
    nginx.start()
    _, ticket = nginx.resumed(None)
    reused, ticket = nginx.resumed(ticket)
    assert reused, "without a fork, tickets are taken"
    done = act()
    assert done.returncode == 0, done.stderr + done.stdout
    assert "verified" in done.stdout
    assert nginx.child is not None
    assert str(nginx.child.pid) in done.stdout
    assert not nginx.resumed(ticket)[0]
    reused, ticket = nginx.resumed(None)
    assert nginx.resumed(ticket)[0], "new tickets are taken again"


def test_a_dry_run_leaves_the_tickets(nginx: Nginx) -> None:
    nginx.start()
    _, ticket = nginx.resumed(None)
    done = act("--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would reload nginx" in done.stdout
    assert nginx.resumed(ticket)[0]


def test_a_broken_configuration_is_a_failure_and_the_server_goes_on(nginx: Nginx) -> None:
    nginx.start()
    (nginx.top / "nginx.conf").write_text("events {} nonsense;\n")
    done = act()
    assert done.returncode == 1
    assert "nginx" in done.stderr
    assert nginx.resumed(None)


def test_sessions_in_a_shared_cache_are_not_called_renewed(nginx: Nginx) -> None:
    nginx.configure("ssl_session_cache shared:S:1m;")
    nginx.start()
    done = act()
    assert done.returncode == 1
    assert "shared cache" in done.stderr
    assert "restart nginx" in done.stderr


def test_keys_from_a_file_are_named(nginx: Nginx) -> None:
    (nginx.top / "ticket.key").write_bytes(os.urandom(80))
    nginx.configure(f"ssl_session_ticket_key {nginx.top}/ticket.key;")
    nginx.start()
    done = act()
    assert done.returncode == 0, done.stderr
    assert f"{nginx.top}/ticket.key: that file is yours to renew" in done.stdout


def test_without_a_server_it_is_skipped() -> None:
    need_root()
    done = subprocess.run(
        driver("session-keys", (), {"Servers": "dovecot"}, None),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 77
    assert "none of these runs: dovecot" in done.stdout


def test_a_process_that_only_calls_itself_nginx_is_not_signalled(tmp_path: Path) -> None:
    need_root()
    need("nginx", package="nginx-light")
    assert "/usr/sbin" in FIXED_PATH
    imposter = tmp_path / "nginx"
    imposter.symlink_to("/bin/sleep")
    with subprocess.Popen([str(imposter), "60"]) as child:
        try:
            assert wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() in ("nginx\n", "sleep\n"), timeout=5)
            done = act()
            assert done.returncode == 77, done.stdout
            assert child.poll() is None
        finally:
            child.kill()


def test_haproxy_in_master_worker_mode_gets_a_new_worker(tmp_path: Path) -> None:
    need_root()
    haproxy = need("haproxy", package="haproxy")
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    (tmp_path / "haproxy.cfg").write_text(
        f"defaults\n  mode http\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\n"
        f"frontend f\n  bind 127.0.0.1:{port}\n  http-request return status 200\n"
    )
    with subprocess.Popen([haproxy, "-W", "-q", "-f", str(tmp_path / "haproxy.cfg")]) as child:
        try:
            workers = Path(f"/proc/{child.pid}/task/{child.pid}/children")
            assert wait_until(lambda: workers.read_text().strip(), timeout=10)
            before = workers.read_text().split()
            done = subprocess.run(
                driver("session-keys", (), {"Servers": "haproxy"}, None), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert set(workers.read_text().split()) - set(before)
        finally:
            child.terminate()
