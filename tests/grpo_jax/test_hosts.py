"""Whole runs over several devices and several processes, against one device: the same tokens, metrics and parameters.

In float64, where rounding cannot hide a wrong term. A process stands for a host; they meet over loopback. Each run takes
seconds of compilation, so the full table is slow:

    python -m pytest -m slow tests/grpo_jax/test_hosts.py
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax import checkpoint, config, hosts, metrics
from grpo_jax.group import Group, flat, ragged
from models import decoder, hf

ROOT = Path(__file__).resolve().parents[2]
EXACT = 1e-9
STEPS = 3
OPTIONS = {
    "run.steps": STEPS,
    "checkpoint.every": 1,
    "checkpoint.keep": STEPS,
    "validation.limit": 5,
    "validation.every": 1,
    "validation.benchmarks": "tests.grpo_jax.length_reward:benchmark",  # three tasks: fewer than some have hosts
    "rollout.prompts_per_step": 5,
    "rollout.group_size": 3,
    "rollout.max_prompt_tokens": 400,
    "rollout.max_response_tokens": 12,
    "rollout.decode_steps_per_call": 4,
    "update.prompts_per_minibatch": 3,
    "learner.tokens_per_microbatch": 2048,
    "loss.kl_coefficient": 0.1,
    "optimizer.learning_rate": 1e-3,
    "reward.kind": "tests.grpo_jax.length_reward:score",
    "run.tensorboard": False,
}
# The training program with all of its numbers in float64; no option of a user's asks for that.
PROGRAM = """
import sys
import jax
from grpo_jax import config, hosts, inputs, train
from models import hf

