"""Training sets as others store them: the same data set in every format, or one clear refusal."""

from __future__ import annotations

import errno
import gzip
import hashlib
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torchvision.transforms import v2

from daskcurv.errors import DataError
from daskcurv.experiment.data import Arrays, Dataset, read_dataset
from daskcurv.experiment.data.cifar import MEAN, STD, Cifar, read_cifar
from daskcurv.experiment.data.encoded import Encoded
from daskcurv.experiment.data.prepared import prepare
from tests.support.builders import write_cifar
from tests.support.formats import (
    COLOUR,
    GREY,
    NAMES,
    as_pillow,
    idx_file,
    png,
    samples,
    write_cifar10,
    write_folders,
    write_gz_idx,
    write_idx,
    write_npy,
    write_npz,
    write_parquet,
    write_shards,
    write_train_folders,
)

MESSAGES = "daskcurv.experiment.data"


def read(path: Path, mean: Any = 0.4, std: Any = 0.3, image_size: int | None = None) -> Dataset:
    return read_dataset(path, mean=mean, std=std, image_size=image_size)


def refusal(path: Path, **wishes: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(path, **wishes)
    return str(refused.value)


@pytest.mark.parametrize("write", COLOUR)
def test_colour_images_are_the_same_in_any_format(tmp_path, write):
    images, labels = samples()
    held = read(write(tmp_path / "set", images, labels))
    assert isinstance(held, Arrays)
    assert held.digest() == Cifar(images, labels).digest()
    assert held.images.dtype == np.uint8
    assert held.images.flags.c_contiguous
    assert held.labels.dtype == np.int64
    assert (held.mean, held.std) == ((0.4,) * 3, (0.3,) * 3)
    named = write not in (write_npz, write_npy, write_shards)
    assert held.class_names == (NAMES if named else ())
    assert prepare(held, tmp_path / "inputs").digest() == held.digest()


@pytest.mark.parametrize("write", GREY)
def test_grey_images_are_the_same_in_any_format(tmp_path, write):
    images, labels = samples(channels=1, height=28, width=20)
    held = read(write(tmp_path / "set", images, labels), mean=(0.4,), std=[0.3])
    assert held.digest() == Arrays(images, labels, (0.4,), (0.3,)).digest()
    assert (held.mean, held.std) == ((0.4,), (0.3,))


def test_cifar_100_is_read_as_ever(tmp_path):
    write_cifar(tmp_path, num_samples=12)
    held, expected = read_dataset(tmp_path), read_cifar(tmp_path)
    assert isinstance(held, Cifar)
    assert held.digest() == expected.digest()
    assert (held.mean, held.std) == (MEAN, STD)
    assert held.class_names == expected.class_names
    assert not held.published


def test_cifar_100_takes_another_normalisation_and_size(tmp_path, monkeypatch):
    images, labels = write_cifar(tmp_path, num_samples=12)
    with (tmp_path / "train").open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    monkeypatch.setattr("daskcurv.experiment.data.cifar._PUBLISHED_TRAIN_MD5", md5)
    held = read_dataset(tmp_path, mean=[0.1, 0.2, 0.3], image_size=20)
    assert isinstance(held, Cifar)
    assert held.published
    assert (held.mean, held.std) == ((0.1, 0.2, 0.3), STD)
    np.testing.assert_array_equal(held.images, as_torchvision(images, 20))
    np.testing.assert_array_equal(held.labels, labels)
    assert "--mean has 2 values, but the images" in refusal(tmp_path, mean=[0.1, 0.2])


def test_nothing_there_is_what_it_ever_was(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        with pytest.raises(DataError) as expected:
            read_cifar(path)
        assert refusal(path) == str(expected.value)
        assert "expected the files of CIFAR-100's python version" in str(expected.value)
    (tmp_path / "train").symlink_to(tmp_path / "unmounted")
    assert "unmounted, which cannot be reached" in refusal(tmp_path)


def test_something_else_there_is_met_with_the_formats_that_are_read(tmp_path):
    message = refusal(tmp_path)
    for words in ("CIFAR-100", "CIFAR-10'", "idx", "npz", "images.npy", "Parquet", "class folders"):
        assert words in message
    assert str(tmp_path) in message
    assert "--data_path" in message
    assert "--download" in message
    assert "the directory has nothing" in message
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    assert "the directory has notes" in refusal(tmp_path)
    assert "this is a file" in refusal(tmp_path / "notes" / "a.txt")


def as_torchvision(images: np.ndarray, size: int) -> np.ndarray:
    transform = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    return np.stack([transform(torch.from_numpy(image)).numpy() for image in images])


@pytest.mark.parametrize(("height", "width"), [(40, 25), (18, 61), (30, 30), (24, 24)])
@pytest.mark.parametrize(
    ("channels", "formats"),
    [(3, [write_folders, write_npz, write_parquet]), (1, [write_idx, write_folders])],
)
def test_images_are_resized_as_by_torchvision(tmp_path, height, width, channels, formats):
    images, labels = samples(channels=channels, height=height, width=width)
    expected = as_torchvision(images, 24)
    for write in formats:
        held = read(write(tmp_path / write.__name__, images, labels), image_size=24)
        np.testing.assert_array_equal(held.images, expected)
        np.testing.assert_array_equal(held.labels, labels)


def test_images_of_several_sizes_are_resized_one_by_one(tmp_path):
    expected = []
    for label, shape in enumerate([(40, 20), (12, 30), (24, 24)]):
        images, labels = samples(3, 3, *shape)
        write_folders(tmp_path, images[:1], labels[:1] + label)
        expected.append(as_torchvision(images[:1], 24))
    held = read(tmp_path, image_size=24)
    np.testing.assert_array_equal(held.images, np.concatenate(expected))
    message = refusal(tmp_path)
    assert f"images of {tmp_path} have 3 sizes (height × width): 40 × 20 (1, such as ant" in message
    assert "12 × 30" in message
    assert "--image_size" in message


@pytest.mark.parametrize("write", [*COLOUR, write_idx])
def test_normalisation_has_to_be_given(tmp_path, write):
    channels = 1 if write is write_idx else 3
    path = write(tmp_path / "set", *samples(channels=channels))
    for wishes, missing in (
        ({"mean": None, "std": None}, "give --mean and --std: one value for each channel"),
        ({"mean": None}, "give --mean: "),
        ({"std": None}, "give --std: "),
    ):
        message = refusal(path, **wishes)
        assert missing in message
        assert str(path) in message
        assert "pixels scaled to 0 … 1" in message
    message = refusal(path, mean=[0.1, 0.2, 0.3, 0.4])
    assert f"--mean has 4 values, but the images of {path}" in message
    assert f"have {channels} channel" in message


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"mean": [125.3, 123, 113.9]}, "on the 0 … 255 scale? Give it on pixels scaled to 0 … 1"),
        ({"mean": [125.3, 123, 113.9]}, "(0.4914 0.4824 0.4467 if it is)"),
        ({"std": [63, 62.1, 66.7]}, "--std is 63 62.1 66.7: on the 0 … 255 scale?"),
        ({"std": [0.2, 0, 0.2]}, "--std is 0.2 0 0.2; expected numbers above 0"),
        ({"mean": float("nan")}, "--mean is nan; expected finite numbers"),
        ({"std": []}, "--std is empty; expected finite numbers"),
        ({"image_size": 0}, "--image_size is 0; expected a number of pixels, at least 1"),
        ({"mean": [0.1, 0.2]}, "--mean has 2 values, but the images of"),
        ({"std": [0.1, 0.2]}, "have 3 channels; give 3 values, or one for all channels"),
    ],
)
def test_values_that_cannot_be_right_are_refused(tmp_path, wishes, expected):
    assert expected in refusal(write_npy(tmp_path / "set", *samples()), **wishes)


