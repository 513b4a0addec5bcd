"""The pictures of docs/how-to/operate.md: both UIs of a site of our own, in headless Chromium.

    .venv/bin/python -m benchmarks.shots                # about five minutes on an idle machine; needs `chromium`

Two runs of the tiny profile with different engines and budgets and a re-optimisation are made first, so that there is
something to compare. Chromium is told what to do over its debugging port: pages are waited for, not guessed at.
"""

import base64
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from benchmarks.site import OVER, PATIENCE, ROOT, Site, request, served
from tasks.operating.charts import OPTIMISATIONS, VIEW
from tasks.running.servers import LOOPBACK, free_port, running

IMAGES = ROOT / "docs" / "images"
QUICK = {"corpus.sources": [{"kind": "python_stdlib", "max_files": 60}], "hardware.threads": 1}
OTHER = {"budget.layer_parameters_fraction": 0.45, "hardware.engine": "llama.cpp"}
MODELS = "puzzle-tiny"


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number = socket, 0

    def tell(self, method: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol, and its answer."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self.socket.recv(timeout=PATIENCE))
            if said.get("id") == self.number:
                assert "error" not in said, said
                return said["result"]

    def evaluate(self, script: str) -> Any:
        """Value of a line of JavaScript."""
        return self.tell("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, text: str, seconds: float = 180) -> None:
        """Until the page shows a text."""
        deadline = time.monotonic() + seconds
        while text not in (self.evaluate("document.body ? document.body.innerText : ''") or ""):
            assert time.monotonic() < deadline, f"{text!r} is not on the page"
            time.sleep(0.5)

    def click(self, text: str) -> None:
        """Press the last button, link or tab of exactly this text."""
        kinds = "button,a,[role=tab],.p-tab,label"
        found = f"[...document.querySelectorAll('{kinds}')].filter(e=>e.innerText.trim()=={text!r})"
        deadline = time.monotonic() + 180
        while not self.evaluate(f"(e=>(e&&e.click(),!!e))({found}.pop())"):
            assert time.monotonic() < deadline, f"nothing to press named {text!r}"
            time.sleep(0.5)

    def write(self, field: str, text: str) -> None:
        """Write into the first text field of a CSS selector, as a person would."""
        self.evaluate(f"document.querySelector({json.dumps(field)}).focus()")
        self.tell("Input.insertText", text=text)
        time.sleep(1)

    def reveal(self, text: str) -> None:
        """Scroll to the innermost element of a text, once it is there."""
        self.wait_for(text)
        found = f"[...document.querySelectorAll('*')].filter(e=>e.innerText&&e.innerText.includes({text!r})).pop()"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
        time.sleep(2)

    def open(self, url: str, text: str, size: tuple[int, int], settle: float = 4.0) -> None:
        """A page in a window of this size, once it shows the text."""
        self.tell("Page.navigate", url="about:blank")  # both UIs change pages behind the #: start afresh
        width, height = size
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.tell("Page.navigate", url=url)
        self.wait_for(text)
        time.sleep(settle)

    def shoot(self, name: str, clip: Sequence[int] | None = None) -> Path:
        """The window as docs/images/<name>.png in few colours; clip: x, y, width, height."""
        cut = {"clip": {**dict(zip(("x", "y", "width", "height"), clip, strict=True)), "scale": 1}} if clip else {}
        data = base64.b64decode(self.tell("Page.captureScreenshot", format="png", **cut)["data"])
        file = IMAGES / f"{name}.png"
        Image.open(io.BytesIO(data)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB", flush=True)
        return file


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no chromium: install Debian's package `chromium`"
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="puzzle-shots-", ignore_cleanup_errors=True) as folder:
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--remote-debugging-port={port}", f"--user-data-dir={folder}/profile", "about:blank"]
        log = Path(folder) / "chromium.log"
        with running(command, f"http://{LOOPBACK}:{port}/json/version", log, {}, PATIENCE):
            pages = request(f"http://{LOOPBACK}:{port}/json/list")[1]
            address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            with connect(address, max_size=None, open_timeout=120) as socket:
                yield Browser(socket)


def forms(site: Site, page: Browser) -> None:
    """The forms of `optimize` and `sweep`, and a value that is refused."""
    own = site.deployment("optimize")
    run = f"{site.prefect}/deployments/deployment/{own['id']}/run"
    page.open(run, "Parameters", (940, 2150))
    page.shoot("form")
    page.open(f"{site.prefect}/deployments/deployment/{site.deployment('sweep')['id']}/run", "Parameters", (940, 1180))
    page.shoot("form-sweep")
    page.open(run, "Parameters", (940, 900))
    page.write("textarea", "700%")
    page.click("Submit")
    page.reveal("is not valid under any of the given schemas")
    page.shoot("form-refused")


def while_running(site: Site, page: Browser) -> str:
    """A run at work, and its artifacts when it is done. Returns the run."""
    run = site.start("optimize", QUICK | OTHER, workspace="shown")
    while not list((site.root / "shown").glob("scores/*.json")):
        assert site.state(run)["type"] not in OVER
        time.sleep(0.2)
    page.open(f"{site.prefect}/runs/flow-run/{run}", "Task Runs", (1300, 1000), settle=8)
    page.shoot("run")
    site.finished(run)
    page.open(f"{site.prefect}/runs/flow-run/{run}?tab=Artifacts", "Artifacts", (1300, 1000))
    page.click("Artifacts")
    time.sleep(4)
    page.shoot("artifacts")
    again = site.start("optimize", QUICK | {"budget.layer_parameters_fraction": 0.45}, workspace="shown")
    site.finished(again)
    page.open(f"{site.prefect}/runs/flow-run/{again}?tab=TaskRuns", "Task Runs", (1300, 1300), settle=8)
    page.click("Task Runs")
    time.sleep(4)
    page.write("input[placeholder='Search by run name']", "distill")
    page.wait_for("Cached")
    time.sleep(4)
    page.shoot("run-cached")
    return run


def in_mlflow(page: Browser, mlflow: str, run_id: str) -> None:
    """The run, what the machine did meanwhile, two runs in charts and side by side, their costs, the registry."""
    client = MlflowClient(tracking_uri=mlflow)
    of = client.get_run(run_id).info.experiment_id
    (machine,) = client.search_runs([of], f"tags.`mlflow.parentRunId` = '{run_id}' and run_name = 'machine'")
    pairs = [
        client.search_runs([of], which, max_results=2) for which in (OPTIMISATIONS, "tags.`puzzle.costs` LIKE '%'")
    ]
    side_by_side = [quote(json.dumps([run.info.run_id for run in pair])) for pair in pairs]
    runs, costs = (
        f"{mlflow}/#/compare-runs?runs={pair}&experiments={quote(json.dumps([of]))}" for pair in side_by_side
    )
    home = f"{mlflow}/#/experiments/{of}/runs"
    page.open(f"{home}/{run_id}", "at_a_glance/kl", (1300, 900))
    page.shoot("mlflow-run")
    page.open(f"{home}/{machine.info.run_id}/system-metrics", "system", (1300, 900), settle=10)
    page.shoot("mlflow-system")
    page.open(f"{home}?viewStateShareKey={VIEW}&compareRunsMode=CHART", "decode_speedup vs", (1800, 1000), settle=10)
    page.shoot("mlflow-charts")
    page.open(runs, "at_a_glance/kl", (1300, 1500), settle=10)
    page.shoot("mlflow-compare")
    page.open(costs, "cost/", (1300, 1500), settle=10)
    page.shoot("mlflow-costs")
    page.open(f"{mlflow}/#/models/{MODELS}", MODELS, (1300, 900))
    page.shoot("registry")
    page.open(f"{mlflow}/#/models/{MODELS}/versions/2", "A child of", (1300, 900))
    page.shoot("registry-version")


def main() -> None:
    """Make a site, its runs, and the pictures."""
    with tempfile.TemporaryDirectory(prefix="puzzle-shots-site-") as folder:
        command = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "2"}
        with served(Path(folder), "tiny", environment=command) as site, browser() as page:
            forms(site, page)
            site.finished(site.start("optimize", QUICK))
            run = while_running(site, page)
            site.finished(site.start("reoptimize", QUICK | OTHER))
            in_mlflow(page, site.mlflow, site.mlflow_run_of(run))


if __name__ == "__main__":
    main()
