"""URLs that let their holder in: what a shard is does not change with that, and no message or record hands it on."""

import json
import logging
import re

import pytest
from servers import Server, serving

from prelude.data import remote_shards, waiting
from prelude.data.bad_samples import BadSamples
from prelude.data.errors import RunStopped, UserError
from prelude.data.remote_shards import open_shard
from prelude.data.shards import ShardIndex
from prelude.data.signed_urls import shown, shown_in, without_signature
from prelude.evaluators.labelled import Labelled, num_in_both
from prelude.pretrain.environment import describe_environment

H = "https://h/p-000.tar"


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in vars(waiting.Patience(timeout_seconds=60)).items():
        monkeypatch.setattr(waiting.patience, name, value)
    monkeypatch.setattr(remote_shards, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def server(write_shards):
    files = {path.rpartition("/")[2]: open(path, "rb").read() for path in write_shards([5, 5])}  # noqa: SIM115
    with serving(Server(files=files)) as running:
        yield running


@pytest.mark.parametrize(
    "url, plain",
    [
        (f"{H}?X-Amz-Signature=a&X-Amz-Expires=9&X-Amz-SignedHeaders=host&x-id=GetObject", H),  # as ever
        (f"{H}?AWSAccessKeyId=a&Signature=b%2F&Expires=1", H),
        (f"{H}?GoogleAccessId=a&Expires=1&Signature=b", H),
        (f"{H}?Policy=a&Signature=b&Key-Pair-Id=c", H),
        (f"{H}?X-Goog-Signature=a&X-Goog-Date=1", H),
        (f"{H}?q-sign-algorithm=sha1&q-signature=a", H),
        (f"{H}?sv=2022&se=2026&sr=b&sp=r&st=1&spr=https&sig=A", H),
        (f"{H}?temp_url_sig=a&temp_url_expires=17", H),
        (f"{H}?X-Tos-Algorithm=a&X-Tos-Signature=b&X-Tos-Expires=3", H),
        (f"{H}?AccessKeyId=k&Expires=1&x-obs-security-token=a&Signature=b", H),
        (f"{H}?access_token=a", H),
        (f"{H}?private_token=a", H),
        (f"{H}?Authorization=3_2", H),
        (f"{H}?md5=a&expires=1", H),  # nginx
        (f"{H}?auth_key=1-0-0-a", H),  # Alibaba's CDN
        (f"{H}?hdnts=exp=1~acl=/*~hmac=a", H),  # Akamai
        (f"{H}?__token__=exp=1~hmac=a", H),
        ("https://h/download.aspx?UniqueId=1&tempauth=a", "https://h/download.aspx?UniqueId=1"),  # SharePoint
        (f"{H}?jwt=a", H),
        (f"{H}?access_key=a&secret=b", H),
        (f"{H}?aws_secret_access_key=a&refresh_token=b&id_token=c&pwd=d&n=1", f"{H}?n=1"),
        (f"{H}?sas=a", H),
        ("https://h/d?file=p.tar&amp;Expires=1&amp;Signature=x&amp;n=1", "https://h/d?file=p.tar&amp;n=1"),
        ("https://user:word@h/p-000.tar", H),
        ("https://h/d?file=p-000.tar&Expires=1&Signature=x", "https://h/d?file=p-000.tar"),
        (f"{H}?versionId=3&X-Amz-Signature=a", f"{H}?versionId=3"),
        (f"{H}?myPolicy=a&noExpires=1&sp=2&se=3", f"{H}?myPolicy=a&noExpires=1&sp=2&se=3"),  # names of something else
        ("https://h/d?token=a", "https://h/d?token=a"),  # it may be the file
        ("https://h/d?md5=a&expires=1", "https://h/d?md5=a"),
        (f"{H}?md5=a", f"{H}?md5=a"),
        (f"{H}?secretary=a&sass=1&keys=b", f"{H}?secretary=a&sass=1&keys=b"),
        ("https://h/a#auth=1.tar", "https://h/a#auth=1.tar"),  # a name
        ("s3://b/a?Signature=x#1.tar", "s3://b/a?Signature=x#1.tar"),
        ("/data/a?Signature=x.tar", "/data/a?Signature=x.tar"),
    ],
)
def test_only_what_signs_a_url_is_dropped(url, plain):
    assert without_signature(url) == plain


def test_files_that_are_named_in_the_query_are_files_of_their_own(write_shards):
    one, other = (open(path, "rb").read() for path in write_shards([5, 5]))  # noqa: SIM115
    files = {"download?file=p-0.tar": one, "download?file=p-1.tar": other}
    with serving(Server(files=files, checksums=False, by_query=("file",))) as server:
        index = ShardIndex(f"{server.url}/download?file=p-{{0..1}}.tar&Expires=1&Signature=x")
        assert [open(open_shard(path), "rb").read() for path in index.paths] == [one, other]  # noqa: SIM115


@pytest.mark.parametrize("query", ["sv=1&sp=r&sig={}", "token={}", "X-Amz-Signature={}"])
def test_another_signature_fetches_nothing_again(query, server):
    url = f"{server.url}/{{000..001}}.tar?{query}"
    first = ShardIndex(url.replace("{}", "a"))
    before = dict(server.asked)
    assert ShardIndex(url.replace("{}", "b")).fingerprint == first.fingerprint and dict(server.asked) == before


def test_another_signature_is_the_same_evaluation(server):
    told, indexes = [], []
    for signature in "ab":
        url = f"{server.url}/000.tar?X-Amz-Signature={signature}"
        indexes.append(ShardIndex(url))
        told.append(Labelled(url, [url], "cls").described("train", indexes[-1]))
    assert told[0] == told[1] and told[0]["shards"] == f"{server.url}/000.tar"
    assert num_in_both(*indexes) == 5  # and the same images


def test_messages_show_no_signature(server, caplog):
    url = f"{server.url}/404.tar?X-Amz-Signature=secret"
    with pytest.raises(RunStopped) as stopped:
        ShardIndex(url)
    assert "404.tar cannot be fetched" in str(stopped.value) and "secret" not in str(stopped.value)
    with pytest.raises(UserError) as refused:
        ShardIndex(f"{server.url}/*.tar?sig=secret&sp=r")
    assert "secret" not in str(refused.value)
    server.files["shards.index.npz"] = b"spoilt"
    with caplog.at_level(logging.WARNING):
        (path,) = ShardIndex(f"{server.url}/000.tar?token=secret").paths
    assert "shards.index.npz is not used" in caplog.text and "secret" not in caplog.text
    assert f"{path}" == f"{server.url}/000.tar" and str(path).endswith("?token=secret")
    waiting.doing(b"it fetches https://u:secret@h/a.tar?X-Amz-Signature=secret, 1 of 2 MiB")
    assert waiting.doing_now() == "it fetches https://h/a.tar, 1 of 2 MiB"


def test_records_have_no_signature(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prelude", f"data.shards={H}?sig=secret&sp=r::{H}?a=1&Signature=secret"])
    assert describe_environment()["command"] == ["prelude", f"data.shards={H}::{H}?a=1"]
    bad = BadSamples(tmp_path / "bad.jsonl")
    bad.add(f"{H}?token=secret", "odd", 3, lambda: "key")
    assert json.loads((tmp_path / "bad.jsonl").read_text())["shard"] == H
    assert shown_in({"a": [f"{H}?token=secret", 1, None]}) == {"a": [H, 1, None]}
    assert shown(f"<a href='{H}?n=1&amp;Signature=secret'>") == f"<a href='{H}?n=1'>"
    for fragment in ("access_token=secret&n=1", "/p?sig=secret", "n=1;jwt=secret", "38;Signature=secret"):
        assert shown(f"see {H}?n=1#{fragment}.") == f"see {H}?n=1." and "secret" not in shown(f"{H}#{fragment}")
    assert shown(f"{H}#secret=secret") == H and shown(f"see {H}#policy.") == f"see {H}#policy."
    assert shown(f"see ({H}?token=secret); or '{H}?sig=a'.") == f"see ({H}); or '{H}'."


@pytest.mark.parametrize(
    "plain",
    ["http://[fd00::1]:9000/b/p.tar", "https://h/it's.tar", "https://h/a::b.tar", f"{H}::/data/a.tar::http://[::1]/a"],
)
def test_colons_and_an_apostrophe_hide_no_signature(plain):
    signed = "::".join(f"{one}?sig=secret" if "://" in one else one for one in re.split(r"::(?=http|/)", plain))
    assert "secret" in signed and shown(f"see '{signed}', or {signed}.") == f"see '{plain}', or {plain}."