def test_one_channel_takes_one_value(tmp_path):
    path = write_idx(tmp_path / "set", *samples(channels=1))
    assert "have 1 channel; give one value" in refusal(path, mean=[0.1, 0.2, 0.3])


def test_consecutive_batches_of_cifar_10_are_a_training_set(tmp_path, caplog):
    images, labels = samples()
    write_cifar10(tmp_path, images, labels)
    (tmp_path / "batches.meta").unlink()
    (tmp_path / "data_batch_1").unlink()
    with caplog.at_level(logging.INFO, MESSAGES):
        held = read(tmp_path)
    assert "2 of CIFAR-10's 5 training batches (data_batch_2, data_batch_3)" in caplog.text
    np.testing.assert_array_equal(held.images, images[3:])
    assert held.class_names == ()


def test_a_gap_between_batches_of_cifar_10_is_refused(tmp_path):
    write_cifar10(tmp_path, *samples())
    (tmp_path / "data_batch_2").unlink()
    message = refusal(tmp_path)
    assert f"{tmp_path} has no data_batch_2, but batches before and after it" in message
    for name in ("data_batch_1", "data_batch_3"):
        (tmp_path / name).unlink()
    assert "has batches.meta but none of CIFAR-10's training batches" in refusal(tmp_path)


class Prints:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": np.zeros((2, 3072), np.uint8)}, "has no 'labels'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, -1]}, "'labels' has -1"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 1]}, "(2, 3071)"),
        ({"data": Prints(), "labels": [1, 1]}, "builtins.print"),
    ],
)
def test_a_batch_of_cifar_10_that_is_not_one_is_named(tmp_path, content, expected, capsys):
    write_cifar10(tmp_path, *samples())
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content))
    message = refusal(tmp_path)
    assert expected in message
    assert str(tmp_path / "data_batch_2") in message
    assert "CIFAR-100" not in message
    assert capsys.readouterr().out == ""
    (tmp_path / "data_batch_2").write_bytes(b"\x80")
    message = refusal(tmp_path)
    assert "cannot be read as a CIFAR-10 pickle" in message
    assert "--download" not in message


