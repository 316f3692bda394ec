"""Python imports this at start. torchvision of the package index is a CUDA build: beside a CPU torch its operators do not
load, and importing it fails while it registers their shapes. Declaring the two schemas first lets it import; text models
call none of them.
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
