"""A role that the traced dataflow does not use is never started, so nothing is asked of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose
from rlhf_dist.typed import ConfigError
from tests.tiny import save_llama

NO_KL = "algorithm.kl_coef=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), hidden=128)


def overrides(folder: Path, *more: str) -> list[str]:
    return [f"output.root={folder / 'runs'}", "placement.pools.main.slots=1", "task=addition", *more]


def test_a_reference_without_a_kl_term_needs_no_model(folder: Path) -> None:
    missing = overrides(folder, f"model.path={folder}", "reference.model.path=no/such/folder")
    with pytest.raises(ConfigError, match="reference.model.path: no folder 'no/such/folder'"):
        check_launch(compose("grpo", missing))
    launch = compose("grpo", [*missing, NO_KL])
    assert "reference" not in launch.used_roles
    assert {"actor", "reward"} <= set(launch.used_roles)
    plan = check_launch(launch)
    assert not any("reference" in line for line in plan)


def test_an_unused_role_asks_for_no_shared_model(folder: Path) -> None:
    own = overrides(folder, "model=none", f"actor.model.path={folder}")
    with pytest.raises(ConfigError, match="model.path has no value"):
        compose("grpo", own)
    check_launch(compose("grpo", [*own, NO_KL]))


def test_a_role_in_use_still_needs_its_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match="model.path has no value"):
        compose("grpo", overrides(folder, "model=none", NO_KL))