def test_image_files_of_every_kind_are_read_in_the_order_of_their_paths(tmp_path, caplog):
    (image,), _ = samples(1)
    expected = []
    names = ["1.BMP", "10.png", "2.ppm", "3.webp", "4.tif", "sub/0.png", "z.jpeg"]
    for name in reversed(names):
        path = tmp_path / "b" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        as_pillow(image).save(path, lossless=True)
    for name in names:
        with Image.open(tmp_path / "b" / name) as opened:
            expected.append(np.asarray(opened.convert("RGB")).transpose(2, 0, 1))
    write_folders(tmp_path, *samples(1))
    (tmp_path / "b" / ".hidden.png").write_bytes(b"of the file system")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "1.png").touch()
    (tmp_path / "b" / "notes.txt").touch()
    (tmp_path / "readme.md").touch()
    with caplog.at_level(logging.INFO, MESSAGES):
        held = read(tmp_path)
    assert held.class_names == ("ant", "b")
    np.testing.assert_array_equal(held.images[1:], expected)
    assert held.labels.tolist() == [0] + [1] * len(names)
    assert "8 images in 2 class folders (ant, b)" in caplog.text
    assert "1 files in class folders are not images by their names" in caplog.text


def test_the_class_folders_in_train_are_used_and_it_is_said(tmp_path, caplog):
    images, labels = samples()
    with caplog.at_level(logging.INFO, MESSAGES):
        held = read(write_train_folders(tmp_path, images, labels))
    assert f"{tmp_path}: the training set is in train" in caplog.text
    assert len(held) == len(images)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        as_pillow(samples(1)[0][0]).save(tmp_path / name / "1.png")
    assert read(tmp_path).class_names == ("car", "train")


@pytest.mark.parametrize("names", [("val", "Test"), ("train", "val")])
def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        as_pillow(samples(1)[0][0]).save(tmp_path / name / "1.png")
    message = refusal(tmp_path)
    assert f"the directories of {tmp_path} are parts of a data set by their names" in message
    assert ", ".join(sorted(names)) in message
    assert "Point --data_path at the one with the class folders of the training set" in message


