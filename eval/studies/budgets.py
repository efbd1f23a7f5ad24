"""Does it pay to share the rate out over the layers? Uniform budgets against measured ones, OWL and AlphaPruning.

    python eval/studies/budgets.py --samples 256                                                       # the demo
    python eval/studies/budgets.py --model dinov2_vits14 --data imagenet/val --samples 96 --held-out 64

Each draw of calibration pictures keeps others apart; on these it measures how far the compressed model's features are
from the dense model's (relative error), and for a classifier how often both choose the same class. Writes budgets.csv,
and a plot and a table of the error; run it again to go on where it stopped.
"""

from typing import Any, ClassVar

from torch import nn

from benches import Pictures, Row, load_dense
from oats_vision.data.pictures import Batches, load_pictures
from oats_vision.evaluation.tasks import task_of
from study import collect, picture_parser, run, show_values

BUDGETS = ["uniform", "measured", "owl", "alphapruning"]
RATES = [0.3, 0.5, 0.7]
ERROR, SAME = "relative error of features", "same class"


class HeldOut(Pictures):
    """What the study measures: closeness to the dense model on pictures that were kept apart from calibration."""

    KEYS: ClassVar = [*Pictures.KEYS, "held_out"]
    RESULTS: ClassVar = ["feature_error", "same_class"]

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.held_out = args.held_out
        self.about |= {"held_out": args.held_out}

    def load(self) -> nn.Module:
        """The dense model."""
        self.dense, self.transform = load_dense(self.config)
        return self.dense

    def calibration(self, seed: int) -> Batches:
        """The calibration pictures of a draw; the dense model sees those that are kept apart."""
        batches = load_pictures(
            str(self.config.data),
            self.transform,
            samples=self.config.samples,
            held_out=self.held_out,
            seed=seed,
            split=self.config.split,
            batch_size=self.config.batch_size or 16,
            workers=self.config.workers,
        )
        self.reference = task_of(self.dense).reference(self.dense, batches.held_out)
        return batches

    def measure(self, model: nn.Module, target: str) -> Row:
        found = {metric.name: metric.value for metric in self.reference.compare(model)[0].metrics}
        return {"feature_error": f"{found[ERROR]:.5f}", "same_class": f"{found[SAME]:.2f}" if SAME in found else ""}


def main() -> None:
    flags = picture_parser(__doc__, "results/budgets")
    flags.add_argument("--held-out", type=int, default=128, help="pictures to measure on")
    flags.add_argument("--budgets", nargs="+", default=BUDGETS)
    flags.add_argument("--methods", nargs="+", default=["oats"])
    flags.add_argument("--rates", type=float, nargs="+", default=RATES)
    args = flags.parse_args()
    cells = [
        {"method": method, "rate": rate, "budget": budget}
        for rate in args.rates
        for method in args.methods
        for budget in args.budgets
    ]
    rows = run(HeldOut(args), args, "budgets", cells)
    cells_by_line = collect(rows, lambda row: f"{row['method']}, {row['budget']}", "rate", "feature_error")
    show_values(cells_by_line, f"{rows[0]['model']}, budgets", "rate", ERROR, args.out / "budgets", log_y=True)


if __name__ == "__main__":
    main()
