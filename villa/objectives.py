"""The pre-training objectives: one table from which data, heads, losses and metrics take their part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from villa.batch import Batch
from villa.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class Objective:
    """What the rooms of the house need to know about an objective.

    Attributes:
        asks: what a model is asked for.
        head: the prediction that is read: of ``words``, region ``features``, detector ``objects``, whether text and
            image are ``matched`` or matched and ``aligned``, ``answers``, ``pairs`` of a micro-batch, or ``lxmert``'s
            parts.
        loss: name of the term in ``villa.losses.pretraining``.
        example: what its examples are made by: masked ``tokens``, masked ``regions`` or a right or wrong ``pair``;
            None where the released databases have none.
        metric: the accuracy that scores it.
    """

    asks: str
    head: str
    loss: str
    example: str | None = None
    metric: str | None = None


#: Every objective by the name that recipes and batches give it.
OBJECTIVES: Mapping[str, Objective] = {
    "mlm": Objective("the tokens that are masked", "words", "classes", "tokens", "mlm_accuracy"),
    "mrfr": Objective("the features of masked regions", "features", "features", "regions"),
    "mrc": Objective("the detector's classes of masked regions", "objects", "top_class", "regions", "mrc_accuracy"),
    "mrc_kl": Objective(
        "the detector's class distributions of masked regions", "objects", "distribution", "regions", "mrc_accuracy"
    ),
    "itm": Objective("whether text and image match", "matched", "classes", "pair", "itm_accuracy"),
    "itm_wra": Objective(
        *("whether they match, with tokens and regions aligned by optimal transport", "aligned", "aligned"),
        *("pair", "itm_accuracy"),
    ),
    "qa": Objective("the answer to a question", "answers", "classes"),
    "contrastive": Objective(
        "which texts of a micro-batch are about which of its images, each embedded on its own", "pairs", "contrastive"
    ),
    "lxmert": Objective("all that LXMERT was pre-trained for, at once", "lxmert", "lxmert"),
}

#: What LXMERT was pre-trained for, by the names of the targets.
LXMERT_PARTS = ("words", "matched", "objects", "attributes", "features", "answers")


def check_objectives(option: str, names: Iterable[str]) -> None:
    """Refuse names that are not those of objectives.

    Args:
        option: the option that gives them, for the message.
        names: what it gives.

    Raises:
        ConfigError: a name is not known.
    """
    wrong = next((name for name in names if name not in OBJECTIVES), None)
    if wrong is not None:
        raise ConfigError(
            f"{option} names '{wrong}', which is not an objective{nearest(wrong, list(OBJECTIVES))} "
            f"(known: {', '.join(OBJECTIVES)})"
        )


def asked_parts(batch: Batch) -> list[str]:
    """The parts that a batch has targets for.

    Raises:
        DataError: none.
    """
    given: Iterable[str] = batch.part_targets or ()
    asked = [name for name in LXMERT_PARTS if name in given]
    if not asked:
        found = next(iter(given), "")
        raise DataError(
            f"objective 'lxmert' needs targets of at least one part{nearest(found, list(LXMERT_PARTS))} "
            f"(known: {', '.join(LXMERT_PARTS)})"
        )
    return asked
