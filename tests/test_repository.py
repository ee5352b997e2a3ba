"""What lies beside the code: it is read by others' programs, and says the same as the code does."""

import re
import subprocess
import sys
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


class Dockerfile:
    """Its instructions, stage by stage, with continued lines joined."""

    def __init__(self):
        text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
        lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
        self.stages: list[list[tuple[str, str]]] = []
        for line in lines:
            instruction, _, rest = line.partition(" ")
            if instruction == "FROM":
                self.stages.append([])
            if self.stages:
                self.stages[-1].append((instruction, rest.strip()))

    def of(self, stage: int, instruction: str) -> list[str]:
        return [rest for one, rest in self.stages[stage] if one == instruction]


def test_the_container_has_two_stages_and_runs_as_nobody_special():
    file = Dockerfile()
    assert len(file.stages) == 2
    assert all(
        rest.startswith("nvidia/cuda:") and "runtime" in rest for stage in (0, 1) for rest in file.of(stage, "FROM")
    )
    (user,) = file.of(1, "USER")
    assert user.isdigit() and int(user) > 0 and f"--uid {user}" in " ".join(file.of(1, "RUN"))
    assert [rest for rest in file.of(1, "COPY") if "--from=build" not in rest] == []  # no sources, no compiler
    assert "build-essential" in file.of(0, "RUN")[0] and "build-essential" not in " ".join(file.of(1, "RUN"))
    assert file.stages[1].index(("USER", user)) > max(
        place for place, (instruction, _) in enumerate(file.stages[1]) if instruction == "RUN"
    )


def test_all_that_a_wheel_is_made_of_is_copied_into_the_container():
    copied = {name for rest in Dockerfile().of(0, "COPY") for name in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    wanted = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()}
    assert {place.split("/")[0] for place in wanted} | {"pyproject.toml", PROJECT["readme"]} <= copied
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in


def test_the_container_installs_what_the_project_asks_for():
    """By the very line of the file that reads it off pyproject.toml."""
    file = Dockerfile()
    (extras,) = [rest.partition("=")[2] for rest in file.of(0, "ARG")]
    (line,) = [rest for rest in file.of(0, "RUN") if "tomllib" in rest]
    code = line.partition('"')[2].partition('"')[0].replace("/src/", f"{ROOT}/").replace("${EXTRAS}", extras)
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(PROJECT["dependencies"]) < set(asked)
    assert {line for name in extras.split(",") for line in PROJECT["optional-dependencies"][name]} < set(asked)
