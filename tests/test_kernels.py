"""Every path of the MoE layer against its definition.

The Triton kernels are tested where triton is installed; without a GPU they are interpreted.
"""

import warnings
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TO_RUN = "pip install triton==3.9.0 (beside the requirements), then pytest tests/test_kernels.py"
NEEDS_TRITON = pytest.mark.skipif(kernels.triton is None, reason=f"needs triton: {TO_RUN}")
TRITON = pytest.param("moe_triton", marks=NEEDS_TRITON)
PATHS = ["moe_reference", "moe_grouped", "moe", "moe_compiled", "moe_all_experts", TRITON]

def random_layer(T, D, m, R, A, routing="random", dtype=torch.float32):
    """y, x, gate_up, down, chosen, weights. Skewed: all tokens choose the last A experts."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    chosen = torch.rand(T, R, generator=generator).topk(A).indices
    if routing == "skewed":
        chosen = torch.arange(R - A, R).expand(T, A)
    gate_up, down = noise(R, 2 * m, D) / D**0.5, noise(R, D, m) / m**0.5
    return [noise(T, D), noise(T, D), gate_up, down, chosen.to(DEVICE), noise(T, A)]

def run(path, arguments):
    y, *rest = arguments
    before = [t.clone() for t in rest]
    out = getattr(kernels, path)(y.clone(), *rest)
    assert all(torch.equal(a, b) for a, b in zip(before, rest, strict=True))  # only y may change
    assert out.dtype == y.dtype and out.shape == y.shape
    return out

def definition(arguments):
    """y_t + the sum over t's experts of weight * W_down (silu(W_gate x_t) * (W_up x_t))."""
    double = (t.double() if t.is_floating_point() else t for t in arguments)
    y, x, gate_up, down, chosen, weights = double
    for e, weight in zip(chosen.T, weights.T, strict=True):  # each token's first expert, ...
        gate, up = torch.einsum("tmd, td -> tm", gate_up[e], x).chunk(2, dim=1)
        y = y + torch.einsum("tdm, tm, t -> td", down[e], gate / (1 + (-gate).exp()) * up, weight)
    return y

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-14)]
SHAPES = [(1, 24), (24,), (3, 24), (8, 24), (2, 4, 24), (9, 24), (1, 1, 24), (0, 24)]

@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2800, 64, 20])  # a large, a small and an odd matrix
def test_linear_is_linear_for_few_rows_and_many(n, shape, dtype, tolerance):
    torch.manual_seed(0)
    double = [torch.randn(*s, dtype=torch.float64) for s in (shape, (n, 24), (n,))]
    x, weight, bias = (t.to(DEVICE, dtype) for t in double)
    strided = (x[..., ::2], weight[:, ::2], bias)
    for arguments in ((x, weight, bias), (x, weight), strided):
        found = kernels.linear(*arguments)
        expected = F.linear(*(t.double() for t in arguments))
        assert found.shape == expected.shape and found.dtype == dtype
        assert torch.allclose(found.double(), expected, rtol=0, atol=tolerance * 24)
    with pytest.raises(RuntimeError):
        kernels.linear(x, weight.half())
    assert torch.backends.mkldnn.enabled  # whatever happened

@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 2500), (2, 1300), (2500,)])
def test_ffn_is_its_formula_for_every_token(shape, monkeypatch):
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)  # blocks of 2,048 tokens
    _, x, gate_up, down, _, weight = random_layer(2600, 6, 3, 4, 1, dtype=torch.float64)
    tokens = torch.Size(shape).numel()
    x, weight = x[:tokens].view(*shape, 6), weight[:tokens].view(*shape, 1)
    expected = (F.silu(x @ gate_up[0, :3].T) * (x @ gate_up[0, 3:].T)) @ down[0].T
    assert torch.allclose(kernels.ffn(x, gate_up[0], down[0]), expected, rtol=1e-10)
    weighted = kernels.ffn(x, gate_up[0], down[0], weight)
    assert torch.allclose(weighted, weight * expected, rtol=1e-10)

