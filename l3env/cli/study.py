"""``l3env sweep``: a grid of runs as a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.shared import Json, announce_compilation, err, finite, print_json, progress_bar
from l3env.errors import L3EnvError

SHOWN_FAILURES = 5
Workers = Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time; -1: one a core.")]


def sweep(
    study: Annotated[Path, typer.Argument(help="The study: a YAML file, or the config.json of an earlier one.")],
    out: Annotated[Path | None, typer.Option(help="Folder; resumes what is there. By default runs/NAME.")] = None,
    backend: Annotated[str, typer.Option(help="loky (local processes) or ray.")] = "loky",
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; without it Ray starts here.")] = None,
    jobs: Workers = -1,
    retry_failed: Annotated[bool, typer.Option(help="Run cells again that failed.")] = False,
    as_json: Json = False,
) -> None:
    """Runs policies x systems x models x traces x loads x seeds; resumes; failed cells do not stop the others."""
    announce_compilation(compile_now=True)
    from l3env.files import write_text
    from l3env.report.html import of_study, write_html
    from l3env.study import StudyConfig, run_study
    from l3env.study.store import read_config

    is_json = study.suffix == ".json"
    config = StudyConfig.from_json(read_config(study)) if is_json else StudyConfig.from_yaml(study)
    folder = out or (study.parent if is_json else Path("runs") / study.stem)
    start_backend(backend, address, jobs)
    with progress_bar("sweeping") as progress:
        store = run_study(
            config, folder, backend=backend, workers_count=jobs, retry_failed=retry_failed, progress=progress
        )
    results = store.results()
    write_text(folder / "results.csv", results.to_csv(index=False))
    if as_json:
        print_json({"config": config.to_json(), "results": plain_rows(results)})
    failed = results[results["error"].notna()]
    err.print(f"{len(results) - len(failed):,} runs done, {len(failed):,} failed", highlight=False)
    for row in failed.head(SHOWN_FAILURES).to_dict("records"):
        err.print(f"  {row['key']}: {row['error']}", highlight=False, soft_wrap=True)
    with err.status("drawing ..."):
        write_html(of_study(store, f"Study {folder.name}"), folder / "report.html")
    err.print(
        f"written: {folder}/results.csv, report.html, config.json and the datasets", highlight=False, soft_wrap=True
    )


def report(folder: Annotated[Path, typer.Argument(help="Folder of a study.")]) -> None:
    """Draws the page of a study again, finished or not."""
    from l3env.report.html import of_study, write_html
    from l3env.study import StudyStore

    path = write_html(of_study(StudyStore.open(folder), f"Study {folder.name}"), folder / "report.html")
    err.print(f"written: {path}", highlight=False, soft_wrap=True)


def start_backend(backend: str, address: str | None, jobs: int) -> None:
    """Makes a joblib backend ready. Raises L3EnvError for an unknown one, or Ray where it is not installed."""
    if backend not in ("loky", "threading", "sequential", "ray"):
        raise L3EnvError(f"--backend {backend!r}; expected loky, threading, sequential or ray")
    if address is not None and backend != "ray":
        raise L3EnvError("--address is for --backend ray")
    if backend != "ray":
        return
    try:
        from l3env.study import ray_backend
    except ModuleNotFoundError as error:
        raise L3EnvError(f"--backend ray needs Ray ({error}): pip install 'l3env[sweep]'") from None
    ray_backend.connect(address, jobs)


def plain_rows(frame: Any) -> list[dict[str, Any]]:
    """Rows for JSON: None for what JSON has no number for."""
    return [{key: finite(value) for key, value in row.items()} for row in frame.to_dict("records")]