def test_grey_among_colour_becomes_colour(tmp_path):
    images, labels = samples(2, channels=1)
    write_folders(tmp_path, images, labels)
    colour = samples(1)[0]
    write_folders(tmp_path, colour, np.array([2]))
    held = read(tmp_path)
    expected = np.concatenate([images.repeat(3, axis=1), colour])
    np.testing.assert_array_equal(held.images, expected)


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "LA", "RGBA"])
def test_other_kinds_of_pixels_are_converted_as_pillow_does(tmp_path, mode, caplog):
    image = as_pillow(samples(1)[0][0]).convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    (tmp_path / "ant").mkdir()
    image.save(tmp_path / "ant" / f"1.{suffix}")
    with caplog.at_level(logging.INFO, MESSAGES):
        held = read(tmp_path)
    expected = np.asarray(image.convert("L" if mode in ("1", "LA") else "RGB"))
    np.testing.assert_array_equal(held.images[0].transpose(1, 2, 0).squeeze(), expected)
    assert ("transparency of 1 images" in caplog.text) == mode.endswith("A")


def test_a_transparent_palette_is_read_without_a_warning(tmp_path):
    image = as_pillow(samples(1)[0][0]).convert("P")
    (tmp_path / "ant").mkdir()
    image.save(tmp_path / "ant" / "1.png", transparency=bytes(range(256)))
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read(tmp_path).images[0], expected)


def test_images_that_cannot_be_decoded_are_counted_and_the_first_ones_named(tmp_path):
    write_folders(tmp_path, *samples())
    whole = (tmp_path / "bee" / "0003.png").read_bytes()
    (tmp_path / "ant" / "0000.png").write_bytes(b"<html>")
    (tmp_path / "ant" / "0001.png").write_bytes(b"")
    (tmp_path / "bee" / "0003.png").write_bytes(whole[:2000])
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "cat" / "0006.png")
    message = refusal(tmp_path)
    assert message.startswith(f"4 of the 7 images of {tmp_path} cannot be decoded: ant/0000.png (")
    assert "it is none of PNG, JPEG" in message
    assert "bee/0003.png (" in message
    assert "and 1 more" in message
    assert "Replace them, or take them out" in message
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    assert "7 of the 7 images" in refusal(tmp_path)


def test_more_than_8_bits_a_pixel_are_refused(tmp_path):
    (tmp_path / "ant").mkdir()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "ant" / "1.png")
    assert "ant/1.png (it has more than 8 bits a pixel; convert it to 8)" in refusal(tmp_path)


def test_images_that_take_gigabytes_are_not_decoded_when_they_are_read(tmp_path):
    write_folders(tmp_path, *samples())
    found = read(tmp_path, image_size=20_000)
    assert isinstance(found, Encoded)
    assert found.image_shape == (3, 20_000, 20_000)
    with pytest.raises(DataError, match=r"digest of .* once its images have been decoded"):
        found.digest()


@pytest.mark.parametrize("count", [3, 300])
def test_the_key_of_an_image_is_that_of_its_pixels_in_any_format_and_size(tmp_path, count):
    images, labels = samples(count)
    expected = [
        hashlib.blake2b(b"uint8 (3, 32, 32)" + image.tobytes(), digest_size=16).digest()
        for image in images
    ]
    for number, write in enumerate((write_folders, write_npz, write_cifar10, write_parquet)):
        for image_size in (None, 8):
            path = tmp_path / f"{number} {image_size}"
            keys = read(write(path, images, labels), image_size=image_size).keys()
            assert [bytes(key) for key in keys] == expected


def test_samples_have_the_names_of_their_files_below_the_data_path(tmp_path):
    images, labels = samples(3)
    assert read(write_folders(tmp_path / "a", images, labels)).names == (
        "ant/0000.png", "bee/0001.png", "cat/0002.png"
    )  # fmt: skip
    assert (
        read(write_train_folders(tmp_path / "b", images, labels)).names[0] == "train/ant/0000.png"
    )
    assert read(write_npz(tmp_path / "c", images, labels)).names == ()
    strange = tmp_path / "d" / "ant" / os.fsdecode(b"\xff.png")
    strange.parent.mkdir(parents=True)
    strange.write_bytes(png(images[0]))
    assert read(tmp_path / "d").names == ("ant/\\xff.png",)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, ()),
        ({"path": ["a", "b"]}, ("a", "b")),
        ({"file_name": ["a", None]}, ()),
        ({"path": ["a", "b"], "file_name": ["c", "d"]}, ()),
        ({"path": [1, 2]}, ()),
    ],
)
def test_a_column_of_a_table_names_its_samples(tmp_path, columns, expected):
    images, _ = samples(2)
    encoded = pa.array([png(image) for image in images])
    path = tmp_path / "table.parquet"
    parquet.write_table(pa.table({"image": encoded, "label": [0, 1], **columns}), path)
    assert read(path).names == expected


