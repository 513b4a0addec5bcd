"""The tiny profile with Prefect on PostgreSQL, MLflow on PostgreSQL and S3, and its block library on S3.

    .venv/bin/python -m benchmarks.stores

Real PostgreSQL (POSTGRES_BIN, Debian's by default), moto's S3 server in a process of its own. Each run starts with an
empty workspace. Any answer that is not the expected one ends it with an error.
"""

import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.backends import ask_postgres, both_servers, hits, last_line, postgres, puzzle, python_path, s3
from benchmarks.common import ROOT, table, write_page

PREFECT_TABLES = ("flow_run", "task_run", "artifact", "log", "events")
MLFLOW_TABLES = ("runs", "metrics", "params", "registered_models", "model_versions", "registered_model_aliases")
STORE = ("--set", "store=s3://puzzle/library")
LOAD = """
import json, mlflow, sys
model = mlflow.pyfunc.load_model("models:/puzzle-tiny@champion")
print(json.dumps(model.predict([{"prompt": "import ", "max_new_tokens": 8}])))
"""


def main() -> None:
    """Run, look into the databases, write benchmarks/stores.md."""
    password, secret = secrets.token_hex(12), secrets.token_hex(16)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="puzzle-stores-") as place:
        site = Path(place)
        site.chmod(0o755)  # PostgreSQL is another user
        with both_servers(site / "sqlite", {}, {}) as client:
            run("Prefect and MLflow servers on SQLite, artifacts in a folder", "sqlite", site, client, rows)
        with (
            postgres(site / "postgres", password, ("prefect", "mlflow")) as address,
            s3(site, secret, ("mlflow", "puzzle")) as keys,
        ):
            prefect = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{address}/prefect"}
            mlflow = {
                "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{address}/mlflow",
                "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/artifacts",
                **keys,
            }
            with both_servers(site / "servers", prefect, mlflow) as client:
                everywhere = {**client, **keys}
                run("both on PostgreSQL; artifacts and library on S3", "first", site, everywhere, rows, *STORE)
                words = ["reoptimize", "profiles/tiny.yaml", "--workspace", str(site / "first-workspace"), *STORE]
                code, said, _ = puzzle(words, everywhere, site / "reoptimize.log")
                assert code == 0 and "outcome: first" in said, said[-2000:]
                databases = [*counted(address, "prefect", PREFECT_TABLES), *counted(address, "mlflow", MLFLOW_TABLES)]
                loaded = load(client, site)
                found = in_s3(keys, "mlflow", site / "first-workspace")
                print(databases, loaded, found, flush=True)
                damage(keys)
                said = run("a second machine, one byte of one block flipped", "second", site, everywhere, rows, *STORE)
                told = [line for line in said.splitlines() if "damaged" in line]
                print(told, flush=True)
                assert len(told) == 1 and digest(site / "second-workspace") == digest(site / "first-workspace"), told
        left = hits(site, [password, secret])
        assert not left, f"a password stands in {left}"
    page(rows, databases, loaded, found, told[0])


def run(what: str, name: str, site: Path, client: dict[str, str], rows: list[list[object]], *more: str) -> str:
    """`puzzle optimize` in an empty workspace, as a row."""
    words = ["optimize", "profiles/tiny.yaml", "--workspace", str(site / f"{name}-workspace"), *more]
    code, said, seconds = puzzle(words, client, site / f"{name}.log")
    assert code == 0, said[-3000:]
    stage = dict(re.findall(r"^(\w+) +done in (\S+)$", said, re.MULTILINE))
    traffic = re.findall(r"sent ([\d.]+ \w+ in \d+) files, fetched ([\d.]+ \w+ in \d+)", said)
    cpu = re.findall(r"([\d,]+) CPU-seconds", said)
    rows.append(
        [what, f"{seconds:.0f}", *cpu, stage["distill"], stage["score"], *(traffic[-1] if traffic else ("", ""))]
    )
    print(rows[-1], flush=True)
    return said


