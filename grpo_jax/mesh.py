"""Where arrays lie: the mesh of devices, and one table from the model's logical axes to it.

Three axes: `data` (whole copies of the weights), `fsdp` (weights and optimizer state split, gathered layer by layer) and
`tensor` (heads, feed-forward width and vocabulary split). Rows of packs and of rollouts are split over data and fsdp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax import config
from models import decoder
from models.decoder import DecoderConfig

ROW_AXES = ("data", "fsdp")
# Logical axes that are not here (layers, head_dim) are never split.
_RULES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ff": "tensor"}


def make(sizes: config.Mesh, over: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, or over some. Raises ValueError where the sizes do not multiply to their number."""
    devices = jax.device_count() if over is None else len(over)
    given = sizes.fsdp * sizes.tensor
    data = sizes.data if sizes.data is not None else max(1, devices // max(1, given))
    if data * given != devices:
        raise ValueError(
            f"--mesh.data {data} x --mesh.fsdp {sizes.fsdp} x --mesh.tensor {sizes.tensor} = {data * given}, "
            f"but there are {devices} devices; make the product fit"
        )
    shape, axes = (data, sizes.fsdp, sizes.tensor), ("data", "fsdp", "tensor")
    try:
        return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 3, devices=over)
    except NotImplementedError:  # of a TPU slice, whose links run along its axes
        raise ValueError(
            f"--mesh.data {data}, --mesh.fsdp {sizes.fsdp}, --mesh.tensor {sizes.tensor} do not lie along the axes of this "
            "slice: each size must be a product of some of its axes, none used twice"
        ) from None


# Of a device's memory that the state may take before it is split over more devices: the rest is for what it computes.
_STATE_SHARE = 0.25
# Bytes a parameter: float32 weights, Adam's two moments, the gradient's sums, and the reference in bfloat16.
_STATE_BYTES = 4 + 8 + 4 + 2


def default(extents: Sequence[int], memory: float, model: DecoderConfig) -> config.Mesh:
    """Sizes for devices of `memory` bytes: fsdp as small as holds the state, tensor 1, data the rest.

    `extents` are those of a TPU slice, whose axes a mesh cannot divide; elsewhere (number of devices,), which it can.

    Fewer devices that gather weights from each other send the same bytes over shorter ways, and larger parts of a weight
    suit the devices' tiles better. Where no fsdp holds it, the largest that divides the model is taken.
    """
    state = _STATE_BYTES * sum(math.prod(x.shape) for x in jax.tree.leaves(decoder.shapes(model)))
    devices = math.prod(extents)
    along = {math.prod(some) for n in range(len(extents) + 1) for some in itertools.combinations(extents, n)}
    sizes = [n for n in range(1, devices + 1) if devices % n == 0] if len(extents) == 1 else sorted(along)
    fit = [n for n in sizes if model.d_model % n == 0]
    fsdp = next((n for n in fit if state / n <= _STATE_SHARE * memory), fit[-1])
    return config.Mesh(data=devices // fsdp, fsdp=fsdp, tensor=1)


def rollout_tensor(devices: int, memory: float, weights: int, model: DecoderConfig) -> int:
    """Devices of a host over which the sampler's weights (bytes, all copies) are split: as few as leave half the memory.

    Of those numbers that divide the devices, the heads and the key/value heads; the largest where none is enough.
    """
    fit = [n for n in range(1, devices + 1) if not (devices % n or model.heads % n or model.kv_heads % n)]
    return next((n for n in fit if weights / n <= memory / 2), fit[-1])


def shardings(mesh: Mesh, model: DecoderConfig) -> Any:
    """A NamedSharding for every parameter.

    Key/value heads that `tensor` does not divide are left whole on each of its devices. Raises ValueError where the mesh
    does not divide another dimension that it splits.
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
                f"--mesh.{option} {mesh.shape[option]} does not divide what it splits of this model ({named}); "
                f"up to {mesh.size} devices, {', '.join(fit)} would"
            )
    lies = lambda names, _: NamedSharding(mesh, PartitionSpec(*map(rules.get, names)))  # noqa: E731
    return jax.tree.map(lies, axes, shapes, is_leaf=is_axes)


def rows(mesh: Mesh) -> NamedSharding:
    """Of the leading axis B of a pack."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


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
    """The output matrix [V, D], gathered over `fsdp`."""
    if mesh is None or mesh.size == 1:
        return weights
    vocab = "tensor" if weights.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, PartitionSpec(vocab, None)))


def shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a pack are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
