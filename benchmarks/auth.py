"""Passwords before Prefect and MLflow: their own, and nginx with TLS before both. Right ones run, wrong ones do not.

    .venv/bin/python -m benchmarks.auth

Needs nginx and openssl on the PATH and `pip install 'mlflow[auth]'`. Any answer that is not the expected one ends it
with an error. nginx runs docs/nginx.conf with free ports and a folder of its own.
"""

import base64
import secrets
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.backends import START, both_servers, hits, last_line, puzzle, python_path
from benchmarks.common import ROOT, table, write_page
from tasks.running.servers import LOOPBACK, QUIET, free_port, running, stop

PROFILE = "benchmarks/operate.yaml"
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
Rows = list[list[object]]


def main() -> None:
    """Try everything; write benchmarks/auth.md."""
    password = secrets.token_hex(12)
    rows: Rows = []
    with tempfile.TemporaryDirectory(prefix="puzzle-auth-") as place:
        site = Path(place)
        site.chmod(0o755)  # nginx's workers are another user
        with own_passwords(site, password) as client:
            tried("own passwords", site, client, password, rows)
        with behind_nginx(site, password) as client:
            untrusted = {key: value for key, value in client.items() if "CERT" not in key}
            refused("nginx: no word of the certificate", site, untrusted, "certificate", rows)
            tried("nginx", site, client, password, rows)
            rows.append(["nginx: what a browser sends MLflow (Origin)", *browsed(client, password)])
        in_address = {"MLFLOW_TRACKING_URI": f"http://puzzle:{password}@127.0.0.1:5000"}
        refused("a password in MLFLOW_TRACKING_URI", site, in_address, "holds a password", rows)
        served(site, password, rows)
        left = hits(site, [password, base64.b64encode(f"puzzle:{password}".encode()).decode()])
        assert not left, f"the password stands in {left}"
    write_page(
        "auth",
        "Authentication before Prefect and MLflow",
        [
            f"`puzzle optimize {PROFILE}` in an empty workspace, unless another command stands there.",
            table(["what", "exit code or status", "what it said"], rows),
            "The password, plain and as in an Authorization header, was looked for in every file that all of this left "
            "(logs of puzzle, Prefect, MLflow and nginx, workspaces, databases): not found.",
        ],
    )


def own_server_environments(folder: Path, password: str) -> tuple[dict[str, str], dict[str, str]]:
    """What Prefect's and MLflow's servers need to ask for a password themselves."""
    settings = folder / "mlflow-auth.ini"
    folder.mkdir(exist_ok=True)
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{folder}/users.db"]
    settings.write_text("\n".join([*lines, "admin_username = puzzle"]) + "\n")
    mlflow = {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
    }
    return {"PREFECT_SERVER_API_AUTH_STRING": f"puzzle:{password}"}, mlflow


def credentials(password: str) -> dict[str, str]:
    """What clients of either need."""
    return {
        "PREFECT_API_AUTH_STRING": f"puzzle:{password}",
        "MLFLOW_TRACKING_USERNAME": "puzzle",
        "MLFLOW_TRACKING_PASSWORD": password,
    }


@contextmanager
def own_passwords(site: Path, password: str) -> Iterator[dict[str, str]]:
    """Both servers with their own authentication."""
    prefect, mlflow = own_server_environments(site / "own", password)
    with both_servers(site / "own", prefect, mlflow) as client:
        yield {**client, **credentials(password)}


