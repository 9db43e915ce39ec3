"""Large sets of encoded images: decoded onto disk once, and from where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daskcurv.errors import DataError, StoreWriteError
from daskcurv.experiment.data import Dataset, draft, encoded, preparation, read_dataset
from daskcurv.experiment.data.decoding import pixels_of
from daskcurv.experiment.data.encoded import Encoded
from daskcurv.experiment.data.preparation import find_copy, prepare_encoded
from daskcurv.experiment.data.prepared import prepare
from tests.support.formats import png, samples, write_folders, write_parquet

N, PER_CHUNK, SIZE = 23, 5, 8
CHUNKS = -(-N // PER_CHUNK)


class Killed(BaseException):
    """As if the process had been killed."""


@pytest.fixture
def decoded(monkeypatch) -> Counter[str]:
    """Large is what has more than a few pixels; counts how often each image was decoded."""
    monkeypatch.setattr(encoded, "IN_MEMORY", 1000)
    monkeypatch.setattr(encoded, "_FIRST_LOOK", 4)
    monkeypatch.setattr(draft, "CHUNK_BYTES", PER_CHUNK * 3 * SIZE * SIZE)
    monkeypatch.setattr(preparation, "say_preparation", lambda *args: None)
    counts: Counter[str] = Counter()
    genuine = pixels_of

    def counting(source: Any, channels: int) -> Any:
        counts[
            hashlib.md5(source if isinstance(source, bytes) else source.read_bytes()).hexdigest()
        ] += 1
        return genuine(source, channels)

    monkeypatch.setattr(encoded, "pixels_of", counting)
    return counts


def read(path: Path) -> Dataset:
    return read_dataset(path, mean=0.4, std=0.3, image_size=SIZE)


def large(path: Path) -> Encoded:
    found = read(path)
    assert isinstance(found, Encoded)
    return found


@pytest.fixture
def small(tmp_path) -> Dataset:
    """What the data set is when it is read into memory."""
    return read(write_folders(tmp_path / "set", *samples(N)))


@pytest.mark.parametrize("write", [write_folders, write_parquet])
def test_a_large_set_becomes_the_copy_that_a_small_one_becomes(tmp_path, small, decoded, write):
    dataset = large(write(tmp_path / "other", *samples(N)))
    assert not decoded
    copy = prepare_encoded(dataset, tmp_path / "inputs")
    assert set(decoded.values()) == {1}
    assert (
        copy.directory
        == prepare(small, tmp_path / "of_small").directory.parent.with_name("inputs")
        / small.digest()[:16]
    )
    np.testing.assert_array_equal(copy.images, small.images)
    np.testing.assert_array_equal(copy.labels, small.labels)
    np.testing.assert_array_equal(copy.keys(), small.keys())
    assert copy.digest() == small.digest()
    assert prepare(copy, tmp_path / "inputs") is copy
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == [copy.directory.name]
    ids = np.array([0, 7, N - 1])
    for one, other in zip(
        pickle.loads(pickle.dumps(copy)).inputs(ids), small.inputs(ids), strict=True
    ):
        assert one.equal(other)
    assert find_copy(large(dataset.path), tmp_path / "inputs") == copy
    assert sum(decoded.values()) == N


@pytest.mark.parametrize("at", range(CHUNKS))
def test_a_killed_preparation_goes_on_with_what_is_missing(
    tmp_path, small, decoded, monkeypatch, at
):
    genuine = draft.Draft.write

    def killed(self: Any, number: int, *arrays: Any) -> None:
        if number == at:
            with (self.directory / "chunks.jsonl").open("a") as file:
                file.write('{"number": ')  # in the middle of a line
            raise Killed
        genuine(self, number, *arrays)

    with monkeypatch.context() as patched:
        patched.setattr(draft.Draft, "write", killed)
        with pytest.raises(Killed):
            prepare_encoded(large(tmp_path / "set"), tmp_path / "inputs")
    decoded.clear()
    copy = prepare_encoded(large(tmp_path / "set"), tmp_path / "inputs")
    assert set(decoded.values()) == {1}
    assert sum(decoded.values()) == N - at * PER_CHUNK
    np.testing.assert_array_equal(copy.images, small.images)
    assert copy.digest() == small.digest()


def interrupted(path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare all chunks, and stop before the copy gets its name."""
    with monkeypatch.context() as patched:
        patched.setattr(draft.Draft, "finish", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare_encoded(large(path), inputs)


def test_a_file_that_changes_in_between_is_decoded_again(tmp_path, decoded, monkeypatch, caplog):
    images, labels = samples(N)
    path = write_folders(tmp_path / "set", images, labels)
    interrupted(path, tmp_path / "inputs", monkeypatch)
    decoded.clear()
    images[7] = 255 - images[7]
    write_folders(path, images[7:8], labels[7:8])
    (path / "ant" / "0000.png").replace(next(path.rglob("0007.png")))
    write_folders(path, images[:1], labels[:1])
    with caplog.at_level(logging.INFO, "daskcurv"):
        copy = prepare_encoded(large(path), tmp_path / "inputs")
    assert "files of 2 more have changed" in caplog.text
    assert 0 < sum(decoded.values()) <= 2 * PER_CHUNK
    monkeypatch.setattr(encoded, "IN_MEMORY", 2**30)
    np.testing.assert_array_equal(copy.images, read(path).images)


def test_a_chunk_that_is_not_on_disk_as_written_is_decoded_again(
    tmp_path, small, decoded, monkeypatch, caplog
):
    interrupted(tmp_path / "set", tmp_path / "inputs", monkeypatch)
    with (tmp_path / "inputs" / "decoding" / "images.npy").open("r+b") as file:
        file.seek(200)
        file.write(b"\0\1\2\3\4")
    decoded.clear()
    copy = prepare_encoded(large(tmp_path / "set"), tmp_path / "inputs")
    assert sum(decoded.values()) == PER_CHUNK
    assert "1 chunks are not on disk as they were written" in caplog.text
    assert copy.digest() == small.digest()


def test_a_touched_file_is_compared_and_a_changed_one_is_another_data_set(
    tmp_path, small, decoded, caplog
):
    path = tmp_path / "set"
    copy = prepare_encoded(large(path), tmp_path / "inputs")
    one = sorted(path.rglob("*.png"))[7]
    os.utime(one, (1, 1))
    decoded.clear()
    assert prepare_encoded(large(path), tmp_path / "inputs") == copy
    assert sum(decoded.values()) == PER_CHUNK
    one.write_bytes(png(255 - samples(N)[0][7]))
    other = prepare_encoded(large(path), tmp_path / "inputs")
    assert "images changed since they were decoded" in caplog.text
    assert other.digest() != copy.digest()


def test_images_that_cannot_be_decoded_are_all_counted_and_the_others_kept(
    tmp_path, small, decoded, monkeypatch
):
    path = tmp_path / "set"
    files = sorted(path.rglob("*.png"))
    whole = files[6].read_bytes()
    files[6].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of the 23 images .* ant/0006\.png \(it is none of"):
        prepare_encoded(large(path), tmp_path / "inputs")
    for number in (6, 17):  # a header, and not all pixels
        files[number].write_bytes(
            files[number].read_bytes()[:-600] if number == 17 else whole[:-600]
        )
    decoded.clear()
    with pytest.raises(DataError, match=r"2 of the 23 images .* cannot be decoded"):
        prepare_encoded(large(path), tmp_path / "inputs")
    assert sum(decoded.values()) == N
    files[6].write_bytes(whole)
    files[17].write_bytes(png(samples(N)[0][17]))
    decoded.clear()
    assert prepare_encoded(large(path), tmp_path / "inputs").digest() == small.digest()
    assert sum(decoded.values()) == PER_CHUNK + PER_CHUNK


def test_a_disk_that_is_too_small_is_refused_before_anything_is_decoded(
    tmp_path, small, decoded, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreWriteError, match=r"0\.00 GiB are free.*another --store"):
        prepare_encoded(large(tmp_path / "set"), tmp_path / "inputs")
    assert not decoded


def test_a_worker_notices_a_copy_that_is_damaged(tmp_path, small, decoded):
    copy = prepare_encoded(large(tmp_path / "set"), tmp_path / "inputs")
    with (copy.directory / "images.npy").open("r+b") as file:
        file.seek(128 + 7 * 3 * SIZE * SIZE)
        file.write(b"\0\1\2\3\4")
    of_worker = pickle.loads(pickle.dumps(copy))
    of_worker.inputs(np.array([0, 1]))
    with pytest.raises(DataError, match="images 5 to 9 are not as written"):
        of_worker.inputs(np.array([9]))
    (copy.directory / "record.json").write_text(json.dumps({"sha256": ""}))
    with pytest.raises(DataError, match=r"record\.json is damaged"):
        pickle.loads(pickle.dumps(copy)).inputs(np.array([0]))


def test_few_chunks_are_in_memory_at_a_time(tmp_path, small, decoded, monkeypatch):
    alive, most = [0], [0]
    genuine, write = preparation._buffers, draft.Draft.write

    def buffers(*args: Any) -> Any:
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return genuine(*args)

    def written(self: Any, *args: Any) -> None:
        write(self, *args)
        alive[0] -= 1

    monkeypatch.setattr(preparation, "_buffers", buffers)
    monkeypatch.setattr(draft.Draft, "write", written)
    prepare_encoded(large(tmp_path / "set"), tmp_path / "inputs")
    assert most == [3]
