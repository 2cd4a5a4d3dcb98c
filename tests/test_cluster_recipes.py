"""The recipes of launch/, read: what schemas and shellcheck find, and that they agree with the code and in themselves.

tests/distributed/test_recipes.py runs those that can run here.
"""

import math
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import IoK8sApiCoreV1PersistentVolumeClaim, JobsetV1alpha2JobSet

from jaxpo import config_file, launch, processes
from jaxpo.arguments import parser_of
from jaxpo.training.loop import TERMINATED

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "launch"
SCRIPTS = [RECIPES / name for name in ("environment.sh", "single-host.sh", "slurm.sbatch", "tpu-vm.sh")]
JOBSETS = [RECIPES / name for name in ("gke-jobset-gpu.yaml", "gke-jobset-tpu.yaml")]
VOLUME = RECIPES / "gke-shared-volume.yaml"
STARTING = [*SCRIPTS[1:], *JOBSETS]
A_MISTAKE = 2

each_jobset = pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def job(jobset: dict[str, Any]) -> dict[str, Any]:
    [replicated] = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


def container(jobset: dict[str, Any]) -> dict[str, Any]:
    [found] = job(jobset)["template"]["spec"]["containers"]
    return found


def variables(jobset: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container(jobset)["env"] if "value" in one}