@contextmanager
def behind_nginx(site: Path, password: str) -> Iterator[dict[str, str]]:
    """Both servers without any, and nginx with docs/nginx.conf before them."""
    folder, ports = site / "nginx", {"4243": free_port(), "5043": free_port()}
    folder.mkdir()
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)
    made = subprocess.run(
        ["openssl", "passwd", "-apr1", "-stdin"], input=password, check=True, capture_output=True, text=True
    )
    (folder / "users").write_text(f"puzzle:{made.stdout.strip()}\n")
    urls = {port: f"https://localhost:{own}" for port, own in ports.items()}
    prefect = {"PREFECT_UI_API_URL": f"{urls['4243']}/api"}
    with both_servers(site / "behind", prefect, {"MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": urls["5043"]}) as behind:
        found = {"4200": behind["PREFECT_API_URL"], "5000": behind["MLFLOW_TRACKING_URI"]}
        ports |= {port: urlsplit(url).port or 0 for port, url in found.items()}
        recipe = (ROOT / "docs" / "nginx.conf").read_text().replace("/etc/puzzle", str(folder))
        for port, own in ports.items():
            recipe = recipe.replace(f"127.0.0.1:{port}", f"127.0.0.1:{own}")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = "\n".join(f"    {kind}_temp_path {folder}/{kind};" for kind in kinds)
        (folder / "nginx.conf").write_text(recipe.replace("http {", f"http {{\n{places}", 1))
        command = [shutil.which("nginx") or "nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
        command += ["-e", str(folder / "error.log"), "-g", f"daemon off; pid {folder}/pid;"]
        with (folder / "nginx.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            time.sleep(1)
            assert process.poll() is None, (folder / "nginx.log").read_text() + (folder / "error.log").read_text()
            yield {
                "PREFECT_API_URL": f"{urls['4243']}/api",
                "MLFLOW_TRACKING_URI": urls["5043"],
                "PREFECT_API_SSL_CERT_FILE": str(folder / "cert.pem"),
                "MLFLOW_TRACKING_SERVER_CERT_PATH": str(folder / "cert.pem"),
                **credentials(password),
            }
        finally:
            stop(process)


def tried(how: str, site: Path, client: dict[str, str], password: str, rows: Rows) -> None:
    """A run with the right password; wrong and missing ones refused; strangers get 401."""
    log = site / f"{how.replace(' ', '-')}.log"
    code, said, _ = puzzle(["optimize", PROFILE, "--workspace", str(site / log.stem)], client, log)
    assert code == 0, said[-3000:]
    noise = [line for line in said.splitlines() if "WARNING" in line or "ERROR" in line]
    rows.append([f"{how}: right", code, f"a child; {len(noise)} warnings"])
    print(rows[-1], noise[:5], flush=True)
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD"):
        wrong = f"puzzle:{password[:-1]}" if name.startswith("PREFECT") else password[:-1]
        refused(f"{how}: wrong {name}", site, {**client, name: wrong}, name.partition("_")[0], rows)
    none = {key: value for key, value in client.items() if key not in credentials(password)}
    refused(f"{how}: none", site, none, "refuses user and password", rows)
    for url in (f"{client['PREFECT_API_URL']}/admin/version", f"{client['MLFLOW_TRACKING_URI']}{SEARCH}"):
        rows.append([f"{how}: a stranger's GET of {urlsplit(url).path}", ask(url, client, {}), ""])
        assert rows[-1][1] == 401, rows[-1]


def refused(what: str, site: Path, client: Mapping[str, str], expected: str, rows: Rows) -> None:
    """Exit code 2, one sentence, no traceback, nothing made."""
    workspace = site / f"refused-{len(rows)}"
    words = ["optimize", PROFILE, "--workspace", str(workspace)]
    code, said, seconds = puzzle(words, client, site / f"{workspace.name}.log")
    assert code == 2 and "Traceback" not in said and expected in said and len(said.strip().splitlines()) == 1, said
    assert not (workspace / "parent").exists()
    rows.append([what, code, f"`{masked(last_line(said))}` ({seconds:.0f} s)"])
    print(rows[-1], flush=True)


def masked(said: str) -> str:
    """Without the ports and folders of this very run."""
    words = [word for word in said.split(" ")]
    for index, word in enumerate(words):
        if "://" in word and urlsplit(word).port:
            words[index] = word.replace(f":{urlsplit(word).port}", "")
    return " ".join(words)


def ask(url: str, client: Mapping[str, str], headers: Mapping[str, str]) -> int:
    """Status of a GET."""
    trust = None
    if url.startswith("https"):
        trust = ssl.create_default_context(cafile=client["MLFLOW_TRACKING_SERVER_CERT_PATH"])
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=dict(headers)), context=trust, timeout=60
        ) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code


def browsed(client: Mapping[str, str], password: str) -> tuple[int, str]:
    """MLflow refuses pages of other origins; the proxy's own must pass."""
    url = client["MLFLOW_TRACKING_URI"]
    own = {"Authorization": "Basic " + base64.b64encode(f"puzzle:{password}".encode()).decode()}
    status = ask(f"{url}{SEARCH}", client, {**own, "Origin": url})
    assert status == 200, status
    return status, f"page: {ask(f'{url}/', client, own)}"


def served(site: Path, password: str, rows: Rows) -> None:
    """`puzzle serve` that starts both servers with their passwords, and a run from its API as the UI does."""
    import httpx

    root = site / "served"
    root.mkdir()
    prefect, mlflow = own_server_environments(site / "served-own", password)
    port, mlflow_port = free_port(), free_port()
    words = ["serve", PROFILE, "--root", str(root), "--port", str(port), "--mlflow-port", str(mlflow_port)]
    environment = {**prefect, **mlflow, "PYTHONPATH": python_path()}
    wrong = {**environment, **credentials(password[:-1])}
    code, said, _ = puzzle(words, wrong, site / "serve-wrong.log")
    assert code == 2 and "Traceback" not in said and "refuses user and password" in said, said
    rows.append(["`puzzle serve` with own passwords, client's wrong", code, f"`{masked(last_line(said))}`"])
    print(rows[-1], flush=True)
    command = [sys.executable, "-c", "from flows.cli import main; main()", *words]
    right, url = {**QUIET, **environment, **credentials(password)}, f"http://{LOOPBACK}:{port}/api"
    with (
        running(command, f"{url}/health", site / "serve.log", right, START, 60),
        httpx.Client(base_url=url, auth=("puzzle", password), timeout=60) as api,
    ):
        deadline = time.monotonic() + START
        while (found := api.get("/deployments/name/optimize/operate")).status_code != 200:
            assert time.monotonic() < deadline, found.text
            time.sleep(1)
        asked = {"parameters": found.json()["parameters"]}
        token = api.get("/csrf-token", params={"client": "auth"}).json()["token"]
        api.headers.update({"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "auth"})
        run = api.post(f"/deployments/{found.json()['id']}/create_flow_run", json=asked).json()["id"]
        while (state := api.get(f"/flow_runs/{run}").json()["state"])["type"] not in ("COMPLETED", "FAILED", "CRASHED"):
            assert time.monotonic() < deadline + START, state
            time.sleep(1)
    assert state["type"] == "COMPLETED", state
    rows.append(["`puzzle serve` with own passwords, a run from its API", "200", state["name"]])
    print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
