# SPDX-License-Identifier: Apache-2.0
"""Training of the byte-level decoder: it learns, its compute goes where it is wanted, and it resumes bit by bit."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from zexpert_tools.byte_decoder import ByteDecoder, ByteDecoderConfig
from zexpert_tools.checkpoint import load_checkpoint, load_model, save_checkpoint
from zexpert_tools.trainer import Trainer, TrainerConfig

TINY = ByteDecoderConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    context_length=32,
    num_experts=8,
    zero_expert_num=4,
    top_k=3,
    intermediate_size=32,
    routed_scaling_factor=3.0,
)
TEXT = torch.frombuffer(
    bytearray(b"The quick brown fox jumps over the lazy dog; 0123456789 times it does so.\n" * 60), dtype=torch.uint8
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is tiny: on a busy machine two threads would wait for each other in every operator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(model_config: ByteDecoderConfig = TINY, **settings: object) -> Trainer:
    torch.manual_seed(0)
    config = TrainerConfig(
        **{"steps": 120, "batch_size": 8, "warmup_steps": 10, "target_ffn_experts": 1.5, "held_out_every": 40}
        | settings
    )
    return Trainer(ByteDecoder(model_config), TEXT, config)


def test_training_lowers_the_loss_and_holds_the_target_compute() -> None:
    trainer = make_trainer(steps=250)
    start = trainer.held_out_bits_per_byte()
    records = [trainer.train_step() for _ in range(250)]

    assert 7.5 < start < 8.5  # it knows nothing yet
    assert records[-1].held_out_bits_per_byte is not None
    assert records[-1].held_out_bits_per_byte < 0.6 * start
    mean = sum(record.ffn_slots_per_token for record in records[-50:]) / 50
    assert mean == pytest.approx(1.5, rel=0.05)


def test_without_zero_experts_every_slot_works() -> None:
    trainer = make_trainer(dataclasses.replace(TINY, zero_expert_num=0))
    assert [trainer.train_step().ffn_slots_per_token for _ in range(3)] == [TINY.top_k] * 3


def test_resumed_training_equals_uninterrupted_training_bitwise(tmp_path) -> None:
    whole = make_trainer()
    for _ in range(12):
        whole.train_step()

    first = make_trainer()
    for _ in range(5):
        first.train_step()
    save_checkpoint(first, tmp_path / "checkpoint.pt")
    torch.manual_seed(99)  # nothing depends on the global generator
    resumed = make_trainer()
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert resumed.step == 5
    for _ in range(7):
        resumed.train_step()

    assert resumed.history == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_saved_model_generates_the_same_bytes(tmp_path) -> None:
    trainer = make_trainer()
    trainer.train_step()
    save_checkpoint(trainer, tmp_path / "checkpoint.pt")
    loaded = load_model(tmp_path / "checkpoint.pt")
    prompt = TEXT[:10]
    texts = [
        model.eval().generate(prompt, 50, generator=torch.Generator().manual_seed(3))
        for model in (trainer.model, loaded)
    ]
    assert torch.equal(*texts)
    assert texts[0].dtype == torch.uint8
    assert texts[0].numel() == 60
    assert torch.equal(texts[0][:10], prompt)
    greedy = [loaded.generate(prompt, 5, temperature=0.0) for _ in range(2)]
    assert torch.equal(*greedy)


def test_later_bytes_do_not_change_earlier_predictions() -> None:
    torch.manual_seed(1)
    model = ByteDecoder(TINY).eval()
    text = torch.randint(256, (1, 32))
    changed = text.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    with torch.no_grad():
        # Not bitwise: the other rows of an expert's segment are others, and a matrix product may round by their number.
        torch.testing.assert_close(model(text)[:, :20], model(changed)[:, :20])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read checkpoint"), (b"no checkpoint", "is not a checkpoint of a byte decoder")],
)
def test_an_unusable_checkpoint_is_named(tmp_path, content: bytes | None, message: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^text must be at least 330 bytes long, got 40$"):
        Trainer(ByteDecoder(TINY), TEXT[:40], TrainerConfig())
    model = ByteDecoder(TINY)
    with pytest.raises(ValueError, match=r"^tokens must be at most context_length \(32\) long, got 33$"):
        model(torch.zeros(1, 33, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^prompt must hold at least one byte$"):
        model.generate(TEXT[:0], 3)
