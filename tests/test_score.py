"""The loss of tokens: many adapters at once give what each gives alone."""

import pytest
import torch

from personalization.neutral import CONVERSATIONS, neutral_rows
from personalization.prompt import Renderer
from personalization.score import losses_of_many, token_losses
from tests.small_model import habits, small_model
from tests.test_train import random_adapter
from tests.tiny_tokenizers import TEMPLATES, write_tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_many_adapters_at_once_give_what_each_gives_alone(monkeypatch, tied):
    monkeypatch.setattr("personalization.score._BATCH_TOKENS", 64)  # several batches, of mixed people
    model = small_model()
    first = random_adapter(3)
    second = random_adapter(4, rank=6, modules=("q_proj", "down_proj"), scale=0.7)
    asked = [
        (first, habits(1, 7)),
        (None, habits(2, 5)),
        (second, habits(3, 9, length=(2, 30))),
        (first if tied else random_adapter(5), habits(4, 2)),
        (second, []),
    ]
    found = losses_of_many(model, asked)
    for (adapter, examples), losses in zip(asked, found, strict=True):
        alone = token_losses(model, examples, adapter)
        assert len(losses) == len(examples)
        for one, other in zip(alone, losses, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_many_bare_bases_are_one_base():
    model = small_model()
    rows = habits(1, 3)
    (first, second) = losses_of_many(model, [(None, rows), (None, rows[:1])])
    torch.testing.assert_close(torch.cat(first), torch.cat(token_losses(model, rows, None)))
    assert len(second) == 1


def test_neutral_text_is_predicted_from_its_first_word_to_its_last(tmp_path):
    renderer = Renderer(write_tokenizer(tmp_path, TEMPLATES["demo"]), 2048)
    rows = neutral_rows(renderer)
    assert len(rows) == len(CONVERSATIONS)
    for row, said in zip(rows, CONVERSATIONS, strict=True):
        ids = [token for token, learn in zip(row.token_ids, row.learn_mask, strict=True) if learn]
        text = renderer._tokenizer.decode(ids, skip_special_tokens=False)
        assert text == "".join(f"{turn}<|end|>" for turn in said)
