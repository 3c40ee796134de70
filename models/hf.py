"""Models in and out of Hugging Face folders: config.json, safetensors, tokenizer.

    load_config, load   a folder or hub id -> DecoderConfig, parameters
    save                the way back: a folder that transformers 4.5x and 5.x and vLLM read as it is
    save_adapter        low-rank adapters alone, as a folder that PEFT reads
    load_tokenizer, end_tokens

One table, `_TABLE`, says for each of our parameters which tensor holds it there and how its axes lie; both directions
read it. Tensors are memory-mapped and read by slices, one stacked parameter at a time and of it only what this process'
devices hold, so that the host never has the whole model. Every name and shape is checked before the first byte is read.

Departures from transformers: a missing, superfluous or misshapen tensor is an error, never a warning only;
the end tokens of generation_config.json join those of config.json, since Qwen2.5 and Llama 3 name some only there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.decoder import DecoderConfig, Params, shapes
from models.lora import TARGETS, Lora

# Our parameter -> (tensor, its axes). A letter is an axis of ours; "hc" is H and C merged into one. "{}": the layer. Axes
# lie in the same order on both sides.
_TABLE = {
    "embed": ("model.embed_tokens.weight", "v d"),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", "d"),
    "layers/attention/q": ("model.layers.{}.self_attn.q_proj.weight", "hc d"),
    "layers/attention/k": ("model.layers.{}.self_attn.k_proj.weight", "kc d"),
    "layers/attention/v": ("model.layers.{}.self_attn.v_proj.weight", "kc d"),
    "layers/attention/q_bias": ("model.layers.{}.self_attn.q_proj.bias", "hc"),
    "layers/attention/k_bias": ("model.layers.{}.self_attn.k_proj.bias", "kc"),
    "layers/attention/v_bias": ("model.layers.{}.self_attn.v_proj.bias", "kc"),
    "layers/attention/o": ("model.layers.{}.self_attn.o_proj.weight", "d hc"),
    "layers/ff_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "d"),
    "layers/ff/gate": ("model.layers.{}.mlp.gate_proj.weight", "f d"),
    "layers/ff/up": ("model.layers.{}.mlp.up_proj.weight", "f d"),
    "layers/ff/down": ("model.layers.{}.mlp.down_proj.weight", "d f"),
    "norm/scale": ("model.norm.weight", "d"),
    "head": ("lm_head.weight", "v d"),
}
_DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}
_TEXTS = ("*.json", "*.jinja", "*.txt")
_WRITTEN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|merges\.txt|chat_template\.jinja|tokenizer\.model"
)
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.safetensors")


@dataclass(frozen=True)
class _Entry:
    """One of our parameters and the tensors that hold it."""

    names: tuple[str, ...]  # one tensor a layer, or a single one
    shape: tuple[int, ...]  # ours, of one layer
    stacked: bool
    axes: tuple[str, ...]  # theirs, each as the letters of ours that it holds

    @property
    def their_shape(self) -> tuple[int, ...]:
        lengths = iter(self.shape)
        return tuple(math.prod(next(lengths) for _ in axes) for axes in self.axes)

    def read(self, tensor: Any, ranges: tuple[slice, ...]) -> np.ndarray:
        """The part of our array of one layer that `ranges` cut out, from their tensor (anything that can be sliced)."""
        lengths, rest, cut, at = list(self.shape), list(ranges), [], 0
        for merged in self.axes:  # only the first of merged axes is cut in the file, the others here
            width, outer = math.prod(lengths[at + 1 : at + len(merged)]), ranges[at]
            cut.append(slice(outer.start * width, outer.stop * width))
            lengths[at], rest[at] = outer.stop - outer.start, slice(None)
            at += len(merged)
        return tensor[tuple(cut)].reshape(lengths)[tuple(rest)]


def _entries(config: DecoderConfig) -> list[_Entry]:
    """In the order of the leaves of the parameters' tree."""
    out = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes(config))[0]:
        name, axes = _TABLE[jax.tree_util.keystr(path, simple=True, separator="/")]
        stacked = "{}" in name
        names = tuple(name.format(i) for i in range(config.layers)) if stacked else (name,)
        out.append(_Entry(names, leaf.shape[stacked:], stacked, tuple(axes.split())))
    return out


# ---------------------------------------------------------------- in


