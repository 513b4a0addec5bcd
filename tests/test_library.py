"""Digests, atomic writes, damaged files."""

from pathlib import Path

import pytest
import torch

from blocks.errors import DamagedBlock
from blocks.files import atomic_path
from blocks.library import (
    BlockLibrary,
    checked_path,
    digest_of,
    is_whole,
    read_tensors,
    read_value,
    write_tensors,
    write_value,
)
from blocks.records import BlockRecord, Ref


def test_digest_ignores_order_and_refuses_what_is_unstable() -> None:
    assert digest_of(a=1, b=[1, 2]) == digest_of(b=[1, 2], a=1)
    assert digest_of(a=1) != digest_of(a=2)
    for unstable in ({"x"}, torch.zeros(1)):
        with pytest.raises(TypeError, match="no stable digest"):
            digest_of(a=unstable)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    reference = write_tensors(tmp_path, "a/b.safetensors", {"x": torch.arange(6.0)})
    torch.testing.assert_close(read_tensors(tmp_path, reference)["x"], torch.arange(6.0))
    path = tmp_path / reference.path
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert not is_whole(tmp_path, reference)
    with pytest.raises(DamagedBlock, match="differs from its digest"):
        read_tensors(tmp_path, reference)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DamagedBlock, match="missing"):
        checked_path(tmp_path, Ref(path="nowhere.safetensors", sha256="0" * 64))


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    target.write_text("old")

    def interrupted() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_library_forgets_a_record_whose_weights_are_damaged(tmp_path: Path) -> None:
    library = BlockLibrary(tmp_path)
    weights = write_tensors(tmp_path, library.weights_path("k"), {"w": torch.ones(2)})
    record = BlockRecord(key="k", layer=0, subblock="ffn", variant="linear", status="trained", weights=weights)
    library.add(record)
    assert library.find("k") == record
    (tmp_path / weights.path).write_bytes(b"")
    assert library.find("k") is None


def test_a_broken_manifest_is_told_with_its_path(tmp_path: Path) -> None:
    write_value(tmp_path / "r.json", Ref(path="a", sha256="b"))
    (tmp_path / "r.json").write_text('{"path": 3}')
    with pytest.raises(DamagedBlock, match="r.json is not a Ref"):
        read_value(tmp_path / "r.json", Ref)
