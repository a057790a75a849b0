import pytest
import torch

from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.data.row_widths import cheapest_rows, fill_rows
from trl.errors import ConfigError
from trl.models.attention import SEGMENT_ATTENTION, segment_mask
from trl.types import Completion, Example

PAIR = Example([10, 11, 12], (Completion([20, 21]), Completion([30, 31, 32])))
TEXT = Example([], (Completion([40, 41], mask=[1, 1]),))


def test_shared_by_hand():
    batch = lay_out([PAIR, TEXT], "shared", pad_token_id=9, capacity=10)
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 40, 41]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1]]
    assert batch.predictor.tolist() == [[2, 3, 0], [2, 5, 6], [0, 8, 0]]
    assert batch.position.tolist() == [[3, 4, 0], [5, 6, 7], [8, 9, 0]]
    assert batch.target.tolist() == [[20, 21, 0], [30, 31, 32], [40, 41, 0]]
    assert batch.mask.tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 0]]
    assert batch.scored.tolist() == [0, 1, 3, 4, 5, 7]
    assert batch.last.tolist() == [4, 7, 9]
    assert batch.example.tolist() == [0, 0, 1]
    assert batch.tokens == 10
    assert batch.segments.sequence.tolist() == [[0] * 8 + [1] * 2]
    assert batch.segments.offset.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1]]
    assert batch.segments.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 1, 1]]


def test_padded_by_hand():
    batch = lay_out([PAIR, TEXT], "padded", pad_token_id=9)
    assert batch.inputs["input_ids"].tolist() == [
        [10, 11, 12, 20, 21, 9],
        [10, 11, 12, 30, 31, 32],
        [40, 41, 9, 9, 9, 9],
    ]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 6, 2]
    assert batch.predictor.tolist() == [[2, 3, 0], [8, 9, 10], [0, 12, 0]]
    assert batch.tokens == 13
    assert batch.segments is None


def test_packed_restarts_positions_and_repeats_the_prompt():
    batch = lay_out([PAIR, TEXT], "packed", pad_token_id=9, capacity=7)
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12, 30, 31, 32, 9], [10, 11, 12, 20, 21, 40, 41]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 0, 1]]
    assert set(batch.inputs) == {"input_ids", "position_ids"}


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_widths_are_rounded_up(layout):
    assert lay_out([PAIR, TEXT], layout, multiple_of=8).inputs["input_ids"].shape[1] == 8


def test_a_branch_sees_the_prompt_and_itself():
    batch = lay_out([PAIR, TEXT], "shared", capacity=11)
    seen = segment_mask(batch.segments)[0, 0]
    ones = {i: set(row.nonzero().flatten().tolist()) for i, row in enumerate(seen)}
    assert ones[2] == {0, 1, 2}
    assert ones[4] == {0, 1, 2, 3, 4}
    assert ones[6] == {0, 1, 2, 5, 6}
    assert ones[9] == {8, 9}


def test_eager_mask_is_the_boolean_mask_as_numbers():
    batch = lay_out([PAIR, TEXT], "shared")
    boolean = SEGMENT_ATTENTION["sdpa"](batch.segments, None, None, torch.float32)
    additive = SEGMENT_ATTENTION["eager"](batch.segments, None, None, torch.float32)
    assert torch.equal(additive == 0, boolean)
    assert additive.min() == torch.finfo(torch.float32).min


