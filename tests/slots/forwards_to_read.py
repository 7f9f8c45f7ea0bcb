"""Forwards for the tests of reading and rewriting: what stands in them, blank lines and comments included, is the point."""

import functools

from torch import nn


def turn(q, k, cos, sin):
    """Stands for a rotary embedding."""
    return q * cos, k * sin


def traced(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Layer(nn.Module):
    def __init__(self, norm, mlp=None):
        super().__init__()
        self.norm, self.mlp = norm, mlp or nn.Identity()

    @traced
    def forward(self, x, *, by=2.0):
        """With a docstring."""
        residual = x
        x = self.mlp(x)
        x = residual + x  # the sum

        # a comment, and a blank line
        residual = x
        x = self.norm(x)
        x = self.mlp(x) * by
        return residual + x


class Swapped(Layer):
    def forward(self, x):
        old = x
        x = self.mlp(x)
        x = x + old
        y = self.norm(x)
        return x, y


class Inside(Layer):
    def forward(self, x, deep=True):
        if deep:
            old = x * 2
            x = old + x
            old = x
            x = self.norm(x)
            return x, old
        return super().forward(x)


class Between(Layer):
    def forward(self, x):
        old = x
        x = old + x
        old = x * 1.0
        x = self.norm(x)
        return x + old


class Within(Layer):
    def forward(self, x):
        old = x
        x = old + x
        old = x
        x = self.mlp(self.norm(x))
        return x + old


class Another(Layer):
    def forward(self, x, y):
        x = x + y
        return self.norm(y)


class Attention(nn.Module):
    def __init__(self, q_norm, k_norm):
        super().__init__()
        self.q_norm, self.k_norm, self.proj = q_norm, k_norm, nn.Identity()

    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], 2, -1)
        q = self.q_norm(self.proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.proj(x).view(shape)).transpose(1, 2)
        v = self.proj(x).view(shape).transpose(1, 2)
        q, k = turn(q, k, cos, sin)
        return q + k + v


class After(Attention):
    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], 2, -1)
        q = self.proj(x).view(shape).transpose(1, 2)
        k = self.proj(x).view(shape).transpose(1, 2)
        q = self.q_norm(q)
        k = self.k_norm(k)
        q, k = turn(q, k, cos, sin)
        return q + k


class Read(Attention):
    def forward(self, x, cos, sin):
        q = self.q_norm(x).transpose(1, 2)
        k = self.k_norm(x).transpose(1, 2)
        q = q * 2
        q, k = turn(q, k, cos, sin)
        return q + k


class More(Attention):
    def forward(self, x, cos, sin):
        q = self.q_norm(x)
        k = self.k_norm(x)
        q, k = turn(q, k, cos, sin=sin)
        return q + k


class Three(nn.Module):
    """`around`: what a forward does with a projection, beside a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.around = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(4, 2), nn.Tanh()

    def forward(self, x):
        shape = (*x.shape[:-1], -1, 2)
        q = self.around(self.a(x).view(shape)).transpose(1, 2)
        k = self.b(x).view(shape).transpose(1, 2)
        v = self.c(x)
        return q.sum(1) + k.sum(1) * v.reshape(*x.shape[:-1], 2)


class Into(Three):
    def forward(self, x):
        q = self.a(x)
        x = self.b(x)
        v = self.c(x)
        return q.sum() + x + v


class Twice(Three):
    def forward(self, x):
        q = self.a(x)
        k = self.b(x)
        v = self.b(x)
        return q.sum() + k + v


class Apart(Three):
    def forward(self, x, y):
        q = self.a(x)
        k = self.b(y)
        v = self.c(y)
        return q.sum() + k + v


class Reads(Three):
    def forward(self, x):
        k = x
        q = self.a(x).add(k.sum())
        k = self.b(x)
        v = self.c(x)
        return q.sum() + k + v


class Product(Three):
    def forward(self, x):
        q = self.a(x) * 2
        k = self.b(x)
        v = self.c(x)
        return q.sum() + k + v
