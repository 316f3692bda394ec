"""Tests of what runs on CUDA alone: on a machine with GPUs and in `make gpu-rehearsal`; elsewhere they are not collected."""

import torch

from tests.fake_gpu import IS_REHEARSAL

collect_ignore_glob = [] if IS_REHEARSAL or torch.cuda.is_available() else ["test_*"]
