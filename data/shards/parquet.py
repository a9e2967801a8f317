"""The hubs' form: Parquet files with a column of images (a struct of `bytes` and `path`, or bytes) and one of labels.

Where the column of images is not compressed, as the hubs' library writes it today, an image's bytes lie in one piece in
the file, and the index says where: pyarrow says what they are, and a search says where they are. Elsewhere a row group
(some 100 images) is read and decompressed at a time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from typing_extensions import override

from data.shards import index
from data.shards.index import ShardIndex
from data.shards.store import Entry, Store
from repopt.errors import UserError, one_line, unknown

ENDING = ".parquet"
HUB = b"huggingface"  # key of the schema's metadata

_PREFIX = 64  # bytes of an image that are searched for; what is found is compared whole


def read_index(store: Store, path: str, size: int, *, image: str, label: str) -> ShardIndex:
    """Return the index of a Parquet file; with places of its own for every image, if it lies on this machine's disk.

    Raises:
        ValueError, OSError: it is damaged.
        UserError: it has no such columns, or labels that are no numbers of classes.
    """
    pa, _ = libraries()
    with store.open(path, size) as file, _opened(file) as parquet:
        column, names = _columns(parquet, store.name(path), image, label)
        table = parquet.read(columns=[label, *names])
        labels = table.column(label)
        if labels.null_count or not pa.types.is_integer(labels.type):
            raise UserError(
                f"column {label!r} of {store.name(path)!r} holds {labels.type}: expected the class of each row"
            )
        paths = _field(table.column(image), "path") if names else [None] * len(table)
        named = [str(name or f"row {row}").encode() for row, name in enumerate(paths)]
        row_groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
        chunks = [group.column(column) for group in row_groups]
        if row_groups and all(_is_empty(chunk) for chunk in chunks):
            raise UserError(f"{store.name(path)!r} holds no images, perhaps their paths only: write them embedded")
        ends = np.cumsum([group.num_rows for group in row_groups])
        groups = np.array([(end, *_bytes_of(chunk)) for end, chunk in zip(ends, chunks, strict=True)], np.int64)
        alone = not store.is_remote and all(chunk.compression == "UNCOMPRESSED" for chunk in chunks)
        places = _places(file, parquet, image, groups) if alone else None
    numbers, read_as = labels.to_numpy(), read_as_columns(image, label)
    if places is None:
        return index.of_rows(named, numbers, None, None, groups=groups, read_as=read_as)
    return index.of_rows(named, numbers, *places, read_as=read_as)


def read_as_columns(image: str, label: str) -> str:
    """Return `ShardIndex.read_as` of the index of two columns."""
    return repr((image, label))


def class_names(store: Store, shards: Mapping[str, Entry], *, label: str) -> tuple[str, ...]:
    """Return the names that the hubs' library writes into the schema, by their number; none where it has none.

    Raises:
        UserError: the first shard is damaged.
    """
    path, shard = next(iter(shards.items()))
    try:
        with store.open(path, shard.size) as file, _opened(file) as parquet:
            metadata = parquet.schema_arrow.metadata or {}
    except UserError:  # a ValueError too
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"shard {store.name(path)!r} is damaged: {one_line(error)}; fetch or make it again") from None
    try:
        names = json.loads(metadata[HUB])["info"]["features"][label]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()


def hub_metadata(image: str, label: str, classes: Sequence[str]) -> dict[bytes, bytes]:
    """Return the schema's metadata that say which column is what, as the hubs' library reads and writes them."""
    numbers = {"names": [*classes], "_type": "ClassLabel"} if classes else {"dtype": "int64", "_type": "Value"}
    return {HUB: json.dumps({"info": {"features": {image: {"_type": "Image"}, label: numbers}}}).encode()}


class Groups:
    """Reads the images of row groups from their bytes."""

    def __init__(self, store: Store, image: str) -> None:
        self._store, self._image = store, image
        self._metadata: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_metadata": {}}

    def images(self, path: str, size: int, *, group: int, start: int, content: bytes) -> list[bytes | OSError]:
        """Return the images of a row group of a file of so many bytes, whose bytes at `start` are the content.

        Raises:
            OSError: they are damaged.
        """
        _, pq = libraries()
        try:
            if path not in self._metadata:
                with self._store.open(path, size) as file:
                    self._metadata[path] = pq.read_metadata(file)
            parquet = pq.ParquetFile(_Piece(start, content), metadata=self._metadata[path])
            images = _images(parquet, group, self._image)
        except UserError:  # the store is gone
            raise
        except ValueError as error:
            raise OSError(f"row group {group} is damaged: {one_line(error)}") from None
        return [OSError("the row has no image") if image is None else image for image in images]


class _Piece(io.BytesIO):
    """A file of which only the bytes from `start` on are there."""

    def __init__(self, start: int, content: bytes) -> None:
        super().__init__(content)
        self._start = start

    @override
    def tell(self) -> int:
        return super().tell() + self._start

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(offset - self._start if whence == io.SEEK_SET else offset, whence) + self._start


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Any]:
    with libraries()[1].ParquetFile(file) as parquet:
        yield parquet


def libraries() -> tuple[Any, Any]:
    """Return pyarrow and pyarrow.parquet.

    Raises:
        UserError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('Parquet files are read by pyarrow, which is absent: pip install ".[shards]"') from None
    return pyarrow, pyarrow.parquet


