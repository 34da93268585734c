"""The typed schema of a recipe: a dataclass per section; variant sections are checked by their registered class.

A variant section (``model``, ``dataset``, ``loss``, ``trainer``, ``optimizer``, ``scheduler``, ``launcher``) is
``{name: registered name, ...}``; its other keys are those of the registered class's ``Config``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: The registry (a key of ``villa.registry.REGISTRIES``) of each variant section.
VARIANTS = {
    "model": "models",
    "dataset": "datasets",
    "loss": "losses",
    "trainer": "trainers",
    "optimizer": "optimizers",
    "scheduler": "schedulers",
    "launcher": "launchers",
}

#: Pairs of options of which a recipe gives one: giving one where an earlier layer gives the other replaces that.
ALTERNATIVES = (("training.updates", "training.epochs"), ("batch.examples", "batch.tokens"))


@dataclass
class BatchConfig:
    """The batch size, independent of the number of processes.

    Attributes:
        examples: examples per update over all processes; or
        tokens: text tokens plus regions per update over all processes, padding included (see ``sampler``).
        per_pass: at most this many (examples or tokens) go through the model at once; the number of
            accumulated micro-batches follows from it. None: all at once.
        accumulation: ``mean`` over all examples of the update, the ``sum`` of the micro-batches' means (as in
            the released code), or the ``total`` over all examples (as in the released code for referring
            expressions).
        bucket: examples that are sorted by length together when batches are cut by tokens.
        multiple: with tokens, micro-batches of more examples than this are cut to a multiple of it.
        drop_last: leave out the last, smaller micro-batch (by tokens) or update (by examples) of every epoch.
        sampler: how batches are cut by tokens: ``tight`` counts each batch as padded to its own longest example, and
            carries the rest of a bucket over into the next; ``released``, as in UNITER, counts all batches of a bucket
            as padded to the bucket's longest example, and ends every bucket with a smaller batch (or, with
            ``drop_last``, without it); ``real`` counts no padding, as models compute none (``model.padding_free``).
    """

    examples: int | None = None
    tokens: int | None = None
    per_pass: int | None = None
    accumulation: Literal["mean", "sum", "total"] = "mean"
    bucket: int = 8192
    multiple: int = 1
    drop_last: bool = False
    sampler: Literal["tight", "released", "real"] = "tight"


@dataclass
class WeightPerturbationConfig:
    """Perturbation of the weights: the micro-batches of an update run twice, and only the second run trains.

    In between, the weights move to where the loss is higher; the optimiser steps from where they were.

    Attributes:
        name: ``none``; ``sam`` (Foret et al., ICLR 2021) moves all weights along their gradient; ``awp`` (Wu et al.,
            NeurIPS 2020) moves every matrix by a share of its own norm.
        radius: l2 norm of the move (``sam``), or of a matrix's move relative to the matrix (``awp``: 0.005 to 0.01).
        adaptive: scale the gradient of ``sam`` by the squared weights (ASAM), for a radius about ten times as large.
        after: updates before it begins.
    """

    name: Literal["none", "sam", "awp"] = "none"
    radius: float = 0.05
    adaptive: bool = False
    after: int = 0


@dataclass
class CleanNoiseConfig:
    """Noise on those training passes that the trainer leaves clean: NEFTune around any method.

    Attributes:
        text: size of the noise on word embeddings; None for none. With ``l2``, entries are drawn up to ``text`` over
            the square root of the number of an example's entries (NEFTune's alpha); with ``linf`` up to ``text``.
        image: the same for the image.
        norm: ``l2`` or ``linf``.
    """

    text: float | None = None
    image: float | None = None
    norm: Literal["l2", "linf"] = "l2"

    def sizes(self) -> dict[str, float]:
        """Return the size of the noise by modality, for those that get some."""
        return {modality: size for modality, size in (("text", self.text), ("image", self.image)) if size}


@dataclass
class TrainingConfig:
    """The training loop.

    Attributes:
        updates: optimiser steps; or
        epochs: passes over the training split.
        clip_norm: largest global gradient norm; None does not clip.
        clip_norms: largest gradient norm of a module's or parameter's own gradients, by its dotted name; the longest
            match wins, and ``clip_norm`` is then for all others together.
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16`` (with loss scaling). Perturbations, norms and
            losses stay in fp32.
        nonfinite: what to do if a loss or gradient is NaN or infinite: ``stop``, or ``skip`` the update. An update that
            is finite without the method's perturbations is then trained without them.
        max_skips: stop after this many updates in a row that were skipped, or trained without perturbations.
        threads: CPU threads; None leaves the choice to torch.
        workers: data loading processes.
        data_timeout: seconds that reading an example may take before a warning names it; a worker that takes ten times
            as long ends the run.
        noise: noise on the trainer's clean passes.
        weight_perturbation: SAM or AWP around the trainer's passes.
        ema: decay of a running average of the weights (such as 0.999), which is then evaluated and used by default; the
            decay is lower in the first updates, (1 + n) / (10 + n) after n of them. None keeps none.
    """

    updates: int | None = None
    epochs: int | None = None
    clip_norm: float | None = None
    clip_norms: dict[str, float] = field(default_factory=dict)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = 10
    threads: int | None = None
    workers: int = 0
    data_timeout: float = 60.0
    noise: CleanNoiseConfig = field(default_factory=CleanNoiseConfig)
    weight_perturbation: WeightPerturbationConfig = field(default_factory=WeightPerturbationConfig)
    ema: float | None = None

    def passes(self) -> int:
        """Return how often each micro-batch of an update runs."""
        return 1 if self.weight_perturbation.name == "none" else 2


@dataclass
class RobustEvaluationConfig:
    """Attacks on the validation split while training; see ``RobustnessConfig`` for what the options mean.

    Attributes:
        attacks: registered attacks; none by default.
        every: updates between attacks, a multiple of ``evaluation.every``; None attacks at every evaluation.
        modality: what to perturb: ``text``, ``image``, or ``both``.
        radius: size of the perturbations, relative to the embedding.
        steps: gradient steps of an iterated attack.
        examples: number of examples, always the same.
    """

    attacks: list[str] = field(default_factory=list)
    every: int | None = None
    modality: Literal["text", "image", "both"] = "both"
    radius: float = 0.1
    steps: int = 5
    examples: int = 100


@dataclass
class EvaluationConfig:
    """Evaluation and early stopping.

    Attributes:
        metrics: registered metric names; the loss is always computed.
        every: updates between evaluations on the validation split; None evaluates at the end only.
        split: split to validate on; None for data sets without one.
        test_split: split to test on.
        monitor: value that selects the best checkpoint.
        mode: whether a higher (``max``) or lower (``min``) value of ``monitor`` is better.
        patience: evaluations without improvement before training stops; None never stops early.
        examples: examples per evaluation batch.
        robustness: attacks on the way; their worst case is the value ``robust_<first metric>``.
    """

    metrics: list[str] = field(default_factory=lambda: ["accuracy"])
    every: int | None = None
    split: str | None = "val"
    test_split: str = "test"
    monitor: str = "accuracy"
    mode: Literal["max", "min"] = "max"
    patience: int | None = None
    examples: int = 256
    robustness: RobustEvaluationConfig = field(default_factory=RobustEvaluationConfig)


@dataclass
class CheckpointConfig:
    """Checkpoints.

    Attributes:
        every: updates between checkpoints; None saves at evaluations and at the end only.
        keep: number of newest checkpoints to keep, besides the best.
        resume: resume from the newest intact checkpoint in ``output_dir``.
        path: trained model to evaluate, predict with or train further with a fresh optimiser: a run, a checkpoint, a
            saved folder (villa's or transformers') or its name on the hub. Its vocabulary and labels are used too.
        weights: which weights of a run or checkpoint at ``path``: the ``average`` over updates if it keeps one
            (``training.ema``), or the ``live`` ones.
        sharded: every process writes its shard of weights and optimiser states; otherwise the main process writes all.
        asynchronous: write checkpoints in the background while training continues.
    """

    every: int | None = None
    keep: int = 2
    resume: bool = False
    path: str | None = None
    weights: Literal["average", "live"] = "average"
    sharded: bool = False
    asynchronous: bool = False


@dataclass
class LoggingConfig:
    """Logs.

    Attributes:
        every: updates between log records.
        tensorboard: write TensorBoard events.
        trackers: more registered trackers, such as ``wandb`` or ``csv``.
        project: project that the run belongs to, for trackers that have projects.
        figures: draw ``curves.png`` at the end.
        progress: show progress bars; ``auto`` shows them on a terminal.
    """

    every: int = 10
    tensorboard: bool = True
    trackers: list[str] = field(default_factory=list)
    project: str = "villa"
    figures: bool = True
    progress: Literal["auto", "on", "off"] = "auto"


@dataclass
class PredictConfig:
    """Prediction (``run_type=predict``).

    Attributes:
        input: what to predict on: a folder of images, a list of them (a path a line), or records: JSON lines, CSV,
            parquet and what else ``dataset.test`` may name; None predicts on ``split``.
        columns: name of a column of ``input`` by field; by default ``dataset.columns``, but for JSON lines.
        question: question about every image of ``input`` that has none of its own.
        split: split to predict on.
        output: file to write, in the format of its ending: ``.csv``, ``.parquet``, or JSON lines; None writes
            ``predictions_<split>.jsonl`` in ``output_dir``.
        top_k: answers of an example to write, best first.
        on_error: what to do about an example of ``input`` that cannot be used, such as a broken image: ``stop``, or
            ``skip`` it and list it in ``<output>.skipped.jsonl``.
        examples: examples of ``input`` that the model gets at a time.
        workers: threads that read images of ``input``.
        extractor: options of the extractor of a model that reads region features (its ``name``, ``weights``, ...); by
            default those noted beside the features of the training data.
    """

    input: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    question: str | None = None
    split: str = "test"
    output: str | None = None
    top_k: int = 1
    on_error: Literal["stop", "skip"] = "stop"
    examples: int = 32
    workers: int = 4
    extractor: dict[str, Any] = field(default_factory=dict)


@dataclass
class TextChangesConfig:
    """Words that attacks and shifts of texts put in the place of others.

    Attributes:
        budgets: how many words an attack may change, ascending: shares of the words of a text below 1 (rounded up), or
            numbers of words (1, 2, ...).
        similarity: least cosine similarity of a word and one that takes its place, in the embedding table.
        candidates: most words that are tried in the place of one.
        synonyms: file of words that may take the place of others, instead of the model's own embedding table: JSON,
            ``{word: [words]}``, or vectors, a word and its numbers a line.
        masked_lm: folder, or name on the hub, of a masked language model of transformers that proposes words.
        keep_labels: never replace a word that is a label, nor put one in the place of another: in a question about
            colours, another colour has another answer.
        rephrasings: JSON-lines file of other wordings of the examples: ``{id: [texts]}``, or a line for each,
            ``{"id": ..., "text": ...}``.
    """

    budgets: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.5])
    similarity: float = 0.5
    candidates: int = 20
    synonyms: str | None = None
    masked_lm: str | None = None
    keep_labels: bool = True
    rephrasings: str | None = None


@dataclass
class RobustnessConfig:
    """Attacks on a trained model (``run_type=robustness``).

    Attributes:
        attacks: registered attacks.
        modalities: what to perturb: ``text``, ``image``, ``both``; empty for all that the model has.
        points: by modality, the point that is perturbed instead of the usual one, such as ``{image: pixels}`` or
            ``{text: layer.3}`` (``villa_run --perturbation-points``).
        radii: sizes of the perturbations, ascending; see ``relative_to``. Of pixels they are colours in [0, 1].
        norm: ``l2`` or ``linf``, over all tokens of an example.
        scope: norms are those of a whole example (``row``), or of every ``token``.
        relative_to: unit of the radii: ``embedding``, the norm of what is perturbed; ``table``, the mean norm of the
            rows of the embedding table (with ``scope=token``); or ``none``, 1.
        losses: what attacks raise: the ``task``'s loss, or the ``margin`` of the best wrong label over the right one.
        steps: gradient steps of an iterated attack.
        restarts: random starts, besides the first one.
        split: split to attack.
        examples: number of examples, the same for all models of the data; null for the whole split.
        seed: seed of all draws.
        checks: whether to check that gradients show the model's weaknesses, with some more attacks.
        shifts: registered shifts of the inputs, such as ``word_dropout``; each is tried in five severities.
        source: a trained model whose gradients are followed instead, in the form of ``checkpoint.path``: attacks that
            are transferred.
        text: changes of words.
    """

    attacks: list[str] = field(default_factory=lambda: ["noise", "fgm", "pgd", "apgd"])
    modalities: list[str] = field(default_factory=list)
    points: dict[str, str] = field(default_factory=dict)
    radii: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1, 0.2, 0.5])
    norm: Literal["l2", "linf"] = "l2"
    scope: Literal["row", "token"] = "row"
    relative_to: Literal["none", "embedding", "table"] = "embedding"
    losses: list[str] = field(default_factory=lambda: ["task"])
    steps: int = 20
    restarts: int = 0
    split: str = "test"
    examples: int | None = 100
    seed: int = 0
    checks: bool = True
    shifts: list[str] = field(default_factory=list)
    source: str | None = None
    text: TextChangesConfig = field(default_factory=TextChangesConfig)


@dataclass
class ProbeConfig:
    """What the attention of a trained model tells (``run_type=probe``).

    Attributes:
        data: texts linked to boxes: ``generated`` for models of generated data, ``flickr30k_entities``,
            ``visual_genome`` or ``nlvr`` in their released form, or JSON ``lines``.
        path: folder or file of the data.
        split: split of the data, such as ``test``; null for all.
        images: folder of images, or of feature files for models that read regions; null for those that the data names.
        file: name of an image's file in that folder, with ``{id}``, or ``{id:12}`` for an id padded with zeros; null
            for ``{id}.jpg`` or ``{id}.npz``.
        tokenizer: ``tokenizer.json`` or ``vocab.txt``, for runs whose texts were tokenized beforehand.
        examples: number of texts, the same for all models; null for all.
        types: types of links and relations to report; empty for the most frequent ones.
        most_types: number of the most frequent types of each kind to report.
        span: how attention to several words is put together: ``sum``, ``mean`` or ``max``.
        overlap: least intersection over union of a box and the region that stands for it.
        fusion: whether to measure how much the states of text and image are mixed (needs scikit-learn).
        weights: ``random`` probes the model with fresh weights instead, as a control.
        seed: seed of the draws.
    """

    data: Literal["generated", "flickr30k_entities", "visual_genome", "nlvr", "lines"] = "generated"
    path: str | None = None
    split: str | None = None
    images: str | None = None
    file: str | None = None
    tokenizer: str | None = None
    examples: int | None = 500
    types: list[str] = field(default_factory=list)
    most_types: int = 10
    span: Literal["sum", "mean", "max"] = "sum"
    overlap: float = 0.5
    fusion: bool = True
    weights: Literal["trained", "random"] = "trained"
    seed: int = 0


@dataclass
class AttentionConfig:
    """Pictures of what a trained model attends to (``run_type=attention``), of ``predict.input`` or ``predict.split``.

    Attributes:
        examples: number of examples.
        runs: further runs to show beside, in the form of ``checkpoint.path``.
        heads: what is drawn of one model: ``layer.head`` such as ``3.2`` (from 1), or ``3.mean`` for the mean of a
            layer's heads; empty for the mean of the last layer and its three sharpest heads. Of several models the
            first one is drawn.
        words: whether to leave out special tokens such as [CLS].
        attack: whether to show what an adversary changes, too: PGD in the embeddings.
        radius: size of its perturbation, relative to the embedding.
        steps: its steps.
    """

    examples: int = 4
    runs: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    words: bool = True
    attack: bool = True
    radius: float = 0.1
    steps: int = 10


@dataclass
class DistributedConfig:
    """How a run is distributed over several processes, started by ``torchrun`` or a launcher.

    Attributes:
        strategy: ``single`` (one process), ``ddp`` (every process has the whole model), ``fsdp`` (parameters, gradients
            and optimiser states are sharded), ``fairscale_fsdp`` (the same by fairscale), or ``fairscale_sdp`` (whole
            models; each gradient and optimiser state is on one process, by fairscale).
        activation_checkpointing: recompute every layer in the backward pass instead of keeping its activations:
            less memory, the same gradients.
        compile: compile the layers with ``torch.compile``: faster updates after a slow first one, the same gradients.
        reduce_each_pass: with ``fsdp`` and fairscale's strategies, reduce gradients after every backward pass instead
            of once per update, so that no process ever holds whole gradients: less memory, more communication.
    """

    strategy: Literal["single", "ddp", "fsdp", "fairscale_fsdp", "fairscale_sdp"] = "single"
    activation_checkpointing: bool = False
    compile: bool = False
    reduce_each_pass: bool = False


@dataclass
class RunConfig:
    """A whole recipe.

    Attributes:
        run_type: what to do; ``train_val_test`` trains (validating on the way) and then tests.
        name: name of the run in tables and figures.
        output_dir: folder for everything that the run writes.
        seed: seed that all randomness derives from.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        user_dir: package folder or module to import, so that its decorators register classes; or a list of them. Those
            of included files, recipe and command line add up; null drops those before it.
        model: the model's name and options.
        dataset: the data set's name and options.
        loss: the loss's name and options.
        trainer: the adversarial method's name and options.
        optimizer: the optimiser's name and options.
        scheduler: the learning rate schedule's name and options.
        launcher: where the run takes place: ``inline`` (in this process), ``local`` (processes on this machine) or
            ``slurm``.
        callbacks: registered callbacks by name, each ``true``, ``false``, or a mapping with its options.
    """

    run_type: Literal["train", "val", "test", "predict", "robustness", "probe", "attention", "train_val_test"] = (
        "train_val_test"
    )
    name: str = "run"
    output_dir: str = "outputs/run"
    seed: int = 0
    device: str = "auto"
    user_dir: Any = None
    model: Any = None
    dataset: Any = None
    loss: Any = None
    trainer: Any = None
    optimizer: Any = None
    scheduler: Any = None
    launcher: Any = None
    batch: BatchConfig = field(default_factory=BatchConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
