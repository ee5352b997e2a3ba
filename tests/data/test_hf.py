"""Shards of a data set on a stand-in for the Hugging Face hub, through HfFileSystem, are those on the disk."""

import json

import pytest

pytest.importorskip("huggingface_hub")

from hub import Hub, serving  # noqa: E402

# In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported.
CODE = """
import json, os, sys
import huggingface_hub
from prelude.data import remote_shards
from prelude.data.batch import View, ViewPlan
from prelude.data.errors import RunStopped, UserError
from prelude.data.loader import build_loader
from prelude.data.waiting import wait_at_most
remote_shards.FIRST_PAUSE_SECONDS = 0.1
wait_at_most(20, "x")
plan = ViewPlan((View((6, 6)),))
build = lambda shards: build_loader(shards, plan, seed=5, micro_batch=6, label="cls")
asked = json.loads(sys.argv[1])
for url in asked["same"]:
    local, remote = build(asked["paths"]), build(url)
    assert local.state_dict() == remote.state_dict()
    assert all(path.checksums.keys() == {"sha256"} for path in remote.index.paths), remote.index.paths[0].checksums
    for step in range(12):
        if step == 7:  # in mid-epoch, by another reader
            state, remote = remote.state_dict(), build(url)
            remote.load_state_dict(state)
        one, other = next(local), next(remote)
        assert one.sample_ids.equal(other.sample_ids) and one.labels.equal(other.labels)
        assert one.views[0].equal(other.views[0])
wait_at_most(4, "x")
for url, token in asked["refused"]:
    os.environ["HF_TOKEN"] = token
    huggingface_hub.HfFileSystem.clear_instance_cache()
    try:
        print(url, build(url).num_samples)
    except (RunStopped, UserError) as error:
        print(f"{type(error).__name__}: {error}")
"""


def contents(paths) -> list[bytes]:
    found = []
    for path in paths:
        with open(path, "rb") as file:
            found.append(file.read())
    return found


def test_shards_of_a_data_set_are_those_on_the_disk_and_what_cannot_be_had_is_a_sentence(write_shards, run_python):
    paths = write_shards([11, 7, 12])
    files = {f"data/{number:03d}.tar": content for number, content in enumerate(contents(paths))}
    hub = Hub(repos={"me/shapes": files, "me/secret": files}, private={"me/secret"}, gone={"me/gone"})
    secret = "hf://datasets/me/secret/data/000.tar"
    refused = [
        ("hf://datasets/me/shapes/data/007.tar", "", "cannot be fetched: 404 Not Found"),
        ("hf://datasets/me/shapes@other/data/000.tar", "", "cannot be fetched: 404 Invalid rev id: other"),
        ("hf://datasets/me/nothing/data/*.tar", "", "cannot be fetched: 401 Invalid username or password;"),
        (secret, "", "cannot be fetched: 401 Invalid username or password;"),
        (secret, "hf_wrong", "cannot be fetched: 401"),
        (secret, "hf_right", " 11"),
        ("hf://datasets/me/gone/data/000.tar", "", " attempts: "),
    ]
    same = ["hf://datasets/me/shapes/data/{000..002}.tar", "hf://datasets/me/shapes@main/data/*.tar"]
    with serving(hub):
        hub.faults = [503]
        asked = {"paths": paths, "same": same, "refused": [case[:2] for case in refused]}
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        out, err = run_python(CODE, json.dumps(asked), **settings).communicate(timeout=300)
        assert "Traceback" not in err, err[-3000:]
        assert hub.faults == []
    lines = out.splitlines()
    assert len(lines) == len(refused), out
    for (url, _, words), line in zip(refused, lines, strict=True):
        assert url in line and words in line and len(line) < 250, line
