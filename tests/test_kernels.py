"""Every path of the MoE layer against its definition, and the definition against a loop over tokens and neurons."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [kernels.moe_grouped, kernels.moe]
PATHS.append(kernels.moe_few_tokens)  # right also when it is not compiled
if kernels.triton:  # interpreted where there is no GPU (conftest.py)
    PATHS.append(kernels.moe_triton)


def random_layer(T, D, m, R, A, routing="random", dtype=torch.float32, seed=0):
    """y, x, gate_up, down, chosen, weights. Skewed: every token chooses the last A experts, nobody chooses the others."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)
    chosen = torch.rand(T, R, generator=random).topk(A).indices
    if routing == "skewed":
        chosen = torch.arange(R - A, R).expand(T, A)
    arguments = draw(T, D), draw(T, D), draw(R, 2 * m, D) / D**0.5, draw(R, D, m) / m**0.5, chosen, draw(T, A)
    return [t.to(DEVICE) for t in arguments]


def run(path, arguments):
    y, *rest = arguments
    before = [t.clone() for t in rest]
    out = path(y.clone(), *rest)
    assert all(torch.equal(a, b) for a, b in zip(before, rest))  # only y is changed in place
    assert out.dtype == y.dtype and out.shape == y.shape
    return out


def test_the_definition_token_by_token_and_neuron_by_neuron():
    y, x, gate_up, down, chosen, weights = random_layer(5, 6, 3, 4, 2, dtype=torch.float64)
    expected = y.clone()
    for t in range(5):
        for e, weight in zip(chosen[t], weights[t]):
            for i in range(3):
                g, u = gate_up[e, i] @ x[t], gate_up[e, 3 + i] @ x[t]
                expected[t] += weight * g / (1 + torch.exp(-g)) * u * down[e, :, i]
    assert torch.allclose(kernels.moe_reference(y, x, gate_up, down, chosen, weights), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [(1, 24), (24,), (3, 24), (8, 24), (2, 4, 24), (9, 24), (1, 1, 24), (0, 24)])
@pytest.mark.parametrize("n", [64, 20])
def test_linear_is_linear_for_few_rows_and_many(n, shape, dtype, tolerance):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64).to(dtype).to(DEVICE) for s in (shape, (n, 24), (n,)))
    for b in (None, bias):
        found, expected = kernels.linear(x, weight, b), F.linear(x.double(), weight.double(), b if b is None else b.double())
        assert found.shape == expected.shape and found.dtype == dtype
        assert torch.allclose(found.double(), expected, rtol=0, atol=tolerance * 24)
    found, expected = kernels.linear(x[..., ::2], weight[:, ::2]), F.linear(x.double()[..., ::2], weight.double()[:, ::2])
    assert torch.allclose(found.double(), expected, rtol=0, atol=tolerance * 24)


def test_linear_leaves_the_library_settings_alone():
    x, weight = torch.randn(1, 24).bfloat16(), torch.randn(64, 24).bfloat16()
    kernels.linear(x, weight)
    with pytest.raises(RuntimeError):
        kernels.linear(x, weight.float())
    assert torch.backends.mkldnn.enabled


def test_ffn_is_its_formula():
    _, x, gate_up, down, _, _ = random_layer(5, 6, 3, 4, 2, dtype=torch.float64)
    expected = (F.silu(x @ gate_up[0, :3].T) * (x @ gate_up[0, 3:].T)) @ down[0].T
    assert torch.allclose(kernels.ffn(x, gate_up[0], down[0]), expected, rtol=1e-12)
    assert torch.allclose(kernels.ffn(x.view(1, 5, 6), gate_up[0], down[0])[0], expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 2500), (2, 1300), (2500,)])
def test_ffn_in_blocks_is_its_formula_for_every_token(shape, monkeypatch):
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)  # blocks of 1,024 tokens
    _, x, gate_up, down, _, weight = random_layer(2600, 6, 3, 4, 1, dtype=torch.float64)
    tokens = torch.Size(shape).numel()
    x, weight = x[:tokens].view(*shape, 6), weight[:tokens].view(*shape, 1)
    expected = (F.silu(x @ gate_up[0, :3].T) * (x @ gate_up[0, 3:].T)) @ down[0].T
    assert torch.allclose(kernels.ffn(x, gate_up[0], down[0]), expected, rtol=1e-10)
    assert torch.allclose(kernels.ffn(x, gate_up[0], down[0], weight), weight * expected, rtol=1e-10)