def test_images_of_a_table_are_read_by_row_group(tmp_path):
    images, labels = samples(40)
    whole = write_parquet(tmp_path / "whole", images, labels)
    path = tmp_path / "groups.parquet"
    parquet.write_table(parquet.read_table(whole), path, row_group_size=3)
    assert read(path).digest() == read(whole).digest()


def test_a_class_without_images_is_refused(tmp_path):
    write_folders(tmp_path, *samples())
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.gif").touch()
    message = refusal(tmp_path)
    assert f"{tmp_path} has directories without images among its 4 class folders: dog" in message


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_folders(tmp_path, *samples())
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == tmp_path / "cat":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path / 'cat'} cannot be listed: Permission denied" in refusal(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels"),
        ("images", "labels"),
        ("x_train", "y_train"),
        ("data", "labels"),
    ],
)
def test_arrays_have_one_of_the_usual_names(tmp_path, names):
    images, labels = samples()
    arrays = dict(zip(names, (images, labels), strict=True))
    np.savez(tmp_path / "set.npz", x_test=images[:1], y_test=labels[:1], **arrays)
    assert read(tmp_path / "set.npz").digest() == Cifar(images, labels).digest()
    (tmp_path / "set.npz").rename(tmp_path / "set")
    assert read(tmp_path / "set").digest() == Cifar(images, labels).digest()


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 1), (6, 1, 5, 4)])
def test_grey_arrays_may_have_an_axis_of_channels(tmp_path, shape):
    images, labels = samples(6, 1, 5, 4)
    np.savez(tmp_path / "set.npz", images=images.reshape(shape), labels=labels)
    np.testing.assert_array_equal(read(tmp_path / "set.npz").images, images)


