"""Options of the losses: one record for module, functional form, presets and repr."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import torch

from ..checks import check_flag, check_option, finite_number
from ..distributed import MODES, check_group

if TYPE_CHECKING:
    from torch import nn

FORMS = ("outside", "inside", "pairs")
DENOMINATORS = ("all", "negatives")
REDUCTIONS = ("mean", "sum", "none")


class LossOptions(NamedTuple):
    """The options of `ClusterInfoNCE` and their defaults; the class describes them."""

    form: str = "outside"
    denominator: str = "all"
    margin: float = 0.0
    label_smoothing: float = 0.0
    symmetric: bool = False
    normalize: bool = True
    reduction: str = "mean"
    gather: bool | str = False
    group: object = None

    def checked(self) -> LossOptions:
        """The options with numbers as floats. ValueError or TypeError names an option that is not valid."""
        if self.group is None and not torch.compiler.is_compiling():  # the compiler warns of caches
            try:
                return _known(*self)
            except TypeError:
                pass  # not hashable, or refused below
        return self._checked()

    def _checked(self) -> LossOptions:
        check_option("form", self.form, FORMS)
        check_option("denominator", self.denominator, DENOMINATORS)
        if self.form == "pairs" and self.denominator != "all":
            raise ValueError(f"denominator: expected 'all' with form='pairs', got {self.denominator!r}")
        margin = finite_number("margin", self.margin)
        if margin < 0:
            raise ValueError(f"margin: expected a number of at least 0, got {margin}")
        smoothing = finite_number("label_smoothing", self.label_smoothing)
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number of at least 0 and below 1, got {smoothing}")
        if smoothing and (self.form, self.denominator, margin) != ("outside", "all", 0):
            form, denominator = self.form, self.denominator
            raise ValueError(
                "label_smoothing: expected 0 unless form='outside', denominator='all' and margin=0; "
                f"got {smoothing} with form={form!r}, denominator={denominator!r}, margin={margin}"
            )
        check_flag("symmetric", self.symmetric)
        check_flag("normalize", self.normalize)
        check_option("reduction", self.reduction, REDUCTIONS)
        check_option("gather", self.gather, MODES)
        check_group(self.group, self.gather)
        # torch 2.6 cannot compile _replace.
        return LossOptions(
            self.form, self.denominator, margin, smoothing, self.symmetric, self.normalize, self.reduction,
            self.gather, self.group,
        )  # fmt: skip


@functools.lru_cache(maxsize=128, typed=True)
def _known(*options: Any) -> LossOptions:
    """`LossOptions.checked` without a group: a small loss takes little longer than the checks."""
    return LossOptions(*options)._checked()


# The options that losses take, as keywords for type checkers. A loss's names and its signature follow from its class.


class DecoupledKeywords(TypedDict, total=False):
    margin: float
    normalize: bool
    reduction: str
    gather: bool | str
    group: object


class PresetKeywords(DecoupledKeywords, total=False):
    label_smoothing: float


class SupConKeywords(PresetKeywords, total=False):
    form: str


class OptionKeywords(SupConKeywords, total=False):
    """All of `LossOptions`."""

    denominator: str
    symmetric: bool


def option_names(keywords: type) -> tuple[str, ...]:
    """The names of the options that a class of keywords has, in the order of `LossOptions`."""
    return tuple(name for name in LossOptions._fields if name in keywords.__annotations__)


# `extra_repr` shows these only if they are set.
_SHOWN_IF_SET = ("label_smoothing", "gather", "group")


def options_of(module: nn.Module) -> LossOptions:
    """The options, from the module's attributes."""
    return LossOptions(*[getattr(module, name) for name in LossOptions._fields])


def shown_options(module: nn.Module) -> str:
    """The options for `extra_repr`, each after a comma."""
    values = options_of(module)._asdict().items()
    return "".join(f", {name}={value!r}" for name, value in values if value or name not in _SHOWN_IF_SET)


def parse_options(
    owner: str,
    given: Mapping[str, Any],
    names: tuple[str, ...] = LossOptions._fields,
    fixed: Mapping[str, Any] | None = None,
) -> LossOptions:
    """Options from the keywords `given` and the values that `owner` fixes. TypeError for a keyword not in `names`."""
    for name in given:
        if name not in names:
            refuse_renamed(owner, name)
            raise TypeError(f"{owner}: expected options out of {', '.join(names)}; got {name!r}")
    return LossOptions(**given, **(fixed or {}))


_ONE_BATCH = "gather=True (or 'ring') contrasts the rows of all processes; rank and size come from torch.distributed"
_QUEUE = "here a queue is an argument of the call: MoCoLoss(temperature)(query, key, MemoryQueue(size, dim))"
# Arguments of other libraries' constructors, and what they are called here.
_RENAMED = {
    **dict.fromkeys(("local_loss", "gather_with_grad", "rank", "world_size", "use_horovod", "dist_impl"), _ONE_BATCH),
    "cache_labels": "there are no labels to cache here, leave it out",
    "gather_distributed": "it is called gather here: gather=True",
    "memory_bank_size": _QUEUE,
    "reducer": "the losses of fastcl have reduction=",
    "embedding_regularizer": "add its value to the loss",
    "sinkhorn_epsilon": "it is called epsilon here",
    "sinkhorn_iterations": "it is called n_iters here",
    "sinkhorn_gather_distributed": "it is called gather here: gather=True",
    "base_temperature": "there is none here: multiply the loss by temperature / base_temperature",
    "weight_fn": "DCLWLoss has the paper's weights; for others docs/own_loss.md has five lines",
    "contrast_mode": "pass the first views as embeddings and all rows as contrasts, as docs/migration.md shows",
    "regularization_weight": "it is called prior_weight here",
    "power_law_exponent": "pass prior=functools.partial(power_law_prior, exponent=x)",
}


def refuse_renamed(owner: str, name: str) -> None:
    """TypeError for an argument that other libraries have under this name, with what it is called here."""
    if name in _RENAMED:
        raise TypeError(f"{owner}: expected no argument {name!r}; {_RENAMED[name]}")


F = TypeVar("F", bound=Callable[..., Any])


def refuses_renamed(init: F) -> F:
    """Decorator of a constructor: `refuse_renamed` for keywords that it does not have. Its signature stays."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(self: nn.Module, *arguments: Any, **keywords: Any) -> None:
        for name in keywords:
            if name not in known:
                refuse_renamed(type(self).__name__, name)
        init(self, *arguments, **keywords)

    return checked  # type: ignore[return-value]


def takes_options(keywords: type) -> Callable[[F], F]:
    """Decorator: the function's signature and annotations list the options of `keywords` in place of ``**options``."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for name in option_names(keywords):
            default, kind = LossOptions._field_defaults[name], LossOptions.__annotations__[name]
            kind = getattr(kind, "__forward_arg__", kind)
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        shown = {p.name: p.annotation for p in parameters if p.annotation is not p.empty}
        function.__annotations__ = {**shown, "return": signature.return_annotation}
        return function

    return decorate
