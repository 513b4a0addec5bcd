"""What a review found: each was seen to fail."""

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch

from blocks import runtime
from blocks.store import Store
from profiles.schema import Hardware
from tasks.costs import hardware_description
from tasks.failures import watch
from tasks.operating.servers import answer, is_up


def test_costs_of_another_gpu_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("H100", "H200"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        found.append(hardware_description(Hardware(device="cuda")))
    assert found[0] != found[1]


def test_an_object_that_goes_while_it_is_fetched_is_missing_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    store = Store(f"file://{tmp_path}/store")
    store.tell = told.append
    monkeypatch.setattr(store, "_size", lambda name: 3)
    assert not store.fetch("a" * 64, tmp_path / "there.json")
    assert not told
    assert not (tmp_path / "there.json").exists()


def test_a_server_that_speaks_no_http_is_not_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            for _ in range(2):
                with server.accept()[0] as one:
                    one.recv(1000)
                    one.sendall(b"SSH-2.0\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        found: list[Any] = []
        for ask in (answer, is_up):
            try:
                found.append(ask(url))
            except Exception as error:
                found.append(error)
        thread.join()
    assert found == [None, False]


def test_a_dead_run_outside_the_root_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()

    class Client:
        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None: ...

        def read_flow_runs(self, **_: object) -> list[Any]:
            asked = (str(outside), "../outside", "")
            return [SimpleNamespace(id=uuid4(), name=one, parameters={"workspace": one}) for one in asked]

        def set_flow_run_state(self, *_: object, **__: object) -> None: ...

    monkeypatch.setattr(watch, "get_client", lambda sync_client: Client())
    assert watch.start_dead_ones_again(root, [uuid4()]) == []
    assert not (outside / "locks").exists()


def test_both_kinds_of_device_locks_lie_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path / "devices"))
    with runtime.on_device(["cpu:7"]):
        assert list((tmp_path / "devices").iterdir())
