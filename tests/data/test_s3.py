"""Shards in a stand-in for S3, through s3fs: killed in mid-epoch and resumed at another size, as from disk."""

import os
import signal

import pytest
import torch
from s3fs import S3FileSystem
from servers import stand_in_for_s3

from prelude.data import remote_shards
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped, UserError
from prelude.data.loader import build_loader
from prelude.data.shards import ShardIndex

PLAN = ViewPlan((View((6, 6)),))
KILLED = """
import sys, time
from prelude.data.batch import View, ViewPlan
from prelude.data.loader import build_loader
loader = build_loader(sys.argv[1], ViewPlan((View((6, 6)),)), seed=5, micro_batch=6, num_workers=2, label="cls")
for step in range(1000):
    batch = next(loader)
    print(step, batch.positions.tolist(), batch.labels.tolist(), flush=True)
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def stand_in():
    with stand_in_for_s3() as bucket:
        yield bucket


@pytest.fixture
def bucket(stand_in, monkeypatch):
    for name, value in stand_in.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # one that another test has made has other credentials
    monkeypatch.setattr(remote_shards, "FIRST_PAUSE_SECONDS", 0.01)
    return stand_in


def test_killed_in_mid_epoch_and_resumed_at_another_size_as_from_disk(bucket, write_shards, run_python, cache):
    paths = write_shards([40, 37, 25, 44])
    bucket.put(paths, "killed/")
    url = f"{bucket.url}/killed/{{000..003}}.tar"
    process = run_python(KILLED, url)
    lines = [process.stdout.readline() for _ in range(7)]  # of 24 that make an epoch
    os.kill(process.pid, signal.SIGKILL)
    local = build_loader(paths, PLAN, seed=5, micro_batch=6, label="cls")
    for step, line in enumerate(lines):
        batch = next(local)
        assert line == f"{step} {batch.positions.tolist()} {batch.labels.tolist()}\n", process.communicate()[1]
    state = local.state_dict()
    ranks = [
        build_loader(url, PLAN, seed=5, micro_batch=4, rank=rank, world_size=3, num_workers=rank, label="cls")
        for rank in range(3)
    ]
    for rank in ranks:
        rank.load_state_dict(state)
    expected = [next(local) for _ in range(48)]  # two epochs
    wanted = {int(p): (b.views[0][i], b.labels[i]) for b in expected for i, p in enumerate(b.positions)}
    seen = set()
    for _ in range(24):
        for rank in ranks:
            batch = next(rank)
            for i, position in enumerate(batch.positions.tolist()):
                seen.add(position)
                assert torch.equal(batch.views[0][i], wanted[position][0]) and batch.labels[i] == wanted[position][1]
    assert seen == set(wanted)
    for rank in ranks:
        rank.close()


def test_wildcards_are_listed(bucket, write_shards):
    paths = write_shards([3, 4])
    bucket.put(paths, "listed/")
    assert ShardIndex(f"{bucket.url}/listed/*.tar").fingerprint == ShardIndex(paths).fingerprint
    with pytest.raises(UserError, match="Nothing matches s3://bucket/nowhere"):
        ShardIndex(f"{bucket.url}/nowhere/*.tar")


def test_a_missing_object_or_bucket_is_named_with_its_status(bucket):
    for url in (f"{bucket.url}/nothing.tar", "s3://no-such-bucket/x.tar"):
        with pytest.raises(RunStopped, match=f"{url} cannot be fetched: .*404"):
            ShardIndex(url)


def test_an_etag_that_is_no_md5_costs_a_second_transfer_and_nothing_else(bucket, write_shards, monkeypatch):
    paths = write_shards([5])
    bucket.put(paths, "kms/")
    real = remote_shards.stores.described
    monkeypatch.setattr(
        remote_shards.stores,
        "described",
        lambda info: real(dict(info) | {"ETag": '"0123456789abcdef0123456789abcdef"'}),
    )
    assert ShardIndex(f"{bucket.url}/kms/000.tar").fingerprint == ShardIndex(paths).fingerprint


def test_an_object_of_several_parts_has_no_md5(bucket, write_shards):
    (path,) = write_shards([5])
    client, content = bucket.client, open(path, "rb").read()  # noqa: SIM115
    upload = client.create_multipart_upload(Bucket="bucket", Key="parts.tar")["UploadId"]
    where = {"Bucket": "bucket", "Key": "parts.tar", "UploadId": upload}
    etag = client.upload_part(**where, PartNumber=1, Body=content)["ETag"]
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]})
    index = ShardIndex(f"{bucket.url}/parts.tar")
    assert index.num_samples == 5 and not index.paths[0].checksums
