"""The example workflow: its commands exist, exit codes become what it says, and nobody's code runs with rights to write."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from tests.command_lines import parse

yaml = pytest.importorskip("yaml")

FILE = Path(__file__).parents[2] / "docs" / "github-actions" / "edgedeploy-gate.yml"
WORKFLOW = yaml.safe_load(FILE.read_text(encoding="utf-8"))
STEPS = [(name, step) for name, job in WORKFLOW["jobs"].items() for step in job["steps"]]
# YAML 1.1 reads the key `on` as a truth value.
TRIGGERS = WORKFLOW[True]


def commands():
    """Return the command lines of edgedeploy in every script."""
    found = []
    for _, step in STEPS:
        script = re.sub(r"\\\n\s*", " ", step.get("run", ""))
        for line in script.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["edgedeploy"]:
                end = next((place for place, word in enumerate(words) if word in ("||", "&&", "|", ";")), len(words))
                found.append(words[1:end])
    return found


def step_named(name):
    return next(step for _, step in STEPS if step.get("name") == name)


def test_the_workflow_runs_edgedeploy():
    assert [words[0] for words in commands()] == ["run", "run"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_and_option_exists(words):
    assert parse(words)["release"] == Path("edgedeploy.toml")


def test_a_misspelt_option_would_be_found():
    with pytest.raises(click.NoSuchOption):
        parse([*commands()[-1], "--marckdown", "x"])


@pytest.mark.parametrize(
    ("code", "ends"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 0), (70, 70)], ids=lambda value: str(value)
)
def test_only_inconclusive_is_turned_into_a_success_of_the_job(tmp_path, code, ends):
    program = tmp_path / "bin" / "edgedeploy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "said $*" > report/comment.md\nexit {code}\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step_named("Gate")["run"]],
        cwd=tmp_path,
        env={
            "PATH": f"{program.parent}:/usr/bin:/bin",
            "GITHUB_OUTPUT": str(tmp_path / "output"),
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ends, done.stderr
    assert (tmp_path / "output").read_text() == f"code={code}\n"
    assert "--sarif report/edgedeploy.sarif" in (tmp_path / "summary").read_text()
    assert ("INCONCLUSIVE" in done.stdout) == (code == 4)


def test_rights_to_write_are_only_where_no_code_of_the_pull_request_runs():
    assert "pull_request_target" not in TRIGGERS
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for name, job in WORKFLOW["jobs"].items():
        writes = [right for right, level in job.get("permissions", {}).items() if level == "write"]
        uses = [step.get("uses", "").partition("@")[0] for step in job["steps"]]
        runs = [step for step in job["steps"] if "run" in step]
        assert not writes or (not runs and "actions/checkout" not in uses), name
    assert WORKFLOW["jobs"]["tell"]["permissions"] == {"checks": "write", "pull-requests": "write"}


def test_forks_do_not_reach_the_lab_and_no_token_stays_on_its_runner():
    gate = WORKFLOW["jobs"]["gate"]
    assert "head.repo.full_name == github.repository" in gate["if"]
    assert "self-hosted" in gate["runs-on"]
    checkout = next(step for step in gate["steps"] if step.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"]["persist-credentials"] is False


def test_nothing_that_a_pull_request_says_is_put_into_a_script():
    for _, step in STEPS:
        text = step.get("run", "") + step.get("with", {}).get("script", "")
        assert "${{" not in text, step.get("name")


def test_every_action_is_from_github_has_a_version_and_the_file_asks_to_pin_it_by_sha():
    actions = [step["uses"] for _, step in STEPS if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[a-z/-]+@(v\d+|[0-9a-f]{40})", action) for action in actions), actions
    assert "PIN BY SHA" in FILE.read_text(encoding="utf-8")


# What github-script gives a script, as far as this one needs it; every call is written down.
HARNESS = """
const calls = [];
const said = (name) => async (given) => { calls.push([name, given]); return {}; };
const github = {
  paginate: async () => JSON.parse(process.env.COMMENTS),
  rest: {
    checks: {create: said('check')},
    issues: {listComments: 'list', updateComment: said('update'), createComment: said('create')},
  },
};
const context = {
  serverUrl: 'https://github.example', runId: 7, repo: {owner: 'o', repo: 'r'},
  payload: {pull_request: {number: 3, head: {sha: 'abc'}}},
};
(async () => { SCRIPT })().then(() => console.log(JSON.stringify(calls)));
"""


def tell(folder, code, comments):
    """Run the script of the last step with a node that a package of ours brings; return what it asked GitHub for."""
    driver = pytest.importorskip("playwright._impl._driver", reason="playwright brings the node that runs this script")
    node = driver.compute_driver_executable()[0]
    script = HARNESS.replace("SCRIPT", step_named("Check and comment")["with"]["script"])
    (folder / "script.js").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [node, "script.js"],
        cwd=folder,
        env={"CODE": code, "COMMENTS": json.dumps(comments)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("code", "conclusion"), [("0", "success"), ("1", "failure"), ("4", "neutral"), ("3", "failure"), ("", "failure")]
)
def test_the_check_has_the_verdict_and_inconclusive_is_neutral(tmp_path, code, conclusion):
    calls = tell(tmp_path, code, [])
    assert calls["check"]["conclusion"] == conclusion
    assert calls["check"]["head_sha"] == "abc"
    assert calls["create"]["issue_number"] == 3
    assert "edgedeploy gave" in calls["create"]["body"], "without a report the comment says what there is"


def test_its_own_comment_is_updated_and_nobody_elses(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "comment.md").write_text("# FAIL `${x}`\n")
    comments = [
        {"id": 1, "user": {"type": "User"}, "body": "<!-- edgedeploy-gate -->\nmine"},
        {"id": 2, "user": {"type": "Bot"}, "body": "another bot"},
        {"id": 5, "user": {"type": "Bot"}, "body": "<!-- edgedeploy-gate -->\nold"},
    ]
    calls = tell(tmp_path, "1", comments)
    assert calls["update"]["comment_id"] == 5
    assert calls["update"]["body"].startswith("<!-- edgedeploy-gate -->\n# FAIL `${x}`")
    assert "create" not in calls
