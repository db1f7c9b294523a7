"""How an FFN and the routed experts of an MoE layer run fast.

An FFN is F(x) = W_down (silu(W_gate x) * (W_up x)). W_gate and W_up lie above each other in one
matrix, so that one product makes both. An MoE layer adds to the output y of its shared expert, for
each token t and each of the A experts e that the token chose,

    y_t += weight[t, e] F_e(x_t).

The functions below all compute that, and `moe` at the end picks a path of 2 to 4:

1. `moe_reference`   The definition, for tests: every expert runs on every token.
2. `moe_grouped`     Many tokens: each expert runs once, on the rows of the tokens that chose it.
3. `moe_compiled`    A few tokens under torch.compile: the weights of each choice are read once.
   `moe_all_experts` A few tokens on a CPU, without it: all experts run, in one batch.
   `moe_one_token`   One token on a CPU, without it.
4. `moe_triton`      The products of all experts as two Triton kernels, for CUDA.

Shapes in comments: T tokens, D hidden_size, R routed experts of m neurons, A of them active per
token. All but `moe_of_modules` take

    y [T, D], x [T, D], gate_up [R, 2m, D], down [R, D, m], chosen [T, A], weights [T, A]

(chosen: numbers of experts) and return y [T, D], which they may change in place.
"""

import functools
import itertools
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BATCHED_TOKENS = 32  # up to so many, all experts in one batch are faster than one by one
FEW_TOKENS = 8  # up to so many, a product takes as long as reading its weights
SCRATCH_BYTES = 24 * 2**20  # glibc maps buffers above 32 MiB anew each time: page faults
SETTINGS_LOCK = threading.RLock()  # held while a setting of the whole process is changed

def widened(x: Tensor) -> Tensor:
    """Convert to at least float32, for sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

@contextmanager
def temporarily(owner, name: str, value):
    """Change an attribute for a while, such as a setting of the whole process. Threads that change
    one take turns; others see the change."""
    with SETTINGS_LOCK:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)

def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b, as F.linear: x [..., D], weight [N, D] -> [..., N].

    For a few rows on a CPU, the time is that of reading W from memory, and F.linear leaves the CPU
    idle there. In float32, MKL reads with one core: cut into 8 slices, W is a batch of products,
    which all cores share; a small W is not worth it. In bfloat16 and for one row, oneDNN reads half
    as fast as PyTorch's own product. Under torch.compile, a sum becomes one fast loop.
    """
    N, D = weight.shape
    rows, compiling = x.numel() // D, torch.compiler.is_compiling()
    few = x.is_cpu and 0 < rows <= FEW_TOKENS
    if compiling and rows == 1:
        y = (weight * widened(x.reshape(-1))).sum(-1).to(x.dtype).view(*x.shape[:-1], N)
    elif few and x.dtype == torch.float32 and N % 8 == 0 and N * D > 2**16:
        slices = weight.view(8, -1, D).transpose(1, 2)  # [8, D, N / 8]
        y = torch.bmm(x.reshape(1, rows, D).expand(8, rows, D), slices)  # [8, rows, N / 8]
        y = y.transpose(0, 1).reshape(*x.shape[:-1], N)
    elif few and x.dtype == torch.bfloat16 and rows == 1:
        with temporarily(torch.backends.mkldnn, "enabled", False):
            return F.linear(x, weight, bias)
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y + bias

def plain_swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up: both [..., 2m] has gate and up side by side -> [..., m]."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up

def swiglu(both: Tensor) -> Tensor:
    """`plain_swiglu`, by what is fastest. It may overwrite `both`."""
    if both.requires_grad or torch.compiler.is_compiling():
        return plain_swiglu(both)
    gate, up = both.chunk(2, dim=-1)
    if both.is_cuda and has_triton() and len(both):
        return compiled_swiglu()(both.reshape(-1, both.shape[-1])).view(gate.shape)
    if both.numel() < 2**18 and gate.shape[-1] * gate.element_size() % 128:
        # PyTorch's loops take 128 bytes a step, and the rest of each row one number at a time.
        # Small copies stay in the cache, and have one long row.
        gate, up = gate.contiguous(), up.contiguous()
    return F.silu(gate, inplace=True).mul_(up)  # fresh memory would cost more than the arithmetic

@functools.cache
def compiled_swiglu() -> Callable:
    """`plain_swiglu` in one pass over memory. Made on first use, because the import is slow."""
    return torch.compile(plain_swiglu, dynamic=True)

def can_compile(device: str) -> bool:
    """Whether torch.compile has its compiler: for CUDA triton, for the CPU one for C++."""
    if device.startswith("cuda"):
        return triton is not None
    return bool(shutil.which(os.environ.get("CXX", "g++")))

