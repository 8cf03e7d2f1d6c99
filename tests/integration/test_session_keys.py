# SPDX-License-Identifier: Apache-2.0
"""Hook 60-session-keys on a real nginx and a real haproxy: a ticket from before the fork is refused after it."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netns import driver
from support.tickets import TicketClient, certificate, free_port, open_directory
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
        self.port = free_port()
        self.child: subprocess.Popen[bytes] | None = None
        self.client = TicketClient(self.port, b"GET / HTTP/1.0\r\n\r\n")
        certificate(top)
        self.configure("")

    def configure(self, more: str) -> None:
        (self.top / "nginx.conf").write_text(CONFIG.format(top=self.top, port=self.port, more=more))

    def start(self) -> None:
        nginx = need("nginx", package="nginx-light")
        self.child = subprocess.Popen([nginx, "-c", str(self.top / "nginx.conf"), "-g", "daemon off;"])
        assert wait_until(self.client.answers, timeout=10)

    def stop(self) -> None:
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)
            self.child.wait(10)


@pytest.fixture
def nginx() -> Iterator[Nginx]:
    need_root()
    need("nginx", package="nginx-light")
    need("openssl", package="openssl")
    with open_directory() as top:
        server = Nginx(top)
        yield server
        server.stop()


def act(*argv: str, servers: str = "nginx") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        driver("session-keys", argv, {"Servers": servers}, None),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_ticket_from_before_is_refused_after(nginx: Nginx) -> None:
    nginx.start()
    _, ticket = nginx.client.resumed()
    reused, ticket = nginx.client.resumed(ticket)
    assert reused, "without a fork, tickets are taken"
    done = act()
    assert done.returncode == 0, done.stderr + done.stdout
    assert "verified" in done.stdout
    assert nginx.child is not None
    assert str(nginx.child.pid) in done.stdout
    assert not nginx.client.resumed(ticket)[0]
    reused, ticket = nginx.client.resumed()
    assert nginx.client.resumed(ticket)[0], "new tickets are taken again"


def test_a_dry_run_leaves_the_tickets(nginx: Nginx) -> None:
    nginx.start()
    _, ticket = nginx.client.resumed()
    done = act("--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would reload nginx" in done.stdout
    assert nginx.client.resumed(ticket)[0]


def test_a_broken_configuration_is_a_failure_and_the_server_goes_on(nginx: Nginx) -> None:
    nginx.start()
    (nginx.top / "nginx.conf").write_text("events {} nonsense;\n")
    done = act()
    assert done.returncode == 1
    assert "nginx" in done.stderr
    assert nginx.client.resumed()


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
    done = act(servers="dovecot")
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


def haproxy_configuration(top: Path, port: int, more: str = "") -> Path:
    cert, key = certificate(top)
    (top / "both.pem").write_text(cert.read_text() + key.read_text())
    (top / "haproxy.cfg").write_text(
        f"defaults\n  mode http\n  timeout connect 1s\n  timeout client 60s\n  timeout server 1s\n"
        f"frontend f\n  bind 127.0.0.1:{port} ssl crt {top}/both.pem {more}\n  http-request return status 200\n"
    )
    return top / "haproxy.cfg"


@pytest.mark.parametrize("held", [False, True], ids=["idle", "with a client that stays"])
def test_a_ticket_of_haproxy_is_refused_after(tmp_path: Path, *, held: bool) -> None:
    need_root()
    haproxy, port = need("haproxy", package="haproxy"), free_port()
    client = TicketClient(port, b"GET / HTTP/1.0\r\n\r\n")
    with subprocess.Popen([haproxy, "-W", "-q", "-f", str(haproxy_configuration(tmp_path, port))]) as child:
        try:
            assert wait_until(client.answers, timeout=10)
            stays = TicketClient(port, b"").connect() if held else None
            reused, ticket = client.resumed(client.resumed()[1])
            assert reused, "without a fork, tickets are taken"
            done = act(servers="haproxy")
            assert done.returncode == 0, done.stderr
            assert "verified" in done.stdout
            assert not client.resumed(ticket)[0]
            if stays is not None:
                stays.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert stays.recv(100).startswith(b"HTTP/1.1 200"), "a client that was there is not thrown out"
                stays.close()
        finally:
            child.terminate()


def test_ticket_keys_of_haproxy_from_a_file_are_named(tmp_path: Path) -> None:
    need_root()
    haproxy, port = need("haproxy", package="haproxy"), free_port()
    keys = tmp_path / "ticket.keys"
    keys.write_text("".join(f"{base64.b64encode(os.urandom(48)).decode()}\n" for _ in range(3)))
    configuration = haproxy_configuration(tmp_path, port, f"tls-ticket-keys {keys}")
    client = TicketClient(port, b"GET / HTTP/1.0\r\n\r\n")
    with subprocess.Popen([haproxy, "-W", "-q", "-f", str(configuration)]) as child:
        try:
            assert wait_until(client.answers, timeout=10)
            done = act("--dry-run", servers="haproxy")
            assert done.returncode == 0, done.stderr
            assert f"haproxy takes ticket keys from {keys}" in done.stdout
        finally:
            child.terminate()
