"""How an FFN and the routed experts of an MoE layer run fast.

An FFN is F(x) = W_down (silu(W_gate x) * (W_up x)). W_gate and W_up lie above each other in one matrix, so that one
product makes both (`ffn`, `swiglu`, `linear`). An MoE layer adds to the output y of its shared expert, for each token t
and each of the A experts e that the token chose,

    y_t += weight[t, e] F_e(x_t).

The functions below all compute that, and `moe` at the end picks one of them:

1. `moe_reference`   the definition: every expert runs on every token, and a mask. The others are tested against it.
2. `moe_grouped`     tokens sorted by expert, so that each expert is a product over the rows of the tokens that chose it.
                     For training: autograd sees through it.
3. `moe_cpu`         the same for inference on a CPU, with an eye on memory.
4. `moe_compiled`    a few tokens: what counts is how few weights are read and how few operations are started. torch.compile
                     makes a few loops of all of it.
   `moe_decode`      one token on a CPU, without torch.compile.
5. `moe_triton`      the products of all experts as two Triton kernels, for CUDA.

Shapes in comments: T tokens, D hidden_size, R routed experts of m neurons, A of them active per token. All take

    y [T, D], x [T, D], gate_up [R, 2m, D], down [R, D, m], chosen [T, A] (expert numbers), weights [T, A]

and return y [T, D], which they may change in place.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


FEW = 8  # rows of x: up to so many, a product takes as long as reading the weights


def widened(x: Tensor) -> Tensor:
    """At least float32, so that sums are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b, as F.linear: x [..., D], weight [N, D] -> [..., N].

    For a few rows, the time is what it takes to read W from memory, and there F.linear leaves a CPU idle. In float32 it
    reads with one core (MKL): cut into slices, W is a batch of products, which all cores share. In bfloat16 and for one
    row, oneDNN reads about half as fast as PyTorch's own product. A sum is what torch.compile makes a fast loop of.
    """
    n, d = weight.shape
    if torch.compiler.is_compiling() and x.numel() == d:
        y = (weight * widened(x.reshape(d))).sum(-1).to(x.dtype).view(*x.shape[:-1], n)
        return y if bias is None else y + bias
    if x.is_cpu and 0 < x.numel() <= FEW * d:
        if x.dtype == torch.float32 and n % 8 == 0:
            y = torch.bmm(weight.view(8, -1, d), x.reshape(-1, d).T.expand(8, d, -1))  # [8, N / 8, rows]
            y = (y if x.numel() == d else y.view(n, -1).T.contiguous()).view(*x.shape[:-1], n)
            return y if bias is None else y + bias
        if x.dtype == torch.bfloat16 and x.numel() == d and torch.backends.mkldnn.enabled:
            torch.backends.mkldnn.enabled = False
            try:
                return F.linear(x, weight, bias)
            finally:
                torch.backends.mkldnn.enabled = True
    return F.linear(x, weight, bias)


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up, of a product [T, 2m] that holds gate and up side by side and is not needed after -> [T, m]."""
    gate, up = both.chunk(2, dim=-1)
    if both.requires_grad or torch.compiler.is_compiling():
        return F.silu(gate) * up
    if both.is_cuda and has_triton() and len(both):
        return compiled_swiglu()(both.reshape(-1, both.shape[-1])).view(gate.shape)
    return F.silu(gate, inplace=True).mul_(up)  # fresh memory would cost more than the arithmetic


@functools.cache
def compiled_swiglu() -> Callable:
    """`swiglu` of [T, 2m] in one pass over memory in place of two, where a compiler is at hand: triton, on CUDA. Made when it
    is wanted: torch.compile takes seconds to import."""
    return torch.compile(lambda both: F.silu(both.chunk(2, dim=-1)[0]) * both.chunk(2, dim=-1)[1], dynamic=True)


def can_compile(device: str) -> bool:
    """Whether torch.compile has the compiler that it needs: for CUDA triton, for the CPU one for C++."""
    return triton is not None if device.startswith("cuda") else bool(shutil.which(os.environ.get("CXX", "g++")))


def ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """F(x): x [..., D], gate_up [2q, D], down [D, q] -> [..., D]."""
    return linear(swiglu(linear(x, gate_up)), down)


# ----------------------------------------------------------------------------------------------------------------------
# 1. The definition


