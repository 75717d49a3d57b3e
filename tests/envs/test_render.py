"""Rendering: what the pixels and the panel show is the engine's state; it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from l3env.envs.render import BAR, COLOURS, HEIGHT, LABEL, MARGIN, STEP, TOP, WIDTH, Renderer
from l3env.errors import L3EnvError, PlanError
from tests.envs.factories import single


def bar_share(pixels: np.ndarray, place: int, colour: tuple[int, int, int]) -> float:
    """How far a bar is filled, from its pixels."""
    row = pixels[TOP + place * STEP + BAR // 2, LABEL : LABEL + WIDTH - LABEL - 4 * MARGIN + 1]
    return float((row == colour).all(axis=1).sum()) / row.shape[0]


def test_pixels_show_pools_and_devices() -> None:
    env = single(render_mode="rgb_array", model="qwen-72b", load=3.0)
    env.reset(seed=1)
    before = None
    for _ in range(12):
        before = env.engine.state.env[0].copy()
        env.step(env.action_space.sample())
    pixels = env.render()
    assert pixels is not None
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, env.render())  # the same moment, the same picture
    now, tables = env.engine.state.env[0], env.engine.tables
    shot = env.renderer.observe(env.engine, 0)
    used, capacity = env.engine.state.pool["used"][0], tables.pool_blocks[0]
    assert shot.bars["PIM KV"] == pytest.approx(used[1:].sum() / capacity[1:].sum())
    assert shot.bars["PIM KV"] > 0
    assert shot.counts["waiting"] == now["waiting_count"]
    assert shot.counts["prefilling"] + shot.counts["decoding"] + shot.counts["paused"] == now["running_count"]
    assert before is not None
    for place, name in enumerate(shot.bars):
        assert bar_share(pixels, place, COLOURS[name]) == pytest.approx(shot.bars[name], abs=0.004)


def test_busy_shares_are_those_since_the_last_picture() -> None:
    env = single(render_mode="rgb_array")
    env.reset(seed=0)
    env.render()
    first = env.engine.state.env[0].copy()
    for _ in range(3):
        env.step(env.action_space.sample())
    now = env.engine.state.env[0]
    elapsed_s = now["clock_s"] - first["clock_s"]
    shot = env.renderer.observe(env.engine, 0)
    assert shot.bars["GPU"] == pytest.approx(min((now["gpu_busy_s"] - first["gpu_busy_s"]) / elapsed_s, 1))


def test_human_mode_draws_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    env = single(render_mode="human")
    env.reset(seed=0)
    for _ in range(3):
        env.step(env.action_space.sample())
    env.close()
    shown = capsys.readouterr()
    assert "PIM KV" in shown.err
    assert f"of {env.engine.state.env['requests_count'][0]} requests done" in shown.err
    assert shown.out == ""


def test_rendering_changes_nothing() -> None:
    plain, drawn = single(), single(render_mode="rgb_array")
    np.testing.assert_array_equal(plain.reset(seed=3)[0], drawn.reset(seed=3)[0])
    for _ in range(20):
        action = plain.action_space.sample()
        drawn.render()
        one, two = plain.step(action), drawn.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:3] == two[1:3]
        if one[2]:
            break
    assert plain.render() is None


def test_what_cannot_be_rendered() -> None:
    with pytest.raises(L3EnvError, match="expected human, rgb_array"):
        single().__class__(render_mode="ansi")
    with pytest.raises(PlanError, match="render before reset"):
        single(render_mode="rgb_array").render()
    assert Renderer()._live is None
