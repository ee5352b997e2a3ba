"""Remote shards whose names are escaped, or have what a URL means something by, are the same as on a disk."""

import logging
import os
import shutil
from urllib.parse import quote

import pytest
from servers import Server, serving

from prelude.data import stores
from prelude.data.batch import View, ViewPlan
from prelude.data.loader import build_loader
from prelude.data.remote_index import write_for
from prelude.data.remote_shards import RemoteShard
from prelude.data.shards import ShardIndex

PLAN = ViewPlan((View((6, 6)),))


@pytest.fixture
def odd(write_shards, tmp_path):
    """Paths on the disk, and a server of the same."""
    paths = []
    for path in write_shards([5, 7]):
        paths.append(str(tmp_path / f"my t#a-{os.path.basename(path)}"))
        shutil.copy(path, paths[-1])
    files = {quote(os.path.basename(path)): open(path, "rb").read() for path in paths}  # noqa: SIM115
    with serving(Server(files=files)) as server:
        yield paths, server


@pytest.mark.parametrize(
    "url, name, index",
    [
        ("https://h/d/my%20t%23a-000.tar?v=1", "my t#a-000.tar", "https://h/d/x%20%23.npz?v=1"),
        ("https://h/o/d%2Fa-0.tar", "a-0.tar", "https://h/o/d%2Fx%20%23.npz"),
        ("https://h/d/a=b+c-0.tar", "a=b+c-0.tar", "https://h/d/x%20%23.npz"),
        ("s3://b/d/t#a%20-0.tar", "t#a%20-0.tar", "s3://b/d/x #.npz"),
        ("gs://b/x?y.tar", "x?y.tar", "gs://b/x #.npz"),
    ],
)
def test_names_are_those_of_a_copy_on_a_disk(url, name, index):
    assert RemoteShard(url).name == name and stores.beside(url, "x #.npz") == index


def test_escaped_names_are_the_same_data_set_with_the_same_index_file(odd, tmp_path, caplog):
    paths, server = odd
    (index,) = write_for(paths, str(tmp_path / "index"))
    server.files[quote(os.path.basename(index))] = open(index, "rb").read()  # noqa: SIM115
    with caplog.at_level(logging.WARNING):
        remote = ShardIndex([f"{server.url}/{quote(os.path.basename(path))}" for path in paths])
    assert remote.fingerprint == ShardIndex(paths).fingerprint and not caplog.text
    assert sum(server.asked.values()) == 1  # the index file alone


def test_a_run_that_began_with_escaped_names_goes_on(odd, monkeypatch):
    paths, server = odd
    urls = [f"{server.url}/{quote(os.path.basename(path))}" for path in paths]
    build = lambda: build_loader(urls, PLAN, seed=5, micro_batch=5, label="cls")  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(RemoteShard, "name", property(lambda shard: shard.first_name))
        before = build()
        state = before.state_dict()
        before.close()
    now = build()
    assert now.state_dict()["fingerprint"] != state["fingerprint"]
    now.load_state_dict(state)
    now.close()