@pytest.mark.parametrize("path", [*PATHS, "moe_one_token"])
@pytest.mark.parametrize("routing", ["random", "skewed"])
@pytest.mark.parametrize("R, A", [(5, 3), (14, 2), (6, 1), (4, 4), (1, 1)])
def test_paths_equal_the_definition(R, A, routing, path):
    for T in [1] if path == "moe_one_token" else [0, 1, 3, 150]:
        arguments = random_layer(T, 40, 24, R, A, routing)
        found = run(path, arguments).double()
        assert torch.allclose(found, definition(arguments), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("path", PATHS)
def test_tiles_of_128_slots(path):
    """Some tiles are full and some are not; columns are no multiple of a block."""
    arguments = random_layer(300, 70, 130, 3, 2)
    assert torch.allclose(run(path, arguments).double(), definition(arguments), atol=1e-4)

def test_experts_that_were_not_chosen_may_overflow():
    y, x, gate_up, down, _, weights = random_layer(20, 16, 8, 4, 2)
    chosen = random_layer(20, 16, 8, 3, 2)[4]  # the last expert never runs
    expected = definition((y, x, gate_up, down, chosen, weights))
    gate_up[3] = 1e38
    found = kernels.moe_all_experts(y, x, gate_up, down, chosen, weights)
    assert torch.allclose(found.double(), expected, atol=1e-5)

@pytest.mark.parametrize("path", [*PATHS, "moe_one_token"])
def test_in_bfloat16_the_error_is_that_of_bfloat16(path):
    T = 1 if path == "moe_one_token" else 77
    arguments = random_layer(T, 72, 20, 6, 2, dtype=torch.bfloat16)
    expected = definition(arguments)
    error = (run(path, arguments).double() - expected).abs().max() / expected.abs().max()
    assert 1e-6 < error < 0.02  # 8 bits; a handful of roundings, one per operation

@pytest.mark.parametrize("rows", [1, 3, 20])
def test_gradients_of_few_rows_in_float32(rows):
    shapes = ((rows, 24), (2800, 24), (2800,))
    tensors = [torch.randn(*shape, device=DEVICE).requires_grad_() for shape in shapes]
    double = [t.detach().double().requires_grad_() for t in tensors]
    found = torch.autograd.grad(kernels.linear(*tensors).sin().sum(), tensors)
    expected = torch.autograd.grad(F.linear(*double).sin().sum(), double)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-4)

def test_swiglu_on_a_gpu_where_nothing_is_compiled(monkeypatch):
    """As with TORCH_COMPILE_DISABLE=1: torch.compile then returns the function itself."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    kernels.compiled_swiglu.cache_clear()
    both = torch.randn(5, 12)
    expected = F.silu(both[:, :6]) * both[:, 6:]
    assert torch.equal(kernels.swiglu(both.clone().as_subclass(OnGPU)), expected)
    kernels.compiled_swiglu.cache_clear()

def test_autocast():
    x, gate_up, down = torch.randn(40, 16), torch.randn(4, 12, 16), torch.randn(4, 16, 6)
    chosen, weights = torch.randint(4, (40, 1)), torch.rand(40, 1)
    expected = kernels.moe(torch.zeros(40, 16), x, gate_up, down, chosen, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.moe(torch.zeros(40, 16), x, gate_up, down, chosen, weights)
    assert (found - expected).norm() < 0.02 * expected.norm()

def test_which_path_is_taken(monkeypatch):
    def path(tokens, active=2, cuda=False, dtype=torch.float32, grad=False, triton=True):
        monkeypatch.setattr(kernels, "triton", object() if triton else None)
        kernels.has_triton.cache_clear()
        t = MagicMock(requires_grad=grad, is_cuda=cuda, is_cpu=not cuda, dtype=dtype)
        t.__len__.return_value = 6
        return kernels.moe(t, t, t, t, MagicMock(shape=(tokens, active)), t)

    for name in ("moe_grouped", "moe_one_token", "moe_all_experts", "moe_triton"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: name)
    assert path(1) == "moe_one_token"
    assert path(3) == path(32) == path(6, active=1) == "moe_all_experts"  # of 6 experts
    assert path(2) == path(33) == path(5, active=1) == path(100) == "moe_grouped"
    assert path(100, dtype=torch.bfloat16) == path(100, grad=True) == "moe_grouped"
    assert path(1, cuda=True) == path(100, cuda=True) == "moe_triton"
    assert path(100, cuda=True, dtype=torch.float64) == "moe_grouped"
    for tokens, cuda in ((1, False), (3, False), (100, True)):
        assert path(tokens, cuda=cuda, grad=True) == "moe_grouped"
    with torch.no_grad():
        assert path(100, cuda=True, grad=True) == "moe_triton"
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert path(100, cuda=True, triton=False) == "moe_grouped"
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        kernels.has_triton()
    kernels.has_triton.cache_clear()
