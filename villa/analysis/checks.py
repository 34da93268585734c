"""Is the robustness real? The usual checks that gradients show a model's weaknesses (Carlini et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

from villa.analysis.robustness import Case, Outcome

#: A difference of mean scores that is none.
_TOLERANCE = 0.01 + 1e-9
#: A radius at which nothing of the input is left, in the largest of the recipe's.
_UNBOUNDED = 100.0
#: Share of examples whose gradient may be zero or wrong, and whose loss may not rise.
_FEW = 0.05
#: Largest relative error of a gradient in fp32 beside finite differences.
_SLOPE_ERROR = 0.1


class Check(NamedTuple):
    """A check and its verdict.

    Attributes:
        name: what should hold.
        passed: whether it does.
        detail: the numbers.
    """

    name: str
    passed: bool
    detail: str


class Extra(NamedTuple):
    """The cases that the checks of a modality need besides those of the recipe.

    Attributes:
        same: PGD at the middle radius alone: in the recipe's it begins where it ended at the smaller ones.
        fewer: PGD with a quarter of the steps, at the middle radius.
        more: with twice the steps.
        again: with two more restarts.
        unbounded: PGD in a ball that is as good as the whole space.
        slope: finite differences of the model's own loss.
        white: PGD along the model's own gradients, if the attacks follow another's.
    """

    same: Case
    fewer: Case
    more: Case
    again: Case
    unbounded: Case
    slope: Case
    white: Case | None


def middle(radii: Sequence[float]) -> float:
    """Return the radius at which most checks are made."""
    return radii[len(radii) // 2]


def extra_cases(main: Case) -> Extra:
    """Return the cases that the checks of PGD's case ``main`` need."""
    at_middle = main._replace(radii=(middle(main.radii),))
    return Extra(
        at_middle,
        at_middle._replace(steps=max(1, main.steps // 4)),
        at_middle._replace(steps=2 * main.steps),
        at_middle._replace(restarts=main.restarts + 2),
        main._replace(radii=(_UNBOUNDED * main.radii[-1],)),
        main._replace(attack="finite_difference", radii=main.radii[:1], steps=1, restarts=0, transferred=False),
        at_middle._replace(transferred=False) if main.transferred else None,
    )


def checks(main: Case, outcomes: Mapping[Case, Sequence[Outcome]], clean_losses: Mapping[str, float]) -> list[Check]:
    """Return the checks of one modality.

    Args:
        main: PGD on the task's loss.
        outcomes: of all cases, on the examples that are right without an attack.
        clean_losses: losses without a perturbation, by id.
    """
    if not outcomes[main]:
        return [Check("an example is right", False, "no example is right even without an attack")]
    return list(_checks(main, outcomes, clean_losses))


def _checks(
    main: Case, outcomes: Mapping[Case, Sequence[Outcome]], clean_losses: Mapping[str, float]
) -> Iterator[Check]:
    extra, place = extra_cases(main), len(main.radii) // 2
    curve = _means(outcomes[main])
    flat = mean(outcome.flat for outcome in outcomes[main])
    yield Check("gradients are not zero", flat <= _FEW, f"zero or not finite for {flat:.0%} of the examples")
    errors = [outcome.slope_error for outcome in outcomes[extra.slope] if outcome.slope_error is not None]
    wrong = mean(error > _SLOPE_ERROR for error in errors)
    yield Check(
        "the loss moves as the gradient says",
        wrong <= _FEW,
        f"off by over {_SLOPE_ERROR:.0%} for {wrong:.0%} of the examples, beside finite differences",
    )
    risen = mean(outcome.losses[-1] > clean_losses[outcome.id] for outcome in outcomes[main])
    share = f"for {risen:.0%} of the examples, at the largest radius"
    yield Check("the loss rises along the gradient", risen >= 1 - _FEW, share)
    yield Check(
        "accuracy falls with the radius",
        all(later <= earlier for earlier, later in pairwise(curve)) and curve[-1] < 1,
        " > ".join(_percent(value) for value in curve),
    )
    unbounded = _means(outcomes[extra.unbounded])[0]
    yield Check("an attack without a bound succeeds", unbounded <= _TOLERANCE, f"{_percent(unbounded)} right are left")
    others = {case.attack: case for case in outcomes if case[:1] + case[2:] == main[:1] + main[2:]}
    for name, claim in (("fgm", "many steps find more than one"), ("noise", "a gradient finds more than noise")):
        if name in others:
            other = _means(outcomes[others[name]])
            held = all(value >= own - _TOLERANCE for value, own in zip(other, curve, strict=True))
            yield Check(claim, held, f"{_percent(curve[place])} by PGD, {_percent(other[place])} by {name}")
    own, fewer, more, again = (_means(outcomes[case])[0] for case in extra[:4])
    yield Check(
        "more steps do not find less",
        more <= own + _TOLERANCE and own <= fewer + _TOLERANCE,
        f"{extra.fewer.steps}, {main.steps}, {extra.more.steps} steps: {', '.join(map(_percent, (fewer, own, more)))}",
    )
    yield Check("the steps suffice", own - more <= _TOLERANCE, f"twice as many lower it by {_percent(own - more)}")
    yield Check(
        "restarts change little", own - again <= 2 * _TOLERANCE, f"two more lower it by {_percent(own - again)}"
    )
    if extra.white is not None:
        white = _means(outcomes[extra.white])[0]
        yield Check(
            "another model's gradients find less",
            white <= own + _TOLERANCE,
            f"{_percent(white)} along its own, {_percent(own)} along the other's",
        )


def _means(outcomes: Sequence[Outcome]) -> list[float]:
    return [mean(scores) for scores in zip(*(outcome.scores for outcome in outcomes), strict=True)]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
