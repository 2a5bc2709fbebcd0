"""Videos: fetch, transcode, cut, label, upload. What is expensive is kept; what is cheap runs again."""

from __future__ import annotations

import hashlib
from datetime import timedelta

from docket_celery import Graph, RetryPolicy, Scope, StepContext, graph_task
from workers.celery import app
from workers.providers import Media
from workers.videos_pb2 import Frames, Labels, RawVideo, TranscodedVideo, VideoJob, VideoResult

CODEC = "h264"

media = Media()

pipeline = Graph("videos")


@pipeline.step(retry=RetryPolicy(max_attempts=3), timeout=60)
def fetch_raw(job: VideoJob) -> RawVideo:
    """Download the film and name its content."""
    content = media.fetch(job.url)
    return RawVideo(content_digest=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


# Depends on the content alone, so any run may use what another one made.
@pipeline.step(persist=Scope.GLOBAL, ttl=timedelta(hours=24), version=CODEC, timeout=600)
def transcode(raw: RawVideo) -> TranscodedVideo:
    """Bring the film into one codec."""
    return TranscodedVideo(asset_id=media.transcode(raw.content_digest, CODEC), codec=CODEC)


@pipeline.step(persist=Scope.WORKFLOW, timeout=600)
def extract_frames(video: TranscodedVideo) -> Frames:
    """Cut frames out, for this run."""
    return Frames(frame_ids=media.frames(video.asset_id))


# The version is the model's: another one must not be served the old one's answers.
@pipeline.step(persist=Scope.GLOBAL, ttl=timedelta(hours=24), version="model-1", timeout=600)
def ml_inference(frames: Frames) -> Labels:
    """Ask the model what the frames show."""
    return Labels(labels=media.labels(frames.frame_ids))


@pipeline.step(retry=RetryPolicy(max_attempts=3), timeout=60)
def upload(video: TranscodedVideo, frames: Frames, labels: Labels, ctx: StepContext) -> VideoResult:
    """Publish the film with its labels."""
    result_url = media.upload(video.asset_id, labels.labels, idempotency_key=ctx.idempotency_key)
    return VideoResult(result_url=result_url, frame_count=len(frames.frame_ids), labels=labels.labels)


@graph_task(app, pipeline)
def process_video(job: VideoJob) -> VideoResult:
    """Take a film from its address to its published, labelled form."""
    raise NotImplementedError
