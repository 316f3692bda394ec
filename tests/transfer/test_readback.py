"""Weights that an update must leave where CUDA graphs have found them."""

from types import SimpleNamespace

import pytest

from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.readback import addresses, check_unmoved


def model(device: str, **places: int) -> SimpleNamespace:
    weights = {n: SimpleNamespace(device=SimpleNamespace(type=device), data_ptr=lambda p=p: p) for n, p in places.items()}
    return SimpleNamespace(named_parameters=lambda: iter(weights.items()))


def test_a_weight_that_has_moved_on_a_device_is_named() -> None:
    before = addresses(model("cuda", up=1, down=2))
    check_unmoved(before, model("cuda", up=1, down=2))
    check_unmoved(before, model("cuda", up=1, down=2, scale=3))
    with pytest.raises(TransferError, match=r"^down: the engine has put it elsewhere"):
        check_unmoved(before, model("cuda", up=1, down=3))
    host = addresses(model("cpu", up=1))
    check_unmoved(host, model("cpu", up=2))  # its layers are packed again, and nothing was captured