def ffn(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor | None = None) -> Tensor:
    """weight * F(x): x [..., D], gate_up [2q, D], down [D, q], weight [..., 1] -> [..., D]."""
    rows = max(2048, SCRATCH_BYTES // (len(gate_up) * x.element_size()))  # fewer run slower
    trains = x.requires_grad or gate_up.requires_grad
    if x.is_cpu and not trains and x.numel() > rows * x.shape[-1]:
        weights = itertools.repeat(None) if weight is None else weight.flatten(0, -2).split(rows)
        blocks = zip(x.flatten(0, -2).split(rows), weights)
        return torch.cat([ffn(block, gate_up, down, w) for block, w in blocks]).view(x.shape)
    h = swiglu(linear(x, gate_up))  # [..., q]
    if weight is not None:
        h = h * weight  # most experts have fewer neurons than D: cheaper than after W_down
    return linear(h, down)

# ------------------------------------------------------------------------------- 1. The definition

def moe_reference(y, x, gate_up, down, chosen, weights):
    per_expert = weights.new_zeros(len(x), len(down)).scatter(1, chosen, weights)  # [T, R]
    for e in range(len(down)):
        y = y + per_expert[:, e, None] * ffn(x, gate_up[e], down[e])
    return y

# ---------------------------------------------------------------------------------- 2. Many tokens
#
# The products take nearly all of the time; what can be saved is moving rows about. Each expert's
# rows are copied just before it runs, and its output is added where it belongs while both are in
# the cache. No buffer holds the output of all experts: above 32 MiB, glibc would map it anew for
# each layer, and the page faults would cost as much as the products that fill it.

def add_experts(y, x, run: Callable, num_routed: int, chosen, weights, step: int = 1):
    """y_t += run(e, x_t, weight[t, e]) for each token t and each expert e that it chose.

    run(e, rows [n, D], weight [n, 1]) -> [n, D]. Numbers of rows are rounded up to multiples of
    `step`, by the first rows of the next expert, and what comes out for those is dropped.
    """
    chose = torch.zeros(len(x), num_routed, dtype=torch.bool, device=x.device)
    chose.scatter_(1, chosen, True)
    per_expert = weights.new_zeros(len(x), num_routed).scatter(1, chosen, weights)  # [T, R]
    experts, tokens = chose.T.nonzero(as_tuple=True)  # in the order of the experts
    weights = per_expert[tokens, experts][:, None]
    tokens, weights = F.pad(tokens, (0, step - 1)), F.pad(weights, (0, 0, 0, step - 1))
    first = 0
    for e, n in enumerate(chose.sum(dim=0).tolist()):
        rounded = math.ceil(n / step) * step
        own, padded = slice(first, first + n), slice(first, first + rounded)
        if n:
            out = run(e, x.index_select(0, tokens[padded]), weights[padded])
            y = y.index_add_(0, tokens[own], out[:n].to(y.dtype))  # autocast may mix dtypes
        first += n
    return y

def moe_grouped(y, x, gate_up, down, chosen, weights):
    # Each use of gate_up[e] would have a gradient of the size of all experts.
    gate_ups, downs = gate_up.unbind(), down.unbind()

    def run(e, rows, weight):
        return ffn(rows, gate_ups[e], downs[e], weight)

    # oneDNN compiles a product for each number of bfloat16 rows that it has not met, which takes
    # as long as the product.
    step = 16 if x.is_cpu and x.element_size() == 2 else 1
    return add_experts(y, x, run, len(downs), chosen, weights, step)

def moe_of_modules(y, x, experts: Sequence[Callable], chosen, weights):
    """The same with experts that are MoE layers themselves, [n, D] -> [n, D]: two levels."""

    def run(e, rows, weight):
        return experts[e](rows) * weight

    return add_experts(y, x, run, len(experts), chosen, weights)

# --------------------------------------------------------------------------------- 3. A few tokens
#
# Their time goes to reading the weights of the experts that run, and to starting operations: for
# one token 15 to 40, of a few microseconds each, which outweigh a small FFN. Compiled, there are
# three or four, and weights are read where they lie, once per choice (`model.Decoder.compiled`).
# Without torch.compile, if the tokens choose nearly all experts between them, one batch of products
# over all experts is the fastest.

def moe_compiled(y, x, gate_up, down, chosen, weights):
    h = swiglu((gate_up[chosen] * widened(x)[:, None, None]).sum(-1))  # [T, A, m]
    h = h * weights[..., None]
    return y + (down[chosen] * h[:, :, None]).sum(-1).sum(1).to(y.dtype)

def moe_all_experts(y, x, gate_up, down, chosen, weights):
    R = len(down)
    per_expert = weights.new_zeros(len(x), R).scatter(1, chosen, weights).T[..., None]  # [R, T, 1]
    h = swiglu(torch.bmm(x.expand(R, *x.shape), gate_up.transpose(1, 2)))  # [R, T, m]
    h = (h * per_expert).masked_fill(per_expert == 0, 0)  # 0 times an overflow is not 0
    return y + torch.bmm(h, down.transpose(1, 2)).sum(dim=0)

def moe_one_token(y, x, gate_up, down, chosen, weights):
    experts = chosen[0].tolist()
    h = swiglu(torch.cat([linear(x, gate_up[e]) for e in experts])).mul_(weights.T)  # [A, m]
    for e, row in zip(experts, h.split(1)):
        y.add_(linear(row, down[e]))
    return y

# ----------------------------------------------------------------------------------------- 4. CUDA
#
# Both kernels work on tiles: up to BLOCK_T consecutive sorted slots of one expert. An expert with n
# slots has ceil(n / BLOCK_T) tiles, so that no expert is padded to the count of another. A program
# finds its tile's expert by comparing the tile's number with the running total of tiles. The grid
# has the size that the total can have at most, and the programs beyond it return at once: nothing
# waits until the counts have reached the CPU.

# Triton's interpreter runs on a CPU, for tests. It gets bfloat16 products wrong, so factors are
# cast there (CAST).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

def sort_by_expert(chosen: Tensor, num_routed: int) -> tuple[Tensor, Tensor]:
    """A slot is one choice of one token: token t's a-th choice is slot t * A + a. chosen [T, A] ->
    the slots in the order of the experts that they chose [T * A], and how many each has [R]."""
    flat = chosen.flatten()
    counts = flat.new_zeros(num_routed).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts  # counts without bincount, which would wait

@functools.cache
def has_triton() -> bool:
    if triton is None:
        slower = "triton is not installed: FFNs run slower on this GPU, and experts one by one"
        warnings.warn(slower, stacklevel=2)
    return triton is not None

if triton:

    @triton.jit
    def find_tile(
        slots, tile_end, slot_end, num_tiles, R: tl.constexpr, R_PADDED: tl.constexpr,
        BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """What a program is to do: its expert (R: nothing), its rows of sorted slots, the slots,
        which of them are real, and its block of columns. Programs go through the columns eight
        tiles at a time, so that a block of weights is read once for all eight."""
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
        """h[row] = silu(W_gate x_t) * (W_up x_t), for the token and the expert of each row."""
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
        h_tile = h + row.to(tl.int64)[:, None] * M + n[None, :]
        tl.store(h_tile, out, mask=real[:, None] & (n < M)[None, :])

    @triton.jit
    def down_kernel(
        h, down, weights, out, slots, tile_end, slot_end, num_tiles,
        D: tl.constexpr, M: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CAST: tl.constexpr,
    ):  # fmt: skip
        """out[slot] = weight[slot] * W_down h[row]: back to the order of the tokens."""
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
        out_tile = out + slot.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(out_tile, y, mask=real[:, None] & (d < D)[None, :])

def moe_triton(y, x, gate_up, down, chosen, weights):
    (T, D), (R, _, m), A = x.shape, down.shape, chosen.shape[1]
    slots, counts = sort_by_expert(chosen, R)
    block_t = 128 if T * A >= 64 * R else 16
    num_tiles = triton.cdiv(T * A, block_t) + R - 1  # at most: each expert's last may be part full
    tile_ends = ((counts + block_t - 1) // block_t).cumsum(0)
    tiles = (slots, tile_ends, counts.cumsum(0), num_tiles)
    sizes = {"D": D, "M": m, "R": R, "R_PADDED": triton.next_power_of_2(R), "BLOCK_T": block_t}
    sizes |= {"CAST": INTERPRETED, "num_warps": 8}
    depth = 32 if x.dtype == torch.float32 else 64  # of blocks along the summed dimension
    x, gate_up, down, weights = (t.contiguous() for t in (x, gate_up, down, weights))
    h, out = x.new_empty(T * A, m), x.new_empty(T * A, D)
    with torch.cuda.device_of(x):  # where Triton launches
        grid = (num_tiles * triton.cdiv(m, 64),)
        gate_up_kernel[grid](x, gate_up, h, *tiles, A=A, BLOCK_M=64, BLOCK_D=depth, **sizes)
        grid = (num_tiles * triton.cdiv(D, 128),)
        down_kernel[grid](h, down, weights, out, *tiles, BLOCK_M=depth, BLOCK_D=128, **sizes)
    return y.add_(out.view(T, A, D).sum(dim=1))

# ----------------------------------------------------------------------------------- Which of them

def moe(y, x, gate_up, down, chosen, weights):
    """Add the routed experts to y, by the fastest path for the device and the number of tokens."""
    tensors = (y, x, gate_up, down, weights)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    (T, A), R = chosen.shape, len(down)
    if torch.compiler.is_compiling() and T <= FEW_TOKENS:
        path = moe_compiled
    elif x.is_cpu and T == 1 and not trains:
        path = moe_one_token
    elif x.is_cpu and T <= BATCHED_TOKENS and T * A >= R and not trains:
        path = moe_all_experts
    elif x.is_cuda and not trains and x.dtype != torch.float64 and has_triton():
        path = moe_triton
    else:
        path = moe_grouped
    return path(y, x, gate_up, down, chosen, weights)
