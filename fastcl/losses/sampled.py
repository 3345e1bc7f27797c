"""Losses against rows of a bank that are sampled for each anchor: instance discrimination, PIRL."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    check_count,
    check_flag,
    check_ids,
    check_indices,
    check_option,
    check_rows,
    check_tensor,
    finite_number,
    positive_number,
    scalar_tensor,
)
from ..distributed import Property, World, check_group, dtype_name, tell_others
from ..memory import MemoryBank
from ..ops.backends.rows import accumulation_dtype, unit
from ..ops.library import once_differentiable
from ..ops.sampled import backward_op, forward_op
from .modules import ExactModule, GroupModule, shown_temperature

FORMS = ("nce", "infonce", "pirl")
REDUCTIONS = ("mean", "sum", "none")


def sampled_similarity(queries: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
    """Inner products of each query with its own sample of keys: ``result[i, s] = <queries[i], keys[indices[i, s]]>``.

    Rows are gathered and multiplied in blocks; neither forward nor backward stores the ``[N, S, D]`` gathered rows.

    Args:
        queries: ``[N, D]``; float64, float32, bfloat16 or float16, not normalised.
        keys: ``[M, D]``, not normalised.
        indices: ``[N, S]`` integers from 0 to M - 1.

    Returns:
        ``[N, S]``, float32, or float64 if one set of rows is. Differentiable once in queries and keys.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.
    """
    check_rows("queries", queries)
    check_rows("keys", keys, like=queries)
    check_samples("indices", indices, queries.shape[0], keys.shape[0], queries.device)
    result: Tensor = forward_op(queries, keys, indices.to(torch.int64))
    return result


class SampledNCELoss(ExactModule, GroupModule):
    r"""Noise-contrastive estimation against negatives from a bank, drawn anew for each anchor and call.

    With logits :math:`s = \langle \hat x_i, y \rangle / \text{temperature}`, the positive's logit s_i, S negatives with
    logits s_n and a bank of M samples, the loss of an anchor is

    ============= ============================================================================================
    form          loss of anchor i
    ============= ============================================================================================
    ``"nce"``     :math:`-\log h(s_i) - \sum_n \log(1 - h(s_n))`, :math:`h(s) = \frac{e^s / Z}{e^s / Z + S / (M - 1)}`
    ``"infonce"`` :math:`-s_i + \log(e^{s_i} + \sum_n e^{s_n})`
    ``"pirl"``    :math:`-\log h_i - \sum_n \log(1 - h_n)`, :math:`h_j = \frac{e^{s_j}}{e^{s_j} + \sum_n e^{s_n}}`
    ============= ============================================================================================

    ``SampledNCELoss(0.07)(z, indices, bank)`` is instance discrimination: the positive is the anchor's own row in the
    bank. PIRL's loss, with f the embedding of an image and g that of its pretext version, is
    ``w * loss(g, indices, bank) + (1 - w) * loss(f, indices, bank)`` with ``form="pirl"``. Update the bank afterwards:
    ``bank.update(indices, z)``.

    Negatives are drawn from the rows that have been updated, but M always counts all rows of the bank, in S / (M - 1)
    and in the estimate of Z. h is therefore a probability in the papers' sense only once the bank is full.

    Args:
        temperature: number, tensor or ``nn.Parameter``.
        num_negatives: S; drawn uniformly, with replacement, from the bank's updated rows except the anchor's own.
        form: ``"nce"``, ``"infonce"`` or ``"pirl"``, as above.
        log_normalizer: log Z of ``"nce"``. None: estimated once, in the first call, from the negatives of anchors that
            count and have finite logits. Stored in a float64 buffer that ``.half()`` and other casts do not change.
        normalize: whether embeddings and ``positives`` are normalised; stored rows are used as they are.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the anchors that count: those that have a positive.
        gather: compute mean and estimate of Z over the anchors of all processes; no effect without a group. Each
            process returns W times its share. Each process has its own bank; the banks are equal if they are updated
            with gathered rows (:func:`fastcl.distributed.gather_rows`).
        group: the process group of ``gather``; None: the default group.

    Shapes of ``forward(embeddings, indices, bank, *, positives=None, negatives=None, generator=None)``:

    - embeddings: ``[N, D]``. float64, float32, bfloat16, float16.
    - indices: ``[N]`` integers: the anchors' sample indices in the bank.
    - bank: :class:`MemoryBank`. An anchor whose row was never updated does not count, unless ``positives`` are given.
    - positives: ``[N, D]``, used instead of the bank's rows.
    - negatives: ``[N, S]`` indices into the bank, used instead of random ones.
    - generator: random generator of the draw, on the bank's device.

    Returns:
        A scalar, or ``[N]`` with ``reduction="none"`` (0 where an anchor does not count). float32; float64 for float64
        embeddings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: on a second derivative.

    Sources: Wu et al. 2018 (instance discrimination), Misra and van der Maaten 2020 (PIRL).
    """

    log_normalizer: Tensor

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        num_negatives: int = 4096,
        form: str = "nce",
        log_normalizer: float | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature = positive_number("temperature", temperature)
        num_negatives = check_count("num_negatives", num_negatives)
        check_option("form", form, FORMS)
        check_flag("normalize", normalize)
        check_option("reduction", reduction, REDUCTIONS)
        check_flag("gather", gather)
        check_group(group, gather)
        self.gather, self.group = gather, group
        known = math.nan if log_normalizer is None else finite_number("log_normalizer", log_normalizer)
        self.register_buffer("log_normalizer", torch.tensor(known, dtype=torch.float64))
        self.num_negatives, self.form, self.normalize, self.reduction = num_negatives, form, normalize, reduction

    def forward(
        self,
        embeddings: Tensor,
        indices: Tensor,
        bank: MemoryBank,
        *,
        positives: Tensor | None = None,
        negatives: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss; the class's docstring has shapes and errors."""
        try:
            negatives = self._checked(embeddings, indices, bank, positives, negatives, generator)
        except Exception as error:
            tell_others(self.gather, error, embeddings, group=self.group)
            raise
        world = World.of(self.gather, self.group)
        if world is not None:
            alike: dict[str, Property] = {
                "form": self.form,
                "reduction": self.reduction,
                "normalize": self.normalize,
                "dimension": embeddings.shape[1],
                "dtype of embeddings": dtype_name(embeddings.dtype),
                "dtype of sums": dtype_name(accumulation_dtype(embeddings, bank.rows)),
                "bank's samples": bank.num_samples,
                "negatives": negatives.shape[1],
                "positives given": positives is not None,
            }
            world.agree("SampledNCELoss", {}, alike, embeddings.device)
        indices = indices.to(torch.int64)
        x = unit(embeddings) if self.normalize else embeddings.to(accumulation_dtype(embeddings, bank.rows))
        key = unit(positives) if positives is not None and self.normalize else positives
        temperature = scalar_tensor("temperature", self.temperature, x.device, accumulation_dtype(x, bank.rows))
        counted = bank.filled[indices] if key is None else torch.ones_like(indices, dtype=torch.bool)
        places = torch.cat((indices[:, None], negatives.to(torch.int64)), 1)
        with torch.no_grad():
            logits: Tensor = forward_op(x, bank.rows, places)
            if key is not None:
                logits[:, 0] = (x * key).sum(1)
            logits /= temperature
            terms, slopes = self._terms(logits, counted, bank.num_samples - 1)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, key, temperature)):
            with torch.no_grad():
                slopes = torch.where(counted[:, None], slopes / temperature, 0)
                of_temperature = -torch.where(counted[:, None], slopes * logits, 0).sum(1)
                of_x, of_key = _slopes(x, key, bank.rows, places, slopes)
            terms = _Terms.apply(terms, x, key, temperature, of_x, of_key, of_temperature)
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        terms = torch.where(counted, terms, 0).to(dtype)
        if self.reduction == "none":
            return terms
        share = terms.sum() if world is None else terms.sum() * world.size
        if self.reduction == "sum":
            return share
        count = counted.sum()
        if world is not None:  # a term that is NaN or infinite makes the mean NaN on all processes
            count = world.total(count.double() + (terms.detach() * 0).sum()).to(dtype)
        return share / count.clamp(min=1)

    def _checked(
        self,
        embeddings: Tensor,
        indices: Tensor,
        bank: MemoryBank,
        positives: Tensor | None,
        negatives: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Checks all arguments of `forward`, and returns the negatives [N, S]."""
        check_rows("embeddings", embeddings)
        if not isinstance(bank, MemoryBank):
            raise TypeError(f"bank: expected a MemoryBank, got {type(bank).__name__}")
        check_rows("bank", bank.rows, like=embeddings)
        check_ids("indices", indices, embeddings.shape[0], embeddings.device)
        check_samples("indices", indices[:, None], embeddings.shape[0], bank.num_samples, embeddings.device)
        if positives is not None:
            check_rows("positives", positives, like=embeddings)
            if positives.shape != embeddings.shape:
                raise ValueError(
                    f"positives: expected shape {list(embeddings.shape)}, as embeddings, got {list(positives.shape)}"
                )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if self.form == "nce" and bank.num_samples < 2:
            raise ValueError("bank: expected at least 2 rows for form='nce', got 1")
        if negatives is None:
            negatives = draw(bank, indices, self.num_negatives, generator)
        else:
            check_samples("negatives", negatives, embeddings.shape[0], bank.num_samples, embeddings.device)
        if self.form == "nce" and negatives.shape[1] == 0:
            raise ValueError(f"negatives: expected at least one each for form='nce', got {list(negatives.shape)}")
        return negatives

    def _terms(self, logits: Tensor, counted: Tensor, others: int) -> tuple[Tensor, Tensor]:
        """Terms [N] and their derivatives [N, 1 + S] with respect to the logits; the positive is first."""
        positive, negative = logits[:, 0], logits[:, 1:]
        if self.form == "infonce":
            slopes = torch.softmax(logits, 1)
            slopes[:, 0] = -slopes[:, 1:].sum(1)  # softmax - 1, without its cancellation
            return logits.logsumexp(1) - positive, slopes
        softplus = nn.functional.softplus
        if self.form == "pirl":
            lse = negative.logsumexp(1)
            above = negative - lse[:, None]
            of_positive, of_negative = torch.sigmoid(lse - positive), torch.sigmoid(above)
            of_lse = of_positive - of_negative.sum(1)
            slopes = torch.cat([-of_positive[:, None], of_negative + of_lse[:, None] * above.exp()], 1)
            return softplus(lse - positive) + softplus(above).sum(1), slopes
        log_odds = self._normalizer(logits, counted, others) + math.log(negative.shape[1] / others)
        slopes = torch.sigmoid(logits - log_odds)
        slopes[:, 0] = -torch.sigmoid(log_odds - positive)
        return softplus(log_odds - positive) + softplus(negative - log_odds).sum(1), slopes

    def _normalizer(self, logits: Tensor, counted: Tensor, others: int) -> Tensor:
        """log Z: the known value, else the estimate others * mean(exp(s)) from these negatives, which is stored."""
        usable = (counted & logits.isfinite().all(1))[:, None]
        negative = torch.where(usable, logits[:, 1:], -torch.inf)
        # Without a usable row the estimate is NaN, and the next call estimates again.
        count, log_sum = usable.sum().to(negative.dtype) * negative.shape[1], negative.flatten().logsumexp(0)
        world = World.of(self.gather, self.group)
        if world is not None:
            counts, log_sums = world.all_rows(torch.stack([count, log_sum])[None], [1] * world.size).unbind(1)
            count, log_sum = counts.sum(), log_sums.logsumexp(0)
        estimate = log_sum - (count / others).log()
        known = self.log_normalizer
        self.log_normalizer.copy_(torch.where(known.isnan(), estimate.to(known), known))
        return self.log_normalizer.to(logits)

    def extra_repr(self) -> str:
        options = f"num_negatives={self.num_negatives}, form={self.form!r}, normalize={self.normalize!r}"
        return f"{shown_temperature(self.temperature)}, {options}, reduction={self.reduction!r}"


def _slopes(
    x: Tensor, key: Tensor | None, stored: Tensor, places: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Derivatives [N, D] of term i in row i of x and of key, from `slopes` in the inner products [N, 1 + S]."""
    if key is None:
        return backward_op(x, stored, places, slopes, [True, False])[0], None
    own, of_negatives = slopes[:, :1], slopes[:, 1:].contiguous()
    of_x, _ = backward_op(x, stored, places[:, 1:], of_negatives, [True, False])
    return of_x + own * key, own * x


class _Terms(torch.autograd.Function):
    """Terms [N] with given derivatives: of term i in row i of x, in row i of key, and in the temperature.

    The forward computes the derivatives because the bank's rows may change before the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, terms: Tensor, x: Tensor, key: Tensor | None, temperature: Tensor, *slopes: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, key, temperature, *slopes)
        return terms.view_as(terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *once_differentiable("SampledNCELoss", _scaled, grad, *ctx.saved_tensors), None, None, None


def _scaled(
    grad: Tensor, x: Tensor, key: Tensor | None, temperature: Tensor, *slopes: Tensor | None
) -> tuple[Tensor | None, ...]:
    of_x, of_key, of_temperature = slopes
    assert of_x is not None
    assert of_temperature is not None
    dx = (grad[:, None] * of_x).to(x.dtype)
    dkey = None if key is None or of_key is None else (grad[:, None] * of_key).to(key.dtype)
    return dx, dkey, (grad * of_temperature).sum().to(temperature.dtype)


def draw(bank: MemoryBank, indices: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """int64 ``[N, count]``: drawn uniformly from the bank's updated rows except the anchor's own."""
    known = bank.ids
    if known.shape[0] < 2:
        raise ValueError(
            f"bank: expected at least 2 rows that were updated, to draw negatives from, got {known.shape[0]}"
        )
    indices = indices.to(torch.int64)
    place = torch.searchsorted(known, indices.contiguous()).clamp(max=known.shape[0] - 1)
    own = known[place] == indices
    drawn = torch.randint(0, 2**62, (indices.shape[0], count), generator=generator, device=known.device)
    drawn %= (known.shape[0] - own.long())[:, None]
    drawn += (own[:, None] & (drawn >= place[:, None])).long()
    return known[drawn]


def check_samples(name: str, value: Any, n: int, m: int, device: torch.device) -> None:
    """Expects a tensor [n, S] of integers from 0 to m - 1."""
    check_tensor(name, value)
    if value.dim() != 2 or value.shape[0] != n:
        raise ValueError(f"{name}: expected shape [{n}, S], got {list(value.shape)}")
    check_indices(name, value, m, device)
