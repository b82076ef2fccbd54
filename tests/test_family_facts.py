"""What `check` says of model families, and that the facts behind it are whole."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from rlhf_dist.families import family_line

FACTS = json.loads(files("rlhf_dist").joinpath("model_families.json").read_text())


def model(folder: Path, **config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_table_has_every_family_of_the_sweep_and_none_that_is_wrong() -> None:
    from tests.engines.test_families import MOST_USED

    exact = {family for family, row in FACTS.items() if row["fsdp"]["state"] == "exact"}
    assert set(MOST_USED) <= exact
    assert {"qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "gemma2", "phi3", "gpt_oss"} <= exact
    assert len([row for row in FACTS.values() if row["fsdp"]["state"] != "untried"]) >= 110
    assert not [family for family, row in FACTS.items() if any(one["state"] == "wrong" for one in row.values())]
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert all(f"| {family} " in page for family in exact)


@pytest.mark.parametrize(
    ("config", "uses", "said"),
    [
        ({"model_type": "llama"}, [], "family llama: exact when it was tried, packed rows, prompts shared"),
        ({"model_type": "apertus"}, ["tp"], "act_fn.alpha_p whole among layers that are cut"),
        ({"model_type": "bert"}, [], "family bert: refused when it was tried: tokens of this model see tokens after"),
        ({"model_type": "of_tomorrow"}, [], "family of_tomorrow: never tried; the engine tries it when it starts"),
        ({}, [], "family unknown: never tried"),
        ({"model_type": "mixtral", "router_aux_loss_coef": 0.02}, [], "not used unless engine.router_aux_loss is set"),
    ],
)
def test_check_says_what_was_found(tmp_path: Path, config: dict[str, object], uses: list[str], said: str) -> None:
    assert said in family_line(model(tmp_path, **config), uses)
