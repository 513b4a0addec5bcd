"""Settings of the whole suite: offline, repeatable, quiet; a chain made once.

The process that hands tests to workers reads this file too: it imports no torch.
"""

import gc
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from blocks.runtime import configure, configure_torch

if TYPE_CHECKING:
    from tests.chain import Chain

configure()
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "240",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PUZZLE_DEVICE_LOCKS": tempfile.mkdtemp(prefix="puzzle-test-devices-"),  # no turns with runs outside the suite
    }
)


LONG = ("test_flow.py", "test_end_to_end.py", "test_gkd.py")  # a minute or more each


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several workers, a file is one's: the long ones first, else one worker ends with them while others wait."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (LONG + (item.path.name,)).index(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    configure_torch(1)  # tiny matrices: a second thread only waits


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_is_left_alone() -> None:
    """A collection of garbage, of which torch, accelerate and puzzle ask for many, looks through what this file's tests
    make, not through half a million objects of modules.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums as an engine with one thread makes them, whatever tests before this one have set."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> "Chain":
    """The tiny chain."""
    from tests.chain import make_chain

    return make_chain(tmp_path_factory.mktemp("chain"))
