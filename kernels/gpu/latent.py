"""Rules for heads that are in two parts, one of them rotated, and for the latent keys that they look at (DeepSeek).

Queries come as [plain | rotated] of each head. The plain part goes through a matrix of the head's into the latent
space, and the head is [latent | rotated] then, as the key is that all of them share.
"""

from __future__ import annotations

from typing import NamedTuple

from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.cuts import Cut
from edgellm.kernels.gpu.emitter import Lowering, blocks, folded
from edgellm.kernels.gpu.experts import of_heads
from edgellm.kernels.gpu.sources import bindings, source
from edgellm.kernels.ops import ApplyRope, HeadMatmul, JoinHeads, RMSNorm, SplitHeads, StoreKV


def split_heads(low: Lowering, op: SplitHeads) -> None:
    """Heads of one buffer to those of two, or all that is done to queries and keys before their attention."""
    cut, found = low.there.cuts.get(op.x), _latent(low, op)
    if cut is not None and cut.order is None:  # they are where they are wanted
        return
    if found is None:
        _cut(low, op.x, (op.first, op.second), op.head_dim, joins=False)
    else:
        _to_cache(low, op, found)


def join_heads(low: Lowering, op: JoinHeads) -> None:
    """Heads of two buffers to those of one."""
    _cut(low, op.out, (op.first, op.second), op.head_dim, joins=True)


def join(low: Lowering, name: str, cut: Cut) -> None:
    """What a product's rows stood in another order for, as the model has it."""
    _cut(low, name, (cut.first, cut.second), cut.dim, joins=True)


def _cut(low: Lowering, whole: str, parts: tuple[str, str], dim: int, *, joins: bool) -> None:
    x, y, z = low.place(whole), low.place(parts[0]), low.place(parts[1])
    kinds = "wrr" if joins else "rww"
    bound = bindings(0, [*zip("xyz", (x.buffer, y.buffer, z.buffer), kinds, strict=True)])
    of_x, of_y, of_z = (f"{bound.names[name]}[{name}]" for name in "xyz")
    first, second = (f"{of_x} = {one}" if joins else f"{one} = {of_x}" for one in (of_y, of_z))
    n = low.n(x) * x.width
    low.emit(
        source("cut_heads", BINDINGS=bound.text, FIRST=first, SECOND=second), bound.buffers, bound.kinds,
        folded(blocks(n)), x.width, n, dim, x.width // (y.width // dim), x.at, x.row, y.at, y.row, z.at, z.row,
    )  # fmt: skip


class _Latent(NamedTuple):
    """The ops behind a split of queries up to the store."""

    turn: ApplyRope
    norm: RMSNorm
    turn_key: ApplyRope
    product: HeadMatmul
    join: JoinHeads
    store: StoreKV


def _latent(low: Lowering, split: SplitHeads) -> _Latent | None:
    """What comes next, where it is the way of a latent layer and nobody else wants what is between."""
    kinds = ApplyRope, RMSNorm, ApplyRope, HeadMatmul, JoinHeads, StoreKV
    ahead = [low.next(i) for i in range(1, 7)]
    if not all(isinstance(op, kind) for op, kind in zip(ahead, kinds, strict=True)):
        return None
    found = _Latent(*ahead)  # type: ignore[arg-type]
    turn, norm, turn_key, product, join, store = found
    layer, tensors = low.there.program.kv_layer(store.layer), low.there.program.tensors
    key, normed, turned = (low.place(name) for name in (store.k, norm.x, turn_key.x))
    chain = (split.second, split.first, product.out, split.second, norm.out)
    is_chain = (turn.x, product.x, join.first, join.second, norm.x) == chain
    is_key = normed.buffer is turned.buffer is key.buffer and (normed.at, turned.at) == (key.at, key.at + normed.width)
    is_whole = key.width == normed.width + turned.width == layer.head_dim_k and layer.n_kv_heads == 1
    is_plain = layer.latent and not layer.is_typed and not product.turned and join.head_dim == normed.width
    is_one = turn.rope == turn_key.rope and turn.head_dim == turn_key.head_dim == turned.width
    fits = tensors[norm.weight].shape[-1] == normed.width and low.place(join.out).width == product.n_heads * key.width
    fits = fits and low.place(split.x).width // product.n_heads % 4 == 0
    apart = len({id(low.place(name).buffer) for name in (split.x, join.out, store.k)}) == 3
    dead = all(low.is_dead(name, 6) for name in (split.first, split.second, product.out, store.k))
    return found if is_chain and is_key and is_whole and is_plain and is_one and fits and apart and dead else None


def _to_cache(low: Lowering, split: SplitHeads, found: _Latent) -> None:
    low.n_taken, program = 7, low.there.program
    x, y, k = low.place(split.x), low.place(found.join.out), low.place(found.store.k)
    n_heads, latent, rot = found.product.n_heads, found.join.head_dim, found.turn.head_dim
    rope, whole = program.ropes[found.turn.rope], x.width // n_heads
    of_heads(low, found.product, x, whole, y, latent + rot)
    bound = bindings(3, [("x", x.buffer, "r"), ("y", y.buffer, "w"), ("k", k.buffer, "r")])
    low.emit(
        source("latent_to_cache", BINDINGS=bound.text, PUT=sources.puts("kept"),
               ROTATE=source("rotate", DIM=rot), ROT=rot, **bound.names),
        [low.step, low.there.pool.arrays[found.store.layer][0].buffer, low.vector(found.norm.weight), *bound.buffers],
        "rwr" + bound.kinds, (n_heads + 1, low.n(x), 1), n_heads, whole, split.head_dim, latent, rope.n_dims // 2,
        int(rope.adjacent), list(program.ropes).index(found.turn.rope), program.table_of(found.store.layer),
        x.at, x.row, y.at, y.row, k.at, k.row, float(found.norm.eps), joins=True, is_fixed=True,
    )  # fmt: skip