def moe_reference(y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    per_expert = torch.zeros(len(x), len(down)).to(weights).scatter(1, chosen, weights)  # [T, R]: 0 where it does not run
    for e in range(len(down)):
        y = y + per_expert[:, e, None] * ffn(x, gate_up[e], down[e])
    return y


# ----------------------------------------------------------------------------------------------------------------------
# 2. Many tokens
#
# A slot is one choice of one token: token t's a-th choice is slot t * A + a. Sorted by the expert that they chose, the
# slots of an expert are consecutive, and its work is two plain matrix products on as many rows as it has slots.


def sort_by_expert(chosen: Tensor, num_routed: int) -> tuple[Tensor, Tensor]:
    """chosen [T, A] -> the slots in the order of the experts that they chose [T * A], and how many each expert has [R]."""
    flat = chosen.flatten()
    counts = flat.new_zeros(num_routed).scatter_add_(0, flat, torch.ones_like(flat))  # on CUDA, bincount would wait
    return flat.argsort(stable=True), counts


def rows_by_expert(chosen: Tensor, num_routed: int, unit: int = 1) -> tuple[Tensor, list[int], Tensor]:
    """The rows of x that the experts run on, one expert after another: chosen [T, A] -> the token of each row, the number
    of rows of each expert (a list), and the row of each slot [T, A]. Numbers of rows are rounded up to a multiple of `unit`,
    but for a few rows.
    """
    slots, counts = sort_by_expert(chosen, num_routed)
    padded = torch.where(counts > FEW, (counts + unit - 1) // unit * unit, counts)
    ahead = (padded - counts).cumsum(0) - (padded - counts)  # padding before each expert's rows
    place = torch.arange(len(slots), device=slots.device) + ahead.repeat_interleave(counts)  # of each sorted slot
    padded = padded.tolist()
    tokens = slots.new_zeros(sum(padded)).scatter_(0, place, slots // chosen.shape[1])  # token 0 is the padding
    return tokens, padded, torch.empty_like(slots).scatter_(0, slots, place).view_as(chosen)


def combine(y: Tensor, out: Tensor, row: Tensor, weights: Tensor) -> Tensor:
    """y_t += sum over a of weights[t, a] out[row[t, a]]: from the order of the experts back to that of the tokens."""
    if out.is_cpu and not (out.requires_grad or weights.requires_grad or y.requires_grad):
        return y.add_(F.embedding_bag(row, out, mode="sum", per_sample_weights=weights))  # a weighted sum of rows of a table
    out = out.index_select(0, row.flatten()).view(*row.shape, y.shape[1])  # [T, A, D]
    return y + (out * weights[..., None]).sum(dim=1)


def row_unit(x: Tensor) -> int:
    """For each number of rows that it has not met, oneDNN, which does the products of two bytes on a CPU, compiles a product.
    That takes as long as the product itself, so that numbers of rows are rounded up to a few."""
    return 16 if x.is_cpu and x.dtype.itemsize == 2 else 1


def moe_of_modules(y: Tensor, x: Tensor, experts: Sequence[Callable], chosen: Tensor, weights: Tensor, unit: int = 1) -> Tensor:
    """The same with any functions for experts, x [t, D] -> [t, D]: MoE layers, say, for a mixture in two levels. Their rows are
    not padded unless `unit` says so, since an inner router would count the padding."""
    tokens, counts, row = rows_by_expert(chosen, len(experts), unit)
    rows = x.index_select(0, tokens).split(counts)
    out = [expert(mine) for expert, mine in zip(experts, rows) if len(mine)]
    return combine(y, torch.cat([x[:0], *out]), row, weights)


def moe_grouped(y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    experts = [functools.partial(ffn, gate_up=both, down=w) for both, w in zip(gate_up, down)]
    return moe_of_modules(y, x, experts, chosen, weights, row_unit(x))


# ----------------------------------------------------------------------------------------------------------------------
# 3. Many tokens on a CPU
#
# The products take nearly all of the time, so that moving rows about is what can be saved. Each expert's rows are copied
# when it runs, and are still in the cache when it needs them again, and its output goes straight to its place. PyTorch's
# grouped_mm (bench.py has it as a peer) would be one call for all experts, but on large ones it is some percent slower.


def moe_cpu(y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    tokens, counts, row = rows_by_expert(chosen, len(down), row_unit(x))
    out = x.new_empty(len(tokens), x.shape[1])
    for mine, part, w_gate_up, w_down in zip(tokens.split(counts), out.split(counts), gate_up, down):
        if not len(mine):
            continue
        h = swiglu(linear(x.index_select(0, mine), w_gate_up))
        if len(mine) > FEW:
            torch.mm(h, w_down.T, out=part)
        else:
            part.copy_(linear(h, w_down))
    return combine(y, out, row, weights)


# ----------------------------------------------------------------------------------------------------------------------
# 4. A few tokens
#
# All of their time is that of reading the weights of the experts that run, and of starting operations: for one token some
# thirty, of a few microseconds each, which outweigh a small FFN. Compiled, they are three or four, and experts' weights are
# read where they lie, once per choice, from the cache if they were chosen before (`model.Decoder.compiled`).


def moe_compiled(y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    h = swiglu((gate_up[chosen] * widened(x)[:, None, None]).sum(-1)) * weights[..., None]  # [T, A, m]
    return y + (down[chosen] * h[:, :, None]).sum(-1).sum(1).to(y.dtype)


def moe_decode(y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    experts = chosen[0].tolist()
    h = swiglu(torch.cat([linear(x, gate_up[e]) for e in experts])).mul_(weights.T)  # [A, m]
    for e, row in zip(experts, h.split(1)):
        y.add_(linear(row, down[e]))
    return y


# ----------------------------------------------------------------------------------------------------------------------
# 5. CUDA
#
# Both kernels work on tiles: up to BLOCK_T consecutive sorted slots of one expert. An expert with n slots has
# ceil(n / BLOCK_T) tiles, so that no expert is padded to the count of another. A program finds its tile's expert by
# comparing the tile's number with the running total of tiles. The grid has the size that the total can have at most, and
# the programs beyond it return at once: nothing waits until the counts have reached the CPU.

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, for tests; needs CAST: it gets bfloat16 products wrong


@functools.cache
def has_triton() -> bool:
    if triton is None:
        warnings.warn("triton is not installed: FFNs run slower on this GPU, and experts one by one", stacklevel=2)
    return triton is not None


if triton:

    @triton.jit
    def find_tile(
        slots, tile_end, slot_end, num_tiles, R: tl.constexpr, R_PADDED: tl.constexpr,
        BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """What a program is to do -> its expert (R: there is nothing to do), its rows of sorted slots, the slots, which of
        them are real, and its block of columns. Programs go through the columns eight tiles at a time, so that a block of
        weights is read once for all eight."""
        group = tl.program_id(0) // (8 * COLUMNS)
        height = min(num_tiles - 8 * group, 8)
        tile = 8 * group + tl.program_id(0) % (8 * COLUMNS) % height
        column = tl.program_id(0) % (8 * COLUMNS) // height
        e = tl.arange(0, R_PADDED)
        ends = tl.load(tile_end + e, mask=e < R, other=2147483647)
        expert = tl.sum((ends <= tile).to(tl.int32))
        after = (expert > 0) & (expert < R)
        first_tile = tl.load(tile_end + expert - 1, mask=after, other=0)
        first = tl.load(slot_end + expert - 1, mask=after, other=0)
        last = tl.load(slot_end + expert, mask=expert < R, other=0)
        row = first + (tile - first_tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        real = row < last
        return expert.to(tl.int64), row, tl.load(slots + row, mask=real, other=0), real, column

    @triton.jit
    def gate_up_kernel(
        x, gate_up, h, slots, tile_end, slot_end, num_tiles,
        D: tl.constexpr, M: tl.constexpr, A: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CAST: tl.constexpr,
    ):  # fmt: skip
        """h[row] = silu(W_gate x_t) * (W_up x_t), for the token t and the expert of each row of sorted slots."""
        columns: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
        expert, row, slot, real, column = find_tile(
            slots, tile_end, slot_end, num_tiles, R, R_PADDED, BLOCK_T, columns
        )
        if expert == R:
            return
        n = column * BLOCK_M + tl.arange(0, BLOCK_M)  # neurons of the expert
        d = tl.arange(0, BLOCK_D)
        x_tile = x + (slot // A).to(tl.int64)[:, None] * D + d[None, :]
        w_tile = gate_up + (expert * 2 * M + n)[None, :] * D + d[:, None]
        gate = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
        up = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = start + d < D
            real_w = inside[:, None] & (n < M)[None, :]
            xs = tl.load(x_tile + start, mask=real[:, None] & inside[None, :], other=0.0)
            gs = tl.load(w_tile + start, mask=real_w, other=0.0)
            us = tl.load(w_tile + M * D + start, mask=real_w, other=0.0)
            if CAST:
                xs, gs, us = xs.to(tl.float32), gs.to(tl.float32), us.to(tl.float32)
            gate = tl.dot(xs, gs, gate, input_precision="ieee")
            up = tl.dot(xs, us, up, input_precision="ieee")
        out = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
        tl.store(h + row.to(tl.int64)[:, None] * M + n[None, :], out, mask=real[:, None] & (n < M)[None, :])

    @triton.jit
    def down_kernel(
        h, down, weights, out, slots, tile_end, slot_end, num_tiles,
        D: tl.constexpr, M: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CAST: tl.constexpr,
    ):  # fmt: skip
        """out[slot] = weight[slot] * W_down h[row]: from sorted slots back to the order of the tokens."""
        columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
        expert, row, slot, real, column = find_tile(
            slots, tile_end, slot_end, num_tiles, R, R_PADDED, BLOCK_T, columns
        )
        if expert == R:
            return
        d = column * BLOCK_D + tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_M)
        h_tile = h + row.to(tl.int64)[:, None] * M + n[None, :]
        w_tile = down + (expert * D + d)[None, :] * M + n[:, None]
        y = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        for start in range(0, M, BLOCK_M):
            inside = start + n < M
            hs = tl.load(h_tile + start, mask=real[:, None] & inside[None, :], other=0.0)
            ws = tl.load(w_tile + start, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            if CAST:
                hs, ws = hs.to(tl.float32), ws.to(tl.float32)
            y = tl.dot(hs, ws, y, input_precision="ieee")
        y *= tl.load(weights + slot, mask=real, other=0.0).to(tl.float32)[:, None]
        y = y.to(out.dtype.element_ty)
        tl.store(out + slot.to(tl.int64)[:, None] * D + d[None, :], y, mask=real[:, None] & (d < D)[None, :])


def moe_triton(y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    (T, D), (R, _, m), A = x.shape, down.shape, chosen.shape[1]
    slots, counts = sort_by_expert(chosen, R)
    block_t = 128 if T * A >= 64 * R else 16
    num_tiles = triton.cdiv(T * A, block_t) + R - 1  # at most: the last tile of each expert need not be full
    tiles = (slots, ((counts + block_t - 1) // block_t).cumsum(0), counts.cumsum(0), num_tiles)
    sizes = {"D": D, "M": m, "R": R, "R_PADDED": triton.next_power_of_2(R), "BLOCK_T": block_t}
    sizes |= {"CAST": INTERPRETED, "num_warps": 8}
    depth = 32 if x.dtype == torch.float32 else 64  # of the blocks along the summed dimension: 32 KiB a stage
    h, out = x.new_empty(T * A, m), x.new_empty(T * A, D)
    grid = (num_tiles * triton.cdiv(m, 64),)
    gate_up_kernel[grid](x.contiguous(), gate_up.contiguous(), h, *tiles, A=A, BLOCK_M=64, BLOCK_D=depth, **sizes)
    grid = (num_tiles * triton.cdiv(D, 128),)
    down_kernel[grid](h, down.contiguous(), weights.contiguous(), out, *tiles, BLOCK_M=depth, BLOCK_D=128, **sizes)
    return y.add_(out.view(T, A, D).sum(dim=1))


# ----------------------------------------------------------------------------------------------------------------------
# Which of them


def moe(y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Add the routed experts to y, by the fastest path for the device and the number of tokens."""
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, gate_up, down, weights))
    if torch.compiler.is_compiling() and len(x) <= FEW:
        path = moe_compiled
    elif x.is_cpu and not trains:
        path = moe_decode if len(x) == 1 else moe_cpu
    elif x.is_cuda and not trains and x.dtype != torch.float64 and has_triton():
        path = moe_triton
    else:
        path = moe_grouped
    return path(y, x, gate_up, down, chosen, weights)
