"""What a value model's last token attends to, against the library's own attention weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_dist.batch import Batch, Column
from tests.tiny import save_classifier
from workers.engines.model.models import ValueModel
from workers.engines.model.packing import pack
from workers.engines.model.ways import ALONE, PACKED, Way

PROMPTS = ([3, 4, 5], [3, 4, 5], [6], [7, 8])
RESPONSES = ([9, 10, 11, 12], [13], [14, 15], [])


def batch() -> Batch:
    rows = {"prompt_ids": PROMPTS, "response_ids": RESPONSES}
    return Batch({name: Column.ragged([np.array(row, np.int32) for row in of], "int32") for name, of in rows.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("attention") / "model")


@pytest.mark.parametrize("rows", ["packed", "shared"])
def test_attention_of_the_last_token_is_the_library_s(folder: Path, rows: str) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    expected = []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            maps = plain(torch.tensor([[*prompt, *response]]), output_attentions=True).attentions
            expected += maps[-1][0, :, -1].mean(0)[len(prompt) :].tolist()
        model = ValueModel(AutoModelForSequenceClassification.from_pretrained(folder).eval(), ())
        way = PACKED if rows == "packed" else Way(rows="shared", attention="packed")
        packed = pack(batch(), torch.device("cpu"), way=way)
        found = model(packed, ("attention", "scores"), 1.0)
        plain_scores = model(packed, ("scores",), 1.0)["scores"]
    np.testing.assert_allclose(found["attention"].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found["scores"], plain_scores)


def test_a_way_without_packs_has_no_attention_to_look_at(folder: Path) -> None:
    model = ValueModel(AutoModelForSequenceClassification.from_pretrained(folder).eval(), ())
    with pytest.raises(ValueError, match="attention is given of packed whole rows, and LlamaFor.* one row a pass"):
        model(pack(batch().slice(0, 1), torch.device("cpu"), way=ALONE), ("attention",), 1.0)