hosts._CHUNK = 2000  # so that what hosts tell each other comes in pieces
in_float32 = inputs.load_params
inputs.load_params = lambda *args: jax.tree.map(lambda x: x.astype("float64"), in_float32(*args))
inputs.compute_dtype = lambda learner: "float64"
config.run_main(train.main)
"""


pytestmark = pytest.mark.usefixtures("x64")  # or checkpoints could not be read back as they are


@pytest.fixture(scope="module")
def environment(environment) -> dict:
    return {**environment, "JAX_ENABLE_X64": "1"}


def drawn(prompts: int, responses: int) -> list[Group]:
    rng = np.random.default_rng(0)
    groups = []
    for p in range(1, prompts + 1):
        lengths = rng.integers(1, 6, responses)
        ids, logp = ([rng.integers(0, 9, n).astype(np.int32) for n in lengths], [rng.normal(size=n) for n in lengths])
        groups.append(Group(np.arange(p), tuple(ids), tuple(logp), tuple(bool(n % 2) for n in lengths)))
    return groups


@pytest.mark.parametrize("prompts, responses", [(3, 2), (1, 1), (0, 0)])
def test_groups_come_back_from_their_flat_form(prompts, responses):
    groups = drawn(prompts, responses)
    found = ragged([g.prompt for g in groups], flat(groups))
    assert [g.truncated for g in found] == [g.truncated for g in groups]
    for a, b in zip(found, groups, strict=True):
        for x, y in zip((a.prompt, *a.responses, *a.sampler_logp), (b.prompt, *b.responses, *b.sampler_logp), strict=True):
            assert x.dtype == y.dtype and x.tolist() == y.tolist()


def test_shares_make_the_whole(monkeypatch):
    for count, items in ((1, 4), (3, 7), (4, 2), (2, 0)):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        shares = []
        for index in range(count):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            shares.append(hosts.share(range(items)))
        assert hosts.whole(shares) == list(range(items))


SLURM = {
    "SLURM_STEP_NODELIST": "n[0-3]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    "environment, settings, joined",
    [
        ({}, {}, None),
        (SLURM, {}, (None, None, None, [])),  # all devices of the host, not the one that JAX would take by itself
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, {}, (None, None, None, None)),  # two tasks a node: a device each
        (SLURM, {"launcher": "none"}, None),
        (SLURM | {"SLURM_NTASKS": "1"}, {}, None),
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, {}, None),  # inside sbatch, outside srun
        (MPI, {}, (None, None, None, None)),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {"coordinator": "a:1"}, ("a:1", 4, 1, [])),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, (None, None, None, [])),
        ({"TPU_WORKER_HOSTNAMES": "a"}, {}, None),
        ({}, {"launcher": "tpu"}, (None, None, None, [])),
        ({}, {"coordinator": "a:1", "count": 2, "index": 0}, ("a:1", 2, 0, [])),
    ],
)
def test_who_is_joined(environment, settings, joined, monkeypatch):
    for name in [*SLURM, *MPI, "TPU_WORKER_HOSTNAMES", "JAX_PLATFORMS"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    hosts.start(config.Hosts(**settings))
    assert calls == ([] if joined is None else [joined])


@pytest.mark.parametrize("given", [{"count": 2}, {"coordinator": "a:1"}, {"coordinator": "a:1", "index": 0}])
def test_half_of_the_flags_is_refused(given):
    with pytest.raises(ValueError, match=r"^--hosts\..* missing: several hosts need"):
        hosts.start(config.Hosts(**given))


def test_hosts_that_do_not_come_are_said_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED:\nnobody there")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(ValueError) as error:
        hosts.start(config.Hosts(coordinator="a:1", count=2, index=1))
    assert str(error.value) == "the hosts did not find each other at a:1 (DEADLINE_EXCEEDED: nobody there); see docs/scale.md"


def begin(
    model: str,
    folder: Path,
    environment: dict,
    processes: int = 1,
    devices: int = 1,
    networks: list[tuple[str, str]] | None = None,
    each: list[dict] | None = None,
    program: str = PROGRAM,
    **options,
) -> list[subprocess.Popen]:
    """The processes of one run, each with so many devices; in network namespaces (name, address) and with options of their
    own, if given."""
    options = {**OPTIONS, "model.path": model, "run.dir": str(folder), **options}
    words = [word for name, value in options.items() for word in option(name, value)]
    flags = {**environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    coordinator = f"{networks[0][1] if networks else '127.0.0.1'}:{free_port()}"
    started = []
    for index in range(processes):
        where = ["--hosts.coordinator", coordinator, "--hosts.count", str(processes), "--hosts.index", str(index)]
        command = [sys.executable, "-W", "ignore", "-c", program, "demo", *words, *(where if processes > 1 else ())]
        command += [word for name, value in (each[index] if each else {}).items() for word in option(name, value)]
        command = (["ip", "netns", "exec", networks[index][0]] if networks else []) + command
        started.append(
            subprocess.Popen(command, env=flags, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return started


def option(name: str, value) -> list[str]:
    section, _, field = name.partition(".")
    return [f"--{name}", str(value)] if not isinstance(value, bool) else [f"--{section}.{'' if value else 'no-'}{field}"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def end(processes: list[subprocess.Popen], code: int = 0) -> list[tuple[str, str]]:
    """What each has printed; all must have ended with `code`."""
    said = [one.communicate(timeout=600) for one in processes]
    assert [one.returncode for one in processes] == [code] * len(processes), said
    assert "Involuntary full rematerialization" not in "".join(
        err for _, err in said
    )  # XLA's word for a copy of all, everywhere
    return said


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock, the memory or the number of devices decides."""
    apart = ("time/", "memory/", "rollout/tokens_per_second", "rollout/slot_utilization", "learner/")
    return [{k: v for k, v in row.items() if not k.startswith(apart)} for row in metrics.read(folder / "metrics.jsonl")]


def params_of(folder: Path, step: int) -> list[np.ndarray]:
    model = hf.load_config(folder / "hf")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float64), decoder.shapes(model))
    return jax.tree.leaves(checkpoint.read_params(folder, shapes, step))


