"""The headers of a GraphTask's message. They survive retries and redeliveries; the wire names stay as they are."""

from __future__ import annotations

from typing import Final

EXECUTION_ID: Final = "docket_execution_id"
"""Names the run."""
CONTEXT: Final = "docket_context"
"""The caller's ``context=``."""
DIGEST: Final = "docket_job_digest"
"""Digest of the job, base64."""
BATCH: Final = "docket_batch"
"""How the submission wants its batch to be worked on."""

# Of one delivery: a new submission never has them.
PART: Final = "docket_part"
"""Which part of a batch the delivery works on."""
WAITS_FOR_OTHER: Final = "docket_attached"
"""The delivery waits for the outcome of a run that another one advances; how often it was sent again for that."""
ENDED_CLEANLY: Final = "docket_released"
"""Number of the retry whose preceding delivery gave its lease back."""
OUTAGES: Final = "docket_skipped"
"""How many deliveries of the task did not reach the database."""
CELERY_RETRIES: Final = "docket_retries"
"""Retries counted before the part of a batch was published as a task of its own."""
UNTOLD: Final = "docket_untold"
"""How many deliveries could not tell Celery the outcome of their run."""
OF_ONE_DELIVERY: Final = (WAITS_FOR_OTHER, ENDED_CLEANLY, OUTAGES, PART, CELERY_RETRIES, UNTOLD)

PREPARED: Final = "docket_again"
"""No header, but an option of `apply_async`: the job has been prepared, its headers are ours."""
