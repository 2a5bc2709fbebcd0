"""The graph: five steps of a video pipeline, the three long ones persisted or, to compare, none.

A run is resolved from its target down: once the frames are there, nobody needs the transcoded video, so a resumed
run neither calls `transcode` nor reads its checkpoint.
"""

from __future__ import annotations

import time

from docket_celery import Graph, Scope
from examples.checkpointing.checkpointing_pb2 import (
    Frames,
    Labels,
    RawVideo,
    TranscodedVideo,
    UploadedVideo,
    VideoJob,
)

#: What a minute of the real pipeline takes here; the whole takes ten.
MINUTE_S = 0.2


def fetch_raw(job: VideoJob) -> RawVideo:
    """Download: half a minute, cheap enough to do again."""
    time.sleep(0.5 * MINUTE_S)
    return RawVideo(title=job.url.rpartition("/")[2], size_bytes=700_000_000)


def transcode(raw: RawVideo) -> TranscodedVideo:  # noqa: ARG001 -- pretended
    """Four minutes of a processor's time."""
    time.sleep(4 * MINUTE_S)
    return TranscodedVideo(codec="av1")


def extract_frames(video: TranscodedVideo) -> Frames:  # noqa: ARG001 -- pretended
    """Two and a half minutes."""
    time.sleep(2.5 * MINUTE_S)
    return Frames(count=240)


def ml_inference(frames: Frames) -> Labels:  # noqa: ARG001 -- pretended
    """Two and a half minutes of a graphics card's time."""
    time.sleep(2.5 * MINUTE_S)
    return Labels(names=["harbour", "ship"])


def upload(raw: RawVideo, labels: Labels) -> UploadedVideo:
    """Half a minute; needs the raw video's title, so a resumed run fetches the raw video again."""
    time.sleep(0.5 * MINUTE_S)
    return UploadedVideo(location=f"videos/{raw.title}", labels=labels.names)


def video_graph(*, checkpoints: bool) -> Graph:
    """Return the pipeline.

    Args:
        checkpoints: Whether the long steps keep their results.
    """
    kept = Scope.WORKFLOW if checkpoints else None
    graph = Graph("examples.checkpointing")
    graph.register(fetch_raw)
    graph.register(transcode, persist=kept)
    graph.register(extract_frames, persist=kept)
    graph.register(ml_inference, persist=kept)
    graph.register(upload)
    graph.validate(VideoJob)
    return graph
