"""Before a run starts: do the servers that the environment names answer, and do they take its user and password.

Prefect: PREFECT_API_URL with PREFECT_API_AUTH_STRING=user:password. MLflow: MLFLOW_TRACKING_URI with
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Asked through the products' own clients, so that certificates and
proxies are those that the run will meet. No address may hold a password: addresses are printed, logged and linked.
"""

import logging
import math
import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from blocks.errors import PuzzleError, PuzzleFailure
from tasks.running.progress import say

PREFECT, MLFLOW = "PREFECT_API_URL", "MLFLOW_TRACKING_URI"
CREDENTIALS = {
    PREFECT: "PREFECT_API_AUTH_STRING=user:password",
    MLFLOW: "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
}
CERTIFICATE = {PREFECT: "PREFECT_API_SSL_CERT_FILE", MLFLOW: "MLFLOW_TRACKING_SERVER_CERT_PATH"}
REFUSED = (401, 403)
FRESH_SECONDS = 10.0  # so long a server that answered is believed to be there
_ANSWERED: dict[str, float] = {}  # URL -> time of its last answer


class ServerRefused(PuzzleError):
    """A server that does not let this user in, or an address that must not be used."""


class ServerAway(PuzzleFailure):
    """A server that is named, and does not answer."""


def check_servers(environment: Mapping[str, str] = os.environ) -> None:
    """Raises ServerRefused, ServerAway. Says nothing, and asks nobody, where no server is named."""
    for name in (PREFECT, MLFLOW):
        plain_address(name, environment.get(name, ""))
    if environment.get(PREFECT):
        _ask_prefect(environment[PREFECT])
    if environment.get(MLFLOW, "").startswith("http"):  # else a database
        _ask_mlflow(environment[MLFLOW])


def plain_address(name: str, url: str) -> None:
    """ServerRefused for an address with a password in it, or that is none. It is not repeated."""
    try:
        password, _ = (parts := urlsplit(url)).password, parts.port
    except ValueError as error:
        raise ServerRefused(
            f"{name} is not an address: a host and a port, as in http://127.0.0.1:4200, [::1] in brackets where it is "
            "a number of IPv6."
        ) from error
    if password is not None:
        raise ServerRefused(
            f"{name} holds a password, and addresses are printed: take it out, set {CREDENTIALS[name]}."
        )


def _ask_prefect(url: str) -> None:
    import httpx
    from prefect.client.base import ServerType
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            if client.server_type == ServerType.CLOUD:  # which has no page of its version
                client.read_flows(limit=1)
            else:
                client.request("GET", "/admin/version")
    except (PrefectHTTPStatusError, httpx.HTTPStatusError) as error:
        _judge(PREFECT, url, error.response.status_code)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _away(PREFECT, url, error) from error


def _ask_mlflow(url: str) -> None:
    try:
        status = _mlflow_status(url, retries=3)
    except Exception as error:  # MLflow wraps what requests raises
        raise _away(MLFLOW, url, error) from error
    _judge(MLFLOW, url, status)


def _mlflow_status(url: str, retries: int) -> int:
    """HTTP status of a search for experiments: the health page is open to everybody."""
    quiet_mlflow()
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(
        get_default_host_creds(url.rstrip("/")),
        "/api/2.0/mlflow/experiments/search",
        "GET",
        max_retries=retries,
        raise_on_status=False,
        params={"max_results": 1},
    )
    return int(answer.status_code)


def wait_for_mlflow(url: str, seconds: float = 300) -> None:
    """Return once MLflow's server answers, told while it does not. ServerAway after so long.

    MLflow's client asks again by itself, for two minutes and without a word. A server that answered less than
    FRESH_SECONDS ago is not asked again.
    """
    if time.monotonic() < _ANSWERED.get(url, -math.inf) + FRESH_SECONDS:
        return
    deadline, told = time.monotonic() + seconds, False
    while not _mlflow_is_up(url):
        if not told:
            say(f"MLflow at {url} does not answer: waiting for it, {seconds / 60:.0f} minutes at most")
            told = True
        if time.monotonic() > deadline:
            raise ServerAway(f"MLflow at {url} has not answered for {seconds / 60:.0f} minutes: start it")
        time.sleep(1)
    _ANSWERED[url] = time.monotonic()
    if told:
        say(f"MLflow at {url} answers again")


def _mlflow_is_up(url: str) -> bool:
    """True for one who asks for a password too; not for a proxy without its server."""
    try:
        return _mlflow_status(url, retries=0) < 500
    except Exception:  # MLflow wraps what requests raises
        return False


def _judge(name: str, url: str, status: int) -> None:
    if status in REFUSED:
        raise ServerRefused(
            f"the server at {url} ({name}) refuses user and password (HTTP {status}): set {CREDENTIALS[name]}."
        )
    if status >= 400:
        raise ServerAway(f"the server at {url} ({name}) answers HTTP {status}: look into its log, or unset {name}.")


def _away(name: str, url: str, error: Exception) -> PuzzleError:
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "CERTIFICATE_VERIFY_FAILED" in str(error) or "certificate verify failed" in str(error):
        return ServerRefused(
            f"the certificate of {url} ({name}) is not one that this machine trusts: name its file in "
            f"{CERTIFICATE[name]}."
        )
    return ServerAway(f"no answer at {url} ({name}): {told[:160]}. Start it, or unset {name} to do without.")


def quiet_mlflow() -> Any:
    """Import mlflow without telemetry, progress bars and log lines."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return mlflow
