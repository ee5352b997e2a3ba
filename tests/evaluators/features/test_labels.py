import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch

from prelude.data.errors import UserError
from prelude.data.shapes import paint, write_shards
from prelude.data.shards import ShardIndex
from prelude.evaluators.features.labels import Labels, VectorFormat, class_numbers, grouped, label_vectors
from prelude.evaluators.labelled import ungrouped


def shard(path, contents, extension):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, content in enumerate(contents):
            for name, data in ((f"{i:04}.ppm", b"P6 1 1 255\n\0\0\0"), (f"{i:04}.{extension}", content)):
                if data is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return ShardIndex(str(path), extension)


def group_numbers(indexes, group, asked=False):
    """Of indexes whose samples are all labelled."""
    ones = [torch.ones(index.num_samples, dtype=torch.int64) for index in indexes]
    return [part.groups for part in grouped([Labels(one, one > 0) for one in ones], indexes, group, asked)]


def test_class_numbers_of_every_sample_that_has_one(tmp_path):
    labels = class_numbers(shard(tmp_path / "a.tar", [b"3", None, b"x", b"-2"], "cls"))
    assert labels.known.tolist() == [True, False, False, True]
    assert labels.values[labels.known].tolist() == [3, -2]


def test_every_sample_has_the_number_that_it_was_written_with(tmp_path):
    write_shards(tmp_path, "train", 50, image_size=16, samples_per_shard=20)
    _, written = paint("train", np.arange(50), image_size=16)
    labels = class_numbers(ShardIndex(f"{tmp_path}/train-*.tar", "cls"))
    assert labels.known.all() and labels.values.tolist() == written.tolist()


def test_labels_that_are_no_class_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="class number"):
        class_numbers(shard(tmp_path / "a.tar", [b"[1, 2]"], "json"))
    with pytest.raises(UserError, match=r"float32 of shape \(2,\)"):
        class_numbers(shard(tmp_path / "c.tar", [b"[0.5, 1]"], "json"))
    with pytest.raises(UserError, match="has a .cls member"):
        class_numbers(shard(tmp_path / "b.tar", [None], "cls"))


FORMS = [
    (["b", "other"], [0, 1, 0]),
    ([], [0, 0, 0]),
    ({"a": 1, "b": -1, "c": 0}, [1, None, 0]),
    ({"a": 1, "b": None}, [1, None, None]),
    ([0, 1, -1], [0, 1, None]),
]


@pytest.mark.parametrize("content, expected", FORMS)
def test_ways_to_write_findings(tmp_path, content, expected):
    for form, written in (
        (VectorFormat(("a", "b", "c")), content),
        (VectorFormat(("a", "b", "c"), field="labels"), {"labels": content, "patient": 7}),
    ):
        contents = [json.dumps(written).encode(), json.dumps(written).encode(), json.dumps(["a"]).encode()]
        if form.field:
            contents[2] = json.dumps({"labels": ["a"], "patient": 8}).encode()
        labels = label_vectors(shard(tmp_path / f"{form.field}.tar", contents, "json"), form)
        assert [None if math.isnan(v) else v for v in labels.values[0].tolist()] == expected
        assert labels.known.all() and labels.groups is None


def test_groups_are_numbered_alike_in_train_and_test_and_who_has_none_is_alone(tmp_path):
    contents = [{"patient": "x"}, {"patient": 7}, {}, {"patient": "x"}], [{"patient": "7"}, {"patient": "y"}, None]
    indexes = [
        shard(tmp_path / f"{i}.tar", [None if c is None else json.dumps(c).encode() for c in part], "json")
        for i, part in enumerate(contents)
    ]
    train, test = (groups.tolist() for groups in group_numbers(indexes, "json:patient"))
    assert train[0] == train[3] and train[1] == test[0] and len({*train, *test}) == 5
    with pytest.raises(UserError, match="has a .txt member"):
        group_numbers(indexes, "txt", asked=True)


