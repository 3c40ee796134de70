"""Where arrays lie: the mesh of devices, and one table from the model's logical axes to it.

Three axes: `data` (whole copies of the weights), `fsdp` (weights and optimizer state split, gathered layer by layer) and
`tensor` (heads, feed-forward width and vocabulary split). Rows of packs and of rollouts are split over data and fsdp.

    make         the mesh of the learner, over all devices of all hosts
    local        the mesh of the sampler, over the devices of this host: while decoding, no host waits for another
    host_copy    the learner's parameters on the sampler's mesh, once a step
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax import config
from models import decoder
from models import lora as adapters
from models.decoder import DecoderConfig
from models.lora import Lora

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
# Logical axes that are not here (layers, head_dim, rank) are never split.
_RULES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ff": "tensor"}


def make(sizes: config.Mesh, over: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, or over some. Raises ValueError where the sizes do not multiply to their number."""
    devices = jax.device_count() if over is None else len(over)
    rest = lambda *given: max(1, devices // max(1, math.prod(given)))  # noqa: E731
    fsdp = sizes.fsdp if sizes.fsdp is not None else 1 if sizes.data is None else rest(sizes.data, sizes.tensor)
    data = sizes.data if sizes.data is not None else rest(fsdp, sizes.tensor)
    if data * fsdp * sizes.tensor != devices:
        raise ValueError(
            f"--mesh.data {data} x --mesh.fsdp {fsdp} x --mesh.tensor {sizes.tensor} = {data * fsdp * sizes.tensor}, "
            f"but there are {devices} devices; make the product fit"
        )
    try:
        return jax.make_mesh((data, fsdp, sizes.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=over)
    except NotImplementedError:  # of a TPU slice, whose links run along its axes
        raise ValueError(
            f"--mesh.data {data}, --mesh.fsdp {fsdp}, --mesh.tensor {sizes.tensor} do not lie along the axes of this "
            "slice: each size must be a product of some of its axes, none used twice"
        ) from None


def extents() -> tuple[int, ...]:
    """The shape of the devices that there are: of a TPU slice along its axes, else their number."""
    devices = jax.devices()
    coordinates = [getattr(device, "coords", None) for device in devices]
    if devices[0].platform == "tpu" and None not in coordinates:
        along = tuple(len(set(axis)) for axis in zip(*coordinates, strict=True))
        if math.prod(along) == len(devices):  # not where a chip has several cores
            return along
    return (len(devices),)


def chosen(
    sizes: config.Mesh, model: DecoderConfig, extents: Sequence[int], memory: float | None, lora: bool = False
) -> config.Mesh:
    """The sizes as given; where that is none of them, `default`, if the memory of a device is known (bytes)."""
    if memory is None or sizes != config.Mesh():
        return sizes
    return default(extents, memory, model, _FROZEN_BYTES if lora else _STATE_BYTES)


# Of a device's memory that the state may take before it is split over more devices: the rest is for what it computes.
_STATE_SHARE = 0.25
# Bytes a parameter: float32 weights, Adam's two moments, the gradient's sums, and the reference in bfloat16.
_STATE_BYTES = 4 + 8 + 4 + 2
_FROZEN_BYTES = 2  # with adapters, which themselves are few


def default(extents: Sequence[int], memory: float, model: DecoderConfig, bytes_each: int = _STATE_BYTES) -> config.Mesh:
    """Sizes for devices of `memory` bytes: fsdp as small as holds the state, tensor 1, data the rest.

    `extents` are those of a TPU slice, whose axes a mesh cannot divide; elsewhere (number of devices,), which it can.

    Fewer devices that gather weights from each other send the same bytes over shorter ways, and larger parts of a weight
    suit the devices' tiles better. Where no fsdp holds it, the largest that divides the model is taken.
    """
    state = bytes_each * decoder.parameters(model)
    devices = math.prod(extents)
    along = {math.prod(some) for n in range(len(extents) + 1) for some in itertools.combinations(extents, n)}
    sizes = [n for n in range(1, devices + 1) if devices % n == 0] if len(extents) == 1 else sorted(along)
    fit = [n for n in sizes if model.d_model % n == 0]
    fsdp = next((n for n in fit if state / n <= _STATE_SHARE * memory), fit[-1])
    return config.Mesh(data=devices // fsdp, fsdp=fsdp, tensor=1)


def local(tensor: int) -> Mesh:
    """The devices of this host: rows split over `data`, the weights whole on each of its places or split in `tensor` parts."""
    return Mesh(_by_host(tensor)[jax.process_index()], AXES, axis_types=(AxisType.Auto,) * 3)


def _by_host(tensor: int) -> np.ndarray:
    """All devices as [hosts, data, fsdp = 1, tensor]. Raises ValueError where `tensor` does not divide those of a host."""
    check_tensor(tensor, jax.local_device_count())
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return np.array(devices).reshape(jax.process_count(), -1, 1, tensor)


def check_tensor(tensor: int, devices: int) -> None:
    """Raises ValueError where so many of a host's devices cannot share the sampler's weights."""
    if devices % tensor:
        raise ValueError(f"--rollout.tensor {tensor} does not divide the {devices} devices of a host")


def rollout_tensor(model: DecoderConfig, dtype: str, devices: int, memory: int | None) -> int:
    """Over how many of a host's `devices` sampling must split the weights; `memory` of a device in bytes, None: not known.

    The least number that divides devices and heads and keeps the weights within half of the memory; where none does, the
    largest.
    """
    weights = decoder.parameters(model) * jnp.dtype(dtype).itemsize
    sizes = (model.heads, model.d_ff, model.vocab, devices)
    fit = [n for n in range(1, devices + 1) if all(size % n == 0 for size in sizes)]
    return next((n for n in fit if memory is None or weights / n <= memory / 2), fit[-1])


def shardings(mesh: Mesh, model: DecoderConfig, lora: Lora | None = None, section: str = "mesh") -> Any:
    """A NamedSharding for every parameter of the model; or, where `lora` is given, of the adapters beside it.

    Key/value heads that `tensor` does not divide are left whole on each of its devices. Raises ValueError where the mesh
    does not divide another dimension that it splits, naming the option of the config's `section` that sets it.
    """
    axes, shapes = decoder.logical_axes(model), decoder.shapes(model)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    pairs = zip(jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(shapes), strict=True)
    sizes = {axis: size for names, leaf in pairs for axis, size in zip(names, leaf.shape, strict=True)}
    rules = dict(_RULES)
    if sizes["kv_heads"] % mesh.shape["tensor"]:
        del rules["kv_heads"]
    for option in ("fsdp", "tensor"):
        split = {axis: sizes[axis] for axis, name in rules.items() if name == option}
        if any(size % mesh.shape[option] for size in split.values()):
            named = ", ".join(f"{axis} {size}" for axis, size in split.items())
            fit = [str(n) for n in range(1, mesh.size + 1) if not any(size % n for size in split.values())]
            raise ValueError(
                f"--{section}.{option} {mesh.shape[option]} does not divide what it splits of this model ({named}); "
                f"up to {mesh.size} devices, {', '.join(fit)} would"
            )
    lies = lambda names: NamedSharding(mesh, PartitionSpec(*map(rules.get, names)))  # noqa: E731
    return jax.tree.map(lies, axes if lora is None else adapters.logical_axes(model, lora), is_leaf=is_axes)


def host_copy(params: Any, model: DecoderConfig, dtype: str, tensor: int) -> Any:
    """The parameters in `dtype` on the `local` mesh of every host, adapters added in. All hosts must call it at once.

    `params` may hold `models.decoder.Adapted`. They go layer by layer, so that a device holds its part of the copy and
    little more (a leaf of all layers, gathered, is a quarter of the weights), and stay so: see `decoder.by_layer`.
    """
    here, everywhere = local(tensor), Mesh(_by_host(tensor), ("hosts", *AXES), axis_types=(AxisType.Auto,) * 4)

    def one(x: Array, sharding: NamedSharding) -> Array:
        x = jax.device_put(x, NamedSharding(everywhere, sharding.spec))
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [s.data for s in x.addressable_shards])

    places = shardings(here, model)
    of_layer = jax.tree.map(of_one_layer, places.pop("layers"))
    rest = {name: x for name, x in params.items() if name != "layers"}
    layers = tuple(jax.tree.map(one, _layer(params["layers"], i, dtype), of_layer) for i in range(model.layers))
    return {**jax.tree.map(lambda x, place: one(x.astype(dtype), place), rest, places), "layers": layers}


def of_one_layer(stacked: NamedSharding) -> NamedSharding:
    """Of an array of one layer, from that of all layers [L, ...]."""
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


@functools.partial(jax.jit, static_argnums=2)
def _layer(layers: Any, i: int, dtype: str) -> Any:
    piece = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), layers)
    is_weight = lambda x: isinstance(x, (Array, decoder.Adapted))  # noqa: E731
    return jax.tree.map(lambda x: adapters.plain(x, dtype)[0], piece, is_leaf=is_weight)


