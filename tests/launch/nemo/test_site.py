"""Sites without NeMo-Run: what a file may say, how many nodes a recipe takes there, and the script that is sent."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_hpt import recipe as recipes
from megatron_hpt.config import Config
from megatron_hpt.environment import PASS, inherited
from megatron_hpt.errors import ConfigError
from megatron_hpt.launch.nemo import experiments
from megatron_hpt.launch.nemo.site import LocalSite, SlurmSite, executor_arguments, load_site, nodes_of, script_of
from megatron_hpt.plan.cluster import load_cluster

ROOT = Path(__file__).parents[3]
SLURM = {"kind": "slurm", "checkout": "/there", "account": "a"}


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters are found by name, and recipes, from the checkout."""
    monkeypatch.chdir(ROOT)


def site(**settings: object) -> SlurmSite:
    return SlurmSite(**{**SLURM, **settings})


def config(*overrides: str) -> Config:
    return recipes.load("recipes/llama_3_1.py", ["size=70B", "method=hpt", *overrides]).config


@pytest.mark.parametrize(("name", "kind"), [("local", LocalSite), ("login_node", SlurmSite), ("over_ssh", SlurmSite)])
def test_shipped_sites_are_found_by_name(name: str, kind: type) -> None:
    assert isinstance(load_site(name), kind)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {**SLURM, "kind": "slum"},
            "kind: given 'slum'; a cluster to send recipes to is one of local, slurm; did you mean 'slurm'?",
        ),
        ([1], "kind: given None"),
        ({"kind": "slurm", "checkout": "/there"}, "account: missing"),
        ({**SLURM, "partion": "p"}, "partion: unknown key; a cluster to send recipes to has: .*; did you mean partition?"),
        (
            {**SLURM, "ssh": {"host": "h", "usr": "u"}},
            "ssh.usr: unknown key; ssh has: host, user, job_dir, identity; did you mean ssh.user?",
        ),
        ({**SLURM, "time": "1 day"}, "time: given '1 day'"),
        ({**SLURM, "time": "0:29:59"}, "time: given 0:29:59; it must be at least twice notice_s, 900 s"),
        ({**SLURM, "notice_s": 60}, "notice_s: given 60"),
        ({**SLURM, "environment": {"A B": "c"}}, "environment.A B"),
    ],
)
def test_a_wrong_file_is_named_line_by_line(tmp_path: Path, tree: object, message: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        load_site(str(file))
    assert str(file) in str(caught.value)


def test_no_such_site_says_where_examples_are() -> None:
    with pytest.raises(ConfigError, match=r"recipes/sites/nowhere\.yaml: no such file; recipes/sites/ has examples"):
        load_site("nowhere")


def test_hardware_is_no_site_and_a_site_is_no_hardware() -> None:
    with pytest.raises(ConfigError, match="kind: given None"):
        load_site("recipes/clusters/h100x8.yaml")
    with pytest.raises(ConfigError, match="not a cluster"):
        load_cluster(Path("recipes/sites/local.yaml"))


def test_one_task_holds_an_allocation_of_all_nodes_and_spares() -> None:
    there = site(spare_nodes=1, sbatch={"qos": "q"})
    arguments = executor_arguments(there, nodes_of(there, config()))
    assert (arguments["nodes"], arguments["ntasks_per_node"], arguments["gpus_per_node"]) == (17, 1, 8)
    assert {"--nodes=1", "--ntasks=1", "--relative=0", "--overlap"} <= set(arguments["srun_args"])
    assert (arguments["exclusive"], arguments["mem"], arguments["signal"]) == (True, "0", "USR1@900")
    assert (arguments["container_image"], arguments["additional_parameters"]) == (None, {"qos": "q"})


def test_without_gpus_and_on_shared_nodes_nothing_asks_for_them() -> None:
    arguments = executor_arguments(site(has_gpus=False, whole_nodes=False), 3)
    assert {arguments[key] for key in ("gpus_per_node", "exclusive", "mem")} == {None}


def test_weights_that_could_not_leave_a_node_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match=r"transfer\.transport=shared_memory reaches engines of the trainer's own host"):
        nodes_of(site(), config("transfer.transport=shared_memory"))


def ran(script: str, folder: Path, **environment: str) -> list[str]:
    """The words that the program of a script gets."""
    program = folder / "program"
    program.write_text('#!/bin/bash\npwd\necho "$TOLD"\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(["bash", "-c", script], env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_script_is_an_sbatch_of_ours_and_keeps_every_word(tmp_path: Path) -> None:
    there = site(
        checkout=str(tmp_path),
        program="./program",
        python="/opt/p",
        health="test -d 'a b'",
        container_image="/i.sqsh",
        container_mounts=["/a:/b", "/c:/d"],
        environment={"TOLD": "it's $HOME"},
    )
    script = script_of(there, "r.py", ["rollout.stop=a b"], config())
    folder, told, *words = ran(script, tmp_path, SLURM_JOB_ID="7")
    assert (folder, told) == (str(tmp_path), "it's $HOME")
    assert words == [
        *("slurm", "--ranks-per-node", "8", "--python", "/opt/p", "--health", "test -d 'a b'"),
        *("--srun", "--container-image=/i.sqsh --container-mounts=/a:/b,/c:/d"),
        *("r.py", "rollout.stop=a b", f"name={config().name}-7", "deadlines.notice_s=840"),
    ]
    assert ran(script, tmp_path, SLURM_JOB_ID="8", HPT_NAME="the-run")[-2] == "name=the-run"


def test_a_sites_environment_is_a_choice_and_is_passed_on(tmp_path: Path) -> None:
    here = LocalSite(kind="local", checkout=str(tmp_path), environment={"NCCL_ALGO": "Ring", PASS: "VLLM_PORT"})
    exports = [line for line in script_of(here, "r.py", [], config()).splitlines() if line.startswith("export ")]
    shell = dict(line.removeprefix("export ").split("=", 1) for line in exports)
    assert inherited({**shell, "VLLM_PORT": "1", "NCCL_PROTO": "LL"}).keys() == {"NCCL_ALGO", "VLLM_PORT", PASS}


def test_a_run_that_is_named_is_continued(tmp_path: Path) -> None:
    there = site(checkout=str(tmp_path), program="./program")
    words = ran(script_of(there, "r.py", ["name=the-run"], config("name=the-run")), tmp_path, SLURM_JOB_ID="7")
    assert words[-3:] == ["r.py", "name=the-run", "deadlines.notice_s=840"]


def test_on_this_machine_the_script_trains(tmp_path: Path) -> None:
    here = LocalSite(kind="local", checkout=str(tmp_path), program="./program")
    assert ran(script_of(here, "r.py", ["a=1"], config()), tmp_path)[2:] == ["train", "r.py", "a=1"]


def test_what_the_script_passes_is_what_the_program_takes() -> None:
    """Options are those of the command line, and of the script in slurm/."""
    options = re.findall(r"--[a-z-]+(?= )", script_of(site(), "r.py", [], config()))
    told = subprocess.run(
        [sys.executable, "-m", "megatron_hpt.cli", "slurm", "--help"],
        env={"COLUMNS": "200", "PATH": ""},
        capture_output=True,
        text=True,
    ).stdout
    script = (ROOT / "slurm" / "hpt_70b.sbatch").read_text()
    assert options
    assert [option for option in options if option not in told or option not in script] == []


def test_without_nemo_run_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(experiments.LaunchError, match=r"NeMo-Run cannot be imported \(.*\); `make nemo-env` installs it"):
        experiments.task("recipes/quickstart.py")
