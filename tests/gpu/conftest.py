"""Tests of what runs on CUDA alone: on a machine with GPUs and in `make gpu-rehearsal`; elsewhere they are not collected."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*"]
