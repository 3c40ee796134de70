"""The benchmark on a model of 20k parameters: what it counts is checked by hand; how fast anything is, is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import lengths
from grpo_jax import flops
from models import hf
from models.decoder import DecoderConfig
from scripts import bench, peers, timing
from scripts.bench import Args

SECTIONS = ("rollout", "update", "logprob", "attention", "step")
SMALL = dict(prompts=2, group_size=3, prompt_tokens=20, response_tokens=8, repeats=2, tokens_per_microbatch=256)


@pytest.fixture(scope="module", autouse=True)
def small_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.SIZES, "cpu", (64, 4096))
        yield


@pytest.fixture(scope="module")
def result(tiny_model, tmp_path_factory):
    """All sections; what is written is what is returned."""
    out = tmp_path_factory.mktemp("bench") / "new" / "result.json"
    made = bench.bench(Args(SECTIONS, model=tiny_model, out=out, **SMALL))
    assert json.loads(out.read_text()) == json.loads(json.dumps(made))
    return made


def test_every_section_reports(result):
    assert list(result["sections"]) == list(SECTIONS)
    keys = {"seconds", "rounds", "parts", "compile_seconds", "tokens", "tokens_per_second", "flops_useful", "mfu"}
    keys |= {"flops_launched", "host_gb", "seconds_over_ours"}
    for rows in result["sections"].values():
        row = rows["ours"]
        assert keys <= set(row)
        assert len(row["rounds"]) == SMALL["repeats"]
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["mfu"] > 0 and row["host_gb"] > 0.05 and row["seconds_over_ours"] == 1
    assert {"device", "devices", "cpu", "cores", "python", "jax", "jaxlib", "numpy"} == set(result["machine"])
    assert set(result["sections"]["rollout"]["ours"]["parts"]) == {"first_token"}
    assert set(result["sections"]["step"]["ours"]["parts"]) == {"rollout", "pack", "reference", "update"}
    assert set(result["sections"]["attention"]["ours"]["parts"]) == {"forward"}
    assert all(0 < v < float("inf") for v in result["ceilings"].values())


def test_counts(result, tiny_model):
    """2 prompts of 20 tokens, each with 3 responses of 8."""
    model = hf.load_config(tiny_model)
    forward = flops.useful(model, bench.make_groups(Args((), **SMALL), model))
    cells = 2 * (20 * 21 // 2 + 3 * (8 * 20 + 36))
    useful = dict(rollout=forward, logprob=forward, update=3 * forward, step=5 * forward)
    useful["attention"] = 3 * 4 * cells * model.heads * model.head_dim
    tokens = dict(rollout=48, step=48, update=88, logprob=88, attention=88)
    assert result["work"] == {"tokens": 88, "response_tokens": 48}
    for section, rows in result["sections"].items():
        row, seconds = rows["ours"], rows["ours"]["seconds"]["median"]
        assert (row["tokens"], row["response_tokens"]) == (tokens[section], 48)
        assert row["tokens_per_second"] == pytest.approx(tokens[section] / seconds)
        assert row["flops_useful"] == useful[section] <= row["flops_launched"]
        assert row["mfu"] * seconds * result["ceilings"]["flops_per_second"] == pytest.approx(useful[section])


def test_launched_is_what_the_parts_launch(result):
    """All of a step is its parts; attention by the layer is a part of the update."""
    launched = {section: rows["ours"]["flops_launched"] for section, rows in result["sections"].items()}
    assert launched["step"] == launched["rollout"] + launched["logprob"] + launched["update"]
    assert 3 * launched["logprob"] < launched["update"] < 4.5 * launched["logprob"]
    assert 2 * launched["attention"] < launched["update"]
    row = result["sections"]["update"]["ours"]
    assert row["padding_dense"] == 0  # 88 tokens, of which each sees what is before it: one step of attention
    assert row["padding_attention"] == 1 - 2 * (20 * 21 // 2 + 3 * (8 * 20 + 36)) / (128 * 4 * 64)
    assert result["sections"]["rollout"]["ours"]["slot_utilization"] == 1


def test_copied_prompts(tiny_model, capsys):
    """The same responses, each with its prompt: 28 tokens instead of 44 / 3; the JSON is the last line."""
    bench.bench(Args(("logprob",), model=tiny_model, against=("copied",), json=True, **SMALL))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, copied = (result["sections"]["logprob"][name] for name in ("ours", "copied"))
    assert (ours["tokens_computed"], copied["tokens_computed"]) == (88, 6 * 28)
    assert ours["flops_useful"] == copied["flops_useful"]
    assert 1.5 < copied["flops_launched"] / ours["flops_launched"] < 3
    assert copied["seconds_over_ours"] == pytest.approx(copied["seconds"]["median"] / ours["seconds"]["median"])


def test_bytes_of_decoding(tiny_model):
    """Every step after the first token reads the weights, each prompt's cache once, and all that was decoded before."""
    model = hf.load_config(tiny_model)
    groups = bench.make_groups(Args((), **SMALL), model)
    weights = 2 * (32 * (4 + 2 + 2 + 4) * 8 + 3 * 32 * 48) + model.vocab * 32
    cache = 2 * 2 * 2 * 8  # keys and values of 2 layers, 2 heads
    steps = sum(weights + cache * 2 * (20 + 3 * t) for t in range(1, 8))
    assert bench.decode_bytes(model, groups, 4) == 4 * steps
    copied = sum(weights + cache * 6 * (20 + t) for t in range(1, 8))
    assert bench.decode_bytes(model, bench.copies(groups), 2) == 2 * copied


