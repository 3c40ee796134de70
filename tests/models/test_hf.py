"""Import and export against transformers: same log-probs, same greedy text, a clear line for every broken folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import decoder, hf, lora
from models.lora import Lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny
logits = jax.jit(decoder.logits, static_argnums=0)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
}
SMALL |= {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
KINDS = {
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE}),
    "qwen2-untied": ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": DEFAULT_ROPE}),
    "llama-tied-9-heads": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": DEFAULT_ROPE,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_size": 54,
        },
    ),
    "llama3-rope": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE, "head_dim": 12}),
}


def torch_model(kind):
    """Large weights and biases everywhere: no two tokens are nearly tied, no tensor can be swapped unseen."""
    name, extra = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**SMALL, **extra})).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(1.0 if "norm" in key else 0.0, 0.3)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (torch model, its folder), made once."""
    cache = {}

    def make(kind):
        if kind not in cache:
            folder = tmp_path_factory.mktemp(kind)
            cache[kind] = torch_model(kind), folder
            cache[kind][0].save_pretrained(folder)
        return cache[kind]

    return make


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the tied Qwen2 folder, to break."""
    return Path(shutil.copytree(made("qwen2-tied")[1], tmp_path / "model"))


def torch_logp(model, tokens, lengths):
    mask = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits
    return torch.log_softmax(out.float(), -1).numpy(), mask


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ---------------------------------------------------------------- parity with transformers


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_equal_those_of_transformers(made, kind):
    model, path = made(kind)
    config, params = hf.load(path)
    lengths = np.array([100, 37, 1])  # longer than the llama3 scaling's original 64 positions
    tokens = np.random.default_rng(0).integers(0, config.vocab, (3, 100))
    expected, mask = torch_logp(model, tokens, lengths)
    found = np.asarray(jax.nn.log_softmax(logits(config, params, tokens, lengths)))
    assert np.abs(found - expected)[mask].max() < 1e-4
    assert expected[mask].min() < -8  # uneven, so that the bound means something


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_continuation_equals_that_of_transformers(made, kind):
    model, path = made(kind)
    config, params = hf.load(path)
    prompt = np.random.default_rng(1).integers(3, config.vocab, 30)
    with torch.no_grad():
        expected = model.generate(torch.tensor(prompt[None]), do_sample=False, max_new_tokens=64, pad_token_id=0)[0].numpy()
    following = jax.jit(lambda params, tokens, t: jnp.argmax(decoder.logits(config, params, tokens, t)[0, t[0] - 1]))
    tokens = np.zeros((1, 94), np.int32)
    tokens[0, :30] = prompt
    for t in range(30, 94):  # every step anew, from the padded sequence
        tokens[0, t] = following(params, tokens, np.array([t]))
    assert len(expected) == 94 and len(set(expected[30:])) > 8
    np.testing.assert_array_equal(tokens[0], expected)


def test_llama3_rope_scaling_matters_here(made):
    _, path = made("llama3-rope")
    config, params = hf.load(path)
    assert config.rope_scaling is not None and config.head_dim == 12
    tokens = np.random.default_rng(2).integers(0, config.vocab, (1, 100))
    scaled, plain = (
        jax.nn.log_softmax(logits(c, params, tokens, np.array([100]))) for c in (config, replace(config, rope_scaling=None))
    )
    assert np.abs(scaled - plain).max() > 0.1


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("kind, shard_bytes", list(zip(KINDS, [5e9, 30_000, 30_000, 5e9], strict=True)))
def test_transformers_loads_an_export_without_a_word(made, tmp_path, kind, shard_bytes):
    model, path = made(kind)
    config, params = hf.load(path)
    hf.save(tmp_path / "out", config, params, shard_bytes=shard_bytes)
    assert equal(hf.load(tmp_path / "out")[1], params)
    assert hf.load_config(tmp_path / "out") == config
    shards = sorted(x.name for x in (tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_bytes == 30_000) == (len(shards) > 1)

    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert said == [] and not any(info.values()), (said, info)
    assert again.dtype == torch.float32
    tokens = np.random.default_rng(3).integers(0, config.vocab, (2, 80))
    np.testing.assert_array_equal(torch_logp(again, tokens, [80, 80])[0], torch_logp(model, tokens, [80, 80])[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_export_is_rounded_once_and_comes_back_bit_equal(made, tmp_path, dtype):
    config, params = hf.load(made("qwen2-untied")[1])
    narrow = jax.tree.map(lambda x: x.astype(dtype), params)
    hf.save(tmp_path / "a", config, params, dtype=dtype)
    hf.save(tmp_path / "b", config, narrow)
    hf.save(tmp_path / "c", config, jax.tree.map(np.asarray, narrow))  # numpy arrays will do
    for out in "abc":
        assert equal(hf.load(tmp_path / out)[1], narrow)
        assert (tmp_path / out / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == dtype
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").dtype == getattr(torch, dtype)
    assert equal(hf.load(tmp_path / "a", dtype="float32")[1], jax.tree.map(lambda x: x.astype("float32"), narrow))


def test_a_bfloat16_folder_of_transformers_is_read(made, tmp_path):
    model = torch_model("qwen2-tied").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    config, params = hf.load(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = hf.load(made("qwen2-tied")[1], dtype=jnp.bfloat16)[1]
    assert equal(params, expected) and params["embed"].dtype == jnp.bfloat16


def test_files_can_be_read_by_others_and_nothing_is_left_beside(made, tmp_path):
    config, params = hf.load(made("qwen2-tied")[1])
    before = os.umask(0o022)
    try:
        hf.save(tmp_path / "new" / "out", config, params)
    finally:
        os.umask(before)
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["out"]
    for file in (tmp_path / "new" / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file


def test_an_export_replaces_an_export_and_nothing_else(made, tmp_path):
    model, path = made("qwen2-tied")
    config, params = hf.load(path)
    out = tmp_path / "out"
    hf.save(out, config, params, shard_bytes=30_000)
    hf.save(out, config, params)  # leaves no shard of the first
    assert sorted(x.name for x in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", config, params)

    (out / "notes.md").write_text("mine")
    foreign = Path(shutil.copytree(path, tmp_path / "foreign"))
    (tmp_path / "file").write_text("mine")
    for target, words in ((out, "notes.md"), (foreign, "not exported from here"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=words):
            hf.save(target, config, params)
    assert (out / "notes.md").read_text() == (tmp_path / "file").read_text() == "mine"
    assert equal(hf.load(foreign)[1], params)


def test_an_interrupted_export_leaves_the_old_one(made, tmp_path, monkeypatch):
    config, params = hf.load(made("qwen2-tied")[1])
    hf.save(tmp_path / "out", config, params)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        hf.save(tmp_path / "out", config, jax.tree.map(jnp.zeros_like, params))
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert equal(hf.load(tmp_path / "out")[1], params)


def test_save_refuses_parameters_of_another_network(made, tmp_path):
    config, params = hf.load(made("qwen2-tied")[1])
    for wrong, words in (
        ({**params, "embed": params["embed"][:-1]}, r"\['embed'\].*\(96, 48\).*\(97, 48\)"),
        ({k: v for k, v in params.items() if k != "norm"}, r"\['norm'\]\['scale'\].*None"),
        ({**params, "head": params["embed"]}, r"\['head'\].*None"),
    ):
        with pytest.raises(ValueError, match=words):
            hf.save(tmp_path / "out", config, wrong)
    with pytest.raises(ValueError, match="int8"):
        hf.save(tmp_path / "out", config, params, dtype="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind, targets",
    [("qwen2-tied", tuple(lora.TARGETS)), ("llama-tied-9-heads", tuple(lora.TARGETS)), ("llama3-rope", ("q_proj", "o_proj"))],
)
def test_peft_loads_an_adapter_and_gives_the_same_logits(made, tmp_path, kind, targets):
    peft = pytest.importorskip("peft")
    _, path = made(kind)
    config, base = hf.load(path)
    settings, adapters = adapters_for(config, targets)
    hf.save_adapter(tmp_path / "adapter", config, settings, adapters, str(path))
    tokens, lengths = np.random.default_rng(0).integers(0, config.vocab, (2, 40)), np.array([40, 23])
    ours = np.asarray(jax.nn.log_softmax(logits(config, lora.join(base, adapters, settings), tokens, lengths)))
    original = transformers.AutoModelForCausalLM.from_pretrained(path)
    theirs, mask = torch_logp(peft.PeftModel.from_pretrained(original, tmp_path / "adapter").eval(), tokens, lengths)
    assert np.abs(ours - theirs)[mask].max() < 1e-4
    without = np.asarray(jax.nn.log_softmax(logits(config, base, tokens, lengths)))
    assert np.abs(ours - without)[mask].max() > 0.5
    # And merged, as an export of its own.
    hf.save(tmp_path / "merged", config, lora.merge(base, adapters, settings, "float32"), dtype="float32")
    merged, _ = torch_logp(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), tokens, lengths)
    assert np.abs(ours - merged)[mask].max() < 1e-4


def adapters_for(config, targets):
    settings, rng = Lora(4, 6.0, targets), np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: lora.init(config, settings, jax.random.key(0)))
    return settings, jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), shapes)


def test_an_adapter_replaces_an_adapter_and_nothing_else(made, tmp_path):
    config, _ = hf.load(made("qwen2-tied")[1])
    settings, adapters = adapters_for(config, ("v_proj",))
    for _ in range(2):
        hf.save_adapter(tmp_path / "adapter", config, settings, adapters, "org/base")
    names = {f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_{x}.weight" for i in range(3) for x in "AB"}
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == names
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["target_modules"], raw["base_model_name_or_path"]) == (
        4,
        6.0,
        ["v_proj"],
        "org/base",
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(raw | {"peft_version": "0.21"}))
    with pytest.raises(ValueError, match="was not exported from here"):
        hf.save_adapter(tmp_path / "adapter", config, settings, adapters, "org/base")
    with pytest.raises(ValueError, match="which an export would delete"):
        hf.save_adapter(made("qwen2-tied")[1], config, settings, adapters, "org/base")


# ---------------------------------------------------------------- placement

SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from models import decoder, hf

read = []
plain = hf._Entry.read
hf._Entry.read = lambda self, tensor, ranges: read.append(out := plain(self, tensor, ranges)) or out
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
for rules in (
    {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "ff": "tensor", "vocab": "tensor"},
    {"embed": "tensor", "head_dim": "fsdp"},  # cuts inside merged axes
):
    config = hf.load_config(sys.argv[1])
    axes = decoder.logical_axes(config)
    on = lambda a, n: rules.get(a) if n % 2 == 0 else None
    spec = lambda names, x: NamedSharding(mesh, P(*map(on, names, x.shape)))
    shardings = jax.tree.map(spec, axes, decoder.shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    read.clear()
    _, params = hf.load(sys.argv[1], shardings=shardings)
    assert sum(x.size for x in read) == sum(x.size for x in jax.tree.leaves(params)), "copies of a slice share one read"
    _, whole = hf.load(sys.argv[1])
    _, same = hf.load(sys.argv[1], shardings=NamedSharding(mesh, P()))
    for a, b, c, s in zip(*map(jax.tree.leaves, (params, whole, same, shardings)), strict=True):
        assert a.sharding == s and c.sharding.is_fully_replicated
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(c, b)
    hf.save(sys.argv[2], config, params)
    assert all(map(np.array_equal, jax.tree.leaves(hf.load(sys.argv[2])[1]), jax.tree.leaves(whole)))
print("fine")
"""


