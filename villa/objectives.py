"""The pre-training objectives: one table that data, heads, losses and metrics are looked up in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from villa.batch import Batch
from villa.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class Objective:
    """Head, loss, examples and metric of an objective.

    Attributes:
        asks: what a model predicts.
        head: the prediction to use: ``words``, region ``features``, detector ``objects``, whether text and image are
            ``matched`` or matched and ``aligned``, ``answers``, ``pairs`` of a micro-batch, or ``lxmert``'s parts.
        loss: name of the term in ``villa.losses.pretraining``.
        example: kind of its examples: masked ``tokens``, masked ``regions`` or a matching or mismatching ``pair``; None
            if the released databases have none.
        metric: its accuracy metric.
    """

    asks: str
    head: str
    loss: str
    example: str | None = None
    metric: str | None = None


#: Every objective by its name in recipes and batches.
OBJECTIVES: Mapping[str, Objective] = {
    "mlm": Objective("masked tokens", "words", "classes", "tokens", "mlm_accuracy"),
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
        "which texts and images of a micro-batch match, each embedded separately", "pairs", "contrastive"
    ),
    "lxmert": Objective("all parts of LXMERT's pre-training objective", "lxmert", "lxmert"),
}

#: The parts of LXMERT's pre-training objective, by the names of their targets.
LXMERT_PARTS = ("words", "matched", "objects", "attributes", "features", "answers")


def check_objectives(option: str, names: Iterable[str]) -> None:
    """Refuse unknown objectives.

    Args:
        option: the option that names them, for the message.
        names: the objectives.

    Raises:
        ConfigError: a name is unknown.
    """
    wrong = next((name for name in names if name not in OBJECTIVES), None)
    if wrong is not None:
        raise ConfigError(
            f"{option} names '{wrong}', which is not an objective{nearest(wrong, list(OBJECTIVES))} "
            f"(known: {', '.join(OBJECTIVES)})"
        )


def asked_parts(batch: Batch) -> list[str]:
    """Return the parts of the ``lxmert`` objective that a batch has targets for.

    Raises:
        DataError: it has targets for none.
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