def load_config(path: str | Path) -> DecoderConfig:
    """The network of a folder or hub id, without its weights. Errors as in `load`."""
    folder = _folder(path, _TEXTS)
    config = DecoderConfig.from_hf(_json(folder / "config.json"), str(folder / "config.json"))
    return replace(config, eos_token_ids=_unique([*config.eos_token_ids, *_generation_eos(folder)]))


def load(path: str | Path, *, shardings: Any = None, dtype: Any = None) -> tuple[DecoderConfig, Params]:
    """Reads a model from a local folder or a hub id "org/name"; "org/name@revision" takes that commit, tag or branch.

    `shardings` is a tree of `jax.sharding.Sharding` like the parameters' (a single one, or None for the default device,
    stands for all); a process reads only the slices that its own devices hold. `dtype`: float32, bfloat16 or float16;
    None keeps the stored one (the widest, if tensors differ: a computation wants all of one).

    Raises FileNotFoundError or ValueError, in one line that names file and tensor, for whatever does not fit.
    """
    folder = _folder(path, (*_TEXTS, "*.safetensors"))
    config = load_config(folder)
    entries = _entries(config)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check(folder, config, entries, tensors)
        stored = {_DTYPES[tensors[name][1].get_dtype()] for entry in entries for name in entry.names}
        dtype = reduce(jnp.promote_types, sorted(stored, key=str)) if dtype is None else _float(dtype)
        is_none = lambda x: x is None  # noqa: E731
        places = jax.tree.leaves(jax.tree.broadcast(shardings, shapes(config), is_leaf=is_none), is_leaf=is_none)
        leaves = [
            _place(entry, [tensors[name][1] for name in entry.names], dtype, place)
            for entry, place in zip(entries, places, strict=True)
        ]
    return config, jax.tree.unflatten(jax.tree.structure(shapes(config)), leaves)


def _place(entry: _Entry, tensors: list[Any], dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    shape = (len(tensors), *entry.shape) if entry.stacked else entry.shape
    done: dict[tuple, np.ndarray] = {}  # devices that hold copies of one slice share one read of it

    def read(index: tuple[slice, ...]) -> np.ndarray:
        ranges = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        key = tuple((s.start, s.stop) for s in ranges)
        if key not in done:
            layers, cut = (ranges[0], ranges[1:]) if entry.stacked else (slice(0, 1), ranges)
            out = np.empty((layers.stop - layers.start, *(s.stop - s.start for s in cut)), dtype)
            for i, tensor in enumerate(tensors[layers]):
                out[i] = entry.read(tensor, cut)
            done[key] = out if entry.stacked else out[0]
        return done[key]

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Path, Any]]:
    """Every tensor of the folder: name -> (file, slice to read from). The files stay mapped as long as `stack`."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():  # of the two, transformers takes the single file
        files, source = [single], folder
    else:
        where = _json(index).get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(f"{index}: no weight_map of tensor to file; download or export the model again")
        names = sorted({str(name) for name in where.values()})
        if strange := [name for name in names if Path(name).name != name or name in ("", "..")]:
            raise ValueError(f"{index}: {strange[0]!r:.100} is no file of this folder; download or export the model again")
        files, source = [folder / name for name in names], index
    tensors = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{source}: {file.name} is not there; download or export the model again")
        try:
            opened = stack.enter_context(safe_open(file, "np"))
            tensors |= {name: (file, opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: truncated or not safetensors ({_line(error)}); get it again") from error
    return tensors


def _check(folder: Path, config: DecoderConfig, entries: list[_Entry], tensors: dict[str, tuple[Path, Any]]) -> None:
    expected = {name: entry.their_shape for entry in entries for name in entry.names}
    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"{folder}: tensors that config.json implies are missing: {_some(missing)}")
    tied_head = {"lm_head.weight"} if config.tied else set()
    unexpected = tensors.keys() - expected.keys() - tied_head
    if unexpected := {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}:  # of old Llama files
        raise ValueError(f"{folder}: tensors that config.json does not imply: {_some(unexpected)}")
    for name, shape in expected.items():
        file, tensor = tensors[name]
        if tuple(tensor.get_shape()) != shape:
            raise ValueError(f"{file}: {name} has shape {tuple(tensor.get_shape())}; config.json implies {shape}")
        if tensor.get_dtype() not in _DTYPES:
            raise ValueError(f"{file}: {name} is stored as {tensor.get_dtype()}; readable are {', '.join(_DTYPES)}")
    if tied_head & tensors.keys():  # some exporters write the tied head too: harmless if it is the embedding
        (file, head), (_, embed) = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
        pieces = [slice(i, min(i + 8192, config.vocab)) for i in range(0, config.vocab, 8192)]
        same = head.get_shape() == embed.get_shape() and all(np.array_equal(head[x], embed[x]) for x in pieces)
        if not same:
            raise ValueError(f"{file}: lm_head.weight is not the embedding; set tie_word_embeddings to false")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder or hub id. ValueError or FileNotFoundError in one line.

    tokenizer.json is taken at its word. AutoTokenizer of transformers 5 is not used: beside a config.json of Qwen2 it
    takes only the vocabulary from there and splits text as Qwen does, whatever the file says.
    """
    from transformers import PreTrainedTokenizerFast

    folder = _folder(path, _TEXTS)
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder}: no tokenizer.json; copy the tokenizer of the model into the folder")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # transformers and tokenizers raise a dozen kinds, bare Exception among them
        raise ValueError(f"{folder}: the tokenizer cannot be read ({_line(error)})") from error


