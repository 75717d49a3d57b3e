"""GPT-175B on OpenR1 against GPU only: batch size and latency of a batch."""

from __future__ import annotations

from l3env.experiments.reproduce.common import Row, measured, row


def rows() -> list[Row]:
    ours, theirs = (measured(name, "gpt-175b", "openr1") for name in ("l3", "gpu"))
    assert ours is not None
    assert theirs is not None
    iteration_s = [figures["makespan_s"] / figures["iterations_count"] for figures in (ours, theirs)]
    batch = ours["batch_mean_count"] / theirs["batch_mean_count"]
    case = "gpt-175b, openr1, L3 over GPU only"
    return [
        row(
            "fig12",
            case,
            "mean batch",
            6.6,
            batch,
            f"{ours['batch_mean_count']:.1f} requests against {theirs['batch_mean_count']:.1f}",
        ),
        row(
            "fig12",
            case,
            "latency of a batch",
            2.2,
            iteration_s[0] / iteration_s[1],
            f"{iteration_s[0] * 1e3:.0f} ms an iteration against {iteration_s[1] * 1e3:.0f}",
        ),
    ]
