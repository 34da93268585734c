"""Give LXMERT's pre-trained weights the answer head of VQA or GQA, as the released code starts these tasks.

    python projects/lxmert/answer_head.py model_LXRT.pth all_ans.json trainval_ans2label.json vqa.pth

docs/lxmert.md tells where the files are from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from villa.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; return the exit code: 0, or 2 for a mistake in the input, reported in one line on stderr."""
    return run_command("answer_head", lambda: _convert(argv))


def _convert(argv: Sequence[str] | None) -> int:
    parser = Parser("answer_head", description=__doc__)
    parser.add_argument("weights", help="pre-trained weights, with answer_head")
    parser.add_argument("pretrained", type=Path, help="answers of pre-training: all_ans.json")
    parser.add_argument("answers", type=Path, help="labels of the task: trainval_ans2label.json")
    parser.add_argument("output", type=Path, help="file to write")
    options = parser.parse_args(argv)
    from villa.checkpoints.weight_files import write_weights
    from villa.convert.checkpoints import read_pretraining_answers, with_answer_head
    from villa.datasets.base import read_answers

    answers = read_answers(options.answers)
    weights, known = with_answer_head(options.weights, read_pretraining_answers(options.pretrained), answers)
    write_weights(weights, options.output)
    print(f"{options.output}: {known} of {len(answers)} answers start from those of pre-training, the others from zero")
    return 0


if __name__ == "__main__":
    sys.exit(main())
