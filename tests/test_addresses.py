"""Models and data by a hub's name or an address: from a real cache folder of a hub, and a real S3 protocol."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
from huggingface_hub import constants

from controller.lifecycle.run_folder import find_beginning
from rlhf_dist.addresses import CACHE, local_data, local_model, push
from rlhf_dist.compose import Launch, compose
from rlhf_dist.data.files import data_files, read_files
from rlhf_dist.typed import ConfigError
from tests.s3_server import s3_server

OLD, NEW = "0" * 39 + "a", "0" * 39 + "b"


def cached(cache: Path, kind: str, name: str, commits: dict[str, dict[str, str]], main: str) -> None:
    """A repository as huggingface_hub keeps it: blobs, a folder of links for each commit, and what a branch is."""
    root = cache / f"{kind}s--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(main)
    (root / "blobs").mkdir()
    for commit, files in commits.items():
        for path, content in files.items():
            blob = root / "blobs" / f"{commit[-1]}{path.replace('/', '-')}"
            blob.write_text(content)
            link = root / "snapshots" / commit / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a network whose cache has a model and a data set."""
    config = {"model_type": "llama", "num_attention_heads": 4}
    cached(tmp_path, "model", "org/tiny", {sha: {"config.json": json.dumps(config)} for sha in (OLD, NEW)}, NEW)
    rows = {"data/train-0.jsonl": '{"prompt": "a"}\n', "data/test.jsonl": '{"prompt": "b"}\n'}
    cached(tmp_path, "dataset", "org/rows", {NEW: rows}, NEW)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def launch(*overrides: str, config: str | None = None) -> Launch:
    given = () if config is not None else ("task=none", "name=x")
    return compose("sft", [*given, *overrides], config)


