"""The base of methods that compare predictions. Such a method is one function of two detectors' predictions.

    class SquaredDifference(PredictionMethod):
        terms = ("cls",)
        paper = "none"

        def losses(self, student: Predictions, teacher: Predictions, pair: Matched) -> dict[str, Tensor]:
            difference = student.logits - teacher.logits.detach()
            return {"cls": difference.square().mean()}

`PredictionMethod` brings both heads to the same priors.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from torch import Tensor

from kdtoolkit.compatibility import check_grids, why_priors_differ, why_scores_differ
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Matched, Method, Predictions, Whose


class PredictionMethod(Method):
    """A method that compares two detectors' predictions at the same priors. A subclass writes `losses`.

    Pairs whose priors or class scores do not correspond are refused. So is a batch from which the two detectors make
    grids of different sizes.

    Attributes:
        priors: whose proposals or queries go through both heads. On a grid it makes no difference.
    """

    needs = frozenset({Capability.PREDICTIONS, Capability.ASSIGNMENT})
    priors: Whose = "student"

    @abstractmethod
    def losses(self, student: Predictions, teacher: Predictions, pair: Matched) -> dict[str, Tensor]:
        """The weighted terms, float32 scalars, by names of `terms`.

        Args:
            student: the student's predictions.
            teacher: the teacher's predictions at the same priors, with `boxes` on the student's canvas. Detach what is
                compared, so that no gradient reaches it.
            pair: the assignments of ground truth to these priors, `student_assignment` and `teacher_assignment`.
        """

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs whose priors do not correspond one to one, or whose scores differ in kind."""
        return why_priors_differ(student_spec, teacher_spec) or why_scores_differ(student_spec, teacher_spec)

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The weighted terms of one step.

        Raises IncompatibleError where the two detectors bring the batch to grids of different sizes.
        """
        pair = exchange.matched(self.priors)
        student, teacher = pair.student.predictions, pair.teacher.predictions
        check_grids(type(self).__name__, student, teacher)
        # Priors lie at the same place of the image, though not always of the canvas.
        return self.losses(student, replace(teacher, decode=lambda regression, priors: pair.teacher_boxes), pair)
