"""A changed byte in a checkpoint is found by whoever reads it: export, comparison, ranks that resume."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_hpt.config import ParallelConfig
from megatron_hpt.errors import CheckpointError
from megatron_hpt.examples import tiny_llama
from megatron_hpt.models import checkpoint_sums
from megatron_hpt.models.checkpoints import META, checksums, damage
from megatron_hpt.models.conversion import ToHf, ToMegatron, compare


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In blocks that are smaller than its files."""
    monkeypatch.setattr(checkpoint_sums, "BLOCK", 4096)
    tiny_llama.write(tmp_path / "hf", hidden=64, heads=4, kv_heads=2)
    ToMegatron(tmp_path / "hf", ParallelConfig(tensor=2), None).write(tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_an_export_and_a_comparison_stop_at_a_flipped_bit(checkpoint: Path, tmp_path: Path, share: float) -> None:
    part = sorted(checkpoint.glob("*.distcp"))[-1]
    flip(part, share)
    with pytest.raises(CheckpointError, match=rf"{part.name}: bytes \d+ to \d+ are not what was written"):
        ToHf(checkpoint).write(tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(CheckpointError, match=part.name):
        list(compare(tmp_path / "hf", checkpoint)[1])


def test_what_was_written_is_read_and_an_older_checkpoint_too_with_a_note(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ToHf(checkpoint).write(tmp_path / "back")
    assert "checksums" not in caplog.text
    meta = json.loads((checkpoint / META).read_text())
    del meta["checksums"]
    (checkpoint / META).write_text(json.dumps(meta))
    ToHf(checkpoint).write(tmp_path / "older")
    assert "was written without checksums" in caplog.text
    for share in (0.2, 0.5, 0.8):
        flip(sorted(checkpoint.glob("*.distcp"))[-1], share)
    with contextlib.suppress(CheckpointError):  # values may be anything; what holds them together is an error in words
        ToHf(checkpoint).write(tmp_path / "damaged")


@pytest.mark.parametrize("resumes", [True, False])
def test_ranks_that_load_refuse_it_and_a_run_passes_over_it_from_then_on(checkpoint: Path, alone: None, resumes: bool) -> None:
    from megatron_hpt.actor.checkpoint import _check_bytes

    _check_bytes(checkpoint, resumes)
    part = sorted(checkpoint.glob("*.distcp"))[0]
    flip(part, 0.5)
    assert damage(checkpoint) is None  # it is large, and only who reads it looks
    with pytest.raises(CheckpointError, match=rf"{part.name}: bytes"):
        _check_bytes(checkpoint, resumes)
    assert (damage(checkpoint) is not None) == resumes


@pytest.mark.slow
def test_every_rank_notes_what_it_writes(tmp_path: Path, tiny_model: Path) -> None:
    from tests.actor.test_actor import Layouts

    saved = tmp_path / "saved"
    Layouts(tmp_path, tiny_model).run("two", "--save", str(saved), last=1, data=2)
    found = checksums(saved)
    assert found is not None
    assert {name.split("_")[2] for name in found if name.endswith(".distcp")} == {"0", "1"}
    assert checkpoint_sums.differing(saved, found) is None
    assert not (saved / ".sums").exists()
