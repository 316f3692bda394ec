"""What trainers of one process leave in this one."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """The next module may want one of its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
