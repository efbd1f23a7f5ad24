"""What is captured of a model's calls to its blocks, against what the blocks are really given."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import capture_block_calls
from oats_vision.errors import DataError, ModelError

WIDTH = 6


class Block(nn.Module):
    """Notes each run; `kind` says how hidden states come in and out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind, self.runs = nn.Linear(WIDTH, WIDTH), kind, 0

    def forward(self, x: Tensor, shift: Tensor | float = 0.0, *, states: Tensor | None = None) -> object:
        x = x[0] if self.kind == "list" else x
        self.runs += 1
        if self.kind == "changes its input":
            x.mul_(0.5)
        y = x + torch.tanh(self.linear(x)) + shift
        return {"tuple": (y, None), "list": [y], "and more": (y, y.mean())}.get(self.kind, y)


class Model(nn.Module):
    """Three blocks, given a shift that depends on the batch; `between` happens before the last block."""

    def __init__(self, kind: str = "plain", between: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(3))
        self.kind, self.between = kind, between
        self.embedded = 0

    def forward(self, x: Tensor) -> Tensor:
        self.embedded += 1
        # in the first, short batch all blocks are given the same
        long, h = x.shape[1] > 3, self.embed(x)
        for i in {"backwards": [2, 1, 0], "twice": [0, 1, 2, 2], "skips": [0, 2]}.get(self.between, range(3)):
            if i == 2 and self.between == "in place":
                h.mul_(2)
            if i == 2 and self.between == "in place, later" and self.embedded > 2:
                h.add_(1)
            if i == 2 and self.between == "anew":
                h = h + 1
            shift = torch.full((WIDTH,), float(i)) if long else torch.zeros(WIDTH)
            if self.kind == "and more" or self.between == "looks":
                shift = shift + h.mean()
            h = self.blocks[i](x=h, shift=shift) if self.kind == "by name" else self._call(i, h, shift)
        return h

    def _call(self, i: int, h: Tensor, shift: Tensor) -> Tensor:
        out = self.blocks[i]([h] if self.kind == "list" else h, shift)
        return out[0] if isinstance(out, (tuple, list)) else out


BATCHES = [torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(tokens)) for tokens in (3, 5, 5, 3)]


def _capture(model: nn.Module, batches: object = BATCHES):
    store = ActivationStore(1e9)
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    return capture_block_calls(model, blocks, batches, store), store


KINDS = ("plain", "by name", "tuple", "list", "and more", "changes its input")