def replicated(tree: Any) -> Any:
    """Small arrays, whole on every device, so that each host can read them."""
    everywhere = NamedSharding(jax.tree.leaves(tree)[0].sharding.mesh, PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=everywhere)(tree)


def rows(mesh: Mesh) -> NamedSharding:
    """Of the leading axis B of a pack."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def moved(tree: Any, memory: str) -> Any:
    """The arrays in a memory of the same devices, "device" or "pinned_host", laid out as they are; those there are not copied.

    Of arrays that span hosts, each host moves its own part.
    """
    leaves, structure = jax.tree.flatten(tree)
    elsewhere = [i for i, x in enumerate(leaves) if x.sharding.memory_kind != memory]
    if not elsewhere:
        return tree
    there = _mover(tuple(leaves[i].sharding.with_memory_kind(memory) for i in elsewhere))([leaves[i] for i in elsewhere])
    for i, x in zip(elsewhere, there, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


@functools.cache
def _mover(shardings: tuple[NamedSharding, ...]) -> Callable:
    return jax.jit(lambda leaves: leaves, out_shardings=list(shardings))


def caches(mesh: Mesh, kv_heads: int) -> NamedSharding:
    """Of the sampler's keys and values [n, K, ..]: heads over `tensor`, where it divides them."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES, None if kv_heads % mesh.shape["tensor"] else "tensor"))


