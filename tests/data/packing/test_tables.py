"""Tables of paths as people and spreadsheets write them, Parquet, and Hugging Face datasets on disk."""

import csv
import errno
import io
import json
import math
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packed_shards import image_of, left_out, read_shards

from prelude.data.errors import RunStopped, UserError
from prelude.data.packing import arrow, blocks, extras
from prelude.data.packing.open import open_source
from prelude.data.packing.source import SourceOptions
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.labels import VectorFormat, label_vectors

ROWS = [("a.png", "cat", "p1"), ("sub/b c.png", "dog", "p2"), ("ä,;.png", "cat", "p1"), ("d.PNG", "emu", "p3")]


@pytest.fixture
def images(write_files, picture):
    return write_files("t", {name: picture(n) for n, (name, _, _) in enumerate(ROWS)})


def write_csv(folder, rows, header=("file", "species", "patient"), name="t.csv", encoding="utf-8", start="", **form):
    out = io.StringIO()
    csv.writer(out, **form).writerows([header, *rows] if header else rows)
    (folder / name).write_bytes((start + out.getvalue()).encode(encoding))
    return folder / name


def by_source(folder, split="train"):
    return {s["source"]: s for s in read_shards(folder, split)}


FORMS = {
    "plain": {},
    "a byte order mark": {"encoding": "utf-8-sig"},
    "semicolons": {"delimiter": ";"},
    "what a German spreadsheet writes": {"delimiter": ";", "encoding": "utf-8-sig", "quoting": csv.QUOTE_ALL},
    "told by its first line": {"delimiter": ";", "start": "sep=;\r\n"},
    "tabs": {"delimiter": "\t", "name": "t.tsv"},
    "Unicode text of a spreadsheet": {"delimiter": "\t", "encoding": "utf-16"},
    "line ends of Unix": {"lineterminator": "\n"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_in_any_form_gives_the_same_samples(images, packed, form):
    folder, _ = packed(write_csv(images, ROWS, **FORMS[form]), options={"label": ("species",)})
    found = by_source(folder)
    assert {name: s["png"] for name, s in found.items()} == {n: (images / n).read_bytes() for n, _, _ in ROWS}
    classes = (folder / "classes.txt").read_text().splitlines()
    assert {name: classes[int(s["cls"])] for name, s in found.items()} == {n: c for n, c, _ in ROWS}


def test_paths_relative_absolute_below_a_root_and_from_windows(images, packed, tmp_path):
    absolute = [(str(images / name), label, group) for name, label, group in ROWS]
    folder, _ = packed(write_csv(tmp_path, absolute), to="absolute")
    assert len(read_shards(folder)) == 4
    (tmp_path / "lists").mkdir()
    elsewhere = write_csv(tmp_path / "lists", [(name.replace("/", "\\"), c, p) for name, c, p in ROWS])
    with pytest.raises(UserError, match="None of the 4 images .*write --root"):
        packed(elsewhere)
    folder, _ = packed(elsewhere, options={"root": str(images)}, to="root")
    assert {image_of(s) for s in read_shards(folder)} == {(images / n).read_bytes() for n, _, _ in ROWS}


def test_rows_without_an_image_are_told(images, packed):
    (images / "empty.jpg").touch()
    (images / "doc.pdf").write_bytes(b"x")
    more = [("", "cat", ""), ("gone.png", "cat", ""), ("http://host/a.png", "cat", ""), ("empty.jpg", "", ""),
            ("doc.pdf", "", ""), ("./a.png", "cat", "p1")]  # fmt: skip
    table = write_csv(images, [*ROWS, *more])
    with pytest.raises(UserError, match=r"listed twice .*\(line 2 and line 11\)"):  # ./a.png is another text
        packed(table)
    folder, summary = packed(write_csv(images, [*ROWS, *more[:-1], ROWS[0]]))
    assert left_out(folder) == {
        "line 6": ("no path", True), "gone.png": ("no such file", True), "doc.pdf": ("no image by its name", True),
        "http://host/a.png": ("a URL and not a file", True), "empty.jpg": ("empty image", True),
        "a.png": ("listed twice", False),
    }  # fmt: skip
    assert len(read_shards(folder)) == 4


def test_labels_that_are_numbers_stay_what_they_are_and_none_is_none(images, packed):
    rows = [(name, label, "") for (name, _, _), label in zip(ROWS, ["3", "", "3.0", "-1"], strict=True)]
    folder, summary = packed(write_csv(images, rows), options={"label": ("species",)})
    assert [by_source(folder)[name].get("cls") for name, _, _ in ROWS] == [b"3", None, b"3", None]
    assert summary["unlabelled"] == 2 and not (folder / "classes.txt").exists()


def test_a_negative_number_among_names_is_no_label_unless_it_is_given(images, packed):
    labels = ["dog", "-1", "-1.0", "cat"]
    table = write_csv(images, [(name, label, "") for (name, _, _), label in zip(ROWS, labels, strict=True)])
    folder, summary = packed(table, options={"label": ("species",)})
    assert [by_source(folder)[name].get("cls") for name, _, _ in ROWS] == [b"1", None, None, b"0"]
    assert summary["unlabelled"] == 2 and (folder / "classes.txt").read_text().splitlines() == ["cat", "dog"]
    given = {"label": ("species",), "classes": ("-1", "cat", "dog")}
    folder, _ = packed(table, to="given", options=given)
    assert [by_source(folder)[name].get("cls") for name, _, _ in ROWS] == [b"2", b"0", None, b"1"]


def test_a_table_without_a_header(images, packed):
    folder, _ = packed(write_csv(images, [row[:2] for row in ROWS], header=None))
    assert (folder / "classes.txt").read_text().splitlines() == ["cat", "dog", "emu"]
    assert len(read_shards(folder)) == 4


@pytest.mark.parametrize("form", ["one column", "a column each", "JSON lines"])
def test_several_labels_are_what_multilabel_reads(images, packed, form):
    names, found = ("x", "y"), [{"x"}, {"x", "y"}, set(), {"y"}]
    if form == "one column":
        rows = [(n, "|".join(sorted(f)), p) for (n, _, p), f in zip(ROWS, found, strict=True)]
        source, options = write_csv(images, rows), {"label": ("species",), "label_separator": "|"}
    elif form == "a column each":
        rows = [(n, p, *(f"{int(name in f)}.0" for name in names)) for (n, _, p), f in zip(ROWS, found, strict=True)]
        source = write_csv(images, rows, header=("file", "patient", *names))
        options = {"label": names}
    else:
        lines = [{"file": n, "patient": p, "findings": sorted(f)} for (n, _, p), f in zip(ROWS, found, strict=True)]
        source, options = images / "t.jsonl", {"label": ("findings",)}
        source.write_text("\n".join(map(json.dumps, lines)))
    folder, _ = packed(source, options=options | {"group": "patient"}, per_shard=2)
    index = ShardIndex(str(folder / "*.tar"), "json")
    labels = label_vectors(index, VectorFormat(names, "labels", "patient"))
    sources = [s["source"] for s in read_shards(folder)]
    order = [sources.index(n) for n, _, _ in ROWS]
    assert labels.values[order].tolist() == [[float(n in f) for n in names] for f in found]
    groups = labels.groups[order].tolist()
    assert groups[0] == groups[2] and len(set(groups)) == 3


def test_uncertain_and_unknown_findings_are_kept_apart(images, packed):
    rows = list(zip([n for n, _, _ in ROWS], ["1", "-1.0", "", "0"], ["True", "no", "nan", "1.0"], strict=True))
    folder, _ = packed(write_csv(images, rows, header=("file", "x", "y")), options={"label": ("x", "y")})
    found = [json.loads(by_source(folder)[n]["json"])["labels"] for n, _, _ in ROWS]
    assert found == [{"x": 1, "y": 1}, {"x": -1, "y": 0}, {"x": None, "y": None}, {"x": 0, "y": 1}]


@pytest.mark.parametrize("option", [{"fields": ("labels",)}, {"group": "labels"}])
def test_a_column_that_would_take_the_place_of_several_labels_is_refused(images, packed, option):
    rows = [(name, "a|b", "site") for name, _, _ in ROWS]
    table = write_csv(images, rows, header=("file", "findings", "labels"))
    with pytest.raises(UserError, match="The column 'labels' of .* beside several labels.*; rename the column"):
        packed(table, options={"label": ("findings",), "label_separator": "|"} | option)
    folder, _ = packed(table, options={"label": ("findings",)} | option)
    assert all(json.loads(sample["json"]) == {"labels": "site"} for sample in read_shards(folder))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"label": ("specie",)}, "did you mean species"),
        ({"image": "patients"}, "did you mean patient"),
        ({"label": ("species", "patient")}, "'species' .*holds 'cat'; write 1, 0, -1 or nothing"),
        ({"split": "test"}, "--split test has no effect on .*, which names no split"),
        ({"label": ("species",), "classes": ("cat", "dog")}, "the class 'emu'"),
        (
            {"label": ("species",), "classes": ("cat", "dog", "cat", "emu")},
            "The list of classes has the class 'cat' more than once",
        ),
    ],
)
def test_mistakes_are_one_sentence(images, packed, options, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        packed(write_csv(images, ROWS), options=options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is empty"),
        (b"file\n\xe4.png\n", "not UTF-8"),
        (b"file,file\na.png,b\n", "two columns 'file'"),
        (b"file,label\na.png,cat,dog\n", "Line 2 .* has 3 cells"),
        (b"x,y\n1,2\n", "not clear which column"),
    ],
)
def test_tables_that_are_none_are_refused(images, packed, content, sentence):
    (images / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        packed(images / "bad.csv")


# ---- Parquet and Arrow


def image_table(images, with_paths=False):
    content = [{"bytes": (images / n).read_bytes(), "path": n} for n, _, _ in ROWS]
    return pa.table({"image": content, "label": [1, 0, 1, 2], "patient": [p for _, _, p in ROWS]})


def with_class_names(table, names):
    features = {"species": {"_type": "ClassLabel", "names": names}, "image": {"_type": "Image"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_parquet_with_image_bytes(images, packed, tmp_path):
    (tmp_path / "pq").mkdir()
    table = image_table(images).rename_columns(["image", "species", "patient"])
    table = with_class_names(table, ["dog", "cat", "emu"])
    pq.write_table(table.slice(0, 3), tmp_path / "pq" / "part-0.parquet", row_group_size=2)
    pq.write_table(table.slice(3), tmp_path / "pq" / "part-1.parquet")
    folder, _ = packed(tmp_path / "pq", options={"group": "patient"}, per_shard=2)
    found = by_source(folder)
    expected = {f"part-{n // 3}.parquet/{n % 3:08d}": row for n, row in enumerate(ROWS)}
    assert {name: s["png"] for name, s in found.items()} == {
        k: (images / r[0]).read_bytes() for k, r in expected.items()
    }
    classes = (folder / "classes.txt").read_text().splitlines()
    assert classes == ["dog", "cat", "emu"]
    assert {name: classes[int(s["cls"])] for name, s in found.items()} == {k: r[1] for k, r in expected.items()}
    assert {name: json.loads(s["json"]) for name, s in found.items()} == {
        k: {"patient": r[2]} for k, r in expected.items()
    }


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_column_of_bytes_that_is_not_the_image_may_be_empty_or_a_path_elsewhere(images, packed, tmp_path, first):
    (tmp_path / "pq").mkdir()
    table = image_table(images).rename_columns(["image", "species", "patient"])
    masks = {"a": table["image"], "b": pa.nulls(len(ROWS)), "c": pa.array(["mask.png"] * len(ROWS))}

    def write(*files):
        for name, of in zip("xy", files, strict=True):
            pq.write_table(table.append_column("mask", masks[of]), tmp_path / "pq" / f"{name}.parquet")

    write(*(first, "b" if first == "a" else "a"))
    assert len(read_shards(packed(tmp_path / "pq")[0])) == 2 * len(ROWS)
    folder, _ = packed(tmp_path / "pq", "masks", options={"image": "mask"})
    assert len(read_shards(folder)) == len(ROWS) and len(left_out(folder)) == len(ROWS)
    write(first, "c")
    assert len(read_shards(packed(tmp_path / "pq", "images", options={"image": "image"})[0])) == 2 * len(ROWS)


def test_class_numbers_that_mean_different_things_are_refused(images, packed, tmp_path):
    (tmp_path / "pq").mkdir()
    table = image_table(images).rename_columns(["image", "species", "patient"])
    for file, names in (("a", ["dog", "cat", "emu"]), ("b", ["cat", "dog", "emu"])):
        pq.write_table(with_class_names(table, names), tmp_path / "pq" / f"{file}.parquet")
    with pytest.raises(
        UserError, match=r"Class 0 of column 'species' is 'dog' in .*a.parquet and 'cat' in .*b.parquet"
    ):
        packed(tmp_path / "pq")
    paths = table.set_column(0, "image", pa.array([name for name, _, _ in ROWS]))
    pq.write_table(with_class_names(paths, ["dog", "cat", "emu"]), tmp_path / "pq" / "b.parquet")
    with pytest.raises(UserError, match="'image' holds image bytes in one of .* only; pack them one by one"):
        packed(tmp_path / "pq")


def tagged(images, tags, path):
    """A Parquet file with a Hugging Face `Sequence(ClassLabel)`."""
    table = pa.table({"image": [(images / name).read_bytes() for name, _, _ in ROWS], "tags": tags})
    features = {"tags": {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return path


def test_lists_of_class_numbers_are_lists_of_their_names(images, packed, tmp_path):
    table = tagged(images, [[0, 2], [], [-1, 1, None], [-1]], tmp_path / "tags.parquet")
    folder, summary = packed(table, options={"label": ("tags",)})
    found = {s["source"][-1]: json.loads(s["json"])["labels"] for s in read_shards(folder) if "json" in s}
    assert found == {"0": ["a", "c"], "1": [], "2": ["b"]} and summary["unlabelled"] == 1
    assert {s["source"][-1] for s in read_shards(folder)} == set("0123")
    with pytest.raises(UserError, match="'tags' .* holds a class number beyond its 3 names; correct either"):
        packed(tagged(images, [[0], [3], [], None], tmp_path / "more.parquet"), options={"label": ("tags",)})


def test_lists_may_come_after_many_rows_that_have_none(images, tmp_path):
    tags = [None] * 1200 + [[0, 2]]
    table = pa.table({"image": [(images / "a.png").read_bytes()] * len(tags), "tags": tags})
    features = {"tags": {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "late.parquet")
    labels = open_source(str(tmp_path / "late.parquet"), SourceOptions(label=("tags",))).labels
    assert labels.several and labels.values == [*[None] * 1200, ["a", "c"]]


def test_parquet_with_plain_bytes_or_with_paths(images, packed, tmp_path):
    plain = pa.table({"picture": [(images / n).read_bytes() for n, _, _ in ROWS]})
    pq.write_table(plain, tmp_path / "plain.parquet")
    folder, _ = packed(tmp_path / "plain.parquet", to="plain")
    assert {s["png"] for s in read_shards(folder)} == {(images / n).read_bytes() for n, _, _ in ROWS}
    pq.write_table(pa.table({"file": [n for n, _, _ in ROWS], "label": [c for _, c, _ in ROWS]}), images / "p.parquet")
    folder, _ = packed(images / "p.parquet", to="paths")
    assert {name: s["cls"] for name, s in by_source(folder).items()} == {
        "a.png": b"0", "sub/b c.png": b"1", "ä,;.png": b"0", "d.PNG": b"2",
    }  # fmt: skip


def test_images_that_lie_beside_a_table_of_images_are_told(images):
    pq.write_table(image_table(images), images / "x.parquet")
    notes = open_source(str(images), SourceOptions()).notes
    assert "without 4 image files that lie beside, such as a.png" in notes
    pq.write_table(pa.table({"file": [name for name, _, _ in ROWS]}), images / "x.parquet")
    assert not any("beside" in note for note in open_source(str(images), SourceOptions()).notes)  # it names them


def test_bytes_that_are_no_image_are_told(images, packed, tmp_path):
    values = [(images / "a.png").read_bytes(), b"", None, b"garbage"]
    pq.write_table(pa.table({"image": values}), tmp_path / "x.parquet")
    folder, _ = packed(tmp_path / "x.parquet")
    reasons = {name[-1]: found for name, found in left_out(folder).items()}
    assert reasons == {"1": ("empty image", True), "2": ("empty image", True), "3": ("not an image", True)}


def test_rows_whose_group_is_blank_are_of_no_group(images, packed):
    rows = [(name, "x", group) for (name, _, _), group in zip(ROWS, [" ", " ", "p", "p "], strict=True)]
    groups = open_source(str(write_csv(images, rows)), SourceOptions(group="patient")).groups
    assert groups == [None, None, "p", "p"]


def test_rows_whose_group_is_nan_are_of_no_group(images, packed, tmp_path):
    nothing = [math.nan] * len(ROWS)
    lines = [{"file": name, "patient": patient} for (name, _, _), patient in zip(ROWS, nothing, strict=True)]
    (images / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    content = [(images / name).read_bytes() for name, _, _ in ROWS]
    pq.write_table(pa.table({"image": content, "patient": nothing}), tmp_path / "t.parquet")
    for source in (images / "t.jsonl", tmp_path / "t.parquet"):
        folder, summary = packed(source, to=f"of {source.name}", options={"group": "patient"}, val_share=0.5)
        assert [summary["splits"][split]["images"] for split in ("train", "val")] == [2, 2]
        assert all(json.loads(sample["json"]) == {"patient": None} for sample in read_shards(folder))


def test_splits_are_asked_for_and_name_the_shards(images, packed, tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for n, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        pq.write_table(image_table(images).slice(n, 1), tmp_path / "hub" / "data" / f"{name}.parquet")
    with pytest.raises(UserError, match="splits test, train; write --split"):
        packed(tmp_path / "hub")
    folder, _ = packed(tmp_path / "hub", options={"split": "train"})
    assert len(read_shards(folder)) == 2


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_of_paths_have_splits_in_a_column_or_in_their_paths(write_files, picture, tmp_path, kind):
    names = [f"{split}/{name}/1.png" for split in ("train", "test") for name in ("cat", "dog")]
    folder = write_files("t", {name: picture(n) for n, name in enumerate(names)})

    def opened(rows: list[tuple], split: str = "", **options):
        columns = dict(zip(("path", "label", "Split"), zip(*rows, strict=True), strict=False))
        if kind == "csv":
            table = write_csv(folder, rows, header=columns)
        else:
            table = folder / "t.parquet"
            pq.write_table(pa.table(columns), table)
        return open_source(str(table), SourceOptions(split=split, **options))

    by_path = [(name, name.split("/")[1]) for name in names]
    by_column = [(*row, split) for row, split in zip(by_path, ("test", "Train", "train", "test"), strict=True)]
    absolute = [(str(folder / name), label) for name, label in by_path]
    for rows, of_train in ((by_path, [0, 1]), (by_column, [1, 2]), (absolute, [0, 1])):
        with pytest.raises(UserError, match="holds the splits test, train; write --split with one of them, or all, as"):
            opened([*rows, ("lost.png", *rows[0][1:])])
        assert opened(rows, "all").names == [row[0] for row in rows]
        missing = ("test/gone.png", "cat", "test")[: len(rows[0])]
        source = opened([*rows, missing], "train")
        assert source.names == [rows[n][0] for n in of_train] and not source.passed_over
        assert opened(rows, whole=True).names == [row[0] for row in rows]
    beside = [(*by_path[0], "train"), (*by_path[1], "holdout"), (*by_path[2], "")]
    assert opened(beside, "holdout").names == names[1:2]
    source = opened(beside, "train")
    assert source.names == names[:1] and any("without 1 row that tells no split" in note for note in source.notes)
    with pytest.raises(UserError, match="holds the splits holdout, train; write --split"):
        opened(beside)
    assert len(opened([(*row, "train") for row in by_path]).names) == 4  # the column decides
    with pytest.raises(UserError, match="--split val has no effect on .*, which names no split"):
        opened([("a.png", "cat")], "val")
    many = [*by_path, *((f"{n}.png", "cat") for n in range(8))]
    numbered = [(*row, split) for row, split in zip(many, (0.0, 1.0, float("nan"), 0.0, *[1.0] * 8), strict=True)]
    source = opened(numbered, "0")  # as WILDS has them
    assert source.names == [names[0], names[3]] and "1 row that tells no split" in source.notes[0]
    twice = [(*by_path[0], "train"), (*by_path[0], "test"), (*by_path[1], "train")]
    for split in ("train", "test"):
        with pytest.raises(UserError, match="train/cat/1.png is listed in .* as (train|test) and as (train|test);"):
            opened(twice, split)


def test_numbers_of_splits_have_the_names_that_huggingface_gives_them(tmp_path, picture):
    told = {"info": {"features": {"split": {"_type": "ClassLabel", "names": ["train", "test"]}}}}
    table = pa.table({"image": [picture(n) for n in range(5)], "split": [0, 1, 0, -1, 7]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(told)}), tmp_path / "t.parquet")
    opened = open_source(str(tmp_path / "t.parquet"), SourceOptions(split="train"))
    assert len(opened.names) == 2 and opened.labels is None and "2 rows that tell no split" in opened.notes[0]


def test_images_in_a_table_have_splits_in_a_column(tmp_path, picture, monkeypatch):
    images = [picture(n) for n in range(6)]
    splits = ["train", "test", "train", None, "test", "train"]
    pq.write_table(
        pa.table({"image": images, "label": list("abcabc"), "split": splits}), tmp_path / "t.parquet", row_group_size=2
    )
    source = str(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="holds the splits test, train; write --split"):
        open_source(source, SourceOptions())
    assert len(open_source(source, SourceOptions(whole=True)).names) == 6
    monkeypatch.setattr(arrow, "CACHE_BYTES", 0)
    for split, rows, firsts in (("train", [0, 2, 5], [0, 1, 2]), ("test", [1, 4], [0, 1])):
        opened = open_source(source, SourceOptions(split=split, label=("label",)))
        assert [opened.read(n)[0] for n in range(len(rows))] == [images[n] for n in rows]
        assert [opened.labels.classes[n] for n in opened.labels.values] == ["abcabc"[n] for n in rows]
        assert opened.blocks == firsts and "1 row that tells no split" in opened.notes[0]


def test_a_table_of_one_split_by_its_name_has_those_of_its_column_too(write_files, picture):
    names = ["i/0.png", "i/1.png", "i/2.png"]
    folder = write_files("t", {name: picture(n) for n, name in enumerate(names)})
    whole = [0, 1, 2]
    for split, taken in ((["train", "val", "train"], [0, 2]), (["a", "b", "c"], whole), (["val"] * 3, whole)):
        pq.write_table(pa.table({"path": names, "split": split}), folder / "train.parquet")
        opened = open_source(str(folder / "train.parquet"), SourceOptions(split="train"))
        assert opened.names == [names[n] for n in taken]
    pq.write_table(pa.table({"path": names, "split": ["training", "validation", "training"]}), folder / "train.parquet")
    assert open_source(str(folder / "train.parquet"), SourceOptions(split="validation")).names == names[1:2]
    with pytest.raises(UserError, match="holds the splits training, validation; write --split"):
        open_source(str(folder / "train.parquet"), SourceOptions(split="train"))


def test_a_folder_of_the_machine_called_like_a_split_does_not_hide_the_one_that_is_asked_for(write_files, picture):
    names = ["dev/x/train/0.png", "dev/x/extra/1.png", "dev/x/train/2.png"]
    folder = write_files("m", {name: picture(n) for n, name in enumerate(names)})
    table = write_csv(folder, [(name,) for name in names], header=("path",))
    assert open_source(str(table), SourceOptions(split="train")).names == [names[0], names[2]]
    with pytest.raises(UserError, match=r"None of the 1 image of .* \(the first: data:[^ ]{195}, no such file"):
        open_source(str(write_csv(folder, [("data:" + "ab/" * 30000,)], header=("path",))), SourceOptions(image="path"))


@pytest.mark.parametrize("train, test", [("train", "test"), ("split=train", "split=test"), ("Train", "Test")])
def test_splits_may_be_folders(images, packed, tmp_path, train, test):
    for n, (split, part) in enumerate([(train, 0), (train, 1), (test, 0)]):
        (tmp_path / "hub" / "default" / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(image_table(images).slice(n, 1), tmp_path / "hub" / "default" / split / f"000{part}.parquet")
    for source in (tmp_path / "hub", tmp_path / "hub" / "*" / "*" / "*.parquet"):
        with pytest.raises(UserError, match="splits test, train; write --split"):
            packed(source)
    for n, source in enumerate((tmp_path / "hub", tmp_path / "hub" / "*" / "*" / "*.parquet")):
        folder, _ = packed(source, to=str(n), options={"split": "train"})
        assert len(read_shards(folder)) == 2
    folder, _ = packed(tmp_path / "hub" / "default" / train, to="alone")  # one split is all that there is
    assert len(read_shards(folder)) == 2


@pytest.fixture
def saved(images, tmp_path):
    """saved(state) -> a Hugging Face data set as it is saved alone, whose state.json says so."""

    def write(state: dict):
        folder, table = tmp_path / "saved", image_table(images)
        folder.mkdir()
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
            stream.write_table(table)
        files = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(files | state))
        return folder

    return write


def test_a_dataset_that_was_saved_alone_is_one_split(saved, packed):
    folder = saved({"_split": "train"})
    with pytest.raises(UserError, match="saved holds the splits train; write --split with one of them"):
        packed(folder, options={"split": "test"})
    for options in ({"split": "train"}, {}):
        assert packed(folder, options=options)[1]["splits"]["train"]["images"] == len(ROWS)


@pytest.mark.parametrize("state", [{}, {"_split": None}])
def test_a_split_of_what_names_none_is_refused(saved, packed, state):
    folder = saved(state)
    with pytest.raises(UserError, match="--split test has no effect on .*saved, which names no split; .* --name test"):
        packed(folder, options={"split": "test"})
    assert packed(folder)[1]["splits"]["train"]["images"] == len(ROWS)


def test_a_split_of_several_is_the_folders_name_whatever_it_was_made_of(saved, packed, tmp_path):
    folder = saved({"_split": "train"})
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "test")
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert packed(tmp_path / "both", options={"split": "test"})[1]["splits"]["train"]["images"] == len(ROWS)


def test_a_disk_that_fails_stops_the_packing_and_damage_does_not(images, packed, tmp_path, monkeypatch):
    pq.write_table(image_table(images), tmp_path / "x.parquet", row_group_size=1)
    reads, raised = [], [OSError("Corrupt snappy compressed data."), OSError(errno.EIO, "Error reading bytes.")]
    read = pq.ParquetFile.read_row_group

    def failing(self, group, **how):
        reads.append(group)
        if group == 2:
            raise raised[0]
        return read(self, group, **how)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", failing)
    folder, summary = packed(tmp_path / "x.parquet")
    assert summary["lost"] == {"damaged row group": 1} and len(read_shards(folder)) == len(ROWS) - 1
    raised.append(PermissionError(errno.EACCES, "Permission denied"))  # a ticket that ran out is no image's fault
    for told in ("Input/output error", "Permission denied"):
        raised.pop(0)
        with pytest.raises(RunStopped, match=rf"x.parquet cannot be read \({told}\); mend the disk"):
            packed(tmp_path / "x.parquet", to="again")
        assert not list((tmp_path / "again").glob("*.tar"))


def test_a_disk_that_fails_does_not_make_rows_of_no_image(images, packed, monkeypatch):
    table, stat = write_csv(images, ROWS), os.stat

    def failing(path, *more, **how):
        if str(path).endswith("a.png"):
            raise OSError(errno.EIO, "Input/output error", path)
        return stat(path, *more, **how)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(UserError, match=r"a.png cannot be read \(Input/output error\)"):
        packed(table, options={"label": ("species",)})


def test_more_than_fits_is_shuffled_in_windows_of_blocks_and_is_all_there(
    images, packed, tmp_path, monkeypatch, picture
):
    content = [picture(n, height=4, width=4) for n in range(600)]
    pq.write_table(pa.table({"image": content, "label": list(range(600))}), tmp_path / "x.parquet", row_group_size=5)
    monkeypatch.setattr(blocks, "CACHE_BYTES", 20_000)
    monkeypatch.setattr(arrow, "CACHE_BYTES", 20_000)
    folder, _ = packed(tmp_path / "x.parquet", per_shard=20)
    samples = read_shards(folder)
    assert {int(s["cls"]): s["png"] for s in samples} == dict(enumerate(content))
    blocks_of_first_window = {int(s["cls"]) // 5 for s in samples[: 64 * 5]}
    assert len(blocks_of_first_window) == 64 and blocks_of_first_window != set(range(64))


def test_huggingface_datasets_saved_to_disk(images, packed, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [str(images / n) for n, _, _ in ROWS], "label": [1, 0, 1, -1]}
    made = datasets.Dataset.from_dict(rows, features=features).map(lambda row: row)
    embedded = datasets.Dataset(datasets.table.embed_table_storage(made.data.table), fingerprint="x")
    datasets.DatasetDict({"train": embedded, "test": embedded.select([0])}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="splits train, test; write --split"):
        packed(tmp_path / "saved")
    folder, summary = packed(tmp_path / "saved", options={"split": "train"})
    found = sorted(read_shards(folder), key=lambda s: s["source"])
    assert [s["png"] for s in found] == [(images / n).read_bytes() for n, _, _ in ROWS]
    assert [s.get("cls") for s in found] == [b"1", b"0", b"1", None]
    assert (folder / "classes.txt").read_text().splitlines() == ["dog", "cat"]


def test_a_missing_library_names_its_extra(images, packed, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pyarrow, which is missing; pip install 'prelude-ssl\[parquet\]'"):
        packed(images / "x.parquet")
