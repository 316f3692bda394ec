"""Lets torchvision be imported beside a CPU torch; Python imports this module when it starts.

torchvision of the package index is a CUDA build: beside a CPU torch its operators do not load, and importing it fails while
it registers their shapes. It imports if their two schemas have been declared before. Text models call neither operator.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.cuda.is_available():
                for operator in ("nms", "qnms"):
                    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOperators())
