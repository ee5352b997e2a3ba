"""What lies beside the code: it is read by others' programs, and says the same as the code does."""

import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_of_one(form):
    about = yaml.safe_load(form.read_text())
    assert about["name"] and about["description"]
    fields = [field for field in about["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids) > 0
    assert all(field["type"] in ("textarea", "input") and field["attributes"]["label"] for field in fields)


def test_who_reports_a_fault_is_asked_for_what_doctor_says():
    (form,) = [yaml.safe_load(form.read_text()) for form in FORMS if form.stem == "fault"]
    (field,) = [field for field in form["body"] if field.get("id") == "doctor"]
    assert "prelude doctor" in field["attributes"]["label"] and field["validations"]["required"]