def assert_same_rows(folder: Path, alone: Path, rtol: float = EXACT) -> None:
    found, wanted = rows(folder), rows(alone)
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # The distance of two log-probs of one token is itself rounding.
            exact = {"rtol": rtol, "atol": rtol / 10 if "mismatch" in name or name == "loss" else 0}
            np.testing.assert_allclose(a[name], b[name], **exact, err_msg=f"step {a['step']}: {name}")
    drawn = [[json.loads(line) for line in (one / "rollouts.jsonl").open()] for one in (folder, alone)]
    for a, b in zip(*drawn, strict=True):
        advantages = [[r.pop("advantage") for r in row["responses"]] for row in (a, b)]
        np.testing.assert_allclose(*advantages, rtol=rtol, atol=1e-12)
        assert a == b


def assert_same(folder: Path, alone: Path) -> None:
    assert_same_rows(folder, alone)
    for step in range(1, STEPS + 1):
        for a, b in zip(params_of(folder, step), params_of(alone, step), strict=True):
            assert np.abs(a - b).max() <= EXACT * np.abs(b).max()
    first, last = (params_of(alone, step) for step in (1, STEPS))
    moved, other = [b - a for a, b in zip(first, last, strict=True)], params_of(folder, STEPS)
    assert max(np.abs(x).max() for x in moved) > 1e-4
    for a, b, update in zip(other, last, moved, strict=True):
        assert np.linalg.norm(a - b) <= EXACT * np.linalg.norm(update)