def end_tokens(path: str | Path, config: DecoderConfig, tokenizer: Any) -> tuple[int, ...]:
    """The token ids that end a response: those of config.json, generation_config.json and the tokenizer together."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return _unique([*config.eos_token_ids, *_generation_eos(_folder(path, _TEXTS)), *own])


# ---------------------------------------------------------------- out


def save(
    path: str | Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that transformers and vLLM load: config, generation config, safetensors, tokenizer.

    `params` are numpy arrays or jax arrays that this process can read whole; `dtype` None keeps that of the embedding.
    The folder is written beside `path` and renamed at the end: a half-written export never looks whole. An existing
    folder is replaced only if it is empty or was written by this function, else ValueError.
    """
    dtype = _float(params["embed"].dtype if dtype is None else dtype)
    tensors = list(_tensors(config, params))
    with _folder_for(path, _WRITTEN, _is_ours) as partial:
        _write_json(partial / "config.json", config.to_hf(dtype.name))
        ends = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
        _write_json(partial / "generation_config.json", ends)
        _write_weights(partial, tensors, dtype, shard_bytes)
        if tokenizer is not None:
            _write_tokenizer(partial, tokenizer)


def save_adapter(path: str | Path, config: DecoderConfig, lora: Lora, adapters: Params, base: str) -> None:
    """Writes the adapters of `models.lora` as a folder that `peft.PeftModel.from_pretrained` and vLLM load; float32.

    `adapters` are arrays as in `save`, `base` the folder or hub id of the model beside which they stand. The folder is
    written and replaced as in `save`.
    """
    tensors = {}
    for target in lora.targets:
        part, matrix, _ = TARGETS[target]
        pair, name = adapters["layers"][part][matrix], _TABLE[f"layers/{part}/{matrix}"][0]
        for i in range(config.layers):
            key = "base_model.model." + name.format(i).removesuffix(".weight")
            a, b = (np.asarray(pair[k][i], np.float32) for k in "ab")
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a.reshape(lora.rank, -1))
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b.reshape(-1, lora.rank))
    with _folder_for(path, _ADAPTER, _is_our_adapter) as partial:
        _write_json(partial / "adapter_config.json", _peft_config(lora, base))
        save_file(tensors, file := partial / "adapter_model.safetensors", {"format": "pt"})
        file.chmod((partial / "adapter_config.json").stat().st_mode)


