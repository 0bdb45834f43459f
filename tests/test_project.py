"""What surrounds the packages agrees: version, changelog, citation, and what CI may do."""

import re
import tomllib

import pytest
import yaml
from support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
RELEASES = re.findall(
    r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M
)


def test_changelog_and_citation_are_of_the_projects_version():
    version, date = RELEASES[0]
    assert version == PROJECT["version"]
    assert (CITATION["version"], CITATION["date-released"]) == (version, date)
    assert CITATION["license"] == PROJECT["license"]


def test_releases_are_in_order():
    numbers = [tuple(map(int, version.split("."))) for version, _ in RELEASES]
    assert numbers == sorted(set(numbers), reverse=True)
    dates = [date for _, date in RELEASES]
    assert dates == sorted(dates, reverse=True)


def test_the_authors_are_those_of_the_licence():
    (author,) = CITATION["authors"]
    assert f" {author['name']}\n" in (ROOT / "LICENSE").read_text()


def test_ci_runs_the_gate_and_may_only_read():
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert content["permissions"] == {"contents": "read"}
    jobs = content["jobs"]
    assert {"run": ".ci/run"} in jobs["gate"]["steps"]
    assert jobs["release"]["needs"] == "gate"
    for job in jobs.values():
        assert "permissions" not in job
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_a_document_names_exists(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_paths_of_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`((?:vqref|vqtrain|vqdeploy|tests|benchmarks)/[\w./]*)`", text))
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_hooks_of_a_commit_are_what_the_gate_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    gate = (ROOT / ".ci" / "run").read_text()
    for hook in local["hooks"]:
        words = [word for word in hook["entry"].split() if word != "--force-exclude"]
        assert re.search(rf"^{' '.join(words)}( \.)?$", gate, re.M), hook["id"]