@pytest.fixture(scope="module")
def alone(tiny_model, environment, tmp_path_factory) -> Path:
    """The run of one device, which all others must equal."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    end(begin(tiny_model, folder, environment))
    return folder


@pytest.mark.parametrize(
    "devices, mesh, tensor",
    [
        pytest.param(8, (2, 2, 2), 2, id="2,2,2"),
        pytest.param(8, (8, 1, 1), None, id="8,1,1", marks=pytest.mark.slow),
        pytest.param(8, (1, 8, 1), None, id="1,8,1", marks=pytest.mark.slow),
        pytest.param(4, (1, 1, 4), 4, id="1,1,4", marks=pytest.mark.slow),
        pytest.param(2, (1, 2, 1), None, id="1,2,1", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_takes_the_steps_that_one_device_takes(devices, mesh, tensor, tiny_model, environment, alone, tmp_path):
    options = {"mesh.data": mesh[0], "mesh.fsdp": mesh[1], "mesh.tensor": mesh[2]}
    options |= {"rollout.tensor": tensor} if tensor else {}
    end(begin(tiny_model, tmp_path / "run", environment, devices=devices, **options))
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_in_float32_a_mesh_comes_near_one_device(tiny_model, environment, tmp_path):
    """As it runs outside of tests: rounding may turn a sample, so the first step is compared, and loosely."""
    single = {**environment, "JAX_ENABLE_X64": "0"}
    program = "from grpo_jax import config, train; config.run_main(train.main)"
    for name, devices, options in (("alone", 1, {}), ("run", 8, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})):
        end(begin(tiny_model, tmp_path / name, single, devices=devices, program=program, **options))
    (_, first, *others), (_, alone, *_) = rows(tmp_path / "run"), rows(tmp_path / "alone")
    for name, near in (("reward/mean", 0.2), ("entropy/mean", 0.02), ("grad_norm", 0.2), ("response_tokens/mean", 1.0)):
        assert abs(first[name] - alone[name]) <= near, (name, first[name], alone[name])
    assert first["rollout/logp_mismatch_max"] < 1e-4
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in (first, *others))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_take_the_steps_that_one_takes(processes, tiny_model, environment, alone, tmp_path):
    """Two devices each; weights and optimizer state are split over all of them."""
    folder = tmp_path / "run"
    said = end(begin(tiny_model, folder, environment, processes, devices=2, **{"mesh.fsdp": 2 * processes}))
    assert_same(folder, alone)
    assert "step 3/3" in said[0][0]
    assert all("step" not in out for out, _ in said[1:])  # only the first speaks


def wait_for(process: subprocess.Popen, ready, seconds: float = 300) -> None:
    began = time.monotonic()
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("told", [[1], pytest.param([0, 1], marks=pytest.mark.slow)], ids=["one", "all"])
def test_stopped_on_two_hosts_goes_on_with_one_as_if_nothing_had_been(told, tiny_model, environment, alone, tmp_path):
    """SIGTERM to one host or to all: both stop, with the code that says so. Elastic: 2 hosts to 1, fsdp to tensor."""
    folder = tmp_path / "run"
    both = begin(tiny_model, folder, environment, 2, devices=2, **{"mesh.fsdp": 4, "checkpoint.every": 100})
    wait_for(both[0], lambda: lines(folder) == 2)  # step 1 is done
    began = time.monotonic()
    for index in told:
        both[index].send_signal(signal.SIGTERM)
    said = end(both, hosts.STOPPED)
    print(f"{time.monotonic() - began:.1f} s from the signal to the end")
    assert ("SIGTERM" if 0 in told else "another host was asked to stop") in said[0][0]
    assert "stopped after step" in said[0][0]
    end(begin(tiny_model, folder, environment, devices=2, **{"mesh.tensor": 2}))
    assert_same_rows(folder, alone)
    for a, b in zip(params_of(folder, STEPS), params_of(alone, STEPS), strict=True):
        assert np.abs(a - b).max() <= EXACT * np.abs(b).max()


@pytest.mark.slow
def test_when_a_host_is_killed_the_others_end(tiny_model, environment, tmp_path):
    folder = tmp_path / "run"
    both = begin(tiny_model, folder, environment, 2, **{"run.steps": 1000})
    wait_for(both[0], lambda: lines(folder) >= 2)
    both[1].kill()
    began = time.monotonic()
    assert both[0].wait(timeout=60) != 0
    print(f"{time.monotonic() - began:.1f} s")
    for one in both:
        one.communicate()


@pytest.mark.slow
def test_eight_devices_then_four_then_two(tiny_model, environment, alone, tmp_path):
    folder = tmp_path / "run"
    for devices, steps, sizes in ((8, 1, (1, 8, 1)), (4, 2, (2, 1, 2)), (2, 3, (1, 2, 1))):
        options = {f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)}
        end(begin(tiny_model, folder, environment, devices=devices, **options, **{"run.steps": steps}))
    assert_same(folder, alone)


@pytest.fixture
def networks():
    """Two network namespaces with an address each and a wire between them: two hosts, as far as sockets can tell."""
    names, addresses = ("grpo-a", "grpo-b"), ("10.117.0.1", "10.117.0.2")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    hosts_files = [Path("/etc/netns") / name / "hosts" for name in names]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address, file in zip(names, addresses, hosts_files, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
            file.parent.mkdir(parents=True)
            file.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")  # how Gloo finds its own address
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', b'') or error}")
    else:
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.mark.slow
def test_two_hosts_with_addresses_of_their_own(networks, tiny_model, environment, alone, tmp_path):
    end(begin(tiny_model, tmp_path / "run", environment, 2, 2, networks, **{"mesh.fsdp": 4}))
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_adapters_offloading_and_hosts_without_a_prompt(tiny_model, environment, tmp_path):
    """One prompt a step, so that the second host has none; adapters are learned, and the moments rest in host memory.

    Adapters are float32 here, too, whatever the rest is.
    """
    options = {"rollout.prompts_per_step": 1, "validation.limit": 1, "lora.rank": 4, "learner.offload": "optimizer"}
    for name, processes in (("alone", 1), ("run", 2)):
        end(begin(tiny_model, tmp_path / name, environment, processes, **options))
    assert_same_rows(tmp_path / "run", tmp_path / "alone", rtol=1e-5)
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("alone", "run")]
    assert max(np.abs(x).max() for name, x in adapters[0].items() if "lora_B" in name) > 1e-4
    for name, x in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], x, rtol=1e-5, atol=1e-6)


def test_hosts_that_were_told_different_things_are_refused(tiny_model, environment, tmp_path):
    both = begin(tiny_model, tmp_path / "run", environment, 2, each=[{"run.seed": 0}, {"run.seed": 1}])
    said = end(both, 2)
    assert "error: hosts differ in their options (" in said[0][1] and "error" not in said[1][1]
