"""Bad layouts are named before anything moves."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_dist.reshard.layout import Layout, LayoutError, ParameterLayout
from rlhf_dist.reshard.routes import make_routes
from workers.engines.generation.interface import Untraceable
from workers.reshard.offer import pair_of

BOX = ((0, 4), (0, 2))
WEIGHTS = Layout(2, {n: ParameterLayout.from_mesh((4, 2), "float32", np.arange(2), [0]) for n in ("a", "b")})


def test_a_parameter_that_nobody_wants_is_left_out() -> None:
    source, target = pair_of(WEIGHTS, [{"a": [BOX]}, {"a": [BOX], "b": []}])
    assert list(source) == list(target) == ["a"]
    assert make_routes(source, target).moved.tolist() == [16, 16]


def test_a_parameter_that_nobody_sends_is_named() -> None:
    with pytest.raises(LayoutError, match="wanted but not sent: lm_head"):
        pair_of(WEIGHTS, [{"a": [BOX], "lm_head": [BOX]}, None])


def test_a_parameter_wanted_in_part_is_named_with_its_boxes() -> None:
    pair = pair_of(WEIGHTS, [{"a": [BOX], "b": [((0, 2), (0, 2))]}, None])
    with pytest.raises(
        LayoutError, match=r"b of shape \[4, 2\]: boxes must cover all 8 elements, got 4 in \[\[0:2, 0:2\]\]"
    ):
        make_routes(*pair)


def test_one_rank_that_cannot_be_traced_speaks_for_all() -> None:
    with pytest.raises(Untraceable, match="no window"):
        pair_of(WEIGHTS, [{"a": [BOX]}, "no window"])
