"""Changes of ``dataset.synthetic=true`` to a recipe: a tiny model and a run of less than a minute on one core."""

from __future__ import annotations

from villa.config.variants import Overlay

_ON = {"synthetic": True}

#: Changes for all tasks.
SMALL = (
    Overlay(
        _ON,
        {
            "output_dir": "outputs/synthetic/${name}/${trainer.name}_seed${seed}",
            "model.checkpoint": None,
            "dataset.subset": None,
            "dataset.max_text_length": 220,
            "dataset.box_threshold": 0.2,
            "dataset.max_boxes": 100,
            "dataset.min_boxes": 10,
            "dataset.fixed_boxes": None,
            "dataset.compressed": False,
            "optimizer.lr": 1e-3,
            "optimizer.head_lr_multiplier": 1.0,
            "scheduler.warmup": 0.1,
            "scheduler.total": None,
            "scheduler.before": 0,
            "batch.examples": None,
            "batch.tokens": 1024,
            "batch.per_pass": None,
            "batch.multiple": 1,
            "batch.drop_last": False,
            "training.updates": 160,
            "training.epochs": None,
            "training.precision": "fp32",
            "training.threads": 1,  # more do not help so small a model, and hurt on busy cores
            "training.workers": 0,
            "evaluation.every": 40,
            "evaluation.examples": 32,
            "evaluation.patience": None,
            "checkpoint.every": None,
        },
    ),
    # For UNITER; other models keep their options.
    Overlay(
        _ON,
        {
            "model.hidden_size": 64,
            "model.num_layers": 2,
            "model.num_heads": 4,
            "model.intermediate_size": None,
            "model.max_positions": 64,
            "model.hidden_dropout": 0.0,
            "model.attention_dropout": 0.0,
            "model.initializer_range": 0.1,  # of the order of 1 / sqrt(hidden_size); 0.02 is too small for this width
        },
    ),
)

#: An example of VCR has four rows, and its length always counts 100 ground-truth boxes.
SMALL_VCR = (*SMALL, Overlay(_ON, {"batch.tokens": 1700, "dataset.ground_truth_boxes": 100}))

SMALL_REFERRING = (
    *SMALL,
    Overlay(
        _ON,
        {
            "batch.tokens": None,
            "batch.examples": 32,
            "training.updates": 80,
            "evaluation.every": 20,
            "dataset.ground_truth_boxes": 100,
        },
    ),
)
SMALL_RETRIEVAL = (
    *SMALL,
    Overlay(
        _ON,
        {
            "batch.tokens": None,
            "batch.examples": 32,
            "training.updates": 120,
            "evaluation.examples": 4,
            "dataset.eval_images": 400,
            "dataset.negative_size": 1,
        },
    ),
    # Few examples, because they pass through the model one by one. Most candidates are kept, because an untrained model
    # learns little from the hardest alone.
    Overlay(
        {**_ON, "negatives": "hard"},
        {
            "batch.examples": 4,
            "batch.per_pass": 1,
            "training.updates": 180,
            "dataset.negative_size": 7,
            "dataset.hard_negatives": 5,
        },
    ),
)

#: Metrics ignore batches of objectives other than their own.
_OBJECTIVES = Overlay(
    _ON,
    {
        "evaluation.metrics": ["mlm_accuracy", "itm_accuracy", "mrc_accuracy"],
        "evaluation.monitor": "loss",
        "evaluation.mode": "min",
        "training.updates": 60,
        "evaluation.every": 30,
        "evaluation.examples": 64,
    },
)
SMALL_PRETRAINING = (*SMALL, _OBJECTIVES)
SMALL_VCR_PRETRAINING = (*SMALL, _OBJECTIVES, Overlay(_ON, {"dataset.ground_truth_boxes": 100}))
