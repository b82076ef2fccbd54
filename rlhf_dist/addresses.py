"""Models and data elsewhere than in a folder: by their name on a Hugging Face hub, or at any address of fsspec.

    organisation/name              a model: in the hub's cache of this machine, else fetched from the hub
    hf://organisation/name@v1      the same, of a revision (branch, tag, commit)
    hf://datasets/org/name@v1/train/*.parquet     files of a data set there
    s3://bucket/models/mine        gs://, http://, memory:// ...: copied to RLHF_DIST_CACHE (~/.cache/rlhf-dist) once

The cache comes first, so what was there yesterday is there today. `pinned` puts the commit into the address, which
config.yaml then has: the same settings later are the same files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from rlhf_dist.failure import text_of
from rlhf_dist.model_folder import WEIGHTS
from rlhf_dist.typed import ConfigError

HUB_ID = r"(?!models/|runs/)[A-Za-z0-9][\w.-]*/[\w.-]+"
"""What `organisation/name` looks like."""
HUB = "hf://"
OF_DATA = "hf://datasets/"
CACHE = "RLHF_DIST_CACHE"
"""Environment variable with the folder of what was copied."""
NOT_OF_MODELS = ("*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.pth", "original/*")
"""Files of a model's repository that nothing here reads."""
ANSWER_S = 10.0
"""Longest wait for a hub's first answer."""


def is_address(path: str) -> bool:
    """Whether `path` is no path of this machine."""
    return "://" in path


def is_hub_name(path: str) -> bool:
    """Whether `path` looks like `organisation/name` and is no folder here."""
    return re.fullmatch(HUB_ID, path) is not None and not Path(path).parent.is_dir()


def local_model(path: str, key: str) -> tuple[str, str]:
    """A folder of this machine with the model that the setting `key` names, and its pinned address.

    A path of this machine is returned as it is. Raises ConfigError for what cannot be fetched.
    """
    if path.startswith(HUB) or is_hub_name(path):
        name, _, revision = path.removeprefix(HUB).strip("/").partition("@")
        if name.count("/") != 1:
            raise ConfigError(f"{key}: a model of a hub is hf://ORGANISATION/NAME[@REVISION], got {path!r}")
        folder = _snapshot(name, revision or None, "model", key)
        return str(folder), f"{HUB}{name}@{folder.name}"
    if is_address(path):
        return str(fetched(path, key)[0]), path
    return path, path


def local_data(path: str, key: str) -> tuple[str, str]:
    """What `data_files` reads on this machine, and the pinned addresses, of files that the setting `key` names.

    Paths of this machine, alone or with commas between them and addresses, are returned as they are. Raises ConfigError
    for what cannot be fetched.
    """
    if not is_address(path):
        return path, path
    found = [_local_rows(name.strip(), key) for name in path.split(",") if name.strip()]
    return ",".join(local for local, _ in found), ",".join(pinned for _, pinned in found)


def _local_rows(name: str, key: str) -> tuple[str, str]:
    if name.startswith(HUB):
        repository, inside = _of_data(name, key)
        folder = _snapshot(*repository, "dataset", key, inside)
        pinned = f"{OF_DATA}{repository[0]}@{folder.name}"
        return (f"{folder}/{inside}", f"{pinned}/{inside}") if inside else (str(folder), pinned)
    if not is_address(name):
        return name, name
    folder, files = fetched(name, key)
    if (base := _base(name)) is not None:
        return f"{folder}/{name[len(base) + 1 :]}", name
    return str(files[0] if len(files) == 1 else folder), name


def fetched(address: str, key: str) -> tuple[Path, list[Path]]:
    """A copy of what is at an address, made once for each version of its files: the folder, and the files in it.

    Raises ConfigError naming the address and what is wrong.
    """
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(address, skip_instance_cache=True, use_listings_cache=False)
        names, base = _listed(files, root)
        infos = [files.info(name) for name in names]
        versions = [
            f"{name} {info['size']} {_version(files, name, info)}" for name, info in zip(names, infos, strict=True)
        ]
        mark = hashlib.sha256("\n".join([str(files.protocol), base, *versions]).encode()).hexdigest()[:24]
        folder = cache() / "files" / mark
        inside = [name[len(base) :].lstrip("/") for name in names]
        if not folder.is_dir():
            _copy(files, names, [info["size"] for info in infos], inside, folder)
        return folder, [folder / name for name in inside]
    except Exception as error:  # whatever the library of a file system raises
        hint = "; pip install 'rlhf-dist[s3]'" if isinstance(error, ImportError) and address.startswith("s3") else ""
        said, advice = " ".join(text_of(error).split()), hint or "; check it, and your credentials"
        raise ConfigError(f"{key}: {address} cannot be read ({said}){advice}") from error


def cache() -> Path:
    """The folder of what was copied; nothing removes anything from it."""
    return Path(os.environ.get(CACHE) or "~/.cache/rlhf-dist").expanduser()


def push(folder: Path, address: str) -> str:
    """Copy an exported model to an address, config.json last; where it is now. Raises ConfigError."""
    try:
        if address.startswith(HUB):
            return _push_to_hub(folder, address)
        from fsspec.core import url_to_fs

        files, root = url_to_fs(address, skip_instance_cache=True, use_listings_cache=False)
        if files.exists(f"{root}/config.json"):
            raise ConfigError(f"{address} holds a model already; choose another address, or remove it")
        every = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in sorted(every, key=lambda file: file.name == "config.json"):
            target = f"{root.rstrip('/')}/{file.relative_to(folder).as_posix()}"
            make_folder(files, target.rpartition("/")[0])
            files.put_file(str(file), target)
            if (found := files.info(target)["size"]) != file.stat().st_size:
                raise OSError(f"{target} has {found} bytes instead of {file.stat().st_size}")
        return address
    except ConfigError:
        raise
    except Exception as error:  # whatever the library of a file system raises
        raise ConfigError(
            f"the model could not be written to {address} ({' '.join(text_of(error).split())}); check the address and "
            f"your credentials"
        ) from error


