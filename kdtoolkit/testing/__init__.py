"""The conformance kit: whether an adapter or a method, wherever it was written, keeps what the contract promises.

One line of pytest each, for a detector with random weights and images of 64 px:

    def test_my_adapter():
        check_adapter(my_tiny_detector(), own=the_librarys_inference, own_losses=the_librarys_losses)

    def test_my_method():
        check_method(MyMethod, student=my_tiny_detector(), teacher=another_tiny_detector())

Each promise is one small function (adapters.py, methods.py), whose name is the check's. Checks work on copies of what
is handed in. A failure that has to be lived with is listed with its reason: `known={"bfloat16": "its NMS has none"}`.
"""

from kdtoolkit.testing._common import example_batch, observe
from kdtoolkit.testing.adapters import ADAPTER_CHECKS, FIRST_STAGE_CHECKS, Own, OwnLosses, check_adapter
from kdtoolkit.testing.methods import METHOD_CHECKS, MethodFactory, check_method
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
