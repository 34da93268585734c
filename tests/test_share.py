"""Dealing out micro-batches, and what the environment says about processes."""

import pytest

from villa.config.schema import BatchConfig
from villa.distributed.environment import Place
from villa.engine.setup import batch_of_processes, idle_note
from villa.errors import ConfigError
from villa.losses.classification import CrossEntropy
from villa.losses.pretraining import Contrastive, Pretraining
from villa.share import WHOLE, Share, Turn


@pytest.mark.parametrize(("count", "world_size"), [(1, 1), (5, 1), (4, 2), (5, 2), (1, 3), (7, 3), (0, 2)])
def test_every_micro_batch_has_one_owner_and_all_have_as_many_turns(count: int, world_size: int) -> None:
    dealt = [Share(rank, world_size).turns(count) for rank in range(world_size)]
    assert sorted(turn.number for turns in dealt for turn in turns if turn.own) == list(range(count))
    assert {len(turns) for turns in dealt} == {-(-count // world_size)}
    assert all(turn.number < count for turns in dealt for turn in turns)


def test_one_process_has_everything_in_order() -> None:
    assert WHOLE.turns(3) == [Turn(0), Turn(1), Turn(2)]
    assert Share(1, 2).turns(3) == [Turn(1), Turn(0, own=False)]


def test_updates_are_cut_for_all_processes_where_the_recipe_leaves_it_open() -> None:
    assert batch_of_processes(BatchConfig(examples=10), 4).per_pass == 3
    assert batch_of_processes(BatchConfig(tokens=100), 2).per_pass == 50
    for kept in (BatchConfig(examples=10), BatchConfig(examples=10, per_pass=10)):
        assert batch_of_processes(kept, 1) == kept
    assert batch_of_processes(BatchConfig(examples=10, per_pass=10), 2).per_pass == 10
    with pytest.raises(ConfigError, match=r"accumulation=sum .* on 2 processes: give batch\.per_pass"):
        batch_of_processes(BatchConfig(examples=10, accumulation="sum"), 2)


def test_a_loss_that_compares_examples_leaves_no_cut_open() -> None:
    contrastive, mixture = Contrastive(), Pretraining()
    assert contrastive.compares_examples(["contrastive"])
    assert mixture.compares_examples(["mlm", "contrastive"])
    assert not mixture.compares_examples(["mlm", "itm"])
    assert not CrossEntropy().compares_examples([])
    with pytest.raises(ConfigError, match=r"the loss compares the examples .* on 3 processes: give batch\.per_pass"):
        batch_of_processes(BatchConfig(examples=10), 3, compares_examples=True)
    for batch, processes in ((BatchConfig(examples=10), 1), (BatchConfig(examples=10, per_pass=5), 3)):
        assert batch_of_processes(batch, processes, compares_examples=True) == batch


def test_idle_processes_are_told_of() -> None:
    assert idle_note(BatchConfig(examples=8, per_pass=4), 2) == []
    (note,) = idle_note(BatchConfig(examples=8, per_pass=8), 4)
    assert note.startswith("an update is 1 micro-batch, so that 3 of 4 processes")
    assert note.endswith("lower batch.per_pass to 2")


def test_the_environment_says_where_a_process_is() -> None:
    whole = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node", "MASTER_PORT": "1234"}
    assert Place.read(whole) == Place(3, 4, 1)
    assert Place.read({**whole, "VILLA_START_TIMEOUT": "900"}).patience == 900
    assert Place.read({}) == Place.read({"WORLD_SIZE": "1", "RANK": "0"}) == Place(0, 1, 0)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 4, but RANK is not set; start the processes with torchrun"):
        Place.read({**whole, "RANK": ""})
    with pytest.raises(ConfigError, match="RANK is 4, but WORLD_SIZE is 4"):
        Place.read({**whole, "RANK": "4"})
    with pytest.raises(ConfigError, match="LOCAL_RANK is 'x'; it must be a whole number"):
        Place.read({**whole, "LOCAL_RANK": "x"})