def test_every_device_gets_its_slice_and_each_slice_is_read_once(made, tmp_path):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = Path(hf.__file__).parents[1]
    command = [sys.executable, "-c", SHARDED, str(made("qwen2-untied")[1]), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


# ---------------------------------------------------------------- tokenizer and end tokens


@pytest.fixture(scope="module")
def tokenizer():
    """Splits by whole words, as no tokenizer of Qwen2 does."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "<|im_end|>", "call", "a", "tool", "<x>"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>")
    made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<x>"]})
    made.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    return made


def test_the_tokenizer_travels_with_the_export(made, tmp_path, tokenizer):
    config, params = hf.load(made("qwen2-tied")[1])
    for _ in range(2):  # the second replaces the first, and what was loaded can be saved
        hf.save(tmp_path / "out", config, params, tokenizer)
        tokenizer = hf.load_tokenizer(tmp_path / "out")
    assert tokenizer("call a tool")["input_ids"] == [3, 4, 5]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode([3, 6, 2], skip_special_tokens=True) == "call"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "call a"}], tokenize=False) == "call a<|im_end|>"
    raw = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())  # in words of transformers 4.5x
    assert raw["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert raw["additional_special_tokens"] == ["<x>"] and "extra_special_tokens" not in raw


def test_end_tokens_are_those_of_all_three_places(folder, tokenizer):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 8], "do_sample": true}')
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": 9}))
    config, params = hf.load(folder)
    assert config.eos_token_ids == (9, 7, 2, 8)
    assert hf.end_tokens(folder, config, tokenizer) == (9, 7, 2, 8)
    tokenizer.eos_token = "tool"
    assert hf.end_tokens(folder, replace(config, eos_token_ids=(9,)), tokenizer) == (9, 7, 2, 8, 5)
    tokenizer.eos_token = "<|im_end|>"
    hf.save(folder.parent / "out", config, params)
    written = json.loads((folder.parent / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [9, 7, 2, 8]}
    (folder / "generation_config.json").unlink()
    assert hf.load_config(folder).eos_token_ids == (9,)


def test_a_folder_without_a_tokenizer_says_so(folder):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError) as error:
        hf.load_tokenizer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- broken folders


UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"
BROKEN = {}  # id -> (what breaks the folder, the error's type, what its text must name)


def breaking(name, error, words):
    return lambda apply: BROKEN.update({name: (apply, error, words)})


def edit(name, words, change):
    """The same for a change of the folder's one safetensors file: a dict of its tensors, changed in place."""

    @breaking(name, ValueError, words)
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


edit("missing", ["model: ", "missing", UP, "model.norm.weight"], lambda t: [t.pop(UP), t.pop("model.norm.weight")])
edit("many missing", ["missing", "and 8 more"], lambda t: [t.pop(k) for k in list(t) if "layers.0" in k])
edit("unexpected", ["does not imply", "layers.3.mlp.up"], lambda t: t.update({UP.replace("1", "3"): t[UP]}))
edit("misshapen", ["model.safetensors", UP, "(48, 80)", "(80, 48)"], lambda t: t.update({UP: t[UP].T.copy()}))
edit("dtype", ["model.safetensors", UP, "I8", "BF16"], lambda t: t.update({UP: t[UP].astype(np.int8)}))
edit("head", ["lm_head.weight", "tie_word_embeddings"], lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
edit("head shape", ["lm_head.weight", "tie_word_embeddings"], lambda t: t.update({"lm_head.weight": t[UP]}))


@breaking("truncated", ValueError, ["model.safetensors", "truncated"])
def _(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


@breaking("corrupt", ValueError, ["model.safetensors", "not safetensors"])
def _(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:8] + b"\xff" * 50 + data[58:])


@breaking("zero bytes", ValueError, ["model.safetensors", "truncated"])
def _(folder):
    (folder / "model.safetensors").write_bytes(b"")


@breaking("no weights", FileNotFoundError, ["model: ", "model.safetensors"])
def _(folder):
    (folder / "model.safetensors").unlink()


@breaking("shard gone", FileNotFoundError, ["model.safetensors.index.json", "model-00002-of-00002.safetensors"])
def _(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@breaking("bad index", ValueError, ["model.safetensors.index.json", "weight_map"])
def _(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weights": []}')


@breaking("no config", FileNotFoundError, ["config.json", "no such file"])
def _(folder):
    (folder / "config.json").unlink()


@breaking("config not json", ValueError, ["config.json", "not JSON", "line 2"])
def _(folder):
    (folder / "config.json").write_text("{\n'a': 1}")


@breaking("config a list", ValueError, ["config.json", "list"])
def _(folder):
    (folder / "config.json").write_text("[]")


@breaking("architecture", ValueError, ["config.json", "GPT2LMHeadModel", "Qwen2ForCausalLM"])
def _(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["GPT2LMHeadModel"]}))


@pytest.mark.parametrize("apply, kind, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_named_in_one_line(folder, apply, kind, words):
    apply(folder)
    with pytest.raises(kind) as error:
        hf.load(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text and all(word in text for word in words), text


def test_harmless_extras_are_accepted(folder):
    tensors = load_file(folder / "model.safetensors")
    before = hf.load(folder)[1]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()  # tied, and written all the same
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # old Llama files
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert equal(hf.load(folder)[1], before)


def test_tensors_of_two_dtypes_become_the_wider(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v if "norm" in k else v.astype(jnp.bfloat16) for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert {x.dtype for x in jax.tree.leaves(hf.load(folder)[1])} == {jnp.dtype("float32")}


def test_an_unknown_dtype_or_place_is_named(folder, monkeypatch):
    for dtype in ("int8", "float31"):
        with pytest.raises(ValueError, match=f"{dtype}.*bfloat16"):
            hf.load(folder, dtype=dtype)
    for path in ("nowhere", "/no/such/folder", "../a/b"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            hf.load(path)
    import huggingface_hub

    asked = []

    def unreachable(repo, allow_patterns):
        asked.append(allow_patterns)
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        hf.load("some-org/some-model")
    assert "some-org/some-model" in str(error.value) and "no route" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(folder))
    assert hf.load("some-org/some-model")[0] == hf.load(folder)[0]
    assert "*.safetensors" in asked[0]


def test_a_revision_of_the_hub_is_asked_for(folder, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **more: asked.append((repo, more)) or str(folder))
    assert hf.load_config("some-org/model-0.5b@refs/pr/3") == hf.load_config("some-org/model-0.5b")
    assert [(repo, more.get("revision")) for repo, more in asked] == [
        ("some-org/model-0.5b", "refs/pr/3"),
        ("some-org/model-0.5b", None),
    ]
    for path in ("some-org/model@", "some-org/model@a@b", "@main", "some-org/model@../x"):
        with pytest.raises(FileNotFoundError, match="no such folder, and not a hub id"):
            hf.load_config(path)


def test_an_adapter_names_the_revision_of_its_model_apart(tmp_path):
    assert "revision" not in hf._peft_config(Lora(1), "org/name")
    config = hf._peft_config(Lora(1), "org/name@1234abcd")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "1234abcd")
    (tmp_path / "a@b").mkdir()
    assert hf._peft_config(Lora(1), str(tmp_path / "a@b"))["base_model_name_or_path"] == str(tmp_path / "a@b")
