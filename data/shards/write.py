"""Makes shards of images that lie otherwise; what is whole already stays, so that a run that was stopped goes on."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from data.shards import index, parquet, tar
from data.shards.images import form_of
from data.shards.store import Store, written_whole
from data.types import EncodedImages, Source
from repopt.errors import UserError, one_line

IMAGE, LABEL = Source("parquet").columns
_ROW_GROUP_BYTES = 2**23
_AT_ONCE = 64  # images that are asked for


class Row(NamedTuple):
    """An image of a shard: its number in the source, its name in the shard and its class."""

    number: int
    name: str
    label: int


def write_split(
    images: EncodedImages,
    classes: Sequence[str],
    to: Path,
    split: str,
    form: str,
    *,
    per_shard: int,
    order: Sequence[int] | None = None,
) -> None:
    """Write the images of a split, as they are encoded, with their index.

    Args:
        images: the split.
        classes: names of its classes, by index; empty where they have none.
        to: the folder for the shards <split>-<number>-of-<count>.
        split: its name.
        form: 'parquet' or 'wds'.
        per_shard: how many images one shard has at most.
        order: the images' numbers in the order in which they are to lie; None = their own.

    Raises:
        UserError: an image cannot be read, or the folder has other shards of the split.
    """
    numbers = range(len(images)) if order is None else order
    parts = [numbers[start : start + per_shard] for start in range(0, len(images), per_shard)]
    found, write = form_of(Source(form)), WRITERS[form]
    names = [f"{split}-{number:05}-of-{len(parts):05}{found.ending}" for number in range(len(parts))]
    to.mkdir(parents=True, exist_ok=True)
    if others := sorted({path.name for path in to.glob(f"{split}-*{found.ending}")} - {*names}):
        raise UserError(f"{str(to)!r} has other shards, such as {others[0]!r}: remove them, or name another folder")
    if form == "wds" and classes:
        (to / tar.CLASSES).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    store = Store(str(to))
    with tqdm(total=len(images), desc=split, unit="image", disable=None) as bar:
        for name, part in zip(names, parts, strict=True):
            rows = [_row(images, number, form) for number in part]
            if (to / name).exists():
                bar.update(len(rows))
            else:
                with written_whole(to / name) as beside:
                    write(beside, images, rows, classes, bar.update)
            entry = store.files()[name]
            (made,) = index.of_shards(store, {name: entry}, {}, found.read_index, found.read_as)
            if [row[1:] for row in rows] != [(made.name(own), label) for own, label in enumerate(made.labels.tolist())]:
                raise UserError(f"{str(to / name)!r} has other images: remove it, or name another folder")


def _row(images: EncodedImages, number: int, form: str) -> Row:
    name = PurePosixPath(images.name(number).rpartition("@/")[2]).name
    if form == "wds":  # whose keys end at the first point, and must differ
        stem, ending = PurePosixPath(name).stem, PurePosixPath(name).suffix.lower()
        name = f"{number:08}-{stem.replace('.', '_')}{ending if ending in IMG_EXTENSIONS else '.jpg'}"
    return Row(number, name, int(images.labels[number]))


def _contents(images: EncodedImages, rows: Sequence[Row], done: Callable[[int], object]) -> Iterator[tuple[Row, bytes]]:
    """Yield every row with its image's bytes."""
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        images.prefetch([row.number for row in part])
        for row in part:
            yield row, _read(images, row)
            done(1)


def _read(images: EncodedImages, row: Row) -> bytes:
    try:
        return images.read(row.number)
    except OSError as error:
        raise UserError(f"cannot read image {images.name(row.number)!r} ({one_line(error)})") from None


def _write_tar(
    path: Path, images: EncodedImages, rows: Sequence[Row], classes: Sequence[str], done: Callable[[int], object]
) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for row, image in _contents(images, rows, done):
            label_name = str(PurePosixPath(row.name).with_suffix(".cls"))
            for name, content in ((row.name, image), (label_name, str(row.label).encode())):
                member = tarfile.TarInfo(name)  # without a time or an owner: the same images give the same bytes
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def _write_parquet(
    path: Path, images: EncodedImages, rows: Sequence[Row], classes: Sequence[str], done: Callable[[int], object]
) -> None:
    pa, pq = parquet.libraries()
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({IMAGE: image, LABEL: pa.int64()}, parquet.hub_metadata(IMAGE, LABEL, classes))
    columns: dict[str, list] = {IMAGE: [], LABEL: []}
    held = 0
    # Images are compressed already; as they are, each can be read by itself.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as file:
        for row, content in _contents(images, rows, done):
            columns[IMAGE].append({"bytes": content, "path": row.name})
            columns[LABEL].append(row.label)
            held += len(content)
            if held >= _ROW_GROUP_BYTES or row is rows[-1]:
                file.write_table(pa.table(columns, schema))
                columns, held = {IMAGE: [], LABEL: []}, 0


WRITERS = {"parquet": _write_parquet, "wds": _write_tar}