IMAGES, LABELS = samples(6)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"a": IMAGES, "b": LABELS}, "has no pair of images and labels: a, b. Save the training"),
        (
            {"images": IMAGES},
            "Save the training set as train_images, train_labels or x_train, y_train or images,",
        ),
        ({}, "has no pair of images and labels: nothing"),
        (
            {"images": IMAGES, "data": IMAGES, "labels": LABELS},
            "has several pairs of images and labels: images, labels or data, labels",
        ),
        (
            {"images": IMAGES / 255, "labels": LABELS},
            "set.npz: images has dtype float64; expected pixels as uint8, 0 … 255. Convert them "
            "(if they are scaled to 0 … 1: (images * 255).round().astype('uint8'))",
        ),
        ({"images": IMAGES.astype(int), "labels": LABELS}, "dtype int64; expected pixels as uint8"),
        ({"images": IMAGES[:, :, :3, :3], "labels": LABELS}, "could be the second axis or the"),
        ({"images": IMAGES[:, :, :, :1], "labels": LABELS}, "(6, 3, 32, 1): the channels could"),
        ({"images": IMAGES[:, :2], "labels": LABELS}, "shape (6, 2, 32, 32); expected (N, H, W)"),
        ({"images": IMAGES.reshape(6, -1), "labels": LABELS}, "(6, 3072); expected (N, H, W)"),
        ({"images": np.uint8(3), "labels": LABELS}, "shape (); expected (N, H, W)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "holds no images: their shape is (0, 3"),
        (
            {"images": IMAGES[:, :, :0], "labels": LABELS},
            "holds no images: their shape is (6, 3, 0",
        ),
        (
            {"images": IMAGES, "labels": LABELS[:5]},
            "the array of labels has shape (5,) and dtype int64",
        ),
        (
            {"images": IMAGES, "labels": np.eye(6, dtype=int)},
            "the array of labels has shape (6, 6)",
        ),
        ({"images": IMAGES, "labels": LABELS * 1.0}, "and dtype float64; expected one class index"),
        (
            {"images": IMAGES, "labels": LABELS - 1},
            "the array of labels has -1; expected indices from 0",
        ),
        ({"images": IMAGES, "labels": np.array(["a", None] * 3)}, "it holds Python objects"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path, arrays, expected):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    message = refusal(path)
    assert expected in message
    assert str(path) in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>", b"\x93NUMPY"])
def test_a_damaged_archive_is_named(tmp_path, content):
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    message = refusal(path)
    assert f"{path} cannot be read: " in message
    assert "Save the arrays again (numpy.save, numpy.savez)" in message


def test_one_array_in_the_place_of_an_archive_and_the_other_way_are_refused(tmp_path):
    np.save(tmp_path / "set.npy", IMAGES)
    (tmp_path / "set.npy").rename(tmp_path / "set.npz")
    assert "it is one array, not an archive of several" in refusal(tmp_path / "set.npz")
    path = write_npy(tmp_path / "set", IMAGES, LABELS)
    np.savez(path / "labels.npz", labels=LABELS)
    (path / "labels.npz").rename(path / "labels.npy")
    assert "labels.npy cannot be read: it is an archive of several arrays" in refusal(path)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_a_missing_or_damaged_array_is_named(tmp_path, name):
    path = write_npy(tmp_path / "set", IMAGES, LABELS) / name
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} cannot be read: " in refusal(path.parent)
    path.unlink()
    assert f"{path} cannot be read: No such file or directory" in refusal(path.parent)
    path.symlink_to("elsewhere")
    assert f"{path} cannot be read: it is a link to elsewhere" in refusal(path.parent)


GREY_IMAGES = samples(6, channels=1)[0][:, 0]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("images-idx3", idx_file(GREY_IMAGES)[:-1], "6,143 values; expected 6 × 32 × 32, as its"),
        ("images-idx3", idx_file(GREY_IMAGES) + b"0", "6,145 values"),
        (
            "images-idx3",
            idx_file(GREY_IMAGES, 0x0D03),
            "begins with 00 00 0d 03; expected 00 00 08",
        ),
        ("images-idx3", idx_file(LABELS), "unsigned bytes along 3 axes"),
        ("images-idx3", b"", "begins with nothing; expected 00 00 08 03"),
        ("images-idx3", b"\x00\x00\x08\x03", "has 0 values; expected 4294967295 × "),
        ("images-idx3", idx_file(GREY_IMAGES[:4]), "has 4 images, but"),
        ("images-idx3", gzip.compress(idx_file(GREY_IMAGES), mtime=0), "begins with 1f 8b"),
        ("labels-idx1", idx_file(LABELS)[:-1], "has 5 values; expected 6, as its header says"),
        ("labels-idx1", idx_file(GREY_IMAGES), "unsigned bytes along 1 axis. Replace"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, name, content, expected):
    write_idx(tmp_path, GREY_IMAGES[:, None], LABELS)
    path = tmp_path / f"train-{name}-ubyte"
    path.write_bytes(content)
    message = refusal(tmp_path)
    assert expected in message
    assert str(path) in message


@pytest.mark.parametrize(
    "damaged",
    [b"", b"no gzip", gzip.compress(idx_file(LABELS), mtime=0)[:-9]],
    ids=["empty", "no gzip", "cut off"],
)
def test_a_damaged_compressed_idx_file_is_named(tmp_path, damaged):
    path = write_gz_idx(tmp_path, GREY_IMAGES[:, None], LABELS) / "train-labels.idx1-ubyte.gz"
    path.write_bytes(damaged)
    assert str(path) in refusal(tmp_path)
    path.unlink()
    assert f"{tmp_path} has no train-labels-idx1-ubyte, or as .gz" in refusal(tmp_path)


def test_an_unpacked_idx_file_goes_before_its_archive(tmp_path):
    write_gz_idx(tmp_path, GREY_IMAGES[:, None], LABELS)
    write_idx(tmp_path, GREY_IMAGES[:, None], LABELS[::-1])
    assert read(tmp_path).labels.tolist() == LABELS[::-1].tolist()


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


PNGS = [png(image) for image in IMAGES]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (table(label=LABELS), "has no column image or img; expected one of them"),
        (table(image=PNGS, classes=LABELS), "no column label or labels or fine_label; expected"),
        (table(image=PNGS, classes=LABELS), "(it has image, classes)"),
        (table(image=PNGS, img=PNGS, label=LABELS), "has the columns image and img; expected one"),
        (table(image=PNGS, label=LABELS, labels=LABELS), "has the columns label and labels"),
        (
            table(image=["a.png"] * 6, label=LABELS),
            "the column image has type string; expected enc",
        ),
        (table(image=[{"path": "a.png"}] * 6, label=LABELS), "type struct<path: string>; expected"),
        (table(image=[None, *PNGS[1:]], label=LABELS), "image (as bytes) has no value in 1 of 6"),
        (
            table(image=[{"bytes": b"", "path": ""}, *[{"bytes": None}] * 5], label=LABELS),
            "no value in 5 of 6 rows",
        ),
        (table(image=PNGS, label=["a"] * 6), "the column label has type string; expected class"),
        (table(image=PNGS, label=LABELS * 1.0), "the column label has type double; expected class"),
        (table(image=PNGS, label=[None, *LABELS[1:].tolist()]), "label has no value in 1 of 6"),
        (
            table(image=PNGS, label=LABELS - 1),
            "the array of labels has -1; expected indices from 0",
        ),
        (table(image=[b"?", *PNGS[1:]], label=LABELS), "decoded: row 0 of set.parquet (it is none"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, content, expected):
    path = tmp_path / "set.parquet"
    parquet.write_table(content, path)
    message = refusal(path)
    assert expected in message
    assert str(path) in message


def test_a_table_without_rows_is_refused(tmp_path):
    empty = table(image=pa.array([], pa.binary()), label=pa.array([], pa.int64()))
    parquet.write_table(empty, tmp_path / "set.parquet")
    assert "has no rows; expected one for each image" in refusal(tmp_path / "set.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>"])
