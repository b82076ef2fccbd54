"""Checkpoints on another file system than the run's folder: S3, GCS, HDFS, any that fsspec knows (`output.store`).

    s3://bucket/prefix/NAME/step_40/   actor/shard-00001-....safetensors ...
                                       manifest.json               put last: without it there is no checkpoint
                                       set_aside.json              what it is called for a step that is done again

Sizes are compared after a file is put; whoever takes a checkpoint from here compares every checksum, and only then
gives it its name in the run's folder.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from controller.lifecycle import manifest as manifests
from controller.lifecycle.checkpoint import Checkpoint, DamagedCheckpoint
from controller.lifecycle.manifest import Damaged
from rlhf_dist.addresses import make_folder
from rlhf_dist.config import OutputConfig
from rlhf_dist.durable_files import sync
from rlhf_dist.failure import text_of
from rlhf_dist.typed import ConfigError

ASIDE = "set_aside.json"
AT_ONCE = 8
"""Files on their way at one time."""
PROBE_S = 30.0
"""Longest that a store may take to show that it can be written."""


class StoreError(Exception):
    """A store did not do what it was asked; the message names it."""


class CheckpointStore:
    """Checkpoints of one run in a folder of any file system. Methods raise StoreError, whatever the library raises."""

    def __init__(self, url: str, name: str, options: dict[str, Any]) -> None:
        """options: of the file system, as fsspec has them. Raises ConfigError for a URL that names none."""
        from fsspec.core import url_to_fs

        self.place = f"{url.rstrip('/')}/{name}"
        try:
            self._files, root = url_to_fs(self.place, skip_instance_cache=True, use_listings_cache=False, **options)
        except (ImportError, ValueError, TypeError) as error:
            hint = "; pip install 'rlhf-dist[s3]'" if url.startswith("s3") else ""
            raise ConfigError(f"output.store={url}: {text_of(error)}{hint}") from error
        self._root = str(root)

    def probe(self) -> None:
        """Raises ConfigError unless a small file can be written, read and removed within PROBE_S."""
        failed: list[str] = ["no answer"]

        def attempt() -> None:
            path = f"{self._root}/.probe-{uuid4().hex}"
            try:
                make_folder(self._files, self._root)
                self._files.pipe_file(path, b"probe")
                same = self._files.cat_file(path) == b"probe"
                self._files.rm_file(path)
                failed[:] = [] if same else ["what is read is not what was written"]
            except Exception as error:  # whatever the library raises
                failed[:] = [text_of(error)]

        thread = threading.Thread(target=attempt, name="store-probe", daemon=True)
        thread.start()
        thread.join(PROBE_S)
        if failed:
            raise ConfigError(
                f"output.store: {self.place} cannot be written within {PROBE_S:g} s ({' '.join(failed[0].split())}); "
                f"check its URL, output.store_options and your credentials"
            )

    def steps(self) -> list[int]:
        """Steps of published checkpoints, in order."""
        with self._named("list"):
            if not self._files.exists(self._root):
                return []
            names = [str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
            steps = [int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit()]
            return sorted(step for step in steps if self._files.exists(self._path(step, manifests.NAME)))

    def read(self, step: int, folder: Path) -> Checkpoint | DamagedCheckpoint:
        """What the manifest says; folder: where its files will be."""
        with self._named(f"read step_{step} from"):
            try:
                found = manifests.parse_manifest(self._files.cat_file(self._path(step, manifests.NAME)), f"step_{step}")
            except Damaged as damage:
                return DamagedCheckpoint(folder, step, f"{damage}, in {self.place}")
        return Checkpoint(folder, found)

    def fetch(self, step: int, folder: Path) -> Checkpoint | DamagedCheckpoint:
        """Copy a checkpoint to `folder`, which it becomes once all checksums are right."""
        found = self.read(step, folder)
        if isinstance(found, DamagedCheckpoint):
            return found
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with self._named(f"copy step_{step} from"):
            for name in found.manifest.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)

            def get(name: str) -> None:
                self._files.get_file(self._path(step, name), str(partial / name))

            try:
                self._each(get, list(found.manifest.files))
                manifests.check_files(partial, found.manifest.files, read=None)
            except (FileNotFoundError, Damaged) as damage:
                return DamagedCheckpoint(folder, step, f"{damage}, in {self.place}")
        (partial / manifests.NAME).write_text(found.manifest.text(), encoding="utf-8")
        sync([path for path in partial.rglob("*")])
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync([folder.parent])
        return found

    def put(self, checkpoint: Checkpoint, retried: Callable[[Callable[[], None]], None]) -> None:
        """Copy a checkpoint here. retried: runs a part of it, perhaps more than once."""
        step, files = checkpoint.step, checkpoint.manifest.files

        def one(name: str) -> None:
            path = self._path(step, name)
            self._files.put_file(str(checkpoint.folder / name), path)
            found = self._files.info(path)["size"]
            if found != files[name][0]:
                raise OSError(f"{name} has {found} bytes there instead of {files[name][0]}")

        def publish() -> None:
            text = checkpoint.manifest.text().encode()
            self._files.pipe_file(self._path(step, manifests.NAME), text)
            if self._files.cat_file(self._path(step, manifests.NAME)) != text:
                self._remove(self._path(step, manifests.NAME))
                raise OSError(f"{manifests.NAME} is not there as it was written")

        with self._named(f"copy step_{step} to"):
            folders = sorted({self._path(step, name).rpartition("/")[0] for name in (*files, manifests.NAME)})
            retried(lambda: self._make_folders(folders))
            retried(lambda: self._remove(self._path(step, manifests.NAME)))
            self._each(lambda name: retried(lambda: one(name)), list(files))
            retried(publish)

    def keep(self, newest: int) -> None:
        """Remove older checkpoints than the `newest`; their manifests first. 0 keeps all."""
        for step in self.steps()[:-newest] if newest else []:
            self.remove(step)

    def remove(self, step: int) -> None:
        """Remove a checkpoint, or what was put of one."""
        with self._named(f"remove step_{step} from"):
            self._remove(self._path(step, manifests.NAME))
            self._files.rm(f"{self._root}/step_{step}", recursive=True)

    def set_aside(self, after: int) -> list[int]:
        """Have steps above `after` count no more; returns them."""
        moved = [step for step in self.steps() if step > after]
        with self._named("write to"):
            for step in moved:
                content = self._files.cat_file(self._path(step, manifests.NAME))
                self._files.pipe_file(self._path(step, ASIDE), content)
                self._remove(self._path(step, manifests.NAME))
        return moved

    def _path(self, step: int, name: str) -> str:
        return f"{self._root}/step_{step}/{name}"

    def _remove(self, path: str) -> None:
        if self._files.exists(path):
            self._files.rm_file(path)

    def _make_folders(self, folders: list[str]) -> None:
        for folder in folders:
            make_folder(self._files, folder)

    def _each(self, function: Callable[[str], None], names: list[str]) -> None:
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="store") as threads:
            for _ in threads.map(function, names):
                pass

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise StoreError(f"could not {what} {self.place}: {' '.join(text_of(error).split())}") from error


def store_of(output: OutputConfig, name: str) -> CheckpointStore | None:
    """The store of a run; None where it has none. Raises ConfigError."""
    return None if output.store is None else CheckpointStore(output.store, name, dict(output.store_options))