@pytest.mark.parametrize(("group", "extension"), [("json:patient", "json"), ("txt", "txt")])
def test_groups_are_told_apart_as_they_are_written(group, extension, tmp_path):
    written = ["0012", "12", "1.0", "ab", str(2**70), str(2**70 + 1), "0012", " 12 ", "", " "]
    contents = [name if extension == "txt" else json.dumps({"patient": name}) for name in written]
    if extension == "json":
        contents += ['{"patient": 12}', f'{{"patient": {2**70}}}', '{"patient": null}', '{"patient": NaN}']
        written += ["12", str(2**70), "", ""]
    (groups,) = group_numbers([shard(tmp_path / "a.tar", [text.encode() for text in contents], extension)], group)
    names = [name.strip() or f"alone {i}" for i, name in enumerate(written)]
    assert groups.tolist() == [list(dict.fromkeys(names)).index(name) for name in names]


def test_where_one_of_train_and_test_names_no_group_the_other_keeps_its_own(tmp_path):
    known = shard(tmp_path / "a.tar", [b'{"patient": 1}', b'{"patient": 1}', b"{}"], "json")
    unknown = shard(tmp_path / "b.tar", [b"{}", b"{}"], "json")
    of_known, of_unknown = group_numbers([known, unknown], "json:patient")
    assert of_known.tolist() == [0, 0, 1] and of_unknown is None
    with pytest.raises(UserError, match="no sample in .*b.tar has a field 'patient'"):
        group_numbers([unknown, known], "json:patient", asked=True)


@pytest.mark.parametrize("findings", [True, False], ids=["findings", "classes"])
def test_images_without_a_group_are_told_and_refused_where_groups_are_asked_for(findings, tmp_path):
    contents = [{"kind": ["a"], "patient": 1}, {"kind": ["a"]}, {"kind": []}, {"kind": [], "patient": 2}, {}]
    index = shard(tmp_path / "a.tar", [json.dumps(each).encode() for each in contents], "json")

    def labels(asked):
        if findings:
            return label_vectors(index, VectorFormat(("a",), "kind", "patient", asked))
        known = torch.tensor([True] * 4 + [False])
        return grouped([Labels(known.long(), known)], [index], "json:patient", asked)[0]

    (told,) = ungrouped("train", labels(False))
    assert told.startswith("2 of 4 train images have no field 'patient' in a .json member")
    with pytest.raises(UserError, match="2 of 4 labelled images in .*a.tar have no field 'patient' .* 0001.*--group"):
        labels(True)
    whole = shard(tmp_path / "b.tar", [json.dumps(contents[i]).encode() for i in (0, 3, 4)], "json")
    only = label_vectors(whole, VectorFormat(("a",), "kind", "patient"))
    assert only.groups[:2].tolist() == [0, 1] and ungrouped("test", only) == []  # the third is left out anyway


@pytest.mark.parametrize("group", ["patient", "json:patient"])
def test_what_cannot_be_read_is_unknown_and_groups_are_numbered(group, tmp_path):
    contents = [
        {"labels": ["a"], "patient": "x"},
        {"labels": "a", "patient": "x"},
        {"patient": "y"},
        {"labels": [], "patient": "y"},
        {"labels": []},
        {"labels": {"a": 2}},
    ]
    index = shard(tmp_path / "a.tar", [json.dumps(c).encode() for c in contents] + [b"{"], "json")
    labels = label_vectors(index, VectorFormat(("a",), "labels", group, group_asked=False))
    assert labels.known.tolist() == [True, False, False, True, True, False, False]
    groups = labels.groups.tolist()
    assert groups[0] == groups[1] != groups[3] == groups[2] and groups[4] not in groups[:4]
    with pytest.raises(UserError, match="no sample in .* has a field 'pateint' .* with a value in it"):
        label_vectors(index, VectorFormat(("a",), "labels", group.replace("patient", "pateint")))


def test_findings_that_never_occur_are_refused(tmp_path):
    index = shard(tmp_path / "a.tar", [b'["a"]', b"[]"], "json")
    with pytest.raises(UserError, match="None of b ever occurs"):
        label_vectors(index, VectorFormat(("b",)))
    with pytest.raises(UserError, match="field 'labels'"):
        label_vectors(index, VectorFormat(("a",), "labels"))