def by_rows(f: Callable, mesh: Mesh | None, heads: tuple[int, int]) -> Callable:
    """f(q [B, T, H, C], k [B, T, K, C], v, layout) -> o like q, run by each device on its own rows and heads.

    Kernels cannot be split by XLA, and one that pretends to (cuDNN with lengths) takes those of other rows. `heads` are H
    and K; where `tensor` does not divide both, its devices compute the same.
    """
    if mesh is None or mesh.size == 1:
        return f
    split = "tensor" if all(n % mesh.shape["tensor"] == 0 for n in heads) else None
    x, layout = PartitionSpec(ROW_AXES, None, split), PartitionSpec(ROW_AXES)
    return jax.shard_map(f, mesh=mesh, in_specs=(x, x, x, layout), out_specs=x, check_vma=False)


def embedded(x: Array, mesh: Mesh | None) -> Array:
    """Embeddings [B, T, D] from a table split over `fsdp`, moved to where their rows lie.

    In two steps, the second of which is an exchange within `fsdp`. Where there is `data`, too, XLA knows no way to do both at
    once but to copy all rows to all devices.
    """
    if mesh is None or mesh.size == 1:
        return x
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data", None, "fsdp")))
    return jax.lax.with_sharding_constraint(x, rows(mesh))


def gathered(weights: Array, mesh: Mesh | None) -> Array:
    """The embedding or the output matrix [V, D], gathered over `fsdp`."""
    if mesh is None or mesh.size == 1:
        return weights
    vocab = "tensor" if weights.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, PartitionSpec(vocab, None)))


def shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a pack are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
