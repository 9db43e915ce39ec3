"""One small data set, written in every format that is read."""

from __future__ import annotations

import gzip
import json
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

NAMES = ("ant", "bee", "cat")


def samples(count: int = 7, channels: int = 3, height: int = 32, width: int = 32) -> Any:
    """Return images (N, channels, height, width) and labels, those of one class together."""
    generator = np.random.default_rng(5)
    images = generator.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    return images, np.sort(np.arange(count) % len(NAMES))


def as_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def png(image: np.ndarray) -> bytes:
    file = BytesIO()
    as_pillow(image).save(file, "PNG")
    return file.getvalue()


def write_cifar10(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path.mkdir(exist_ok=True)
    data = images.reshape(len(images), -1)
    for number, ids in enumerate(np.array_split(np.arange(len(images)), 3), 1):
        content = {b"data": data[ids], b"labels": labels[ids].tolist()}
        (path / f"data_batch_{number}").write_bytes(pickle.dumps(content))
    meta = {b"label_names": [name.encode() for name in NAMES]}
    (path / "batches.meta").write_bytes(pickle.dumps(meta))
    return path


def write_folders(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (path / NAMES[label]).mkdir(parents=True, exist_ok=True)
        as_pillow(image).save(path / NAMES[label] / f"{number:04d}.png")
    return path


def write_train_folders(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    write_folders(path / "val", images[:1], labels[:1])
    write_folders(path / "train", images, labels)
    return path


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path = path.with_suffix(".npz")
    images = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    np.savez_compressed(path, train_images=images, train_labels=labels[:, None].astype(np.uint8))
    return path


def write_npy(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path.mkdir()
    np.save(path / "images.npy", images)
    np.save(path / "labels.npy", labels.astype(np.int16))
    return path


def write_idx(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path.mkdir(exist_ok=True)
    (path / "train-images-idx3-ubyte").write_bytes(idx_file(images[:, 0]))
    (path / "train-labels-idx1-ubyte").write_bytes(idx_file(labels))
    return path


def idx_file(values: np.ndarray, magic: int | None = None) -> bytes:
    magic = 0x0800 + values.ndim if magic is None else magic
    header = np.array([magic, *values.shape], ">u4")
    return header.tobytes() + values.astype(np.uint8).tobytes()


def write_gz_idx(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path.mkdir(exist_ok=True)
    images_file, labels_file = idx_file(images[:, 0]), idx_file(labels)
    (path / "train-images.idx3-ubyte.gz").write_bytes(gzip.compress(images_file))
    (path / "train-labels.idx1-ubyte.gz").write_bytes(gzip.compress(labels_file))
    return path


def write_parquet(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path = path.with_suffix(".parquet")
    column = pa.array([{"bytes": png(image), "path": "x.png"} for image in images])
    table = pa.table({"image": column, "label": pa.array(labels)})
    features = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    return path


def write_shards(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path.mkdir(exist_ok=True)
    for shard, ids in enumerate(np.array_split(np.arange(len(images)), 2)):
        encoded = [png(image) for image in images[ids]]
        table = pa.table({"img": encoded, "fine_label": pa.array(labels[ids], pa.uint8())})
        parquet.write_table(table, path / f"train-{shard:05d}-of-00002.parquet")
    parquet.write_table(table, path / "test-00000-of-00001.parquet")
    return path


COLOUR = [
    write_cifar10,
    write_folders,
    write_train_folders,
    write_npz,
    write_npy,
    write_parquet,
    write_shards,
]
GREY = [
    write_folders,
    write_npz,
    write_npy,
    write_idx,
    write_gz_idx,
    write_parquet,
    write_shards,
]