def test_a_model_by_its_name_is_the_cached_one_and_its_commit_is_kept(hub: Path, tmp_path: Path) -> None:
    made = launch("model.path=org/tiny", "data.train.path=rows.jsonl")
    folder = hub / "models--org--tiny/snapshots" / NEW
    assert made.roles["actor"].model is not None and made.roles["actor"].model.path == str(folder)
    assert f"path: hf://org/tiny@{NEW}" in made.yaml and "org/tiny\n" not in made.yaml
    (hub / "models--org--tiny/refs/main").write_text(OLD)  # somebody has fetched another since
    (tmp_path / "config.yaml").write_text(made.yaml)
    again = launch(config=str(tmp_path / "config.yaml"))
    assert again.roles["actor"].model is not None and again.roles["actor"].model.path == str(folder)
    assert local_model(f"hf://org/tiny@{OLD}", "m")[0].endswith(OLD)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("org/none", "org/none is not in the cache .* HF_HUB_OFFLINE is set.* run `hf download org/none`"),
        ("hf://org/tiny@v9", "org/tiny is not in the cache .* run `hf download org/tiny --revision v9`"),
        ("hf://tiny", r"a model of a hub is hf://ORGANISATION/NAME\[@REVISION\], got 'hf://tiny'"),
        ("nowhere://bucket/model", "nowhere://bucket/model cannot be read .*Protocol not known"),
    ],
    ids=["no model", "no revision", "half a name", "no file system"],
)
def test_a_model_that_is_not_there_is_one_line(hub: Path, path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^actor.model.path: {said}"):
        launch(f"model.path={path}", "data.train.path=rows.jsonl")


def test_data_of_a_hub_are_files_of_the_cached_commit(hub: Path) -> None:
    made = launch("model.path=org/tiny", "data.train.path=hf://datasets/org/rows/data/train-*.jsonl")
    assert f"path: hf://datasets/org/rows@{NEW}/data/train-*.jsonl" in made.yaml
    assert made.run.data.train.path is not None
    assert rows_of(made.run.data.train.path) == ["a"]
    with pytest.raises(ConfigError, match="data.train.path: data of a hub are hf://datasets/"):
        launch("model.path=org/tiny", "data.train.path=hf://org/rows")
    with pytest.raises(ConfigError, match="hf download org/other --repo-type dataset"):
        local_data("hf://datasets/org/other", "data.train.path")


def test_of_data_only_the_files_that_are_named_are_fetched_and_a_model_without_weights_is(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    cached_only = huggingface_hub.snapshot_download

    def download(name: str, *, local_files_only: bool = False, **settings: Any) -> str:
        if local_files_only:
            return str(cached_only(name, local_files_only=True, **settings))
        asked.append({"name": name, **settings})
        if settings["repo_type"] == "dataset":
            raise ConnectionError("no such file")
        folder = hub / "models--org--tiny/snapshots" / NEW
        (folder / "model.safetensors").write_text("")
        return str(folder)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    local_data("hf://datasets/org/rows/data", "data.train.path")
    local_data("hf://datasets/org/rows/**/test.jsonl", "data.train.path")
    assert not asked, "they are in the cache"
    with pytest.raises(ConfigError, match="org/rows is not in the cache"):
        local_data("hf://datasets/org/rows/more/**/*.jsonl", "data.train.path")
    assert asked.pop()["allow_patterns"] == ["more/**/*.jsonl", "more/**/*.jsonl/*", "more/*.jsonl"]
    for _ in range(2):
        local_model("org/tiny", "model.path")
    assert [one["name"] for one in asked] == ["org/tiny"], "once: then it has weights"


def test_a_file_of_the_web_is_copied_again_when_the_server_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"etag": "1", "body": b'{"prompt": "a"}\n'}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("ETag", str(content["etag"]))
            self.end_headers()  # no Content-Length: its size is not known
            self.wfile.write(content["body"] if self.command == "GET" else b"")  # type: ignore[arg-type]

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv(CACHE, str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        first, again = (local_data(address, "data.train.path")[0] for _ in range(2))
        assert first == again and rows_of(first) == ["a"]
        content |= {"etag": "2", "body": b'{"prompt": "b"}\n'}
        assert rows_of(local_data(address, "data.train.path")[0]) == ["b"]
        server.shutdown()


def rows_of(path: str) -> list[str]:
    return [placed.row["prompt"] for placed in read_files(data_files(path))]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fsspec.AbstractFileSystem]:
    """A bucket that is reached as people reach theirs: by variables of the environment."""
    for package in ("moto", "s3fs"):
        if "CI" not in os.environ:
            pytest.importorskip(package)
    with s3_server() as options, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", options["key"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
        patch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
        yield fsspec.filesystem("s3", use_listings_cache=False, **options)


def test_data_and_models_come_from_s3_once_for_each_version(bucket: fsspec.AbstractFileSystem) -> None:
    bucket.pipe({"bucket/rows/train-0.jsonl": b'{"prompt": "a"}\n', "bucket/rows/train-1.jsonl": b'{"prompt": "b"}\n'})
    several, kept = local_data("s3://bucket/rows/train-*.jsonl, s3://bucket/rows/train-0.jsonl", "data.train.path")
    assert rows_of(several) == ["a", "b", "a"] and kept.startswith("s3://bucket/rows/train-*.jsonl,s3://")
    whole, _ = local_data("s3://bucket/rows", "data.train.path")
    assert several.split(",")[0] == f"{whole}/train-*.jsonl", "the same copy"
    bucket.pipe("bucket/rows/train-0.jsonl", b'{"prompt": "c"}\n')
    changed, _ = local_data("s3://bucket/rows/train-0.jsonl", "data.train.path")
    assert rows_of(changed) == ["c"] and changed != several.split(",")[1]
    bucket.pipe({"bucket/m/config.json": b"{}", "bucket/m/model.safetensors": b"x" * 9})
    folder, pinned = local_model("s3://bucket/m", "actor.model.path")
    assert pinned == "s3://bucket/m" and (Path(folder) / "model.safetensors").stat().st_size == 9
    with pytest.raises(ConfigError, match=r"data.train.path: s3://bucket/none.jsonl cannot be read .*no such file"):
        local_data("s3://bucket/none.jsonl", "data.train.path")


def test_an_export_is_pushed_whole_and_never_over_another(bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"w" * 1000)
    assert push(tmp_path, "s3://bucket/exports/mine") == "s3://bucket/exports/mine"
    assert bucket.cat("bucket/exports/mine/model.safetensors") == b"w" * 1000
    with pytest.raises(ConfigError, match="holds a model already"):
        push(tmp_path, "s3://bucket/exports/mine/")
    with pytest.raises(ConfigError, match="could not be written to s3://nobody/mine"):
        push(tmp_path, "s3://nobody/mine")


def test_a_run_writes_to_a_folder(hub: Path) -> None:
    made = launch("model.path=org/tiny", "data.train.path=rows.jsonl", "output.root=s3://bucket/runs")
    with pytest.raises(ConfigError, match="output.root=s3://bucket/runs must be a folder .* output.store=URL"):
        find_beginning(made)
