"""Each projection against its published formula, written out in plain float64."""

import pytest
import torch

from ato_fast import DHSPG, AdamW, HalfSpace
from samples import VARIANTS, by_name, every_layout, layout_of, set_grads, snapshot
from small_rates import RATES, wrong_groups


def test_prox_is_the_published_formula(served):
    model = every_layout().to(served)
    layout = layout_of(model)
    optimizer = VARIANTS[0](model, layout, lr=0.1)
    before = snapshot(model)
    norms = optimizer.group_norms().double().cpu()
    mask = torch.zeros(layout.n_groups)
    lam = 0.1 + torch.rand(layout.n_groups, generator=torch.Generator().manual_seed(3)) * 20
    optimizer.set_mask(mask, lam)
    optimizer.zero_grad()
    optimizer.step()
    nu = (norms**2 + 1e-8).sqrt()
    scale = (nu - 0.1 * lam).clamp(min=0) / nu
    for name, param in model.named_parameters():
        expected = before[name].double().cpu()
        for dim in range(param.dim()):
            groups = torch.tensor(layout.groups_of(name, dim))
            if name == "last.weight" and dim == 1:
                continue
            factor = torch.where(groups >= 0, scale[groups], torch.ones(()).double())
            expected = expected * factor.reshape(
                [-1 if d == dim else 1 for d in range(param.dim())]
            )
        torch.testing.assert_close(param.detach().double().cpu(), expected, rtol=1e-6, atol=1e-7)


def test_half_space_is_otos_formula(served):
    model = every_layout().to(served)
    layout = layout_of(model)
    optimizer = VARIANTS[0](model, layout, lr=0.1, projection=HalfSpace(eps=0.3))
    optimizer.set_mask(torch.zeros(layout.n_groups), 4.0)
    x = model.odd.weight.detach().double().cpu(), model.odd.bias.detach().double().cpu()
    set_grads(model, 0, scale=80.0)
    g = model.odd.weight.grad.double().cpu(), model.odd.bias.grad.double().cpu()
    optimizer.step()
    rows = torch.cat([x[0], x[1][:, None]], dim=1)
    grads = torch.cat([g[0], g[1][:, None]], dim=1)
    norm = rows.norm(dim=1, keepdim=True)
    z = rows - 0.1 * grads - 0.4 * rows / (norm + 1e-8)
    drop = (z * rows).sum(1) < 0.3 * norm[:, 0] ** 2
    assert drop.any() and not drop.all()
    z[drop] = 0
    got = torch.cat([model.odd.weight, model.odd.bias[:, None]], dim=1).detach().double().cpu()
    torch.testing.assert_close(got, z, rtol=1e-5, atol=1e-6)
    assert not got[drop].any()


def test_dhspg_is_otov2s_formula(served):
    """Every branch of the choice of lambda, against the formulas in plain float64."""
    model = every_layout().to(served)
    layout = layout_of(model)
    lr, decay, eps, amplify, cap = 0.1, 0.5, 0.3, 1.8, 3.0
    lam = torch.full((129,), 2.0, dtype=torch.float64)
    lam[:9] = 6.0
    optimizer = AdamW(model, layout, lr=lr, weight_decay=decay, projection=DHSPG(eps, amplify, cap))
    strength = torch.ones(layout.n_groups)
    strength[layout.gate("odd").span] = lam.float()
    optimizer.set_mask(torch.zeros(layout.n_groups), strength)
    odd = model.odd
    with torch.no_grad():
        odd.weight[::3] *= 0.1
        odd.bias[::3] *= 0.1

    def rows(values):
        return torch.cat([values[0], values[1][:, None]], dim=1).detach().double().cpu()

    x = rows((odd.weight, odd.bias))
    # One step of Adam moves every element by lr along the gradient's sign: mix it with x's so that
    # rows grow, shrink and turn.
    pushed = torch.linspace(-1, 1, len(x), dtype=torch.float64)[:, None]
    g = torch.randn(x.shape, dtype=torch.float64) * 0.3 + pushed * x.sign()
    g[:9] = -x[:9].sign()
    set_grads(model, 0)
    odd.weight.grad = g[:, :-1].float().to(served)
    odd.bias.grad = g[:, -1].float().to(served)
    optimizer.step()
    g = g.float().double()
    d = g / (g.abs() + 1e-8)
    norm, xd, dd = x.norm(dim=1), (x * d).sum(1), (d * d).sum(1)
    low, high = -xd / norm, -dd * norm / xd
    chosen = (amplify * low).maximum(lam).minimum(cap * lam)
    middle = chosen >= high
    chosen = torch.where(middle, (low + high) / 2, chosen)
    grows = xd < 0
    lambdas = torch.where(grows, chosen, lam)
    branches = [~grows, grows & middle, grows & ~middle & (chosen == cap * lam)]
    branches += [grows & ~middle & (chosen > lam) & (chosen < cap * lam)]
    assert all(branch.any() for branch in branches), [int(b.sum()) for b in branches]
    z = x - lr * d - lr * decay * x - lr * lambdas[:, None] * x / (norm[:, None] + 1e-8)
    drop = (z * x).sum(1) < eps * norm**2
    assert drop.any() and not drop.all()
    z[drop] = 0
    got = rows((odd.weight, odd.bias))
    torch.testing.assert_close(got, z, rtol=1e-5, atol=2e-6)
    assert not got[drop].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lr", RATES)
@pytest.mark.parametrize("variant", VARIANTS, ids=by_name)
def test_rounding_does_not_choose_dhspgs_strength(variant, lr, dtype, served):
    assert wrong_groups(variant, lr, dtype, served) == 0
