"""The league at toy size: our arm trains as long as it was told and is judged as the doors judge; so is a peer's, where
the peer is installed. What the tables say of who is ahead is checked by hand."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

BENCHMARKS = str(ROOT / "benchmarks")
RECORD = [sys.executable, f"{BENCHMARKS}/league_record.py", "--minutes", "20"]
ENTRY = "mae/{}/{}/seed 0/5 min"


@pytest.fixture(scope="module")
def league_table():
    sys.path.insert(0, BENCHMARKS)
    import league_table

    yield league_table
    sys.path.remove(BENCHMARKS)


def smoke(folder, *words, code=0):
    command = [sys.executable, f"{BENCHMARKS}/league.py", "--smoke", "--work", str(folder), "--methods", "mae", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr if code else json.loads((folder / "smoke.json").read_text())


def test_mistakes_are_told_in_a_sentence(tmp_path):
    command = [sys.executable, f"{BENCHMARKS}/league.py", "--methods", "mae", "--arms", "prelude", "--busy", "1"]
    for words, told in ((["--data", "nosuch-*.tar", "--test", "t.tar"], "nosuch-*.tar"),):
        done = subprocess.run([*command, *words, "--out", f"{tmp_path}/o.json"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr


@pytest.mark.tutorial
def test_our_arm_trains_as_told_is_judged_as_the_doors_judge_and_is_not_repeated(tmp_path, capsys):
    words = ("--arms", "prelude", "--features", "mean", "stages")  # which a transformer does not have
    assert "mae has no features=stages" in smoke(tmp_path, "--arms", "prelude", "--features", "stages", code=2)
    assert "--features nonsense is no kind" in smoke(tmp_path, *words, "nonsense", code=2)
    unjudged = smoke(tmp_path, *words, "--train-only")["entries"][ENTRY.format("prelude", "ours")]
    record = smoke(tmp_path, *words)
    entry = record["entries"][ENTRY.format("prelude", "ours")]
    assert "linear" not in unjudged and unjudged == {key: entry[key] for key in unjudged}
    assert entry["steps"] == 4 and entry["batch"] == 16 and entry["images"] == 64
    run = tmp_path / "mae-prelude-ours-0" / "5" / "run"
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert entry["seconds"] == pytest.approx(sum(each["step_seconds"] for each in logged))
    assert 0 <= entry["others"] <= 1 and record["machine"]["cores"] >= 1
    for judged in (entry, record["untrained"]["mae/seed 0"]):
        assert {judged[name]["chosen"]["features"] for name in ("linear", "knn")} == {"mean"}

    from prelude.launch import knn

    shards = [word for split in ("train", "test") for word in (f"--{split}", str(tmp_path / f"shapes/{split}-*.tar"))]
    told = ["--features", "mean", "--out", str(tmp_path / "door"), "--num-workers", "0"]
    assert knn.main([str(run), *shards, *told]) == 0
    (found,) = (tmp_path / "door").glob("*.json")
    assert entry["knn"]["top1"] == pytest.approx(json.loads(found.read_text())["numbers"]["top1"]["value"], abs=0.01)

    before = (run / "metrics.jsonl").stat().st_mtime_ns
    assert smoke(tmp_path, *words)["entries"] == record["entries"]
    record["recipes"]["mae"] = "0123456789abcdef"  # as if the file had been another one, with which nothing came out
    failed = record | {"entries": {ENTRY.format("prelude", "ours"): {"failed": "typing error"}}}
    (tmp_path / "smoke.json").write_text(json.dumps(failed))
    assert "cannot be started" in smoke(tmp_path, *words, "--peers-python", "nosuch", code=2)
    (tmp_path / "smoke.json").write_text(json.dumps(record))  # with which something did
    assert "has measured another recipe mae; write another --out" in smoke(tmp_path, *words, code=2)
    assert "was begun with features ['mean', 'stages'], here it is" in smoke(tmp_path, *words, "cls", code=2)
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.tutorial
@pytest.mark.parametrize(("arm", "package"), [("lightly", "lightly"), ("stable-pretraining", "stable_pretraining")])
def test_a_peers_arm_trains_and_is_judged_alike(tmp_path, arm, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{arm} is not installed")
    record = smoke(tmp_path, "--arms", arm)
    assert all(record["entries"][ENTRY.format(arm, setting)]["steps"] == 4 for setting in ("their", "ours"))


def test_ahead_level_and_behind_are_told_by_the_interval(league_table):
    def row(*values):
        return [{"linear": {"top1": value, "se": 1.0}} for value in values]

    # 1.96 sqrt(1 + 1) = 2.77; with the seeds' variances of 2 and 2 over 2 seeds: 2.306 sqrt(2 + 1 + 1) = 4.61, of
    # Student's t at (2 + 1 + 1)² / (1² / 1 + 1² / 1) = 8 degrees of freedom
    assert league_table.difference(row(60.0), row(57.0), "linear") == "+3.0 ± 2.8, ahead"
    assert league_table.difference(row(59.0, 61.0), row(56.0, 58.0), "linear") == "+3.0 ± 4.6, level"
    assert league_table.difference(row(50.0), row(57.0), "linear") == "-7.0 ± 2.8, behind"


def test_what_is_to_be_measured_anew_is_marked_and_no_lead(league_table):
    def entry(arm, **more):
        number = {"top1": 50.0 + (arm == "prelude"), "se": 0.1}
        about = {"method": "mae", "minutes": 5, "arm": arm, "setting": "ours", "others": 0.0, "seconds": 300.0}
        return about | {"linear": number, "knn": number} | more

    us, them, old = entry("prelude"), entry("lightly"), entry("lightly", anew="another encoder")
    assert "+1.0 ± 0.3, ahead" in league_table.ahead([us, them])
    assert league_table.ahead([us, old]) == ""
    assert league_table.marks([them, old]) == "2 seeds, to be measured anew"


def test_a_peer_has_our_positions_at_our_settings_and_its_own_at_its_own(tmp_path, league_table):
    from types import SimpleNamespace

    import torch
    from league_arms import positions_of, recipe, timm_arguments
    from league_peer import POSITIONS, encoder_of

    config = recipe("ijepa", [])
    table = positions_of(config)  # (1, L, D)
    torch.save(table, tmp_path / POSITIONS)
    spec = SimpleNamespace(encoder=timm_arguments(config), folder=tmp_path, setting="ours")
    ours = encoder_of(spec)
    assert torch.equal(ours.pos_embed, table) and not ours.pos_embed.requires_grad and table.std() > 0.5
    spec.setting = "their"
    assert encoder_of(spec).pos_embed.requires_grad and encoder_of(spec).pos_embed.std() < 0.1
    assert positions_of(recipe("vicreg", [])) is None


def test_what_was_measured_beside_others_or_off_its_budget_is_marked(league_table):
    entry = {"others": 0.0, "seconds": 305.0, "minutes": 5}
    assert league_table.marks([entry]) == ""
    assert league_table.marks([entry, entry | {"others": 0.3}]) == "2 seeds, busy 30%"
    assert league_table.marks([entry | {"seconds": 240.0}]) == "off by 20%"


def test_a_record_needs_three_sound_seeds_and_more_than_the_spread(tmp_path):
    def kept(method, *values, others=0.0):
        about = {"method": method, "arm": "prelude", "minutes": 20, "seconds": 1210.0, "others": others}
        return {f"{method} {i}": about | {"linear": {"top1": value}} for i, value in enumerate(values)}

    def asked(features=("mean",), **entries):
        measured = {"machine": {"cores": 2}, "shards": {}, "settings": [], "features": features, "entries": entries}
        (tmp_path / "league.json").write_text(json.dumps(measured))
        words = ["--measured", str(tmp_path / "league.json"), "--folder", str(tmp_path)]
        return subprocess.run([*RECORD, *words], capture_output=True, text=True)

    two = asked(**kept("a", 60.0, 61.0), **kept("b", 70.0, 71.0, 72.0, others=0.3))
    assert two.returncode == 1 and "a has 2 sound seeds of 2" in two.stdout and "b has 0 sound" in two.stdout
    assert asked(**kept("a", 60.0, 61.0, 62.0)).returncode == 0  # 61 ± 1
    within = asked(**kept("c", 61.5, 61.9, 62.3))
    assert within.returncode == 1 and "the record stays a: 61.0 ± 1.0" in within.stdout
    assert asked(**kept("c", 61.7, 62.1, 62.5)).returncode == 0
    assert json.loads((tmp_path / "linear-20min-2cores.json").read_text())["method"] == "c"
    unlike = asked(("last4",), **kept("d", 80.0, 81.0, 82.0))
    assert unlike.returncode == 1 and "measured with features ['mean'], this with ['last4']" in unlike.stdout


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"entries": []}', b'{"entries": {}}']
)
def test_what_is_no_record_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "league.json"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run([*RECORD, "--measured", str(path)], capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith(f"error: {path} is no record") and done.stderr.count("\n") == 1
    )
