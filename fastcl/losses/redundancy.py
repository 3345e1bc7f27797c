"""Losses of two views without negatives: VICReg, Barlow Twins and W-MSE, on covariances, and the negative cosine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_count, check_flag, check_rows, finite_number, plain_number
from ..distributed import Property, World, check_group, dtype_name, tell_others
from ..ops.backends.rows import accumulation_dtype, unit
from ..ops.products import product
from . import small_redundancy
from .gathered import has_gradient
from .modules import GroupModule, loss_dtype

NORMALISATION_EPS = 1e-5  # added to variances by batch normalisation, which lightly's Barlow Twins goes through


def vicreg_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    eps: float = 1e-4,
    gather: bool = False,
    group: Any = None,
) -> Tensor:
    """The stateless form of :class:`VICRegLoss`, which describes formula, shapes and errors."""
    check_flag("gather", gather)
    if not gather:
        further = partial(_vicreg, (lambda_param, mu_param, nu_param), eps, False, None)
        loss = small_redundancy.vicreg(z_a, z_b, (lambda_param, mu_param, nu_param), eps, further)
        if loss is not None:
            return loss
    try:
        weights = [
            finite_number(name, value)
            for name, value in (("lambda_param", lambda_param), ("mu_param", mu_param), ("nu_param", nu_param))
        ]
        eps = plain_number("eps", eps)
        _check_views(z_a, z_b)
    except Exception as error:
        tell_others(gather, error, z_a, z_b, group=group)
        raise
    return _vicreg(weights, eps, gather, group, z_a, z_b)


def _vicreg(weights: Sequence[float], eps: float, gather: bool, group: Any, z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b, n, world = _opened("VICRegLoss", z_a, z_b, gather, group, (*weights, eps))
    d = a.shape[1]
    invariance = _total((a - b).square().sum(), world) / max(n * d, 1)
    variance = covariance = a.new_zeros(())
    for rows in (a, b):
        centred, variances = _centred(rows, n, world)
        if n > 1:
            variances = variances * n / (n - 1)
            off = _off_diagonal(centred, centred, world) / (n - 1) ** 2
            covariance = covariance + off / max(d, 1)
        spread = (variances + eps).sqrt()
        variance = variance + (1 - spread).relu().sum() / (2 * max(d, 1))
    if n < 2:  # one row has no variance; the sum keeps NaN, and a graph
        variance = covariance = 0 * (a.sum() + b.sum())
    loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
    return loss.to(loss_dtype(z_a))


def barlow_twins_loss(
    z_a: Tensor, z_b: Tensor, *, lambda_param: float = 5e-3, scale: float = 1.0, gather: bool = False, group: Any = None
) -> Tensor:
    """The stateless form of :class:`BarlowTwinsLoss`, which describes formula, shapes and errors."""
    check_flag("gather", gather)
    if not gather:
        further = partial(_barlow_twins, lambda_param, scale, False, None)
        loss = small_redundancy.barlow_twins(z_a, z_b, lambda_param, scale, NORMALISATION_EPS, further)
        if loss is not None:
            return loss
    try:
        lambda_param, scale = finite_number("lambda_param", lambda_param), finite_number("scale", scale)
        _check_views(z_a, z_b)
    except Exception as error:
        tell_others(gather, error, z_a, z_b, group=group)
        raise
    return _barlow_twins(lambda_param, scale, gather, group, z_a, z_b)


def _barlow_twins(lambda_param: float, scale: float, gather: bool, group: Any, z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b, n, world = _opened("BarlowTwinsLoss", z_a, z_b, gather, group, (lambda_param, scale))
    if n < 2:  # one row has no variance
        return (0 * (a.sum() + b.sum())).to(loss_dtype(z_a))
    units = []
    for rows in (a, b):
        centred, variances = _centred(rows, n, world)
        units.append(centred * (variances + NORMALISATION_EPS).rsqrt())
    left, right = units
    diagonal = _total((left * right).sum(0), world) / n
    redundancy = _off_diagonal(left, right, world) / n**2
    loss = scale * ((diagonal - 1).square().sum() + lambda_param * redundancy)
    return loss.to(loss_dtype(z_a))


def wmse_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    eps: float = 0.0,
    w_size: int | None = None,
    generator: torch.Generator | None = None,
    gather: bool = False,
    group: Any = None,
) -> Tensor:
    """The stateless form of :class:`WMSELoss`, which describes formula, shapes and errors."""
    check_flag("gather", gather)
    try:
        eps, w_size = _shrinkage(eps), _sub_batch(w_size, gather)
        _check_views(z_a, z_b)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if w_size is not None and len(z_a) % w_size:
            raise ValueError(f"z_a: expected a multiple of w_size={w_size} rows, got {len(z_a)}")
    except Exception as error:
        tell_others(gather, error, z_a, z_b, group=group)
        raise
    a, b, n, world = _opened("WMSELoss", z_a, z_b, gather, group, (eps,))
    d, size = a.shape[1], n if w_size is None else w_size
    if n < 2:  # one row has no variance
        return (0 * (a.sum() + b.sum())).to(loss_dtype(z_a))
    if eps == 0 and size <= d:
        raise ValueError(f"z_a: expected more rows than features, {d}, to whiten with eps=0, got {size}")
    if w_size is not None:
        if generator is None:  # torch.compile takes no generator, not even None
            order = torch.randperm(n, device=a.device)
        else:
            order = torch.randperm(n, device=a.device, generator=generator)
        # The backward of an embedding is deterministic, that of an index is not.
        a, b = (F.embedding(order, rows) for rows in (a, b))
    white = []
    for rows in (a, b):
        parts = [_whitened(part, size, eps, world) for part in rows.split(len(rows) if w_size is None else size)]
        white.append(unit(torch.cat(parts)))
    cosines = (white[0] * white[1]).sum()
    return (2 - 2 * _total(cosines, world) / n).to(loss_dtype(z_a))


def negative_cosine_similarity(x0: Tensor, x1: Tensor) -> Tensor:
    """The stateless form of :class:`NegativeCosineSimilarity`, which describes formula, shapes and errors."""
    _check_views(x0, x1, ("x0", "x1"))
    wide = accumulation_dtype(x0, x1)
    cosines = (unit(x0.to(wide)) * unit(x1.to(wide))).sum(1)
    return (-cosines.sum() / max(len(x0), 1)).to(loss_dtype(x0))


class VICRegLoss(GroupModule):
    r"""VICReg (Bardes et al. 2022): two views agree, each feature varies, and features do not covary.

    With the D features of each view, :math:`\operatorname{Var}_d` their unbiased variances and C their covariances,

    .. math:: \frac{\lambda}{N D} |A - B|^2
              + \frac{\mu}{2 D} \sum_{Z \in \{A, B\}} \sum_d
              \max\big(0, 1 - \sqrt{\operatorname{Var}_d(Z) + \epsilon}\big)
              + \frac{\nu}{D} \sum_{Z \in \{A, B\}} \sum_{d \neq e} C_{de}(Z)^2

    ``VICRegLoss()(z_a, z_b)`` is lightly's call, which halves the variance term as the authors' code does; solo-learn
    does not halve it: ``mu_param=50``. The covariance term takes the smaller of the D x D and the N x N products, so
    its memory is O(min(N, D)^2).

    Args:
        lambda_param, mu_param, nu_param: the weights of the three terms, any finite numbers.
        eps: > 0.
        gather: variances and covariances over the rows of all processes of a group; no effect without a
            group. Memory is then O(D^2). Each process returns the loss of the whole batch, whose gradient DDP averages
            to that of one process with all rows.

    Shapes of ``forward(z_a, z_b)``: ``[N, D]`` both; float64, float32, bfloat16 or float16. A single pair has neither
    variance nor covariance, and no pairs have loss 0.

    Returns:
        A scalar, float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        eps: float = 1e-4,
        *,
        gather: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.lambda_param = finite_number("lambda_param", lambda_param)
        self.mu_param, self.nu_param = finite_number("mu_param", mu_param), finite_number("nu_param", nu_param)
        self.eps = plain_number("eps", eps)
        check_flag("gather", gather)
        check_group(group, gather)
        self.gather, self.group = gather, group

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return vicreg_loss(
            z_a, z_b, lambda_param=self.lambda_param, mu_param=self.mu_param, nu_param=self.nu_param, eps=self.eps,
            gather=self.gather, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        gather = ", gather=True" if self.gather else ""
        weights = f"lambda_param={self.lambda_param:g}, mu_param={self.mu_param:g}, nu_param={self.nu_param:g}"
        return f"{weights}, eps={self.eps:g}{gather}"


class BarlowTwinsLoss(GroupModule):
    r"""Barlow Twins (Zbontar et al. 2021): the features' cross-correlations of two views approach the identity.

    With C the D x D correlations of the features of one view with those of the other,

    .. math:: \text{scale} \Big( \sum_d (1 - C_{dd})^2 + \lambda \sum_{d \neq e} C_{de}^2 \Big)

    ``BarlowTwinsLoss()(z_a, z_b)`` is lightly's call. solo-learn's is ``BarlowTwinsLoss(0.0051, scale=0.025)``. The
    second sum takes the smaller of the D x D and the N x N products, so its memory is O(min(N, D)^2). Features are
    divided by the square root of their biased variance + 1e-5.

    Args:
        lambda_param: the weight of the second sum, any finite number.
        scale: any finite number.
        gather: as in :class:`VICRegLoss`.

    Shapes of ``forward(z_a, z_b)``: ``[N, D]`` both; float64, float32, bfloat16 or float16. Fewer than two pairs have
    loss 0.

    Returns:
        A scalar, float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self, lambda_param: float = 5e-3, *, scale: float = 1.0, gather: bool = False, group: Any = None
    ) -> None:
        super().__init__()
        self.lambda_param, self.scale = finite_number("lambda_param", lambda_param), finite_number("scale", scale)
        check_flag("gather", gather)
        check_group(group, gather)
        self.gather, self.group = gather, group

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return barlow_twins_loss(
            z_a, z_b, lambda_param=self.lambda_param, scale=self.scale, gather=self.gather, group=self.group
        )

    def extra_repr(self) -> str:
        gather = ", gather=True" if self.gather else ""
        return f"lambda_param={self.lambda_param:g}, scale={self.scale:g}{gather}"


class WMSELoss(GroupModule):
    r"""W-MSE (Ermolov et al. 2021): views agree after each is whitened, which keeps the embeddings from collapsing.

    With :math:`\mu` and C the mean and the covariance of the N rows of a view, and L the Cholesky factor of
    :math:`(1 - \epsilon) C + \epsilon I`, the whitened rows are :math:`w_i = L^{-1} (z_i - \mu)`, and

    .. math:: \frac1N \sum_i \big| \hat w_i^a - \hat w_i^b \big|^2

    ``WMSELoss()(z_a, z_b)`` is the authors' loss of two views. Covariances are of N - 1 degrees of freedom.

    Args:
        eps: from 0 to less than 1. With 0 the covariance must have full rank: more rows than features are needed, and a
            constant feature gives NaN.
        w_size: whitens random parts of the batch, of w_size rows each, drawn anew in each call. None: the whole batch.
            The paper averages several draws: the mean of several calls.
        gather: means and covariances over the rows of all processes of a group; no effect without a group. Each process
            returns the loss of the whole batch, whose gradient DDP averages to that of one process with all rows. Not
            with ``w_size``.

    Shapes of ``forward(z_a, z_b, *, generator=None)``: ``[N, D]`` both; float64, float32, bfloat16 or float16. Fewer
    than two pairs have loss 0. generator: random generator of the parts, on the rows' device.

    Returns:
        A scalar, float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, eps: float = 0.0, *, w_size: int | None = None, gather: bool = False, group: Any = None) -> None:
        super().__init__()
        check_flag("gather", gather)
        self.eps, self.w_size = _shrinkage(eps), _sub_batch(w_size, gather)
        check_group(group, gather)
        self.gather, self.group = gather, group

    def forward(self, z_a: Tensor, z_b: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return wmse_loss(
            z_a, z_b, eps=self.eps, w_size=self.w_size, generator=generator, gather=self.gather, group=self.group
        )

    def extra_repr(self) -> str:
        gather = ", gather=True" if self.gather else ""
        return f"eps={self.eps:g}, w_size={self.w_size}{gather}"


class NegativeCosineSimilarity(nn.Module):
    r"""The loss of SimSiam (Chen and He 2021) and BYOL (Grill et al. 2020): minus the mean cosine of paired rows.

    .. math:: -\frac1N \sum_i \langle \hat x_i, \hat y_i \rangle

    ``NegativeCosineSimilarity()(x0, x1)`` is lightly's call. BYOL's squared distance of unit rows is 2 + 2 times this.
    Gradients flow into both arguments: both papers pass the target detached.

    Shapes of ``forward(x0, x1)``: ``[N, D]`` both; float64, float32, bfloat16 or float16. No pairs have loss 0.

    Returns:
        A scalar, float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The loss. The class describes shapes and errors."""
        return negative_cosine_similarity(x0, x1)


def _shrinkage(eps: float) -> float:
    eps = finite_number("eps", eps)
    if not 0 <= eps < 1:
        raise ValueError(f"eps: expected a number from 0 to less than 1, got {eps}")
    return eps


def _sub_batch(w_size: int | None, gather: bool) -> int | None:
    if w_size is None:
        return None
    if gather:
        raise ValueError(f"w_size: expected None with gather=True, got {w_size}")
    return check_count("w_size", w_size, least=2)


def _whitened(rows: Tensor, n: int, eps: float, world: World | None) -> Tensor:
    """Rows [m, D] of a batch of n, with the covariance of the batch as the identity."""
    centred = rows - _total(rows.sum(0), world) / n
    # Dynamo traces no autograd function that is given one tensor twice: the second is a view.
    covariance = _total(product(centred.T, centred.T.T.T), world) / (n - 1)
    shrunk = (1 - eps) * covariance + eps * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return product(centred, _InverseFactor.apply(shrunk))


class _InverseFactor(torch.autograd.Function):
    """The inverse of the Cholesky factor [D, D] of a matrix; NaN if it is not positive definite.

    torch's own derivatives multiply matrices, which autocast would round. This one has derivatives of any order.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        # Unlike cholesky, cholesky_ex neither waits for the device nor raises.
        factor, failed = torch.linalg.cholesky_ex(matrix)
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        inverse = inverse.masked_fill(failed > 0, torch.nan)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        inner = product(grad, inverse).tril()
        inner = inner - torch.diag(inner.diagonal() / 2)
        found = product(product(inverse.T, inner.T), inverse.T)
        return -(found + found.T) / 2


def _check_views(z_a: Tensor, z_b: Tensor, names: tuple[str, str] = ("z_a", "z_b")) -> None:
    check_rows(names[0], z_a)
    check_rows(names[1], z_b, like=z_a)
    if z_b.shape != z_a.shape:
        raise ValueError(f"{names[1]}: expected shape {list(z_a.shape)}, as {names[0]}, got {list(z_b.shape)}")


def _opened(
    call: str, z_a: Tensor, z_b: Tensor, gather: bool, group: Any, options: tuple[float, ...]
) -> tuple[Tensor, Tensor, int, World | None]:
    """Both views in the dtype of sums, the number of pairs on all processes, and the processes."""
    wide = accumulation_dtype(z_a, z_b)
    n, world = len(z_a), World.of(gather, group)
    if world is not None:
        alike: dict[str, Property] = {"dimension": z_a.shape[1], "dtype": dtype_name(wide)}
        alike |= {f"option {k}": option for k, option in enumerate(options)}
        alike |= {"z_a with a gradient": has_gradient(z_a), "z_b with a gradient": has_gradient(z_b)}
        n = sum(world.agree(call, {"rows": n}, alike, z_a.device)[0])
    return z_a.to(wide), z_b.to(wide), n, world


def _total(values: Tensor, world: World | None) -> Tensor:
    return values if world is None else world.total(values)


def _centred(rows: Tensor, n: int, world: World | None) -> tuple[Tensor, Tensor]:
    """Rows less their mean over all processes, and the biased variances [D]."""
    centred = rows - _total(rows.sum(0), world) / max(n, 1)
    return centred, _total(centred.square().sum(0), world) / max(n, 1)


def _off_diagonal(left: Tensor, right: Tensor, world: World | None) -> Tensor:
    """The sum of the squares of leftᵀ right off its diagonal.

    |AᵀB|² = <AAᵀ, BBᵀ>: with fewer rows than features the N x N products are the smaller ones.
    """
    n, d = left.shape
    if world is None and n < d:
        # Dynamo traces no autograd function that is given one tensor twice: the second is a view.
        whole = (product(left, left.T.T) * product(right, right.T.T)).sum()
        return whole - (left * right).sum(0).square().sum()
    products = _total(product(left.T, right.T), world)
    return products.masked_fill(torch.eye(d, dtype=torch.bool, device=left.device), 0).square().sum()