def test_a_damaged_table_is_named(tmp_path, content):
    path = tmp_path / "set.parquet"
    path.write_bytes(content)
    assert f"{path} cannot be read as Parquet: " in refusal(path)


def test_columns_may_be_in_any_order_and_a_table_called_anything(tmp_path):
    parquet.write_table(table(more=LABELS, labels=LABELS, image=PNGS), tmp_path / "set.parquet")
    expected = Cifar(IMAGES, LABELS).digest()
    assert read(tmp_path / "set.parquet").digest() == expected
    assert read(tmp_path).digest() == expected
    (tmp_path / "set.parquet").rename(tmp_path / "set")
    assert read(tmp_path / "set").digest() == expected


def test_of_several_tables_those_of_the_training_set_are_read_and_it_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, MESSAGES):
        read(write_shards(tmp_path, IMAGES, LABELS))
    assert "the training set is in train*; not read: test-00000-of-00001.parquet" in caplog.text
    assert "6 images in train-00000-of-00002.parquet, train-00001-of-00002" in caplog.text


def test_tables_of_other_parts_are_not_taken_for_the_training_set(tmp_path):
    write_shards(tmp_path, IMAGES, LABELS)
    for path in tmp_path.glob("train*"):
        path.unlink()
    message = refusal(tmp_path)
    assert f"{tmp_path} has test-00000-of-00001.parquet, but no file of a training set" in message
    assert "point --data_path at one file" in message
    assert len(read(tmp_path / "test-00000-of-00001.parquet")) == 3


@pytest.mark.parametrize("noted", ["[]", "{}", "no json", '{"info": {"features": {"label": 3}}}'])
def test_notes_in_a_table_that_are_not_as_expected_do_no_harm(tmp_path, noted):
    noted_table = table(image=PNGS, label=LABELS).replace_schema_metadata({"huggingface": noted})
    parquet.write_table(noted_table, tmp_path / "set.parquet")
    assert read(tmp_path / "set.parquet").class_names == ()


def test_formats_load_their_libraries_when_they_read():
    heavy = ["torch", "torchvision", "pyarrow", "PIL"]
    code = (
        "import sys, daskcurv.experiment.data; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
