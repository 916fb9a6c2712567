"""Small random networks for property tests: ``build(seed, size)`` gives a network and its inputs.

A network is one stem per input, ``size`` random blocks on feature maps ``[N, C, H, W]``, and one
or two heads. A smaller ``size`` of the same seed is a prefix of the same network, up to its heads.
``print(model)`` shows it in the order in which it runs; functions are written out.

Some blocks have a size in them that does not follow when channels go (`Sizes`), and some do what
no channel survives (`HOSTILE`): a tracer may offer nothing there, but never a gate that is wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_parts import (
    HOSTILE,
    Apply,
    Random,
    Sizes,
    Weight,
    activation,
    conv,
    function,
    layer,
    norm,
    width,
)  # fmt: skip

Made = tuple[nn.Module, int]
"""A block and the number of channels that come out of it."""


def plain(r: Random, c: int, deep: int) -> Made:
    out = width(r)
    return layer(r, c, out), out


def grouped(r: Random, c: int, deep: int) -> Made:
    groups = r.choice((2, 4, c))
    out = c * r.choice((1, 1, 2))
    return layer(r, c, out, groups), out


def transposed(r: Random, c: int, deep: int) -> Made:
    out, groups = width(r), r.choice((1, 1, 1, 2))
    if r.random() < 0.5:
        up = nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups)
        return nn.Sequential(up, norm(r, out), activation(r, out)), out
    up = nn.ConvTranspose2d(c, out, 2, stride=2, groups=groups, bias=False)
    return nn.Sequential(up, norm(r, out), activation(r, out), nn.AvgPool2d(2)), out


def residual(r: Random, c: int, deep: int) -> Made:
    inner, w = block(r, c, deep - 1)
    f = nn.Sequential(inner, conv(r, w, c), norm(r, c))
    how = r.choice(("x + f(x)", "y = f(x); y += x", "x - f(x)", "y = g(x); y += f(x)",
                    "x + scale * f(x)", "g(x) + f(x)", "x + f(norm(x))"))  # fmt: skip
    more: dict[str, nn.Module] = {}
    if "scale" in how:
        more["scale"] = Weight(c, 1, 1)
    if "norm" in how:
        more["norm"] = norm(r, c)
    if how == "g(x) + f(x)":
        more["g"] = conv(r, c, c)
    elif "g(x)" in how:
        more["g"] = r.choice((nn.GELU(), function("x.clone()", torch.clone)))

    def forward(m, x):
        if "scale" in how:
            return x + m.scale.value * m.f(x)
        if "norm" in how:
            return x + m.f(m.norm(x))
        if how == "x - f(x)":
            return x - m.f(x)
        short = m.g(x) if "g" in more else x
        if "y = f" in how:
            y = m.f(x)
            y += short
            return y
        if "y = g" in how:
            short += m.f(x)
            return short
        return short + m.f(x)

    return nn.Sequential(Apply(how, forward, f=f, **more), activation(r, c)), c


def concat(r: Random, c: int, deep: int) -> Made:
    a, wide = block(r, c, deep - 1)
    b, more = block(r, c, 0) if r.random() < 0.5 else (nn.Identity(), c)
    if r.random() < 0.5:
        a, wide, b, more = b, more, a, wide
    return Apply("cat([a(x), b(x)], 1)", lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=a, b=b), (
        wide + more
    )


def split(r: Random, c: int, deep: int) -> Made:
    """Half of the channels passes a block; the pieces are joined again, or multiplied."""
    half = c // 2
    how = r.choice(("chunk(x, 2)", "split(x, C // 2)", f"split(x, [{half}, {half}])",
                    f"x[:, :{half}], x[:, {half}:]", "x[:, ::2], x[:, 1::2]"))  # fmt: skip

    def pieces(x):
        if how.startswith("chunk"):
            return x.chunk(2, 1)
        if how == "split(x, C // 2)":
            return x.split(x.shape[1] // 2, 1)
        if how.startswith("split"):
            return x.split([half, half], 1)
        if "::" in how:
            return x[:, ::2], x[:, 1::2]
        return x[:, :half], x[:, half:]

    f, out = block(r, half, deep - 1)
    swap = r.random() < 0.5

    def forward(m, x):
        a, b = pieces(x)
        return torch.cat([b, m.f(a)] if swap else [m.f(a), b], 1)

    return Apply(f"a, b = {how}; cat({'b, f(a)' if swap else 'f(a), b'})", forward, f=f), half + out


def gate(r: Random, c: int, deep: int) -> Made:
    out = width(r)
    act = r.choice((nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.Identity(), nn.Softmax(dim=1)))
    how = r.choice(("glu(f(x))", "a, b = f(x).chunk(2); a * act(b)", "f(x) * act(g(x))",
                    "f(x) / (1 + g(x).abs())", "maximum(f(x), g(x))"))  # fmt: skip
    one = how.startswith(("glu", "a, b"))
    f = conv(r, c, 2 * out if one else out)
    g = nn.Identity() if one else conv(r, c, out)

    def forward(m, x):
        y = m.f(x)
        if how.startswith("glu"):
            return F.glu(y, 1)
        if one:
            a, b = y.chunk(2, 1)
            return a * m.act(b)
        z = m.g(x)
        if "/" in how:
            return y / (1 + z.abs())
        return torch.maximum(y, z) if how.startswith("max") else y * m.act(z)

    return Apply(how, forward, f=f, g=g, act=act), out


def squeeze_excite(r: Random, c: int, deep: int) -> Made:
    w = width(r)
    act = r.choice((nn.Sigmoid(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Softmax(dim=1), nn.Tanh()))
    how = r.choice(("x * s", "x * s", "x * (1 + s)", "x + s"))
    inner = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, w, 1), activation(r, w),
                          nn.Conv2d(w, c, 1), act)  # fmt: skip

    def forward(m, x):
        s = m.s(x)
        return x + s if "+ s" == how[-3:] else x * (1 + s) if "1" in how else x * s

    return Apply(f"s = s(x); {how}", forward, s=inner), c


def attention(r: Random, c: int, deep: int) -> Made:
    """Multi-head attention over the positions, some with fewer heads of keys and values."""
    heads, w, sizes = r.choice((1, 2, 4)), r.choice((8, 16)), Sizes(r)
    n_kv = r.choice((heads, heads, max(heads // 2, 1), 1))
    kind = r.choice(("q, k, v", "chunk", "unbind")) if n_kv == heads else "q, k, v"
    how = r.choice(("sdpa", "softmax")) if n_kv == heads else r.choice(("sdpa", "softmax", "gqa"))
    add = r.random() < 0.5
    kv = w // heads * n_kv

    def project(m, t):
        if kind == "unbind":
            size = w // heads if sizes.how == "fixed" else -1
            return m.qkv(t).reshape(*t.shape[:2], 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = m.qkv(t).chunk(3, -1) if kind == "chunk" else (m.q(t), m.k(t), m.v(t))
        return sizes.heads(q, heads, w), sizes.heads(k, n_kv, kv), sizes.heads(v, n_kv, kv)

    def forward(m, x):
        q, k, v = project(m, m.norm(x.flatten(2).transpose(1, 2)))
        if how == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            if n_kv == 1:
                k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
            elif n_kv < heads:
                k, v = (y.repeat_interleave(heads // n_kv, 1) for y in (k, v))
            if how == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1) @ v
        y = m.out(sizes.merge(y, w)).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
        return x + y if add else y

    parts = {"norm": nn.LayerNorm(c) if r.random() < 0.7 else nn.Identity(),
             "out": nn.Linear(w, c, bias=r.random() < 0.5)}  # fmt: skip
    if kind == "q, k, v":
        parts |= {"q": nn.Linear(c, w), "k": nn.Linear(c, kv), "v": nn.Linear(c, kv)}
    else:
        parts["qkv"] = nn.Linear(c, 3 * w, bias=r.random() < 0.5)
    words = f"{kind}, {heads} heads ({n_kv} of k and v), {how}, sizes {sizes.how}"
    return Apply(f"{words}; {'x + ' if add else ''}attention", forward, **parts), c


def mlp(r: Random, c: int, deep: int) -> Made:
    """LayerNorm, linear, activation, linear over the channels, with a residual."""
    w = width(r)
    act = r.choice((nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.SiLU()))
    f = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, w), act, nn.Dropout(0.1), nn.Linear(w, c))

    def forward(m, x):
        return x + (m.scale.value * m.f(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    return Apply("x + scale * f(x) over the channels", forward, f=f, scale=Weight(c)), c


def shuffle(r: Random, c: int, deep: int) -> Made:
    n, sizes = r.choice((2, 4)), Sizes(r)
    if r.random() < 0.3:
        return nn.ChannelShuffle(n), c
    return function(f"shuffle {n}, sizes {sizes.how}", lambda x: sizes.shuffle(x, n, c)), c


def pixels(r: Random, c: int, deep: int) -> Made:
    out = width(r)
    if r.random() < 0.5:
        return nn.Sequential(conv(r, c, 4 * out), nn.PixelShuffle(2), nn.MaxPool2d(2)), out
    up = nn.Upsample(scale_factor=2, mode=r.choice(("nearest", "bilinear")))
    return nn.Sequential(nn.PixelUnshuffle(2), conv(r, 4 * c, out), up), out


def pool(r: Random, c: int, deep: int) -> Made:
    return r.choice((
        nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1),
        nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
        function("x + x.mean((2, 3))", lambda x: x + x.mean((2, 3), keepdim=True)),
        function("x * x.amax((2, 3))", lambda x: x * x.amax((2, 3), keepdim=True)),
        function("pad 1, reflect", lambda x: F.pad(x, (1, 1, 1, 1), "reflect")[:, :, 1:-1, 1:-1]),
    )), c  # fmt: skip


def shared(r: Random, c: int, deep: int) -> Made:
    """One layer at two places, with one norm or two."""
    f = layer(r, c, c)
    a, b = norm(r, c), norm(r, c)
    how = r.choice(
        ("a(f(f(x)))", "a(f(x)) + b(f(x.flip(3)))", "cat([a(f(x)), x])", "f(b(f(a(x))))")
    )

    def forward(m, x):
        if how.startswith("a(f(f"):
            return m.a(m.f(m.f(x)))
        if "flip" in how:
            return m.a(m.f(x)) + m.b(m.f(x.flip(3)))
        if "cat" in how:
            return torch.cat([m.a(m.f(x)), x], 1)
        return m.f(m.b(m.f(m.a(x))))

    return Apply(how, forward, f=f, a=a, b=b), 2 * c if "cat" in how else c


def slices(r: Random, c: int, deep: int) -> Made:
    how = r.choice((f"x[:, {c // 4}:]", f"x[:, :{c // 2}]", "x[:, ::2]", "cat([x[:, :2], x])"))
    if how.startswith("cat"):
        return function(how, lambda x: torch.cat([x[:, :2], x], 1)), c + 2
    if "::" in how:
        return function(how, lambda x: x[:, ::2]), c // 2
    if how.endswith(":]"):
        return function(how, lambda x: x[:, c // 4 :]), c - c // 4
    return function(how, lambda x: x[:, : c // 2]), c // 2


def scaled(r: Random, c: int, deep: int) -> Made:
    how = r.choice(("w * x", "w * x", "x + w", "x * softmax(w)", "buffer * x", "x - buffer"))
    weight = Weight(c, 1, 1, buffer="buffer" in how)

    def forward(m, x):
        w = m.w.value
        if "softmax" in how:
            return x * w.softmax(0)
        return x * w if "*" in how else x + w if "+" in how else x - w

    return Apply(how, forward, w=weight), c


def hostile(r: Random, c: int, deep: int) -> Made:
    """Operations that mix, count or rank channels, or whose weight is no plain parameter."""
    name, call = r.choice(HOSTILE)
    more = {"w": Weight(c, c)} if "w" in name else {}
    return Apply(name, lambda m, x: call(m, x), **more), c


MAKERS = {
    plain: 8, grouped: 5, transposed: 3, residual: 8, concat: 4, split: 4, gate: 4,
    squeeze_excite: 3, attention: 4, mlp: 3, shuffle: 2, pixels: 2, pool: 3, shared: 2, slices: 2,
    scaled: 3,
}  # fmt: skip


def block(r: Random, c: int, deep: int) -> Made:
    """A random block for ``c`` channels; blocks lie inside blocks ``deep`` times."""
    if c % 4 or c > 32:
        out = width(r)
        return layer(r, c, out), out
    if deep > 0 and r.is_hostile():
        return hostile(r, c, deep)
    maker = r.choices(list(MAKERS), list(MAKERS.values()))[0] if deep > 0 else plain
    return maker(r, c, deep)


def head(r: Random, c: int, side: int) -> nn.Module:
    """From a feature map to an output."""
    kind = r.choice(("pool", "pool", "flatten", "map", "hidden"))
    if kind == "map":
        return nn.Conv2d(c, 3, 1)
    if kind == "flatten":
        return nn.Sequential(nn.Flatten(), nn.Linear(c * side * side, 5))
    # Without the ReLU nothing but rounding would come out of an instance norm.
    layers: list[nn.Module] = [function("relu(x).mean((2, 3))", lambda x: x.relu().mean((2, 3)))]
    if kind == "hidden":
        layers += [nn.Linear(c, 12), nn.BatchNorm1d(12), nn.ReLU()]
        c = 12
    return nn.Sequential(*layers, nn.Linear(c, 5))


class Network(nn.Module):
    """Stems, blocks, heads."""

    def __init__(self, seed: int, size: int) -> None:
        super().__init__()
        r = Random(seed)
        r.hostile = r.choice((0, 0.03, 0.1))
        self.side = r.choice((4, 6))
        self.n_inputs, self.join = r.choice((1, 1, 1, 2)), r.choice(("add", "cat", "mul"))
        self.form = r.choice(("tensor", "tensor", "tuple", "dict"))
        c = width(r)
        self.stems = nn.ModuleList(layer(r, 3, c) for _ in range(self.n_inputs))
        c *= 2 if self.n_inputs == 2 and self.join == "cat" else 1
        self.blocks = nn.ModuleList()
        widths = [c]
        for _ in range(size):
            made, c = block(r, c, 2)
            self.blocks.append(made)
            widths.append(c)
        r = Random(seed + 1)
        self.early = r.randrange(len(widths))
        self.heads = nn.ModuleList([head(r, c, self.side)])
        if self.form != "tensor":
            self.heads.append(head(r, widths[self.early], self.side))

    def extra_repr(self) -> str:
        return f"{self.n_inputs} inputs, {self.join}; output {self.form}; early head {self.early}"

    def forward(self, *inputs: Tensor):
        x, *more = (stem(x) for stem, x in zip(self.stems, inputs, strict=True))
        for y in more:
            x = (
                x + y
                if self.join == "add"
                else x * y
                if self.join == "mul"
                else torch.cat([x, y], 1)
            )
        seen = [x]
        for part in self.blocks:
            x = part(x)
            seen.append(x)
        outputs = tuple(f(y) for f, y in zip(self.heads, (x, seen[self.early]), strict=False))
        if self.form == "dict":
            return dict(zip(("out", "early"), outputs, strict=True))
        return outputs if self.form == "tuple" else outputs[0]


def build(seed: int, size: int = 5) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A random network in eval mode, and inputs for it; the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network(seed, size).eval()
        shape = (2, 3, model.side, model.side)
        return model, tuple(torch.randn(shape) for _ in range(model.n_inputs))
