"""The pre-training objectives: names that recipes and batches give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from villa.batch import Batch
from villa.errors import ConfigError, DataError, nearest

#: Every objective with what it asks of a model.
OBJECTIVES: Mapping[str, str] = {
    "mlm": "the words that are masked",
    "mrfr": "the features of masked regions",
    "mrc": "the detector's classes of masked regions",
    "mrc_kl": "the detector's class distributions of masked regions",
    "itm": "whether text and image match",
    "itm_wra": "whether they match, with words and regions aligned by optimal transport",
    "qa": "the answer to a question",
    "contrastive": "which texts of a micro-batch are about which of its images, each embedded on its own",
    "lxmert": "all that LXMERT was pre-trained for, at once",
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
