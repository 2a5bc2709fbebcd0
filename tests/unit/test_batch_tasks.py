"""GraphTasks with lists, without a worker: what is declared, what is refused, and what runs here and now."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state

from docket_celery import BatchResult, Graph, GraphTask, SQLStore, StepContext, graph_task, lifecycle
from docket_celery.batch_plan import BatchOrder
from docket_celery.checkpoint import Chunk
from docket_celery.defaults import process_defaults
from docket_celery.errors import InvalidArguments, InvalidDeclaration, PayloadTooLarge, StepFailed
from examples.movies.graph import MOVIES, movie_graph
from examples.movies.movies_pb2 import EnrichedMovie, Movie

picky = Graph("picky-task")


@picky.step
def check(movie: Movie, ctx: StepContext) -> EnrichedMovie:
    """Refuse what is old."""
    if movie.year < 1960:
        raise ValueError("too old")
    return EnrichedMovie(original=movie)


@pytest.fixture
def app() -> Generator[Celery]:
    """An app of its own; whichever was current is so again."""
    state: Any = _state
    before, shared = getattr(state._tls, "current_app", None), set(state._on_app_finalizers)
    state._on_app_finalizers.intersection_update(
        {one for one in shared if one.__module__ == "celery.app.builtins"}
    )
    yield Celery("cinema", broker="memory://", backend="cache+memory://")
    state._tls.current_app = before
    state._on_app_finalizers.clear()
    state._on_app_finalizers.update(shared)
    process_defaults.close()


def test_a_list_makes_a_batch_here_and_now(app: Celery) -> None:
    """Called, applied, and declared by its types; the declared forms come back."""

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    class CheckSome(GraphTask[[list[Movie]], BatchResult[EnrichedMovie]]):
        graph = picky

    recent = MOVIES[:4]
    assert [each.original for each in check_all(recent)] == recent
    assert [each.original for each in check_all.apply((recent,)).get()] == recent
    some: CheckSome = app.register_task(CheckSome())
    found = some(MOVIES)
    assert [each is None for each in found.results] == [False] * 4 + [True]
    assert found.errors[4].caused_by(ValueError)
    with pytest.raises(StepFailed, match="item 4"):
        check_all(MOVIES)


def test_what_is_no_batch_is_refused(app: Celery) -> None:
    """Two lists, a lazy result, one message instead of many, an item of another type, an option out of range."""
    with pytest.raises(InvalidDeclaration, match="it takes 2 lists"):

        @graph_task(app, picky)
        def two(movies: list[Movie], others: list[EnrichedMovie]) -> list[EnrichedMovie]:
            raise NotImplementedError

    with pytest.raises(InvalidArguments, match="chunk_size"):

        @graph_task(app, picky, chunk_size=0)
        def none(movies: list[Movie]) -> list[EnrichedMovie]:
            raise NotImplementedError

    @graph_task(app, picky)
    def check_all(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    task: Any = check_all
    with pytest.raises(InvalidArguments, match="must be a list of"):
        task.delay(MOVIES[0])
    with pytest.raises(InvalidArguments, match=r"movies\[1\]"):
        task.delay([MOVIES[0], EnrichedMovie()])
    with pytest.raises(InvalidArguments, match="max_failed"):
        task.apply_async((MOVIES,), max_failed=2)
    with pytest.raises(PayloadTooLarge, match="the list of task"):
        task.delay([Movie(title="x" * 1000 * 1000)] * 68)


@pytest.mark.parametrize(("backend", "words"), [("disabled://", "no result backend"), ("rpc://", "the rpc")])
def test_a_backend_without_chords_is_a_fault(app: Celery, tmp_path: Path, backend: str, words: str) -> None:
    """Nobody would ever join the chunks; a task that spreads nothing does not mind."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    store = SQLStore(url)
    store.migrate()
    store.close()
    app.conf.update(result_backend=backend, docket_database_url=url)

    @graph_task(app, movie_graph)
    def enrich(movies: list[Movie]) -> list[EnrichedMovie]:
        raise NotImplementedError

    (fault,) = lifecycle.find_faults(app, "prefork")
    assert words in fault
    assert "set result_backend" in fault


@pytest.mark.parametrize(
    ("size", "count", "first", "number"),
    [(None, 1, 1, 1), (None, 64, 1, 64), (None, 10_000, 157, 64), (None, 100_000, 500, 200), (3, 7, 3, 3)],
)
def test_stages_are_cut_into_chunks(size: int | None, count: int, first: int, number: int) -> None:
    """About 64 without a size, of at most 500 items; no item is left out or in two."""
    chunks = BatchOrder(chunk_size=size).cut(2, count)
    assert (chunks[0], len(chunks)) == (Chunk(2, 0, first), number)
    assert [c.lo for c in chunks] + [count] == [0] + [c.hi for c in chunks]
    assert BatchOrder(chunk_size=size).cut(2, 0) == []
