"""The environment of docs/episodes.md passes its own check, and its recipe is traced."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_dist.compose import compose_dataflow
from rlhf_dist.python_files import load_file
from rlhf_dist.testing import check_environment

GUIDE = Path(__file__).parents[2] / "docs" / "episodes.md"


def test_the_guides_environment_is_one(tmp_path: Path) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "guess.py").write_text(code)
    assert compose_dataflow(str(tmp_path / "guess.py"))["actor.run_episodes"].kwargs["limits"].turns == 5
    environment = load_file(tmp_path / "guess.py").HigherLower()
    transcripts = check_environment(environment, [{"prompt": "a number: ", "answer": "7"}])
    assert {piece["who"] for one in transcripts for piece in one} == {"prompt", "model", "environment"}
