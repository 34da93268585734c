"""Attacks on words against a bag of words, whose worst substitutions are known."""

import importlib
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU
from torch import Tensor, nn

from villa.analysis.candidates import MaskedWords, Synonyms, misspellings
from villa.analysis.robustness import Outcome
from villa.analysis.victim import Measure, Victim
from villa.analysis.word_attacks import Query, Search, WordAttack
from villa.analysis.word_search import Start, attack_words, runner, words_of
from villa.analysis.words import PieceWords, Texts, Vocabulary, Wording, WrittenWords, whole_words
from villa.batch import Batch
from villa.config.schema import TextChangesConfig
from villa.datasets.base import Example
from villa.datasets.collation import collate
from villa.engine.passes import ModelPasses, Precision
from villa.errors import VillaError
from villa.evaluation.metrics import Accuracy
from villa.facts import DataFacts
from villa.losses.classification import CrossEntropy
from villa.models.base import Model, ModelOutput, Point
from villa.registry import ATTACKS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = tuple(a + b + "o" for a in "bcdfg" for b in "aeiou")
TOKENS = (*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS), "?", *WORDS)
FIRST = TOKENS.index(WORDS[0])
WIDTH, COUNT, LENGTH = 4, 30, 7


class Bag(Model):
    """Two classes; the logit of the second is the sum of the words' weights, each a product with its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(len(TOKENS), WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.Parameter(torch.tensor(9.0))
        self.double()

    @classmethod
    def from_config(cls, config: Any, facts: DataFacts) -> Model:
        raise NotImplementedError

    def weights(self) -> Tensor:
        return (self.embed.weight @ self.weight).detach()

    def margin(self, ids: Tensor) -> Tensor:
        return self.weights()[ids].sum() + self.bias.detach()

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        assert batch.input_ids is not None
        assert batch.attention_mask is not None
        side = ((self.embed(batch.input_ids) * batch.attention_mask.unsqueeze(-1)).sum(1)) @ self.weight + self.bias
        return ModelOutput(torch.stack((torch.zeros_like(side), side), 1))

    def perturbation_points(self) -> Mapping[str, Point]:
        return {"text": Point("embed", "output", lambda batch: batch.attention_mask)}


def texts(model: Bag, **options: Any) -> Texts:
    given = {"similarity": -1.0, "candidates": len(WORDS), **options}
    return Texts(TextChangesConfig(**given), DataFacts(len(TOKENS), tokens=TOKENS), 20, model.embed.weight.detach, 0)


def examples(model: Bag) -> list[Example]:
    """Texts of which the model says the second class, with that as the target."""
    generator, found = torch.Generator().manual_seed(1), []
    while len(found) < COUNT:
        words = torch.randint(len(WORDS), (LENGTH,), generator=generator) + FIRST
        ids = torch.cat((torch.tensor([2]), words, torch.tensor([TOKENS.index("?"), 3])))
        if model.margin(ids) > 0:
            found.append(Example(str(len(found)), ids, target=1))
    return found


def attacked(
    name: str, model: Bag, given: Sequence[Example], budgets: Sequence[float], loss: str = "margin", **options: Any
) -> list[Outcome]:
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)

    def make(some: Sequence[Example]) -> Victim:
        return Victim(passes, collate(list(some)), Measure(CrossEntropy(), Accuracy(), loss), list(range(len(some))))

    attack: WordAttack = ATTACKS.get(name)(texts(model, **options))
    starts = []
    for one in given:
        losses, scores = make([one]).clean()
        starts.append(Start(one, losses.item(), scores.item()))
    return attack_words(attack, budgets, starts, runner(make), bool)


@pytest.mark.parametrize("name", ["synonym_swap", "hotflip"])
def test_the_worst_words_of_a_bag_are_found_exactly(name: str) -> None:
    """With all words for candidates, the worst are those of the largest weights, each replaced by the smallest one."""
    model = Bag()
    weights, given = model.weights(), examples(model)
    lowest = weights[FIRST:].min()
    outcomes = attacked(name, model, given, [1, 2, 3, 5])
    for one, outcome in zip(given, outcomes, strict=True):
        assert isinstance(one.input_ids, Tensor)
        total = model.margin(one.input_ids)
        drops = (weights[one.input_ids[1 : 1 + LENGTH]] - lowest).sort(descending=True).values
        margins = [(total - drops[:count].sum()).item() for count in (1, 2, 3, 5)]
        first = next((count for count, value in zip((1, 2, 3, 5), margins, strict=True) if value <= 0), None)
        assert outcome.scores == [float(value > 0) for value in margins]
        for place, count in enumerate((1, 2, 3, 5)):
            if first is None or count <= first:  # a text that has fallen is not searched further
                if margins[place] > 0:
                    assert outcome.words[place] == count
                    assert outcome.losses[place] == pytest.approx(-margins[place])
                assert outcome.sizes[place] == outcome.words[place] / LENGTH
    assert 0 < sum(outcome.scores[1] for outcome in outcomes) < COUNT


def test_greedy_never_claims_more_than_the_worst_of_all_substitutions() -> None:
    model = Bag()
    near, weights = {"similarity": 0.3, "candidates": 3}, model.weights()
    found = Synonyms(texts(model, **near))
    given = examples(model)
    outcomes = attacked("synonym_swap", model, given, [2], **near)
    reached = 0
    for one, outcome in zip(given, outcomes, strict=True):
        words = texts(model).wording(one).words
        weight = {word: weights[TOKENS.index(word)].item() for word in WORDS}
        assert isinstance(one.input_ids, Tensor)
        total = model.margin(one.input_ids).item()
        choices = [[weight[other] - weight[word] for other, _ in found.of(word)] for word in words]
        pairs = [a + b for i, j in combinations(range(LENGTH), 2) for a, b in product(choices[i], choices[j])]
        best = total + min([0.0, *pairs, *(change for its in choices for change in its)])
        assert outcome.scores[0] >= float(best > 0)
        reached += outcome.scores[0] == float(best > 0)
    assert reached > 0.8 * COUNT


def test_without_candidates_results_are_those_without_an_attack() -> None:
    model = Bag()
    given = examples(model)
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)
    losses, _ = Victim(passes, collate(given), Measure(CrossEntropy(), Accuracy()), list(range(COUNT))).clean()
    for name in ("synonym_swap", "hotflip"):
        outcomes = attacked(name, model, given, [0.3, 0.5], loss="task", similarity=1.0)
        assert all(outcome.scores == [1.0, 1.0] for outcome in outcomes)
        assert [outcome.losses[1] for outcome in outcomes] == pytest.approx(losses.tolist(), abs=0)
        assert all(outcome.words == [0, 0] for outcome in outcomes)
        assert all(len(set(outcome.texts)) == 1 for outcome in outcomes)


def test_what_is_reported_is_what_the_model_reads() -> None:
    model = Bag()
    given = examples(model)
    for outcome in attacked("synonym_swap", model, given, [0.3]):
        before, after = (text.split() for text in outcome.texts)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == outcome.words[0]
        ids = torch.tensor([2, *(TOKENS.index(word) for word in after), 3])
        assert outcome.scores[0] == float(model.margin(ids) > 0)
        assert outcome.forwards[0] <= 1 + LENGTH + words_of(0.3, LENGTH) * len(WORDS)


def test_examples_together_are_as_each_by_itself() -> None:
    model = Bag()
    given = examples(model)
    for name in ("synonym_swap", "hotflip", "misspelling"):
        whole = attacked(name, model, given, [1, 3])
        assert whole == [one for example in given for one in attacked(name, model, [example], [1, 3])]


def test_all_processes_run_as_many_passes_of_each_kind() -> None:
    """One that has nothing to do runs passes of its first example as long as another goes on."""
    model, kinds = Bag(), list[bool]()
    given = examples(model)[:1]
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)

    def make(some: Sequence[Example]) -> Victim:
        return Victim(passes, collate(list(some)), Measure(CrossEntropy(), Accuracy()), list(range(len(some))))

    def counting(some: Sequence[Example], gradient: bool) -> Any:
        kinds.append(gradient)
        return runner(make)(some, gradient)

    others = iter([True, False, True, True, True, False, *[True, False] * 3, False])  # another process, and then none
    attack = ATTACKS.get("misspelling")(texts(model))
    alone = attack_words(attack, [1], [Start(given[0], 0.1, 1.0)], runner(make), bool)
    together = attack_words(
        attack, [1], [Start(given[0], 0.1, 1.0)], counting, lambda mine: mine or next(others, False)
    )
    assert together == alone
    assert True in kinds


def test_a_loss_that_is_not_known_is_asked_for() -> None:
    model = Bag()
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)
    measure = Measure(CrossEntropy(), Accuracy(), "margin")
    run = runner(lambda some: Victim(passes, collate(list(some)), measure, list(range(len(some)))))
    given = examples(model)[:4]
    attack = ATTACKS.get("synonym_swap")(texts(model))
    found = attack_words(attack, [1], [Start(one, None, 1.0) for one in given], run, bool)
    known = attacked("synonym_swap", model, given, [1])
    assert [one.losses for one in found] == [one.losses for one in known]
    assert [one.forwards[0] - 1 for one in found] == [one.forwards[0] for one in known]
    nothing = ATTACKS.get("synonym_swap")(texts(model, similarity=1.0))
    (left,) = attack_words(nothing, [1], [Start(given[0], None, 1.0)], run, bool)
    assert isinstance(given[0].input_ids, Tensor)
    assert left.losses == pytest.approx([-model.margin(given[0].input_ids).item()])


def test_losses_are_those_of_the_source_and_scores_the_models_own() -> None:
    model, other = Bag(), Bag()
    with torch.no_grad():
        other.weight.neg_()
    mine, theirs = (ModelPasses(m, CrossEntropy(), Precision("fp32", CPU), 0) for m in (model, other))
    some = examples(model)[:3]
    batch = collate(some)
    measure = Measure(CrossEntropy(), Accuracy())
    own = Victim(mine, batch, measure, [0, 1, 2]).clean()
    guide = Victim(theirs, batch, measure, [0, 1, 2]).clean()
    makers = [lambda given, p=p: Victim(p, collate(list(given)), measure, [0, 1, 2]) for p in (mine, theirs)]
    for gradient in (False, True):
        answer = runner(*makers)(some, gradient)
        assert answer.scores == own[1].tolist() != guide[1].tolist()
        assert answer.losses == pytest.approx(guide[0].tolist())
        assert (answer.gradient is not None) == gradient


def test_labels_neither_go_nor_come() -> None:
    model = Bag()
    free = texts(model)
    kept = Texts(free.options, DataFacts(tokens=TOKENS, labels=(WORDS[0], "yes")), 20, free.look_up, 0)
    assert Synonyms(free).of(WORDS[0])
    assert not Synonyms(kept).of(WORDS[0])
    assert WORDS[0] in [word for word, _ in Synonyms(free).of(WORDS[1])]
    assert WORDS[0] not in [word for word, _ in Synonyms(kept).of(WORDS[1])]


def test_neighbours_are_those_above_the_threshold() -> None:
    model = Bag()
    table = torch.nn.functional.normalize(model.embed.weight.detach().float(), dim=-1)
    for word in WORDS[:5]:
        cosines = {other: float(table[TOKENS.index(word)] @ table[TOKENS.index(other)]) for other in WORDS}
        near = sorted((o for o in WORDS if o != word and cosines[o] >= 0.4), key=lambda other: -cosines[other])
        found = Synonyms(texts(model, similarity=0.4)).of(word)
        assert [other for other, _ in found] == near
        assert [value for _, value in found] == pytest.approx([cosines[other] for other in near], abs=1e-6)


def test_words_in_pieces_are_kept_whole() -> None:
    vocabulary = Vocabulary(TOKENS)
    ids = torch.tensor([2, FIRST, *vocabulary.pieces("zebra"), TOKENS.index("?"), FIRST + 1, 3])
    types = torch.zeros(len(ids), dtype=torch.int64)
    types[-2:] = 1
    one = PieceWords(Example("one", ids, types), vocabulary, 0)
    assert one.words == (WORDS[0], "zebra", WORDS[1])
    assert one.text({}) == f"{WORDS[0]} zebra ? {WORDS[1]}"
    assert one.example({}).input_ids is ids
    shorter = one.example({1: WORDS[5], 2: None})
    assert isinstance(shorter.input_ids, Tensor)
    assert shorter.input_ids.tolist() == [2, FIRST, FIRST + 5, TOKENS.index("?"), 3]
    assert isinstance(shorter.token_type_ids, Tensor)
    assert shorter.token_type_ids.tolist() == [0, 0, 0, 0, 1]
    longer = one.example({0: "zebrazebra"})
    assert isinstance(longer.input_ids, Tensor)
    assert len(longer.input_ids) == len(ids)  # cut, before the last special token
    assert longer.input_ids[-1] == 3


def test_written_words_keep_what_is_between_them() -> None:
    one = WrittenWords(Example("one", text="Is it Peter's well-known dog,  or not?", pair="Yes.", images=(0,)))
    assert one.words == ("Is", "it", "Peter's", "well-known", "dog", "or", "not", "Yes")
    changed = one.example({0: "Was", 3: "unknown", 4: None, 7: "No"})
    assert (changed.text, changed.pair) == ("Was it Peter's unknown,  or not?", "No.")
    assert changed.images == (0,)
    assert one.example({}).text == "Is it Peter's well-known dog,  or not?"


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (("[CLS]", "cat", "##cat", "a", "7x", "dog"), {"cat": 1, "dog": 5}),
        (("<s>", "Ġcat", "cat", "Ġ!"), {"cat": 1}),
        (("▁cat", "s", "▁Dog"), {"cat": 0, "Dog": 2}),
        (("cat</w>", "cat", "<|endoftext|>"), {"cat": 0}),
    ],
)
def test_whole_words_of_every_kind_of_vocabulary(tokens: tuple[str, ...], words: dict[str, int]) -> None:
    assert whole_words(tokens) == words


def test_misspellings_are_one_slip_away() -> None:
    made = misspellings("red")
    assert made["swap"] == ["rde"]
    assert made["delete"] == ["rd", "re"]
    assert "rwd" in made["replace"]
    assert all(word[0] == "r" and word != "red" for its in made.values() for word in its)
    assert not misspellings("it")
    assert "Rwd" in misspellings("Red")["replace"]


class Lazy(WordAttack):
    """Asks for more than a pass holds."""

    def search(self, id_: str, wording: Wording, most: int) -> Search:
        answer = yield Query([{0: word} for word in (*WORDS, *WORDS)])
        assert len(answer.losses) == 2 * len(WORDS)


def test_a_query_may_be_larger_than_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bag()
    monkeypatch.setitem(ATTACKS._classes, "lazy", Lazy)
    (found,) = attacked("lazy", model, examples(model)[:1], [1])
    assert found.forwards == [2 * len(WORDS)] or found.scores == [0.0]


@pytest.mark.parametrize(("budget", "words", "count"), [(0.1, 7, 1), (0.3, 10, 3), (0.5, 7, 4), (2, 7, 2), (9, 7, 7)])
def test_budgets_are_shares_rounded_up_or_numbers(budget: float, words: int, count: int) -> None:
    assert words_of(budget, words) == count


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random masked language model, and beside it the encoder alone, with the vocabulary of the texts."""
    transformers: Any = importlib.import_module("transformers")
    folder = tmp_path_factory.mktemp("masked")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(TOKENS), max_position_embeddings=40, **sizes)
    for name, kind in (("whole", transformers.BertForMaskedLM), ("encoder", transformers.BertModel)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_a_masked_language_model_proposes_its_likeliest_words(masked_lm: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    model = transformers.BertForMaskedLM.from_pretrained(masked_lm / "whole").eval()
    given = texts(Bag(), masked_lm=str(masked_lm / "whole"), candidates=5)
    one = Example("one", text=f"{WORDS[3]} {WORDS[9]}, {WORDS[4].capitalize()}?")
    found = MaskedWords(given).of(WrittenWords(one))
    pieces = [TOKENS.index(token) for token in ("[CLS]", WORDS[3], WORDS[9], "[UNK]", WORDS[4], "?", "[SEP]")]
    for place, word in ((1, 3), (2, 9), (4, 4)):
        ids = torch.tensor([pieces])
        ids[0, place] = TOKENS.index("[MASK]")
        with torch.inference_mode():
            ranked = model(input_ids=ids).logits[0, place].argsort(descending=True).tolist()
        best = [TOKENS[row] for row in ranked if TOKENS[row] in WORDS and TOKENS[row] != WORDS[word]]
        words = [other.lower() for other in found[{1: 0, 2: 1, 4: 2}[place]]]
        assert words == best[: len(words)]
        assert words
    assert found[2][0][0].isupper()
    outcomes = attacked(
        "masked_lm_swap", Bag(), examples(Bag())[:4], [2], masked_lm=str(masked_lm / "whole"), candidates=10
    )
    assert any(outcome.words[0] for outcome in outcomes)


def test_an_encoder_without_its_head_proposes_nothing(masked_lm: Path) -> None:
    with pytest.raises(VillaError, match="is no masked language model: it has no weights for cls"):
        MaskedWords(texts(Bag(), masked_lm=str(masked_lm / "encoder")))
