"""The conformance kit: checks whether an adapter or a method keeps what the contract promises.

It needs one line of pytest, and a small detector with random weights:

    def test_my_adapter():
        check_adapter(my_tiny_detector(), own=the_librarys_inference, own_losses=the_librarys_losses)

    def test_my_method():
        check_method(MyMethod, student=my_tiny_detector(), teacher=another_tiny_detector())

Each promise is one small function in `adapters/` or `methods/`, and the check has the function's name. Checks work on
copies of the models. If a check must fail, name it with the reason: `known={"bfloat16": "its NMS has none"}`.
"""

from kdtoolkit.testing._batch import example_batch, observe
from kdtoolkit.testing.adapters import ADAPTER_CHECKS, FIRST_STAGE_CHECKS, check_adapter
from kdtoolkit.testing.adapters._case import Own, OwnLosses
from kdtoolkit.testing.methods import METHOD_CHECKS, check_method
from kdtoolkit.testing.methods._case import MethodFactory
from kdtoolkit.testing.report import ConformanceError, ConformanceReport, Result

__all__ = [
    "ADAPTER_CHECKS",
    "FIRST_STAGE_CHECKS",
    "METHOD_CHECKS",
    "ConformanceError",
    "ConformanceReport",
    "MethodFactory",
    "Own",
    "OwnLosses",
    "Result",
    "check_adapter",
    "check_method",
    "example_batch",
    "observe",
]
