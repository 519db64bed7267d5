"""Looking for the smallest compilation that holds bounds on accuracy, latency and size."""

from qcompiler.search.request import SearchRequest
from qcompiler.search.search import compile_searching

__all__ = ["SearchRequest", "compile_searching"]
