"""Servers that ask for a password, or do not answer: a sentence before any work, and no password in it."""

import base64
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tasks.operating import reach
from tasks.operating.reach import ServerAway, ServerRefused, check_servers, wait_for_mlflow
from tasks.running.servers import free_port, mlflow_server

PASSWORD = "a-secret-of-the-test"
RIGHT = "Basic " + base64.b64encode(f"puzzle:{PASSWORD}".encode()).decode()
NAMES = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")


class Guarded(BaseHTTPRequestHandler):
    """Both APIs at once, for whoever knows the password."""

    def do_GET(self) -> None:
        body = b'"3.9.0"' if "version" in self.path else b"{}"
        known = self.headers.get("Authorization")
        told = next((status for status in (403, 404) if self.path.startswith(f"/{status}/")), 401)
        self.send_response(200 if known == RIGHT and told == 401 and "//" not in self.path else told)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def using(name: str, url: str, password: str | None) -> Iterator[dict[str, str]]:
    """The environment of a client of one server, for either product."""
    credentials = {"MLFLOW_TRACKING_USERNAME": "puzzle", "MLFLOW_TRACKING_PASSWORD": password} if password else {}
    settings = {PREFECT_API_URL: url, **({PREFECT_API_AUTH_STRING: f"puzzle:{password}"} if password else {})}
    with pytest.MonkeyPatch.context() as patch, temporary_settings(settings):
        for variable, value in credentials.items():
            patch.setenv(variable, value)
        yield {name: url}


@pytest.mark.parametrize("name", NAMES)
def test_the_right_password_passes_and_others_are_refused(name: str, url: str) -> None:
    api = f"{url}/api" if name == "PREFECT_API_URL" else url
    with using(name, api, PASSWORD) as environment:
        check_servers(environment)
    for wrong in (PASSWORD[:-1], None):
        told = pytest.raises(ServerRefused, match=f"{name}.*refuses user and password.*set ")
        with using(name, api, wrong) as environment, told as refused:
            check_servers(environment)
        assert PASSWORD[:-1] not in str(refused.value) and url in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_who_is_known_and_not_allowed_is_refused_and_an_answer_that_is_none_is_told(name: str, url: str) -> None:
    with using(name, f"{url}/403", PASSWORD) as environment, pytest.raises(ServerRefused, match=r"HTTP 403\).*set "):
        check_servers(environment)
    with using(name, f"{url}/404", PASSWORD) as environment, pytest.raises(ServerAway, match=f"HTTP 404.*unset {name}"):
        check_servers(environment)


def test_a_slash_at_the_end_of_mlflows_address_is_no_other_address(url: str) -> None:
    with using("MLFLOW_TRACKING_URI", f"{url}/", PASSWORD) as environment:
        check_servers(environment)


@pytest.mark.parametrize("said", ["[SSL: CERTIFICATE_VERIFY_FAILED]", "ssl: certificate verify failed: self-signed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_certificate_that_is_not_trusted_is_told_with_the_variable_that_names_it(name: str, said: str) -> None:
    refused = reach._away(name, "https://host", ValueError(said))
    assert isinstance(refused, ServerRefused) and reach.CERTIFICATE[name] in str(refused)
    away = reach._away(name, "https://host", ValueError("no route\nand a page more"))
    assert isinstance(away, ServerAway) and "no route. Start it" in str(away) and f"unset {name}" in str(away)


@pytest.mark.parametrize("name", NAMES)
def test_an_address_with_a_password_is_refused_and_not_repeated(name: str) -> None:
    for scheme in ("http", "https", "postgresql"):
        with pytest.raises(ServerRefused, match="holds a password") as refused:
            check_servers({name: f"{scheme}://puzzle:{PASSWORD}@127.0.0.1:1/x"})
        assert PASSWORD not in str(refused.value)
    with pytest.raises(ServerRefused, match="holds a password"):
        check_servers({name: "http://puzzle:@127.0.0.1:1"})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("address", ["http://[", "http://[::1", "http://127.0.0.1:port", "http://127.0.0.1:99999"])
def test_what_is_no_address_is_a_sentence(name: str, address: str) -> None:
    with pytest.raises(ServerRefused, match=f"{name} is not an address: .*http://127.0.0.1"):
        check_servers({name: address})
    with pytest.raises(ServerRefused) as refused:
        check_servers({name: f"http://puzzle:{PASSWORD}@[::1"})
    assert PASSWORD not in str(refused.value)


def test_a_server_that_is_away_is_told() -> None:
    nobody = f"http://127.0.0.1:{free_port()}/api"
    told = pytest.raises(ServerAway, match=r"no answer at .*Start it")
    with using("PREFECT_API_URL", nobody, None) as environment, told:
        check_servers(environment)
    check_servers({})
    check_servers({"MLFLOW_TRACKING_URI": "sqlite:////tmp/mlflow.db"})


def test_what_mlflows_variables_say_stays_off_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"postgresql://puzzle:{PASSWORD}@db/mlflow")
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", "s3://bucket/x")
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", "auth.ini")
    words, _ = mlflow_server(1234, "sqlite:///x", "folder")
    assert PASSWORD not in " ".join(words) and "sqlite:///x" not in words and "folder" not in words
    assert words[words.index("--app-name") + 1] == "basic-auth"


class Away(BaseHTTPRequestHandler):
    """A proxy whose server is away."""

    def do_GET(self) -> None:
        self.send_response(502)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_mlflow_that_is_away_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(reach, "say", said.append)
    monkeypatch.setattr(reach, "_ANSWERED", {})
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with pytest.raises(ServerAway, match="has not answered"):
        wait_for_mlflow(address, seconds=0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Away) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        with pytest.raises(ServerAway, match="has not answered"):
            wait_for_mlflow(f"http://127.0.0.1:{proxy.server_port}", seconds=0.1)
        proxy.shutdown()
    found: list[ThreadingHTTPServer] = []

    def come_back() -> None:  # asking for a password: it is there
        found.append(ThreadingHTTPServer(("127.0.0.1", port), Guarded))
        found[0].serve_forever()

    threading.Timer(0.5, come_back).start()
    said.clear()
    wait_for_mlflow(address, seconds=20)
    found[0].shutdown()
    assert [line.split(address)[1] for line in said] == [
        " does not answer: waiting for it, 0 minutes at most",
        " answers again",
    ]


def test_mlflow_that_answered_is_not_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    now = [100.0]

    def answers(address: str) -> bool:
        asked.append(address)
        return True

    monkeypatch.setattr(reach, "_mlflow_is_up", answers)
    monkeypatch.setattr(reach, "_ANSWERED", {})
    monkeypatch.setattr("tasks.operating.reach.time.monotonic", lambda: now[0])
    for later in (0, 1, reach.FRESH_SECONDS - 1.5, 1):
        now[0] += later
        wait_for_mlflow("http://one")
    assert asked == ["http://one"] * 2
    wait_for_mlflow("http://other")
    assert asked[2:] == ["http://other"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_mlflow_is_waited_for_with_the_certificate_that_runs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    made = [*words.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    monkeypatch.setattr(reach, "_ANSWERED", {})
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"https://localhost:{server.server_port}"
        with pytest.raises(ServerAway, match="has not answered"):
            wait_for_mlflow(address, seconds=0.1)
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        wait_for_mlflow(address, seconds=0.1)
        server.shutdown()
