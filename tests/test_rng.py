from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from villa.rng import derive_seed, generator, seed_pass

parts = st.lists(st.integers() | st.text(max_size=8), max_size=4)


@given(parts, parts)
def test_seeds_differ_exactly_when_the_parts_do(first: list[int | str], second: list[int | str]) -> None:
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


@given(parts)
def test_seeds_have_63_bits(values: list[int | str]) -> None:
    assert 0 <= derive_seed(*values) < 2**63


def test_a_number_and_its_text_are_different_parts() -> None:
    assert len({derive_seed(1, 23), derive_seed("1", 23), derive_seed(12, 3), derive_seed("1, 23")}) == 4


def test_seed_is_the_same_in_another_process_and_release() -> None:
    code = "from villa.rng import derive_seed; print(derive_seed(7, 'shuffle', 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == derive_seed(7, "shuffle", 3) == 8645944366093577699


def draw(*key: int) -> list[float]:
    seed_pass(*key)
    return torch.nn.functional.dropout(torch.ones(64)).tolist()


def test_equal_passes_draw_equal_dropout_whatever_was_drawn_between() -> None:
    first = draw(0, 5, 1, 0)
    torch.rand(1000)
    assert draw(0, 5, 1, 0) == first


def test_every_part_of_the_key_changes_the_dropout() -> None:
    base = (3, 3, 3, 3)
    others = [tuple(4 if i == j else 3 for j in range(4)) for i in range(4)]
    assert len({tuple(draw(*key)) for key in [base, *others]}) == 5


def test_generators_are_independent_of_the_global_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.rand(8, generator=generator(1, "init"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.rand(8, generator=generator(1, "init")), first)
    assert not torch.equal(torch.rand(8, generator=generator(2, "init")), first)