def in_shell(text: str, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """What a shell does with this text, in the repository's root and in no more than this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=ROOT,
        env={"PATH": path, "HOME": os.environ["HOME"], **environment},
        capture_output=True,
        text=True,
    )


def test_every_recipe_is_named_in_the_readme_and_tested_here():
    files = {path.name for path in RECIPES.iterdir()}
    tested = {path.name for path in (*SCRIPTS, *JOBSETS, VOLUME)}
    assert files == tested | {"README.md", "Dockerfile"}
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert [name for name in files - {"README.md"} if name not in text] == []


# Scripts.


def shellcheck(*arguments: str, text: str | None = None) -> str:
    program = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [program, "--external-sources", *arguments], cwd=ROOT, input=text, capture_output=True, text=True
    )
    return found.stdout + found.stderr


def test_shellcheck_finds_nothing_in_scripts():
    assert shellcheck(*map(str, SCRIPTS), ".ci/run") == ""


@each_jobset
def test_shellcheck_finds_nothing_in_the_command_of_a_container(path: Path):
    *shell, text = container(read(path))["command"]
    assert shell == ["bash", "-c"]
    assert shellcheck("--shell=bash", "-", text=text) == ""


def test_shellcheck_finds_what_is_wrong():
    assert "SC2086" in shellcheck("--shell=bash", "-", text="echo $unquoted")
    assert "SC1091" in shellcheck("--shell=bash", "-", text="source launch/nowhere.sh")


# What they start.


def started(path: Path) -> tuple[str, list[str]]:
    """The text that starts jaxpo, and the arguments of `python -m jaxpo.launch`, for scripts those of their header."""
    if path in JOBSETS:
        text = container(read(path))["command"][-1]
        return text, text.partition("python -m jaxpo.launch ")[2].split()
    [example] = re.findall(
        rf"{path.name} (configs/[\w.-]+\.yaml(?: \w[\w.]*=[^\s\[']+)*) \[KEY=VALUE …\]", header(path)
    )
    text = path.read_text(encoding="utf-8")
    [command] = re.findall(r'python -m jaxpo\.launch (\w+) "\$@"', text)
    return text, [command, *example.split()]


@pytest.mark.parametrize("path", STARTING, ids=lambda path: path.name)
def test_a_recipe_starts_a_run_that_makes_sense_in_the_shared_environment(path: Path):
    text, arguments = started(path)
    assert re.search(r'^source (launch|"\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\))/environment\.sh\b', text, re.MULTILINE)
    known = parser_of(launch.CALLS).parse_args(arguments)
    assert known.command == "train"
    run = config_file.load(ROOT / known.config, known.overrides)
    # Where there are several hosts, the folder is one that they share.
    assert path.name == "single-host.sh" or (run.output_dir or Path()).is_relative_to("/shared")


@pytest.mark.parametrize("path", STARTING, ids=lambda path: path.name)
def test_a_header_says_what_one_needs(path: Path):
    for part in ("To change: ", "Environment: launch/environment.sh", "When it hangs: "):
        assert f"\n# {part}" in header(path)
    assert all(len(line) <= 120 for line in path.read_text(encoding="utf-8").splitlines())


def test_the_environment_is_one_that_jax_starts_in():
    text = "source launch/environment.sh && python -c 'import jax; print(jax.devices())'"
    done = in_shell(text, {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert "Cpu" in done.stdout
    wrong = in_shell(text, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_no_such_flag=true"})
    assert wrong.returncode != 0
    assert "xla_gpu_no_such_flag" in wrong.stderr


def environment(given: Mapping[str, str]) -> dict[str, str]:
    done = in_shell("source launch/environment.sh && env -0", given)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def test_what_is_set_stays():
    before = in_shell("env -0", {}).stdout
    new = {name for name in environment({}) if f"\0{name}=" not in f"\0{before}"}
    assert {"XLA_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "NCCL_DEBUG"} <= new
    given = dict.fromkeys(new, "0")
    assert {name: value for name, value in environment(given).items() if name in new} == given
    # JAX refuses both names of one thing.
    assert "XLA_CLIENT_MEM_FRACTION" not in environment({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"})


# Schemas.


def kept(document: dict[str, Any]) -> dict[str, Any]:
    """What the models of JobSet and Kubernetes know of it: without the keys that they do not know.

    Raises ValueError where a type is wrong.
    """
    model = {"JobSet": JobsetV1alpha2JobSet, "PersistentVolumeClaim": IoK8sApiCoreV1PersistentVolumeClaim}
    found = model[document["kind"]].from_dict(document)
    assert found is not None
    return found.to_dict()


@pytest.mark.parametrize("path", [*JOBSETS, VOLUME], ids=lambda path: path.stem)
def test_every_key_and_type_is_in_the_schema(path: Path):
    document = read(path)
    versions = {"JobSet": "jobset.x-k8s.io/v1alpha2", "PersistentVolumeClaim": "v1"}
    assert document["apiVersion"] == versions[document["kind"]]
    assert kept(document) == document


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (("spec", "failurePolicy"), "maxRestart", 3),
        (("spec", "failurePolicy"), "maxRestarts", "3"),
        (("spec", "failurePolicy", "rules", 0), "onJobFailureMessages", []),
        (("spec", "replicatedJobs", 0, "template", "spec"), "podFailPolicy", {}),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "terminationGracePeriod", 300),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "terminationGracePeriodSeconds", "300"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "volumeMount", []),
    ],
)
def test_the_schema_knows_a_mistake(place: tuple[str | int, ...], key: str, value: Any):
    document = deepcopy(read(JOBSETS[0]))
    part: Any = document
    for name in place:
        part = part[name]
    part[key] = value
    try:
        found = kept(document)
    except ValueError:
        return
    assert found != document


# Processes.


def test_slurm_starts_one_process_for_each_gpu():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", header(SCRIPTS[2]), re.MULTILINE))
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    [(gpus, tasks)] = re.findall(r"--gpus-per-node=(\d+) --ntasks-per-node=(\d+)", header(SCRIPTS[2]))
    assert gpus == tasks
    # Time for a step and a checkpoint.
    assert int(options["signal"].removeprefix("B:USR1@")) >= 120


def test_the_pods_of_gpus_are_told_places_that_fit_together():
    jobset = read(JOBSETS[0])
    name, [replicated] = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    hosts, told = job(jobset)["completions"], variables(jobset)
    assert job(jobset)["parallelism"] == hosts
    # JobSet's name of the first pod, which its headless service, named like itself, makes known.
    host, _, port = told["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    [index] = [one["valueFrom"] for one in container(jobset)["env"] if one["name"] == "JAX_PROCESS_ID"]
    assert index == {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert job(jobset)["completionMode"] == "Indexed"
    places = [
        processes.place(dict.fromkeys(("--coordinator", "--processes", "--process")), told | {"JAX_PROCESS_ID": str(n)})
        for n in range(hosts)
    ]
    assert places == [processes.Place(f"{host}:{port}", hosts, n) for n in range(hosts)]


def test_a_slice_of_tpus_has_as_many_pods_as_hosts():
    jobset = read(JOBSETS[1])
    topology = job(jobset)["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container(jobset)["resources"]["limits"]["google.com/tpu"]
    hosts = math.prod(map(int, topology.split("x"))) // chips
    assert hosts > 1
    assert job(jobset)["completions"] == job(jobset)["parallelism"] == hosts
    # GKE tells them their places, which jax then reads; what stands in JAX_* would go before that.
    assert not any(name in variables(jobset) for name in processes.ENVIRONMENT)
    assert processes.scheduled({"TPU_WORKER_HOSTNAMES": ",".join(f"host-{n}" for n in range(hosts))})


# What becomes of a pod that ends.


def action(jobset: dict[str, Any], code: int, conditions: tuple[str, ...] = ()) -> str:
    """What JobSet does when a pod ends so: by the Job's first rule that matches, and the words that it then says."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job(jobset)["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes = rule.get("onExitCodes", {"values": []})["values"]
        asked = {one["type"] for one in rule.get("onPodConditions", []) if one["status"] == "True"}
        if code in codes or asked & set(conditions):
            said = f"Container jaxpo for pod default/x failed with exit code {code}"
            reason, message = "PodFailurePolicy", f"{said} matching FailJob rule at index {index}"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@each_jobset
@pytest.mark.parametrize(
    ("code", "conditions", "expected"),
    [
        (A_MISTAKE, (), "FailJobSet"),
        (TERMINATED, (), "RestartJobSetAndIgnoreMaxRestarts"),
        (TERMINATED, ("DisruptionTarget",), "RestartJobSetAndIgnoreMaxRestarts"),
        (137, ("DisruptionTarget",), "RestartJobSetAndIgnoreMaxRestarts"),
        (137, (), "RestartJobSet"),
        (1, (), "RestartJobSet"),
    ],
)
def test_exit_codes_mean_what_they_mean_in_the_code(path: Path, code: int, conditions: tuple[str, ...], expected: str):
    jobset = read(path)
    assert action(jobset, code, conditions) == expected
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job(jobset)["backoffLimit"] == 0
    for rule in job(jobset)["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", container(jobset)["name"]) == container(jobset)["name"]


@each_jobset
def test_a_pod_has_time_to_save_and_a_place_that_outlives_it(path: Path):
    jobset = read(path)
    pod = job(jobset)["template"]["spec"]
    # A Job with a podFailurePolicy takes no other.
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert pod["shareProcessNamespace"] is True
    claims = {
        one["name"]: one["persistentVolumeClaim"]["claimName"]
        for one in pod["volumes"]
        if "persistentVolumeClaim" in one
    }
    mounts = {one["mountPath"]: one["name"] for one in container(jobset)["volumeMounts"]}
    assert claims[mounts["/shared"]] == read(VOLUME)["metadata"]["name"]
    assert "ReadWriteMany" in read(VOLUME)["spec"]["accessModes"]
    assert variables(jobset)["HOME"].startswith("/shared/")


def test_the_image_has_a_python_and_extras_that_the_project_knows():
    text = (RECIPES / "Dockerfile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {*re.findall(r"EXTRA=(\w+)", text), *re.findall(r"EXTRA=(\w+)", header(JOBSETS[1]))} == {"gpu", "tpu"}
    assert {"gpu", "tpu"} <= set(extras)
    # JAX for CUDA 13, which the first one asks for, needs Python 3.12.
    [(major, minor)] = re.findall(r"^FROM python:(\d+)\.(\d+)", text, re.MULTILINE)
    assert (int(major), int(minor)) >= (3, 12)


def test_the_readme_names_the_exit_codes():
    codes = re.findall(r"^\| (\d+) \|", (RECIPES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(code) for code in codes] == [0, A_MISTAKE, TERMINATED]