def counted(address: str, database: str, tables: tuple[str, ...]) -> list[list[object]]:
    """Rows of some tables, and the size of the database."""
    found: list[list[object]] = [
        [database, name, ask_postgres(address, database, f'select count(*) from "{name}"')[0][0]] for name in tables
    ]
    size = int(str(ask_postgres(address, database, f"select pg_database_size('{database}')")[0][0]))
    return [*found, [database, "size of the database, MiB", f"{size / 2**20:.0f}"]]


def load(client: dict[str, str], site: Path) -> str:
    """The champion, loaded from the registry by a process that has no workspace and no S3 keys; what it completes."""
    environment = {**os.environ, **client, "PYTHONPATH": python_path()}
    ran = subprocess.run([sys.executable, "-c", LOAD], cwd=site, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    completion = json.loads(last_line(ran.stdout))[0]
    assert completion
    return completion


def in_s3(keys: dict[str, str], bucket: str, workspace: Path) -> str:
    """How much lies in a bucket, and that the child's weights are there bit for bit."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )
    objects = client.list_objects_v2(Bucket=bucket)["Contents"]
    weights = [one["Key"] for one in objects if one["Key"].endswith("model.safetensors")]
    bodies = [client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in weights]
    assert hashlib.sha256(bodies[0]).hexdigest() == digest(workspace), weights
    total = sum(one["Size"] for one in objects)
    return (
        f"{len(objects)} objects, {total / 2**20:.1f} MiB, among them the child's weights, bit for bit ({weights[0]})"
    )


def damage(keys: dict[str, str]) -> None:
    """Flip a bit of the weights of one block in the store."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )
    records = client.list_objects_v2(Bucket="puzzle", Prefix="library/records/library/")["Contents"]
    for record in records:
        body = client.get_object(Bucket="puzzle", Key=record["Key"])["Body"].read()
        weights = json.loads(body.partition(b"\n")[2])["weights"]
        if weights:
            key = f"library/objects/{weights['sha256'][:2]}/{weights['sha256']}"
            flipped = bytearray(client.get_object(Bucket="puzzle", Key=key)["Body"].read())
            flipped[-1] ^= 1
            client.put_object(Bucket="puzzle", Key=key, Body=bytes(flipped))
            return


def digest(workspace: Path) -> str:
    """sha256 of the only child of a workspace."""
    (child,) = workspace.glob("runs/*/child/model.safetensors")
    return hashlib.sha256(child.read_bytes()).hexdigest()


def page(rows: list[list[object]], databases: list[list[object]], loaded: str, found: str, told: str) -> None:
    """benchmarks/stores.md."""
    header = ["run", "wall s", "CPU s", "distill", "score", "sent to the store", "fetched"]
    write_page(
        "stores",
        "Stores: PostgreSQL, S3, a library that machines share",
        [
            f"`puzzle optimize profiles/tiny.yaml`, an empty workspace each time, load {os.getloadavg()[0]:.1f} on 2 "
            "cores at the end. S3 is moto's server: a mock, so its seconds say nothing of a real one. Wall time is of "
            "the whole command.",
            table(header, rows),
            "The second machine began with an empty workspace, and took from the store whatever was whole there; both "
            f"children are the same bit for bit. What it said of the flipped byte: `{told}`",
            "In the databases after the second row and a `puzzle reoptimize` that made its child the champion:",
            table(["database", "table", "rows"], databases),
            f"In MLflow's bucket then: {found}.",
            "`mlflow.pyfunc.load_model('models:/puzzle-tiny@champion')` in a process with no workspace and no S3 keys "
            f"(MLflow's server hands the artifacts out) completed `import ` with {len(loaded)} characters.",
            "PostgreSQL's password and the S3 secret were looked for in every file that all of this left (logs, "
            "workspaces, databases, Prefect's home): not found.",
        ],
    )


if __name__ == "__main__":
    assert (ROOT / "profiles" / "tiny.yaml").is_file()
    main()