def test_copies_keep_every_response():
    model = DecoderConfig("qwen2", 50, 8, 8, 1, 2, 1, 4)
    groups = bench.make_groups(Args((), drawn=True, prompts=3, group_size=4), model)
    copied = bench.copies(groups)
    assert len(copied) == 12
    for i, one in enumerate(copied):
        g, j = groups[i // 4], i % 4
        assert one.prompt is g.prompt and one.responses == (g.responses[j],) and one.advantages == g.advantages[j]


def test_drawn_lengths():
    prompts, responses = lengths.draw(2000, 8)
    assert prompts.shape == (2000,) and responses.shape == (2000, 8)
    assert prompts.min() >= 64 and prompts.max() <= 4096 and responses.min() >= 8 and responses.max() <= 2048
    assert abs(np.median(prompts) / 700 - 1) < 0.05 and abs(np.median(responses) / 120 - 1) < 0.05
    assert (responses == 2048).any() and (responses == 8).any()
    assert np.log(prompts).std() == pytest.approx(0.5, rel=0.05)
    again = lengths.draw(2000, 8)
    assert np.array_equal(prompts, again[0]) and np.array_equal(responses, again[1])
    assert not np.array_equal(prompts, lengths.draw(2000, 8, seed=1)[0])


def test_the_model_cut_and_the_wrong_command_lines(tiny_model, monkeypatch):
    device_mesh = bench.mesh.make(bench.config.Mesh())
    model, params = bench.load(Args((), model=tiny_model, layers=1), device_mesh)
    assert model.layers == 1 and all(x.shape[0] == 1 for x in jax.tree.leaves(params["layers"]))
    for args, message in [
        (Args(()), "at least one section"),
        (Args(("update",), prompts=0), "--prompts 0"),
        (Args(("update",), model="nowhere"), "no such folder"),
        (Args(("update",), layers=0), "--layers 0"),
        (Args(("update",), model=tiny_model, against=("trl",)), "section step"),
        (Args(("step",), against=("trl",)), "Hugging Face folder"),
        (Args(("rollout",), model=tiny_model, against=("transformers",), dtype="bfloat16"), "float32"),
        (Args(("rollout",), model=tiny_model, against=("transformers",), peer_rows=(7,)), "--peer_rows 7"),
    ]:
        monkeypatch.setattr(peers, "require", lambda name: None)
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            bench.prepare(args)


def test_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    peers.require("transformers")
    with pytest.raises(ValueError, match="trl: trl is not installed; pip install -e"):
        peers.require("trl")


def test_recording_notes_calls_and_restores():
    module = type(sys)("module")
    module.double = double = jax.jit(lambda x: x @ x)
    module.outer = outer = jax.jit(lambda x: module.double(x) @ x)
    calls = []
    with timing.recording([module], calls):
        module.outer(jnp.ones((4, 4)))
        module.double(np.ones((2, 2), np.float32))
    assert timing.launched(calls) == 2 * (2 * 4**3) + 2 * 2**3
    assert module.double is double and module.outer is outer


@pytest.mark.slow
def test_peers_make_exactly_the_wanted_tokens(tiny_model, tmp_path):
    """transformers and TRL beside ours, from the command line; the JSON is the last line."""
    pytest.importorskip("trl")
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "scripts/bench.py", "rollout", "step", "--model", tiny_model, *options, "--json"]
    root = bench.config.ROOT
    done = subprocess.run(
        [*command, "--against", "transformers", "trl"],
        cwd=root, env={**bench.os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sections = json.loads(done.stdout.splitlines()[-1])["sections"]
    for section, name in [("rollout", "transformers"), ("step", "trl")]:
        row = sections[section][name]
        assert row["response_tokens"] == 48 == sections[section]["ours"]["response_tokens"]
        assert len(row["rounds"]) == SMALL["repeats"] and "rows" in row["setting"]