@pytest.mark.parametrize("between", ["", "looks"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_blocks_run_from_what_was_captured_give_the_models_outputs_in_every_batch(kind, between):
    model = Model(kind, between)
    calls, store = _capture(model)
    for b, x in enumerate(BATCHES):
        hidden, kept = store[b], store[b].clone()
        for i, block in enumerate(model.blocks):
            hidden = calls.run(block, i, b, hidden)
        torch.testing.assert_close(hidden, model(x))
        assert torch.equal(store[b], kept)  # also of blocks that write into their input


@pytest.mark.parametrize(("kind", "between"), [("plain", ""), ("by name", ""), ("tuple", ""), ("list", "")])
def test_only_the_first_batch_runs_through_the_blocks(kind, between):
    model = Model(kind, between)
    calls, _ = _capture(model)
    assert [block.runs for block in model.blocks] == [1, 1, 1]
    assert [len(entry) for entry in calls.calls] == [1, 3, 3, 1]  # one entry where all blocks are given the same
    assert calls.calls[1] is calls.calls[2]


@pytest.mark.parametrize(
    ("tokens", "batches", "counted"),
    [(200, 9, 41), (1000, 9, 32), (5, 9, 72), (1000, 20, 40)],
    ids=["8,192 tokens", "32 samples", "all there are", "a quarter of all"],
)
@torch.no_grad()
def test_gradients_are_taken_on_a_part_that_is_large_enough(tokens, batches, counted):
    data = [torch.randn(1, 1, tokens, 4).expand(8, 1, tokens, 4) for _ in range(batches)]
    calls, _ = _capture(Model("plain", ""), data)
    assert calls.gradient_samples == counted
    assert len(calls.inputs) == -(-counted // 8)


@pytest.mark.parametrize(("kind", "between"), [("and more", ""), ("plain", "looks")])
def test_extras_that_depend_on_the_hidden_states_are_those_of_whole_runs(kind, between):
    model = Model(kind, between)
    _capture(model)
    assert [block.runs for block in model.blocks] == [4, 4, 4]


@pytest.mark.parametrize(
    ("between", "message"),
    [
        ("in place", r"changes the hidden states after blocks\.1"),
        ("in place, later", r"changes the hidden states after blocks\.1"),
        ("anew", r"changes the hidden states after blocks\.1"),
        ("backwards", r"in another order than it holds them: blocks\.2, blocks\.1, blocks\.0"),
        ("twice", "each must run once"),
        ("skips", "each must run once"),
    ],
)
def test_a_model_that_is_not_block_by_block_is_refused_and_left_alone(between, message):
    model = Model(between=between)
    with pytest.raises(ModelError, match=message):
        _capture(model)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_block_that_is_used_twice_is_refused():
    model = Model()
    model.blocks[2] = model.blocks[0]
    blocks = list(model.blocks.named_children())
    with pytest.raises(ModelError, match="each must run once"):
        capture_block_calls(model, blocks, BATCHES, ActivationStore(1e9))


def test_what_the_model_raises_is_one_error_that_says_which_batch():
    with pytest.raises(DataError, match=r"Model cannot take calibration batch 1, \(2, 3, 5\) of torch.float32: mat1"):
        _capture(Model(), [BATCHES[0], torch.zeros(2, 3, 5)])


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_batch_is_an_error(data):
    with pytest.raises(DataError, match="gave no batch"):
        _capture(Model(), data)


@pytest.mark.parametrize("kind", [hf.Qwen2Config, hf.Gemma3TextConfig])
@torch.no_grad()
def test_masks_of_sliding_windows_are_seen_in_long_batches_after_a_short_one(kind):
    args = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "head_dim": 16,
    }
    windows = {
        "sliding_window": 4,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = kind(**args, **windows, vocab_size=50, num_key_value_heads=1)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    blocks = list(model.model.layers.named_children())
    last: list[Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda _, args, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    batches = [torch.randint(0, 50, (2, length)) for length in (3, 16, 16)]
    for batch in batches:
        model(batch, use_cache=False)
    handle.remove()
    store = ActivationStore(1e9)
    calls = capture_block_calls(model, blocks, batches, store, "sequences")
    for b, expected in enumerate(last):
        hidden = store[b]
        for i, (_, block) in enumerate(blocks):
            hidden = calls.run(block, i, b, hidden)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    assert model.config.use_cache


def test_batches_of_nothing_but_padding_teach_nothing():
    class Padded(Model):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    mask = torch.tensor([[True, True, False], [False] * 3])
    batches = [{"x": BATCHES[0], "attention_mask": mask & keep} for keep in (torch.tensor(False), torch.tensor(True))]
    calls, store = _capture(Padded(), batches)
    assert len(store) == len(calls.masks) == 1
    assert torch.equal(calls.masks[0], mask)
    with pytest.raises(DataError, match="all tokens of the calibration data are padding"):
        _capture(Padded(), batches[:1])


def test_hidden_states_of_padding_need_not_be_finite_and_all_others_must():
    class Broken(Model):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.embed(x)
            h[:, 2] = torch.nan
            for block in self.blocks:
                h = block(h)
            return h

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    calls, _ = _capture(Broken(), [{"x": BATCHES[0], "attention_mask": mask}])
    assert len(calls.calls) == 1
    with pytest.raises(ModelError, match=r"blocks\.0 are not finite in calibration batch 0"):
        _capture(Broken(), [{"x": BATCHES[0], "attention_mask": torch.ones(2, 3)}])