def test_encoder_decoder_by_hand():
    batch = lay_out_encoder_decoder([PAIR, Example([5], (Completion([6]),))], pad_token_id=9, decoder_start_token_id=7)
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12], [5, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[7, 20, 9], [7, 30, 31], [7, 9, 9]]
    assert batch.inputs["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.predictor.tolist() == [[0, 1, 0], [3, 4, 5], [6, 0, 0]]
    assert batch.position.tolist() == batch.predictor.tolist(), "the decoder reads a token one position later"
    assert batch.last.tolist() == [1, 5, 6]
    assert batch.example.tolist() == [0, 0, 1]


def test_the_last_token_of_an_empty_completion_is_within_the_batch():
    batch = lay_out_encoder_decoder([Example([5], (Completion([]),))], pad_token_id=9, decoder_start_token_id=7)
    assert batch.last.tolist() == [0]
    assert not batch.mask.any()
    shared = lay_out([Example([5, 6], (Completion([7]), Completion([]))), Example([], (Completion([]),))], "shared")
    assert shared.last.tolist() == [2, 1, 0], "of nothing it is that of its prompt"


def test_signals_per_sequence_per_token_and_missing():
    a = Completion([1, 2], signals={"reward": 3.0, "advantage": [0.5, 0.25]})
    b = Completion([3], signals={"advantage": [1.0]})
    signals = lay_out([Example([7], (a, b, Completion([4])))]).signals
    assert signals["reward"][0] == 3.0
    assert signals["reward"][1:].isnan().all()
    assert signals["advantage"][:2].tolist() == [[0.5, 0.25], [1.0, 0.0]]
    assert signals["advantage"][2].isnan().all()


def test_completion_mask_leaves_tokens_out():
    batch = lay_out([Example([1], (Completion([2, 3, 4], mask=[1, 0, 1]),))])
    assert batch.mask.tolist() == [[1, 0, 1]]
    assert batch.scored.tolist() == [0, 2]


def test_rows_are_filled_best_fit_decreasing():
    # 6 | 5 | 4 joins 6 | 3 joins 5 | 2 joins 5+3 (room 2), since 6+4 is full.
    assert fill_rows([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]


def test_rows_are_as_wide_as_is_cheapest():
    # One each: 4 rows of 10 cost 40 (6H + 5). Two rows of 13 cost 26 (6H + 19.5). With H = 1: 440 and 663; with H = 10:
    # 2,600 and 2,067.
    sizes = [10, 8, 5, 3]
    assert cheapest_rows(sizes, hidden_size=1) == [[0], [1], [2], [3]]
    assert cheapest_rows(sizes, hidden_size=10) == [[0, 3], [1, 2]]
    # On CUDA 40 (6H + 10) and 26 (6H + 52): with H = 10 2,800 and 2,912; with H = 20 5,200 and 4,472.
    assert cheapest_rows(sizes, hidden_size=10, device="cuda") == [[0], [1], [2], [3]]
    assert cheapest_rows(sizes, hidden_size=20, device="cuda") == [[0, 3], [1, 2]]
    assert cheapest_rows([7], hidden_size=8) == [[0]]
    assert cheapest_rows(sizes) == [[0], [1], [2, 3]], "as wide as the longest, where nothing is known of the model"


def test_rows_of_one_sequence_need_no_mask():
    batch = lay_out([PAIR, TEXT], "packed", hidden_size=1)
    assert batch.inputs["position_ids"].tolist() == [list(range(6))] * 3
    assert set(batch.inputs) == {"input_ids", "position_ids"}


def test_a_layout_that_there_is_not():
    with pytest.raises(ConfigError, match="Unknown layout 'pakced'. Did you mean 'packed'"):
        lay_out([PAIR], "pakced")


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_every_target_follows_its_predictor(layout):
    examples = [PAIR, TEXT, Example([1], (Completion([2, 3, 4]), Completion([5])))]
    batch = lay_out(examples, layout, capacity=12)
    ids, positions = batch.inputs["input_ids"].flatten(), batch.inputs["position_ids"].flatten()
    completions = [(e, c) for e in examples for c in e.completions]
    for n, (example, completion) in enumerate(completions):
        whole = [*example.prompt, *completion.ids]
        for t in range(len(completion)):
            if batch.mask[n, t]:
                before = len(example.prompt) + t - 1
                assert ids[batch.predictor[n, t]] == whole[before]
                assert positions[batch.predictor[n, t]] == before
        assert ids[batch.last[n]] == completion.ids[-1]