def _peft_config(lora: Lora, base: str) -> dict[str, Any]:
    name, revision = (base, {}) if Path(base).expanduser().is_dir() else _named(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        **revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _is_our_adapter(folder: Path) -> bool:
    """As `_is_ours`: PEFT's own files say more."""
    try:
        return _json(folder / "adapter_config.json").keys() - {"revision"} == _peft_config(Lora(1), "").keys()
    except (ValueError, OSError):
        return False


@contextlib.contextmanager
def _folder_for(path: str | Path, written: re.Pattern, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write in, beside `path`, whose place it takes at the end. ValueError where that holds what is not ours."""
    target = Path(path).expanduser().resolve()
    _refuse_foreign(target, written, is_ours)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tensors(config: DecoderConfig, params: Params) -> Iterator[tuple[str, _Entry, Any, int | None]]:
    """(name, entry, our array, layer) of every tensor, layer by layer. Checks the tree and every shape first."""
    want = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(shapes(config))}
    have = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(params)}
    if wrong := {k for k in want.keys() | have.keys() if want.get(k) != have.get(k)}:
        worst = min(wrong)
        raise ValueError(f"params{worst} has shape {have.get(worst)}; the config implies {want.get(worst)}")
    pairs = list(zip(_entries(config), jax.tree.leaves(params), strict=True))
    yield from ((entry.names[0], entry, x, None) for entry, x in pairs if not entry.stacked)
    yield from ((entry.names[i], entry, x, i) for i in range(config.layers) for entry, x in pairs if entry.stacked)


def _write_weights(
    folder: Path, tensors: list[tuple[str, _Entry, Any, int | None]], dtype: np.dtype, shard_bytes: float
) -> None:
    sizes = [math.prod(entry.their_shape) * dtype.itemsize for _, entry, _, _ in tensors]
    shards, filled = [[]], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if shards[-1] and filled + size > shard_bytes:
            shards, filled = [*shards, []], 0
        shards[-1].append(tensor)
        filled += size
    where = {}
    for i, shard in enumerate(shards, 1):
        file = folder / ("model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors")
        host = [(name, entry, np.asarray(x if layer is None else x[layer])) for name, entry, x, layer in shard]
        save_file(
            {name: np.ascontiguousarray(x.astype(dtype).reshape(entry.their_shape)) for name, entry, x in host},
            file,
            {"format": "pt"},
        )
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files that only their owner can read
        where |= {name: file.name for name, *_ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """As transformers 5 writes it, in words that 4.5x knows too (seen failing there with the first two)."""
    tokenizer.save_pretrained(str(folder))
    raw = _json(folder / "tokenizer_config.json")
    if raw.get("tokenizer_class") == "TokenizersBackend":
        raw["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(raw.get("extra_special_tokens"), list):
        raw["additional_special_tokens"] = raw.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only"):  # of this machine, not of the tokenizer
        raw.pop(name, None)
    _write_json(folder / "tokenizer_config.json", raw)


def _refuse_foreign(target: Path, written: re.Pattern, is_ours: Callable[[Path], bool]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: is a file; an export needs a folder")
    entries = sorted(target.iterdir())
    foreign = [x.name for x in entries if not written.fullmatch(x.name)]
    if foreign:
        raise ValueError(f"{target}: holds {_some(foreign)}, which an export would delete; choose another folder")
    if entries and not is_ours(target):
        raise ValueError(f"{target}: holds a model that was not exported from here; choose another folder")


def _is_ours(folder: Path) -> bool:
    """Whether config.json says nothing that `save` would not write; transformers' own and published ones say more."""
    try:
        raw = _json(folder / "config.json")
        return raw.items() <= DecoderConfig.from_hf(raw).to_hf(raw["torch_dtype"]).items()
    except (ValueError, OSError, KeyError):
        return False


# ---------------------------------------------------------------- small things


def _folder(path: str | Path, patterns: tuple[str, ...]) -> Path:
    """A local folder, or the local copy of a hub id, at its revision, with the files that match `patterns`."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@\w[\w./-]*)?", str(path)):
        raise FileNotFoundError(f"{path}: no such folder, and not a hub id (org/name, or org/name@revision)")
    name, revision = _named(str(path))
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(patterns), **revision))
    except Exception as error:  # of the hub, of httpx, of the file system: all mean the same here
        raise FileNotFoundError(f"{path}: no such folder, and not to be had from the hub ({_line(error)})") from error


def _named(hub_id: str) -> tuple[str, dict[str, str]]:
    """("org/name", {"revision": ...}) of "org/name@revision"; {} where there is none."""
    name, _, revision = hub_id.partition("@")
    return name, {"revision": revision} if revision else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; a model's folder needs it") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file}: not JSON ({_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a JSON {type(value).__name__}, not an object")
    return value


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _generation_eos(folder: Path) -> list[int]:
    file = folder / "generation_config.json"
    eos = _json(file).get("eos_token_id") if file.exists() else None
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(one, int) for one in ids):
        raise ValueError(f"{file}: eos_token_id is {eos!r:.100}; give a number, or a list of numbers")
    return ids


def _unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(int, ids)))


def _float(dtype: Any) -> np.dtype:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known not in _DTYPES.values():
        raise ValueError(f"dtype {dtype} is not one of weights; use {', '.join(d.name for d in _DTYPES.values())}")
    return known


def _some(names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
