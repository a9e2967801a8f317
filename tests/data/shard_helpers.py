"""What tests of shards share: the same images in every form, and a store that fails now and then."""

import functools
import http.server
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

from data import Source, describe, registry
from data.registry import FileSpec
from data.shards.write import write_split

FORMS = ("folder", "zip", "parquet", "wds")


def source_of(form, root, **how):
    """The source of a form of the images."""
    if form == "zip":
        return Source("folder", str(root), zip_mode=True, cache_mode="no", **how)
    return Source(form, str(root), **how)


def opened(source, split="train", num_classes=12, rank=0, world_size=1):
    return registry.find(source, FileSpec).open(source, split, num_classes, rank, world_size)


def write(folder, to, form, per_shard=5, **how):
    """Write the images of a folder in another form."""
    if form == "zip":
        return _write_zip(Path(folder), to)
    source = Source("folder", str(folder))
    classes = describe(source).classes
    for split in ("train", "val"):
        write_split(opened(source, split), classes, to, split, form, per_shard=per_shard, **how)
    return to


def _write_zip(folder, to):
    to.mkdir()
    for split in ("train", "val"):
        paths = sorted((folder / split).glob("*/*"))
        classes = sorted({path.parent.name for path in paths})
        with zipfile.ZipFile(to / f"{split}.zip", "w") as file:
            for path in paths:
                file.write(path, path.relative_to(folder / split).as_posix())
        lines = [f"{path.relative_to(folder / split)}\t{classes.index(path.parent.name)}\n" for path in paths]
        (to / f"{split}_map.txt").write_text("".join(lines))
    return to


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files by ranges, as object stores give them."""

    protocol_version = "HTTP/1.1"

    def send_head(self):
        with self.server.lock:
            self.server.requests += 1
            self.server.paths.append(self.path)
            fails = self.server.fails_at(self.server.requests)
        if fails:
            self.send_error(503)
            return None
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().send_head()
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        content = path.read_bytes()[int(start) : int(end) + 1 if end else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(content) - 1}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, *arguments):
        pass


@contextmanager
def served(folder, fails_at=lambda request: False):
    """Serve a folder on this machine; `fails_at` says which requests fail."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.requests, server.paths, server.lock, server.fails_at = 0, [], threading.Lock(), fails_at
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