def make_folder(files: Any, path: str) -> None:
    """Make a folder and what is above, where a file system has folders; never a bucket, whose name may be misspelt."""
    try:
        files.mkdir(path, create_parents=False)
    except FileExistsError:
        return
    except FileNotFoundError:
        parent = path.rpartition("/")[0]
        if "/" not in parent:
            raise
        make_folder(files, parent)
        files.mkdir(path, create_parents=False)


def _push_to_hub(folder: Path, address: str) -> str:
    from huggingface_hub import HfApi

    name, _, revision = address.removeprefix(HUB).strip("/").partition("@")
    if name.count("/") != 1:
        raise ConfigError(f"a model of a hub is hf://ORGANISATION/NAME[@BRANCH], got {address!r}")
    api = HfApi()
    api.create_repo(name, private=True, exist_ok=True)
    if revision:
        api.create_branch(name, branch=revision, exist_ok=True)
    done = api.upload_folder(repo_id=name, folder_path=folder, revision=revision or None)
    return f"{HUB}{name}@{done.oid}"


def _of_data(address: str, key: str) -> tuple[tuple[str, str | None], str]:
    """((repository, revision), path inside) of an address of data."""
    found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", address)
    if found is None:
        raise ConfigError(
            f"{key}: data of a hub are hf://datasets/ORGANISATION/NAME[@REVISION][/FILES], got {address!r}"
        )
    return (found[1], found[2]), found[3] or ""


def _version(files: Any, name: str, info: Mapping[str, Any]) -> str:
    """What another version of a file has another of: of the web what the server says, since a `ukey` is of the address
    alone there."""
    return str(info.get("ETag") or info.get("Last-Modified") or files.ukey(name))


def _snapshot(name: str, revision: str | None, kind: str, key: str, inside: str = "") -> Path:
    """The folder of a repository at a revision in the hub's cache; its name is the commit.

    inside: the files, pattern or folder that is wanted of it; empty: all.
    """
    from huggingface_hub import constants, snapshot_download

    asked: dict[str, Any] = {"repo_type": kind, "revision": revision, **_wanted(kind, inside)}
    cached: Path | None = None
    try:
        cached = Path(snapshot_download(name, local_files_only=True, **asked))
        if _is_whole(cached, kind, inside):
            return cached
    except Exception:  # it is not in the cache, whatever the library calls that
        pass
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        return Path(snapshot_download(name, etag_timeout=ANSWER_S, **asked))
    except Exception as error:  # no hub, no such repository, no right to it
        if cached is not None and kind == "model":
            return cached  # a config alone is enough for model.init=random; else the check of the model says what lacks
        said = " ".join(text_of(error).split())
        at = "" if revision is None else f" --revision {revision}"
        flag = "" if kind == "model" else f" --repo-type {kind}"
        raise ConfigError(
            f"{key}: {name} is not in the cache {constants.HF_HUB_CACHE}, and could not be fetched ({said[:200]}); "
            f"where there is a network run `hf download {name}{flag}{at}`, with --local-dir FOLDER to set {key}=FOLDER"
        ) from error


def _wanted(kind: str, inside: str) -> dict[str, Any]:
    if kind == "model":
        return {"ignore_patterns": list(NOT_OF_MODELS)}
    # The hub's patterns are of whole paths, its `*` takes in folders, and `**/` is a folder at least.
    return {"allow_patterns": [inside, f"{inside}/*", inside.replace("**/", "")] if inside else None}


def _is_whole(folder: Path, kind: str, inside: str) -> bool:
    """Whether a cached snapshot has what is asked for: others fetch single files into it, such as the tokenizer's."""
    if kind != "model":
        return not inside or any(glob.iglob(f"{glob.escape(str(folder))}/{inside}", recursive=True))
    try:
        indices = [json.loads(file.read_text()) for file in folder.glob("*.safetensors.index.json")]
    except ValueError:
        return False
    shards = {name for index in indices for name in index["weight_map"].values()}
    return any(any(folder.glob(pattern)) for pattern in WEIGHTS) and all((folder / name).is_file() for name in shards)


def _listed(files: Any, root: str) -> tuple[Sequence[str], str]:
    """The files at a path, pattern or folder, and what their names begin with."""
    if (base := _base(root)) is not None:
        names = sorted(name for name in files.glob(root) if not files.isdir(name))
    elif files.isfile(root):
        return [root], root.rpartition("/")[0]
    else:
        base, names = root.rstrip("/"), sorted(files.find(root))
    if not names:
        raise FileNotFoundError("there is no such file")
    return [str(name) for name in names], base


def _base(path: str) -> str | None:
    """The folder above a pattern; None for what is none."""
    parts = re.split(r"[*\[]", path)  # a "?" is part of addresses of the web
    return parts[0].rpartition("/")[0] if len(parts) > 1 else None


def _copy(files: Any, names: Sequence[str], sizes: Sequence[int | None], inside: Sequence[str], folder: Path) -> None:
    """sizes: in bytes; None where a server does not say."""
    partial = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.partial")
    try:
        for name, size, where in zip(names, sizes, inside, strict=True):
            target = partial / where
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(target))
            if size is not None and target.stat().st_size != size:
                raise OSError(f"{name} came with {target.stat().st_size} bytes instead of {size}")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