def _columns(parquet: Any, name: str, image: str, label: str) -> tuple[int, list[str]]:
    """Return the number of the column of the images' bytes, and the name of that of their paths, if there is one."""
    known = parquet.schema_arrow.names
    for key, wanted in (("DATA.IMAGE_COLUMN", image), ("DATA.LABEL_COLUMN", label)):
        if wanted not in known:
            raise UserError(f"{unknown('column', wanted, known)} in {name!r}: set {key}")
    leaves = [parquet.schema.column(number).path for number in range(parquet.metadata.num_columns)]
    leaf = _leaf(parquet, image)
    if leaf not in leaves or parquet.schema.column(leaves.index(leaf)).physical_type != "BYTE_ARRAY":
        raise UserError(f"column {image!r} of {name!r} holds no bytes of images: set DATA.IMAGE_COLUMN")
    return leaves.index(leaf), [path for path in (f"{image}.path",) if path in leaves]


def _is_empty(chunk: Any) -> bool:
    """Return whether a column of a row group is known to have no values."""
    return chunk.is_stats_set and chunk.statistics.null_count == chunk.num_values


def _bytes_of(chunk: Any) -> tuple[int, int]:
    """Return where the bytes of a column of a row group begin and end."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def _leaf(parquet: Any, image: str) -> str:
    """Return the name of the column in which the images' bytes are: one of a struct, or the column itself."""
    return f"{image}.bytes" if parquet.schema_arrow.field(image).type.num_fields else image


def _images(parquet: Any, group: int, image: str) -> list[bytes | None]:
    leaf = _leaf(parquet, image)
    column = parquet.read_row_group(group, columns=[leaf], use_threads=False).column(image)
    return column.to_pylist() if leaf == image else _field(column, "bytes")


def _field(column: Any, field: str) -> list[Any]:
    return [row for chunk in column.chunks for row in chunk.field(field).to_pylist()]


def _places(file: BinaryIO, parquet: Any, image: str, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return where each image's bytes begin and end in the file; None where one does not lie there in one piece."""
    places: list[tuple[int, int]] = []
    for group, (_, start, end) in enumerate(groups.tolist()):
        images = _images(parquet, group, image)
        file.seek(start)
        chunk, at = file.read(end - start), 0
        for content in images:
            while content and not chunk.startswith(content, at):
                at = chunk.find(content[:_PREFIX], at + 1)
                if at < 0:
                    return None
            size = len(content or b"")  # a row without an image is one that cannot be decoded
            places.append((start + at, start + at + size))
            at += size
    return np.array([start for start, _ in places]), np.array([end for _, end in places])