@pytest.mark.parametrize("routing", ["random", "skewed"])
@pytest.mark.parametrize("R, A", [(5, 3), (14, 2), (6, 1), (4, 4), (1, 1)])
@pytest.mark.parametrize("T", [1, 3, 150])
def test_paths_equal_the_definition(T, R, A, routing):
    arguments = random_layer(T, 40, 24, R, A, routing)
    expected = kernels.moe_reference(*(t.double() if t.is_floating_point() else t for t in arguments))
    for path in PATHS + [kernels.moe_one_token] * (T == 1):
        assert torch.allclose(run(path, arguments).double(), expected, rtol=1e-4, atol=1e-5), path


@pytest.mark.parametrize("path", [*PATHS, kernels.moe_one_token], ids=lambda path: path.__name__)
def test_in_bfloat16_the_error_is_that_of_bfloat16(path):
    arguments = random_layer(1 if path is kernels.moe_one_token else 77, 72, 20, 6, 2, dtype=torch.bfloat16)
    expected = kernels.moe_reference(*(t.double() if t.is_floating_point() else t for t in arguments))
    error = (run(path, arguments).double() - expected).abs().max() / expected.abs().max()
    assert 1e-6 < error < 0.02  # 8 bits; a handful of roundings, one per operation


def test_many_tokens_for_one_large_tile():
    """Tiles of 128 slots, some full, some not, columns that are no multiple of a block."""
    arguments = random_layer(300, 70, 130, 3, 2)
    expected = kernels.moe_reference(*(t.double() if t.is_floating_point() else t for t in arguments))
    for path in PATHS:
        assert torch.allclose(run(path, arguments).double(), expected, rtol=1e-4, atol=1e-5), path


@pytest.mark.parametrize("path", [kernels.moe_reference, *PATHS], ids=lambda path: path.__name__)
def test_no_tokens_at_all(path):
    assert run(path, random_layer(0, 8, 4, 3, 2)).shape == (0, 8)


@pytest.mark.parametrize("R, A", [(5, 3), (4, 1)])
def test_gradients_are_exact(R, A):
    """Against finite differences in float64, and against the definition's; with an expert that no token chose."""
    *tensors, chosen, weights = random_layer(7, 4, 3, R, A, dtype=torch.float64)
    chosen = chosen % (R - 1) if A == 1 else chosen
    tensors = [t.requires_grad_() for t in (*tensors, weights)]
    through = lambda path: lambda y, x, gate_up, down, w: path(y.clone(), x, gate_up, down, chosen, w)
    assert torch.autograd.gradcheck(through(kernels.moe), tensors)
    ours, definition = (torch.autograd.grad(through(f)(*tensors).sin().sum(), tensors) for f in (kernels.moe, kernels.moe_reference))
    for a, b in zip(ours, definition):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_gradients_of_few_rows_in_float32(rows):
    x, weight, bias = (torch.randn(*shape, device=DEVICE).requires_grad_() for shape in ((rows, 24), (64, 24), (64,)))
    found = torch.autograd.grad(kernels.linear(x, weight, bias).sin().sum(), (x, weight, bias))
    double = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    for a, b in zip(found, torch.autograd.grad(F.linear(*double).sin().sum(), double)):
        assert torch.allclose(a.double(), b, atol=1e-4)


def test_the_sorted_slots_are_those_of_each_expert():
    chosen = torch.tensor([[2, 0], [0, 3], [3, 2], [2, 3]])
    slots, counts = kernels.sort_by_expert(chosen, 5)
    assert slots.tolist() == [1, 2, 0, 5, 6, 3, 4, 7] and counts.tolist() == [2, 0, 3, 3, 0]


@pytest.fixture
def has_triton_anew():
    yield
    kernels.has_triton.cache_clear()


def test_which_path_is_taken(monkeypatch, has_triton_anew):
    taken = []
    for name in ("moe_grouped", "moe_one_token", "moe_triton"):
        monkeypatch.setattr(kernels, name, lambda *a, name=name: taken.append(name))

    def path(T=100, cuda=False, dtype=torch.float32, grad=False, triton=True):
        class Fake(SimpleNamespace):
            __len__ = lambda self: T

        monkeypatch.setattr(kernels, "triton", object() if triton else None)
        kernels.has_triton.cache_clear()
        tensor = Fake(requires_grad=grad, is_cuda=cuda, is_cpu=not cuda, dtype=dtype)
        kernels.moe(*[tensor] * 6)
        return taken.pop()

    assert path() == path(dtype=torch.bfloat16) == "moe_grouped"
    assert path(T=1) == "moe_one_token"
    assert path(cuda=True) == path(cuda=True, T=1) == "moe_triton"
    assert path(grad=True) == path(grad=True, cuda=True) == path(grad=True, T=1) == "moe_grouped"
    with torch.no_grad():
        assert path(grad=True, cuda=True) == "moe_triton"
    assert path(cuda=True, dtype=torch.float64) == "moe_grouped"
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert path(cuda=True, triton=False) == "moe_grouped"
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        kernels.has_triton()
