"""Shards in a stand-in for Google's store, through gcsfs, are those on the disk."""

import pytest

pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("gcsfs")

# In a process of its own: gcsfs reads these settings when it is imported.
SETTINGS = {"FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
CODE = """
import os, socket, sys
from pathlib import Path
from gcp_storage_emulator.server import create_server
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
server.start()
import gcsfs
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped
from prelude.data.loader import build_loader
store = gcsfs.GCSFileSystem(token="anon", endpoint_url=os.environ["STORAGE_EMULATOR_HOST"])
for path in map(Path, sys.argv[1:]):
    store.pipe(f"bucket/{path.name}", path.read_bytes())
build = lambda shards: build_loader(shards, ViewPlan((View((6, 6)),)), seed=5, micro_batch=6, label="cls")
for url in ("gs://bucket/{000..002}.tar", "gs://bucket/00*.tar"):
    local, remote = build(sys.argv[1:]), build(url)
    assert local.state_dict() == remote.state_dict() and remote.index.paths[0].checksums.keys() == {"md5", "crc32c"}
    for _ in range(12):
        one, other = next(local), next(remote)
        assert one.sample_ids.equal(other.sample_ids) and one.labels.equal(other.labels)
        assert one.views[0].equal(other.views[0])
try:
    build("gs://bucket/none.tar")
except RunStopped as error:
    print(error)
sys.stdout.flush()
os._exit(0)  # the stand-in's threads know no end
"""


def test_shards_of_a_bucket_are_those_on_the_disk(write_shards, run_python):
    out, err = run_python(CODE, *write_shards([11, 7, 12]), **SETTINGS).communicate(timeout=120)
    assert "gs://bucket/none.tar cannot be fetched: 404" in out, err[-3000:]
