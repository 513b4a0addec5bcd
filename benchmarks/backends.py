"""Servers that benchmarks start, on loopback and free ports: PostgreSQL, S3, Prefect, MLflow; puzzle against them.

Everything lies below one folder, so that at the end it can be searched for passwords.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import ROOT
from tasks.running.servers import LOOPBACK, QUIET, free_port, mlflow_server, prefect_server, running, stop

POSTGRES = Path(os.environ.get("POSTGRES_BIN", "/usr/lib/postgresql/15/bin"))


START = 900.0  # seconds that a server may take on a busy machine


def as_postgres() -> list[str]:
    """PostgreSQL refuses to run as root: words before a command that make it the user postgres."""
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []


@contextmanager
def postgres(folder: Path, password: str, databases: Sequence[str]) -> Iterator[str]:
    """A PostgreSQL server of its own with these databases; gives `puzzle:password@host:port`."""
    import psycopg2

    folder.mkdir()
    (folder / "password").write_text(password)
    if os.geteuid() == 0:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres", "postgres")
    data, port = folder / "data", free_port()
    made = [str(POSTGRES / "initdb"), "-D", str(data), "-U", "puzzle", "--auth=scram-sha-256"]
    made += [f"--pwfile={folder / 'password'}"]
    subprocess.run([*as_postgres(), *made], check=True, capture_output=True)
    (folder / "password").unlink()
    command = [*as_postgres(), str(POSTGRES / "postgres"), "-D", str(data), "-k", str(folder)]
    command += ["-h", LOOPBACK, "-p", str(port)]
    with (folder.parent / "postgres.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            try:
                asked = psycopg2.connect(host=LOOPBACK, port=port, user="puzzle", password=password, dbname="postgres")
                break
            except psycopg2.OperationalError:
                assert process.poll() is None, (folder.parent / "postgres.log").read_text()
                time.sleep(0.2)
        asked.autocommit = True
        with asked.cursor() as cursor:
            for name in databases:
                cursor.execute(f'create database "{name}"')
        asked.close()
        yield f"puzzle:{password}@{LOOPBACK}:{port}"
    finally:
        process.send_signal(signal.SIGINT)  # on SIGTERM it waits for its clients
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        stop(process)


def ask_postgres(address: str, database: str, query: str) -> list[tuple[object, ...]]:
    """Rows of a query."""
    import psycopg2

    with psycopg2.connect(f"postgresql://{address}/{database}") as asked, asked.cursor() as cursor:
        cursor.execute(query)
        rows = cursor.fetchall()
    asked.close()
    return rows


@contextmanager
def s3(folder: Path, secret: str, buckets: Sequence[str]) -> Iterator[dict[str, str]]:
    """moto's S3 server with these buckets; gives the environment that reaches it. A mock: it keeps all in memory."""
    import boto3

    url = f"http://{LOOPBACK}:{(port := free_port())}"
    own = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    own |= {"AWS_ACCESS_KEY_ID": "puzzle", "AWS_SECRET_ACCESS_KEY": secret, "MLFLOW_S3_ENDPOINT_URL": url}
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", LOOPBACK, "-p", str(port)]
    with running(command, f"{url}/moto-api/", folder / "s3.log", {}):
        client = boto3.client("s3", endpoint_url=url, aws_access_key_id="puzzle", aws_secret_access_key=secret)
        for name in buckets:
            client.create_bucket(Bucket=name)
        yield own


@contextmanager
def both_servers(folder: Path, prefect: Mapping[str, str], mlflow: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A Prefect and an MLflow server with more in their environments; gives the environment of their clients."""
    folder.mkdir(exist_ok=True)
    command, prefect_url = prefect_server(free_port())
    home = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_UI_API_URL": prefect_url, "PYTHONPATH": python_path()}
    with running(command, f"{prefect_url}/health", folder / "prefect-server.log", {**QUIET, **home, **prefect}, START):
        # a part of this process's environment while the command is made: what it says stays off the command line
        before = dict(os.environ)
        os.environ.update(mlflow)
        command, mlflow_url = mlflow_server(free_port(), f"sqlite:///{folder}/mlflow.db", str(folder / "artifacts"))
        os.environ.clear()
        os.environ.update(before)
        own = {**QUIET, "PYTHONPATH": python_path(), **mlflow}
        with running(command, f"{mlflow_url}/health", folder / "mlflow-server.log", own, START):
            yield {"PREFECT_API_URL": prefect_url, "MLFLOW_TRACKING_URI": mlflow_url}


def python_path() -> str:
    """This repository first."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def puzzle(words: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[int, str, float]:
    """Run the command line; its exit code, all it said (kept in `log`), and seconds."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", *words]
    own = {**os.environ, **QUIET, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path(), **environment}
    started = time.monotonic()
    ran = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    log.write_text(said)
    return ran.returncode, said, time.monotonic() - started


def hits(folder: Path, secrets: Sequence[str], left_out: Sequence[str] = ()) -> list[str]:
    """Files below a folder that hold a secret; `left_out`: names of those that must."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name not in left_out:
            body = path.read_bytes()
            found += [str(path.relative_to(folder)) for secret in secrets if secret.encode() in body]
    return found


def last_line(said: str) -> str:
    """The sentence that a command ended with."""
    return said.strip().splitlines()[-1]
